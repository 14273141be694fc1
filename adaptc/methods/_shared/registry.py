"""Map PEFT's type names and the names of methods to their classes, which are imported when first used.

Other distributions add methods through the entry points of the group ``adaptc.methods``. Each names a module, or a
function, that calls :func:`register_method`. They are loaded when a name is looked up that is not in the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from adaptc.errors import ConfigError, nearest
from adaptc.methods._shared.config import AdapterConfig
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods._shared.refused import UNSUPPORTED_METHODS
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.method_names import PARTS, check_old_hooks
from adaptc.passes.protocol.program_method import PROGRAM_VALUES, ProgramMethod

#: peft_type -> "module:ConfigClass"
CONFIGS: dict[str, str] = {
    "LORA": "adaptc.methods.lora_family.lora_config:LoraConfig",
    "ADALORA": "adaptc.methods.lora_family.adalora:AdaLoraConfig",
    "OFT": "adaptc.methods.orthogonal.oft:OFTConfig",
    "BOFT": "adaptc.methods.orthogonal.boft:BOFTConfig",
    "HRA": "adaptc.methods.orthogonal.hra:HRAConfig",
    "VERA": "adaptc.methods.shared_factors.vera:VeraConfig",
    "PVERA": "adaptc.methods.shared_factors.pvera:PveraConfig",
    "RANDLORA": "adaptc.methods.shared_factors.randlora:RandLoraConfig",
    "VBLORA": "adaptc.methods.shared_factors.vblora:VBLoRAConfig",
    "FROD": "adaptc.methods.shared_factors.frod:FrodConfig",
    "TINYLORA": "adaptc.methods.shared_factors.tinylora:TinyLoraConfig",
    "UNILORA": "adaptc.methods.shared_factors.unilora:UniLoraConfig",
    "LOHA": "adaptc.methods.lycoris.loha:LoHaConfig",
    "LOKR": "adaptc.methods.lycoris.lokr:LoKrConfig",
    "IA3": "adaptc.methods.sparse.ia3:IA3Config",
    "PSOFT": "adaptc.methods.orthogonal.psoft:PsoftConfig",
    "OSF": "adaptc.methods.orthogonal.osf:OSFConfig",
    "ROAD": "adaptc.methods.orthogonal.road:RoadConfig",
    "MISS": "adaptc.methods.lora_family.miss:MissConfig",
    "GRALORA": "adaptc.methods.lora_family.gralora:GraloraConfig",
    "FOURIERFT": "adaptc.methods.sparse.fourierft:FourierFTConfig",
    "WAVEFT": "adaptc.methods.sparse.waveft:WaveFTConfig",
    "C3A": "adaptc.methods.sparse.c3a:C3AConfig",
    "DEFT": "adaptc.methods.weight_dependent.deft:DeftConfig",
    "GLORA": "adaptc.methods.weight_dependent.glora:GloraConfig",
    "LILY": "adaptc.methods.shared_factors.lily:LilyConfig",
    "POLY": "adaptc.methods.routed.poly:PolyConfig",
    "SHIRA": "adaptc.methods.sparse.shira:ShiraConfig",
    "HIRA": "adaptc.methods.weight_dependent.hira:HiraConfig",
    "DELORA": "adaptc.methods.weight_dependent.delora:DeloraConfig",
    "PEANUT": "adaptc.methods.weight_dependent.peanut:PeanutConfig",
    "BEFT": "adaptc.methods.sparse.beft:BeftConfig",
    "SUPERTUNING": "adaptc.methods.sparse.supertuning:SupertuningConfig",
    "ADAMSS": "adaptc.methods.sparse.adamss:AdamssConfig",
    "LN_TUNING": "adaptc.methods.sparse.ln_tuning:LNTuningConfig",
    "TRAINABLE_TOKENS": "adaptc.methods.sparse.trainable_tokens:TrainableTokensConfig",
    "XLORA": "adaptc.methods.routed.xlora_config:XLoraConfig",
    "PROMPT_TUNING": "adaptc.methods.prompt.prompt_tuning:PromptTuningConfig",
    "P_TUNING": "adaptc.methods.prompt.p_tuning:PromptEncoderConfig",
    "MULTITASK_PROMPT_TUNING": "adaptc.methods.prompt.multitask_prompt_tuning:MultitaskPromptTuningConfig",
    "PREFIX_TUNING": "adaptc.methods.prompt.prefix_tuning:PrefixTuningConfig",
    "CARTRIDGE": "adaptc.methods.prompt.cartridge:CartridgeConfig",
    "CPT": "adaptc.methods.prompt.cpt:CPTConfig",
    "ADAPTION_PROMPT": "adaptc.methods.prompt.adaption_prompt:AdaptionPromptConfig",
    # The older name of MiSS, which only old files have.
    "BONE": "adaptc.methods.lora_family.miss:MissConfig",
}

#: method name in region tags -> "module:Class"
METHODS: dict[str, str] = {
    "lora": "adaptc.methods.lora_family.lora:Lora",
    "lora_tied": "adaptc.methods.lora_family.lora:LoraTied",
    "alora": "adaptc.methods.lora_family.alora:Alora",
    "qalora": "adaptc.methods.lora_family.qalora:QaLora",
    "bdlora": "adaptc.methods.lora_family.variants.bdlora:BdLora",
    "kasa": "adaptc.methods.lora_family.variants.kasa:Kasa",
    "velora": "adaptc.methods.lora_family.variants.velora:Velora",
    "monteclora": "adaptc.methods.lora_family.variants.monteclora:Monteclora",
    "arrow": "adaptc.methods.lora_family.arrow:Arrow",
    "dora": "adaptc.methods.lora_family.dora:Dora",
    "adalora": "adaptc.methods.lora_family.adalora:AdaLora",
    "oft": "adaptc.methods.orthogonal.oft:Oft",
    "boft": "adaptc.methods.orthogonal.boft:Boft",
    "hra": "adaptc.methods.orthogonal.hra:Hra",
    "vera": "adaptc.methods.shared_factors.vera:Vera",
    "pvera": "adaptc.methods.shared_factors.pvera:Pvera",
    "randlora": "adaptc.methods.shared_factors.randlora:RandLora",
    "vblora": "adaptc.methods.shared_factors.vblora:VBLoRA",
    "frod": "adaptc.methods.shared_factors.frod:Frod",
    "tinylora": "adaptc.methods.shared_factors.tinylora:TinyLora",
    "unilora": "adaptc.methods.shared_factors.unilora:UniLora",
    "loha": "adaptc.methods.lycoris.loha:LoHa",
    "lokr": "adaptc.methods.lycoris.lokr:LoKr",
    "ia3": "adaptc.methods.sparse.ia3:IA3",
    "psoft": "adaptc.methods.orthogonal.psoft:Psoft",
    "osf": "adaptc.methods.orthogonal.osf:Osf",
    "road": "adaptc.methods.orthogonal.road:Road",
    "miss": "adaptc.methods.lora_family.miss:Miss",
    "gralora": "adaptc.methods.lora_family.gralora:Gralora",
    "fourierft": "adaptc.methods.sparse.fourierft:FourierFT",
    "waveft": "adaptc.methods.sparse.waveft:WaveFT",
    "c3a": "adaptc.methods.sparse.c3a:C3A",
    "deft": "adaptc.methods.weight_dependent.deft:Deft",
    "glora": "adaptc.methods.weight_dependent.glora:Glora",
    "lily": "adaptc.methods.shared_factors.lily:Lily",
    "poly": "adaptc.methods.routed.poly:Poly",
    "shira": "adaptc.methods.sparse.shira:Shira",
    "hira": "adaptc.methods.weight_dependent.hira:Hira",
    "delora": "adaptc.methods.weight_dependent.delora:Delora",
    "peanut": "adaptc.methods.weight_dependent.peanut:Peanut",
    "beft": "adaptc.methods.sparse.beft:Beft",
    "supertuning": "adaptc.methods.sparse.supertuning:Supertuning",
    "adamss": "adaptc.methods.sparse.adamss:Adamss",
    "xlora": "adaptc.methods.routed.xlora:XLora",
    "prompt_tuning": "adaptc.methods.prompt.prompt_tuning:PromptTuning",
    "p_tuning": "adaptc.methods.prompt.p_tuning:PTuning",
    "multitask_prompt_tuning": "adaptc.methods.prompt.multitask_prompt_tuning:MultitaskPromptTuning",
    "prefix_tuning": "adaptc.methods.prompt.prefix_tuning:PrefixTuning",
    "prefix_projection": "adaptc.methods.prompt.prefix_tuning:PrefixProjection",
    "cartridge": "adaptc.methods.prompt.cartridge:Cartridge",
    "cpt": "adaptc.methods.prompt.cpt:Cpt",
    "adaption_prompt": "adaptc.methods.prompt.adaption_prompt:AdaptionPrompt",
    "stacked": "adaptc.methods._shared.stacked:PerExpertMethod",
    "whole": "adaptc.methods._shared.saved_modules:TrainedParameter",
    "trainable_tokens": "adaptc.methods._shared.saved_modules:TokenRows",
}

#: the group of entry points through which other distributions add methods
ENTRY_POINT_GROUP = "adaptc.methods"

#: "module:Class" -> a registered class, which need not be importable by name (it may be local to a script)
_registered_classes: dict[str, Any] = {}
#: not empty once the entry points were loaded
_entry_points_loaded: list[bool] = []


def register_method(config: type[AdapterConfig], method: type[Method]) -> None:
    """Make a method of your own known to ``compile``, ``load`` and adapter files, under ``config.peft_type``.

    A pair that is registered again replaces the older one: that happens when its module is reloaded or its notebook
    cell runs once more. :func:`adaptc.methods.check_method` tests what a method computes.

    Args:
        config: a dataclass derived from :class:`adaptc.methods.TargetedConfig` whose ``method(name, kind)`` returns
            instances of ``method``. For a method of the program, derive from :class:`adaptc.methods.ProgramConfig`.
        method: a frozen dataclass derived from :class:`adaptc.methods.Method` with a ``name`` of its own. For a method
            of the program, derive from :class:`adaptc.methods.ProgramMethod` or :class:`adaptc.methods.VirtualTokens`.

    Raises:
        ConfigError: a name is taken or missing. The same for a method that lacks ``slots``, or has neither ``weight``
            nor a form around a layer.
        MethodError: the method has hooks under names of an older adaptc.

    Example:
        >>> adaptc.methods.register_method(ShiftConfig, Shift)
        >>> adaptc.compile(model, ShiftConfig(target_modules=["0"]), example_inputs=x)(x).shape
        torch.Size([2, 3])
    """
    _check_classes(config, method)
    check_old_hooks(method)
    kind, name = config.peft_type, method.name
    if not kind or kind != kind.upper() or not name:
        raise ConfigError(
            f"{config.__name__}.peft_type must be a name in capitals and {method.__name__}.name must not be empty; "
            f"found {kind!r} and {name!r}"
        )
    for table, key, cls in ((CONFIGS, kind, config), (METHODS, name, method)):
        if key in table and table[key] != _class_path(cls):
            raise ConfigError(f"{key!r} is the name of {table[key]!r} already; choose another")
    for table, key, cls in ((CONFIGS, kind, config), (METHODS, name, method)):
        table[key] = _class_path(cls)
        _registered_classes[table[key]] = cls


def _check_classes(config: type[AdapterConfig], method: type[Method]) -> None:
    needs = (
        (config, AdapterConfig, "TargetedConfig", "@dataclass"),
        (method, Method, "Method", "@dataclass(frozen=True)"),
    )
    for cls, base, name, decorator in needs:
        if not issubclass(cls, base) or "__dataclass_fields__" not in vars(cls):
            raise ConfigError(
                f"{cls.__name__} must be derived from adaptc.methods.{name} and decorated with {decorator}"
            )

    for f in dataclasses.fields(method):
        if callable(getattr(Method, f.name, None)) or f.name in PARTS:
            raise ConfigError(
                f"{method.__name__}.{f.name} is a function or an object of the protocol: give the field another name, "
                f"or write {f.name} = ... without an annotation"
            )

    def is_overridden(name: str) -> bool:
        return getattr(method, name) is not getattr(Method, name)

    if not is_overridden("slots"):
        raise ConfigError(f"{method.__name__} must define slots(op), its tensors at a site")
    if issubclass(method, ProgramMethod) != issubclass(config, ProgramConfig):
        raise ConfigError(
            f"{config.__name__} and {method.__name__} are not of one kind: methods of the program have configs derived "
            "from adaptc.methods.ProgramConfig"
        )
    if issubclass(method, ProgramMethod):
        if not any(getattr(method, n) is not getattr(ProgramMethod, n) for n in (*PROGRAM_VALUES, "prompt")):
            raise ConfigError(
                f"{method.__name__} must define what it makes of a program value: {', '.join(PROGRAM_VALUES)}"
            )
    elif not (is_overridden("weight") or is_overridden("apply") or is_overridden("input")):
        raise ConfigError(
            f"{method.__name__} must define weight(op, W, slots, scale), what it makes of a weight; or, if it means "
            "something for activations alone, apply() or input()"
        )


def check_registered(method: Method) -> None:
    """Raise ConfigError for a method that is not registered: a program with it could be saved, but never loaded."""
    inner = method.options().get("method") if method.name == "stacked" else method.name
    if _find_path(METHODS, str(inner)) is None or _find_path(METHODS, method.name) is None:
        raise ConfigError(
            f"the method {inner!r} ({type(method).__name__}) is not registered, so nothing that is saved with it could "
            "be loaded: call adaptc.methods.register_method(YourConfig, YourMethod) first"
        )
    if _load_class(METHODS[method.name]) is not type(method):
        raise ConfigError(
            f"{method.name!r} is the name of {METHODS[method.name]!r}, and this is another class of that name: "
            "register it, or give it a name of its own"
        )


def is_builtin(method: Method) -> bool:
    """Return whether ``method`` is one of adaptc's own, which adaptc's tests cover at every kind of layer."""
    path = _class_path(type(method))
    return METHODS.get(method.name) == path and path not in _registered_classes


def config_class(peft_type: str) -> type[AdapterConfig]:
    """Return the config class for a ``peft_type`` as files have it; raise ConfigError for an unknown or refused one."""
    kind = peft_type.rpartition(".")[2].upper()
    path = _find_path(CONFIGS, kind)
    if path is None and kind in UNSUPPORTED_METHODS:
        raise ConfigError(f"peft_type {kind!r} is not supported: {UNSUPPORTED_METHODS[kind]}.")
    if path is None:
        raise ConfigError(
            f"peft_type {peft_type!r} is not supported; supported are {', '.join(sorted(CONFIGS))}. A method of your "
            "own is known once its module was imported and called adaptc.methods.register_method"
        )
    return _load_class(path)


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """Return the method named ``data["method"]`` in files, with ``data["options"]``; raise ConfigError if unknown."""
    path = _find_path(METHODS, data["method"])
    if path is None:
        close = nearest(data["method"], METHODS, 1)
        raise ConfigError(
            f"the program holds regions of the method {data['method']!r}, which is not known here"
            + (f" (nearest: {close[0]!r})" if close else "")
            + ". Import the module that calls adaptc.methods.register_method for it first; on the command line: "
            "--import FILE"
        )
    return _load_class(path).from_options(data["options"])


def _class_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _find_path(table: Mapping[str, str], key: str) -> str | None:
    if key not in table and not _entry_points_loaded:
        _entry_points_loaded.append(True)
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            found = point.load()
            if isinstance(found, Callable):
                found()
    return table.get(key)


def _load_class(path: str) -> Any:
    if path in _registered_classes:
        return _registered_classes[path]
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    if path in CONFIGS.values():
        found.__module__ = "adaptc"  # users import it from there; without this, it would depend on the first import
    return found
