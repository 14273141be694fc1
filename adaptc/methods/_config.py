"""Configs: PEFT's names, fields and defaults, and the three ways one comes to be (written, from peft, from a file).

Before: any mapping or object with PEFT's fields. After: a config whose every field is either honoured or at its
default; a field that is set and not supported is refused by name when the config is made.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

from torch import Tensor

from adaptc.errors import SHOWN, AdaptcWarning, ConfigError, nearest, shown
from adaptc.methods._default_targets import adapts_defaults, defaults
from adaptc.methods._model_facts import ModelFacts
from adaptc.methods._name_patterns import MANY, matches_pattern, value_table
from adaptc.methods._parts import Part, Written
from adaptc.methods._united import united
from adaptc.passes.ir.method import Method
from adaptc.value_types import fitting, table

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass
class AdapterConfig:
    """Fields common to all PEFT configs (file format: ``adapter_config.json``)."""

    #: PEFT's name of the method in files
    peft_type: ClassVar[str] = ""
    #: fields PEFT has and adaptc does not support yet: refused when set to anything but the default
    refused: ClassVar[Mapping[str, str]] = {}
    #: attributes beside the fields, which no file can have: functions
    unsaved: ClassVar[tuple[str, ...]] = ()
    #: the field with the scale of a module times its rank; '' for methods that files of other formats have not
    alpha_field: ClassVar[str] = ""

    # An option of configs that choose layers, which make a field of it.
    modules_to_save = cast("Any", None)

    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value, why = getattr(self, f.name), self.refused.get(f.name)
            if why is None or value is None or (type(value) is type(default_of(f)) and value == default_of(f)):
                continue
            raise ConfigError(
                f"{type(self).__name__}.{f.name}={shown(value)} is not supported: {why}. "
                f"Leave {f.name} at its default ({default_of(f)!r})."
            )
        self.check_types()
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type={shown(self.task_type)} is not one of {', '.join(TASK_TYPES)}")

    def check_types(self) -> None:
        """Raises ConfigError where a field holds what its annotation does not allow; see ``adaptc.value_types``."""
        for name, rule in table(type(self)).items():
            value = getattr(self, name)
            new = fitting(f"{type(self).__name__}.{name}", rule, value)
            if new is not value:
                setattr(self, name, new)

    def method(self, name: str, kind: str) -> Method:
        """The method with the options it has at module ``name`` (rank and alpha patterns resolved)."""
        raise AssertionError(f"{type(self).__name__} must define method()")

    def name_endings(self) -> dict[str, Collection[str]]:
        """Further lists of endings of module names, by field name: each must end one."""
        return {}

    def pattern_entries(self) -> dict[str, Mapping[str, Any]]:
        """Per-module option tables, by field name: each key must match a targeted module."""
        return {}

    def pattern_matches(self, key: str, name: str) -> bool:
        """Whether a key of these tables is for the module ``name``: PEFT has one rule for LoRA, and others."""
        return matches_pattern(key, name)

    # -- adapters made of others, which have files of their own --------------------------------------------------------

    def parts(self) -> Mapping[str, str]:
        """The adapters that are still to be read before this one is known: name -> directory; {} for none."""
        return {}

    def with_parts(
        self, parts: Sequence[Part], tensors: Mapping[str, Tensor] | None, order: Sequence[str]
    ) -> tuple[Self, dict[str, Tensor]]:
        """This config with its :meth:`parts`, and the tensors of all of it. ``tensors``: those of its own file, None
        for an adapter that is new; ``order``: the names of the model's tensors, in its order. Raises ConfigError or
        CheckpointError for parts that do not go together."""
        raise AssertionError(f"{type(self).__name__} has no with_parts()")

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """This config for an adapter whose sites have these sizes, by the names that :meth:`method` is asked with;
        itself where it has no words for them."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As ``adapter_config.json`` has it: plain JSON types, sets as sorted lists."""
        out: dict[str, Any] = {"peft_type": self.peft_type}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
        return out

    def written(self, tensors: Mapping[str, Tensor], directory: str) -> Mapping[str, Written]:
        """What files hold an adapter of this config, with these tensors by bare keys, as: the content of configs, and
        the tensors, of adapters by the names that they have below ``directory``, '' for what lies there itself. The
        last stands for all."""
        return {"": (self.to_dict(), tensors)}

    def said(self) -> dict[str, Any]:
        """:meth:`to_dict` without what is at its default, for files in which that goes without saying."""
        usual = {f.name: default_of(f) for f in fields(self)}
        return {k: v for k, v in self.to_dict().items() if k not in usual or v != usual[k]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From ``adapter_config.json``. Keys PEFT has never had are dropped with a warning that names them."""
        known = {f.name for f in fields(cls)}
        odd = next((k for k in data if not isinstance(k, str)), None)
        if odd is not None:
            raise ConfigError(f"{cls.__name__}: the names of options are strings, got {shown(odd)}")
        unknown = sorted(k for k in data if k not in known and k != "peft_type")
        if unknown:
            hints = {k: near[0] for k in unknown[:SHOWN] if (near := nearest(k, known, 1))}
            warnings.warn(
                f"adapter config: dropping unknown {shown(unknown)} (written by a newer PEFT, or misspelled"
                + (f"; nearest known: {hints}" if hints else "")
                + ")",
                AdaptcWarning,
                stacklevel=3,
            )
        return cls(**{k: v for k, v in data.items() if k in known})

    @classmethod
    def options_of(cls, modules: Sequence[Mapping[str, Tensor]], shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The options, beside ranks and alphas, that an adapter has whose modules have these tensors by slot, at
        weights of these shapes. For files without a config. Raises ConfigError where no options give all of them."""
        return {}

    def replace(self, **changes: Any) -> Self:
        new = dataclasses.replace(self, **changes)
        for name in self.unsaved:
            setattr(new, name, getattr(self, name))
        return new

    def completed(self, values: Mapping[str, Any]) -> Self:
        """This config with ``values`` in those of the fields that are None. What the user wrote is not checked again:
        defaults need not fit it in the way the user's own words must."""
        new = copy.copy(self)
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(new, name, value)
        return new


def default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@dataclass
class TargetedConfig(AdapterConfig):
    """Fields of configs that choose layers. Every method may have all of them here. In PEFT most methods lack one or
    another (``target_parameters`` is LoRA's alone), and a file that has it makes PEFT warn: but for LoRA, files have
    the optional ones only when they are set."""

    #: fields of an example of each method the config stands for: those that have no default, or choose the method
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    #: the field with the probability that an input of the adapter is dropped, for methods that have one
    dropout_field: ClassVar[str] = ""
    #: whether files have the optional fields of this class even where they are not set
    writes_all: ClassVar[bool] = False
    #: what ``target_modules`` names: "matrices" to adapt, "modules" to train as a whole, or tables to train "rows" of
    unit: ClassVar[str] = "matrices"

    # Options of some methods, which make fields of them. Not annotated: they would get a place among the fields.
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
            if len(entries) > MANY:
                raise ConfigError(
                    f"{type(self).__name__}.{option} has {len(entries)} entries, and {MANY} are the most: one "
                    "expression can be for many modules"
                )
        bias = self.bias
        if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
            own = f"{self.peft_type.lower()}_only"
            raise ConfigError(f"{type(self).__name__}.bias must be 'none', 'all' or {own!r}, got {bias!r}")

    def resolved(self, facts: ModelFacts) -> Self:
        """This config with the fields it leaves to the model filled in from what is known of it, as in PEFT's files.

        Called before the config is planned, and what is planned is what gets saved. What stays None is found in the
        graph, if it can be. A method whose defaults are not in ``_default_targets`` overrides it.
        """
        named = self.target_parameters and not adapts_defaults(facts.model_type)
        found = defaults(self.peft_type, facts.model_type, facts.types)
        return self.completed({k: v for k, v in found.items() if not (named and k == "target_modules")})

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """This config for an adapter whose modules have these ranks, by the names that :meth:`method` is asked with;
        itself where it has no rank, or one for all where there are several."""
        own = {f.name for f in fields(self)}
        if "r" not in own or not ranks:
            return self
        r, others = value_table(ranks)
        values: dict[str, Any] = {"r": r}
        if "rank_pattern" in own:
            values["rank_pattern"] = others
        new = copy.copy(self)
        for name, value in values.items():
            setattr(new, name, value)
        return new

    def united(self, configs: Sequence[Any], names: Sequence[Sequence[str]]) -> Self:
        """This config, the first of ``configs``, with the sites of all of them: the modules called ``names`` of each,
        and what else its file holds. All are of this class."""
        new = copy.copy(self)
        for name, value in united(configs, names).items():
            setattr(new, name, value)
        return new

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if self.writes_all:
            return out
        optional = [f.name for f in fields(TargetedConfig)[len(fields(AdapterConfig)) :] if f.name != "target_modules"]
        return {k: v for k, v in out.items() if v is not None or k not in optional}
