"""Define the base classes of configs, with PEFT's names, fields and defaults.

A config is written in code, made of peft's own config, or read from a file. Each of its fields is either honoured or at
its default: the constructor refuses a field that is set and not supported, by name.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

from torch import Tensor

from adaptc.errors import MAX_LISTED, AdaptcWarning, ConfigError, nearest, short_repr
from adaptc.methods._shared.default_targets import adds_default_modules, default_modules
from adaptc.methods._shared.method_parts import AdapterContent, ExpertAdapter
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.name_patterns import MAX_KEYS, default_and_pattern
from adaptc.methods._shared.union_configs import union_target_fields
from adaptc.passes.protocol.method import Method
from adaptc.patterns import matches_pattern
from adaptc.value_types import field_rules, validate_option

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass
class AdapterConfig:
    """Fields common to all PEFT configs (file format: ``adapter_config.json``).

    Attributes:
        task_type: the task of the model, one of PEFT's names such as "CAUSAL_LM"; None where it does not matter.
        auto_mapping: PEFT's note on the class of the model.
        peft_version: the version of peft that wrote the file.
        base_model_name_or_path: the name of the model that the adapter is for.
        revision: the revision of that model.
        inference_mode: whether the adapter is not to be trained.
    """

    #: PEFT's name for the method in files
    peft_type: ClassVar[str] = ""
    #: fields that PEFT has and adaptc does not support: field -> why; refused when set to anything but the default
    unsupported_fields: ClassVar[Mapping[str, str]] = {}
    #: attributes that are no fields because no file can hold them: functions
    unsaved_attributes: ClassVar[tuple[str, ...]] = ()
    #: the field that holds a module's scale times its rank; '' for methods that no file of another format holds
    alpha_field: ClassVar[str] = ""

    # Configs that choose layers make a field of this option; generic code reads it of all configs.
    modules_to_save = cast("Any", None)

    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value, why = getattr(self, f.name), self.unsupported_fields.get(f.name)
            if why is None or value is None or (type(value) is type(field_default(f)) and value == field_default(f)):
                continue
            raise ConfigError(
                f"{type(self).__name__}.{f.name}={short_repr(value)} is not supported: {why}. "
                f"Leave {f.name} at its default ({field_default(f)!r})."
            )
        self.check_types()
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type={short_repr(self.task_type)} is not one of {', '.join(TASK_TYPES)}")

    def check_types(self) -> None:
        """Convert each field to the type of its annotation; raise ConfigError where that cannot be done.

        The rules are in ``adaptc.value_types``.
        """
        for name, rule in field_rules(type(self)).items():
            value = getattr(self, name)
            new = validate_option(f"{type(self).__name__}.{name}", rule, value)
            if new is not value:
                setattr(self, name, new)

    def method(self, name: str, kind: str) -> Method:
        """Return the method with the options it has at module ``name``, rank and alpha patterns resolved.

        Args:
            name: the name of the module.
            kind: the kind of the op that consumes the weight, such as "linear".

        Returns:
            the method.
        """
        raise AssertionError(f"{type(self).__name__} must define method()")

    def name_endings(self) -> dict[str, Collection[str]]:
        """Return further lists of endings of module names, by field. Each must end the name of one of the modules."""
        return {}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        """Return the tables of per-module options, by field. Each key must match an adapted module."""
        return {}

    def pattern_matches(self, key: str, name: str) -> bool:
        """Return whether ``key`` of such a table matches the module ``name``.

        The default is LoRA's rule; some methods have another one in PEFT, and override this.
        """
        return matches_pattern(key, name)

    def ranks_differ_in_files(self) -> bool:
        """Return whether PEFT may write other ranks than this config says, so that the tensors of a file count."""
        return False

    # -- adapters made of other adapters, which have files of their own ------------------------------------------------

    def expert_paths(self) -> Mapping[str, str]:
        """Return the adapters that must be read before this one is complete: name -> directory; {} for none."""
        return {}

    def with_experts(
        self, experts: Sequence[ExpertAdapter], tensors: Mapping[str, Tensor] | None, tensor_names: Sequence[str]
    ) -> tuple[Self, dict[str, Tensor]]:
        """Return this config completed with its :meth:`expert_paths`, and the tensors of the whole adapter.

        ``tensors``: the tensors of its own file, None for a new adapter. ``tensor_names``: the names of the model's
        tensors, in the model's order. Raises ConfigError or CheckpointError for experts that do not fit together.
        """
        raise AssertionError(f"{type(self).__name__} has no with_experts()")

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """Return this config for an adapter with these ranks; the config itself where it cannot express them.

        ``ranks``: module name, as :meth:`method` takes it, -> rank.
        """
        return self

    def data_scheme(self) -> str | None:
        """Return the scheme of first values that are made of data; None where the first values need none."""
        return None

    def for_changed_base(self) -> Self:
        """Return this config for a model that has the base weights already which first values change by data."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``: plain JSON types, sets as sorted lists."""
        out: dict[str, Any] = {"peft_type": self.peft_type}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
        return out

    def adapters_to_write(self, tensors: Mapping[str, Tensor], directory: str) -> Mapping[str, AdapterContent]:
        """Return the adapters that files hold for this one: subdirectory -> (content of the config, tensors).

        ``tensors``: the tensors of the whole adapter, by bare keys. ``directory``: where the files will be. The
        subdirectory '' stands for ``directory`` itself. The last entry is the adapter that stands for all of them.
        """
        return {"": (self.to_dict(), tensors)}

    def non_default_fields(self) -> dict[str, Any]:
        """Return :meth:`to_dict` without the fields that are at their default."""
        usual = {f.name: field_default(f) for f in fields(self)}
        return {k: v for k, v in self.to_dict().items() if k not in usual or v != usual[k]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the config for the content of an ``adapter_config.json``.

        Keys that are no fields are dropped with a warning that names them. Raises ConfigError for a key that is no
        string, and for the constructor's reasons.
        """
        field_names = {f.name for f in fields(cls)}
        odd = next((k for k in data if not isinstance(k, str)), None)
        if odd is not None:
            raise ConfigError(f"{cls.__name__}: the names of options are strings, got {short_repr(odd)}")
        unknown = sorted(k for k in data if k not in field_names and k != "peft_type")
        if unknown:
            hints = {k: near[0] for k in unknown[:MAX_LISTED] if (near := nearest(k, field_names, 1))}
            warnings.warn(
                f"adapter config: dropping unknown {short_repr(unknown)} (written by a newer PEFT, or misspelled"
                + (f"; nearest known: {hints}" if hints else "")
                + ")",
                AdaptcWarning,
                stacklevel=3,
            )
        return cls(**{k: v for k, v in data.items() if k in field_names})

    @classmethod
    def options_from_tensors(
        cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the options, other than ranks and alphas, that follow from an adapter's tensors.

        ``modules``: for each module its tensors by slot; ``shapes``: for each module the shape of its weight. This is
        for files without a config. Raises ConfigError where no options give all of these tensors.
        """
        return {}

    def replace(self, **changes: Any) -> Self:
        new = dataclasses.replace(self, **changes)
        for name in self.unsaved_attributes:
            setattr(new, name, getattr(self, name))
        return new

    def with_missing_filled(self, values: Mapping[str, Any]) -> Self:
        """Return this config with ``values`` in those of its fields that are None.

        The constructor's checks do not run again: default values need not pass the checks made of a user's values.
        """
        new = copy.copy(self)
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(new, name, value)
        return new


def field_default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@dataclass
class TargetedConfig(AdapterConfig):
    """Fields of configs that choose layers.

    Here every method has all of them. In PEFT most methods lack some (``target_parameters`` is LoRA's alone), and PEFT
    warns of a file that has them. So, except for LoRA, files have the optional fields only where they are set.

    Attributes:
        target_modules: the layers to adapt: endings of names, an expression for whole names, or "all-linear". None for
            the model's defaults.
        exclude_modules: the layers to leave out, in the same forms.
        modules_to_save: modules that are trained whole and saved with the adapter.
        layers_to_transform: indices of the blocks whose layers are adapted; None for all.
        layers_pattern: the name of the list of blocks, before the index.
        target_parameters: parameters to adapt by name, such as those of experts.
        r: the rank.
        bias: which biases are trained: "none", "all", or those of adapted layers ("lora_only" and so on).
        fan_in_fan_out: kept for files; the program shows how a weight is stored.
        init_weights: whether the adapter starts as the identity; False starts from random values.
        rank_pattern: name or expression -> the rank of these modules.
        alpha_pattern: name or expression -> the alpha of these modules.

    Example:
        >>> ShiftConfig(target_modules=["0"]).method("0", "linear").name
        'shift'
    """

    #: for each method that the config can choose, the fields of an example: those without a default, or that choose it
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    #: the field with the dropout probability of the adapter's input; '' for methods without one
    dropout_field: ClassVar[str] = ""
    #: whether files have the optional fields of this class where they are not set, too
    writes_unset_fields: ClassVar[bool] = False
    #: the kind of thing that ``target_modules`` names: "matrices" to adapt, "modules" to train as a whole, or tables of
    #: which "rows" are trained
    target_unit: ClassVar[str] = "matrices"

    # Some methods make fields of these options. They are not annotated, or dataclasses would make fields of them here.
    bias = cast("Any", "none")
    trainable_token_indices = cast("Any", None)
    layer_replication = cast("Any", None)
    ensure_weight_tying = cast("Any", False)

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform needs target_modules as a list; put the layers into the regex instead"
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError("layers_pattern needs target_modules as a list; put the layers into the regex instead")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform, the indices to pick")
        for option, entries in self.pattern_entries().items():
            if len(entries) > MAX_KEYS:
                raise ConfigError(
                    f"{type(self).__name__}.{option} has {len(entries)} entries, and {MAX_KEYS} are the most: one "
                    "expression can be for many modules"
                )
        bias = self.bias
        if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
            own = f"{self.peft_type.lower()}_only"
            raise ConfigError(f"{type(self).__name__}.bias must be 'none', 'all' or {own!r}, got {bias!r}")

    def check_layer(self, name: str) -> None:
        """Raise ConfigError where the options have no meaning at the layer ``name``, which the config's targets choose.

        :meth:`method` is asked of layers that the config does not choose, too, and must not raise there.
        """

    def with_model_defaults(self, facts: ModelFacts) -> Self:
        """Return this config with the fields that it leaves to the model filled in, as PEFT's files have them.

        It is called before sites are planned, and the resolved config is the one that is saved. For a field that stays
        None, the graph is searched. A method whose defaults are not in ``_default_targets`` overrides this.

        Args:
            facts: the model's class, its config and the types of its modules.

        Returns:
            the resolved config.
        """
        named = self.target_parameters and not adds_default_modules(facts.model_type)
        found = default_modules(self.peft_type, facts.model_type, facts.module_types)
        return self.with_missing_filled({k: v for k, v in found.items() if not (named and k == "target_modules")})

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """Return this config for an adapter with these ranks (module name, as :meth:`method` takes it, -> rank).

        A config without ``r`` is returned as it is. Without a ``rank_pattern`` it gets the most frequent rank.
        """
        own = {f.name for f in fields(self)}
        if "r" not in own or not ranks:
            return self
        r, others = default_and_pattern(ranks)
        values: dict[str, Any] = {"r": r}
        if "rank_pattern" in own:
            values["rank_pattern"] = others
        new = copy.copy(self)
        for name, value in values.items():
            setattr(new, name, value)
        return new

    def with_all_targets(self, configs: Sequence[Any], names: Sequence[Sequence[str]]) -> Self:
        """Return this config, the first of ``configs``, with fields that choose the sites of all of them.

        ``names``: for each config the names of its modules. All configs are of this class.
        """
        new = copy.copy(self)
        for name, value in union_target_fields(configs, names).items():
            setattr(new, name, value)
        return new

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``: plain JSON types, sets as sorted lists.

        Returns:
            field -> value.
        """
        out = super().to_dict()
        if self.writes_unset_fields:
            return out
        optional = [f.name for f in fields(TargetedConfig)[len(fields(AdapterConfig)) :] if f.name != "target_modules"]
        return {k: v for k, v in out.items() if v is not None or k not in optional}
