"""adaptc: fine-tuning adapters as a compiler pass over ``torch.export`` programs.

Re-exports only. Names are looked up when first used (PEP 562), so that ``import adaptc`` loads nothing heavy: neither
torch nor transformers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptc.api import (
        compile,
        load,
        load_package,
        lower,
        merge,
        package,
        report,
        save,
        save_adapter,
        swap,
        unload,
        unmerge,
        verify,
    )
    from adaptc.errors import (
        AdaptcError,
        AdaptcWarning,
        BackendError,
        CaptureError,
        CheckpointError,
        ConfigError,
        MergeError,
        PassError,
        RecompileError,
        SwapError,
        TargetError,
    )
    from adaptc.methods._base import TargetedConfig
    from adaptc.methods._rank_allocator import RankAllocator, orthogonal_loss
    from adaptc.methods._registry import register_method
    from adaptc.methods.adalora import AdaLoraConfig
    from adaptc.methods.boft import BOFTConfig
    from adaptc.methods.c3a import C3AConfig
    from adaptc.methods.fourierft import FourierFTConfig
    from adaptc.methods.hra import HRAConfig
    from adaptc.methods.ia3 import IA3Config
    from adaptc.methods.ln_tuning import LNTuningConfig
    from adaptc.methods.loha import LoHaConfig
    from adaptc.methods.lokr import LoKrConfig
    from adaptc.methods.lora import LoraConfig
    from adaptc.methods.miss import MissConfig
    from adaptc.methods.oft import OFTConfig
    from adaptc.methods.randlora import RandLoraConfig
    from adaptc.methods.road import RoadConfig
    from adaptc.methods.shira import ShiraConfig
    from adaptc.methods.trainable_tokens import TrainableTokensConfig
    from adaptc.methods.vblora import VBLoRAConfig
    from adaptc.methods.vera import VeraConfig
    from adaptc.methods.waveft import WaveFTConfig
    from adaptc.passes._kinds import Op
    from adaptc.passes._method import Initial, Method, Slot
    from adaptc.program import AdaptedProgram
    from adaptc.runtime import assert_no_recompiles

__version__ = "0.1.0"

__all__ = [
    # what one does
    "compile",
    "swap",
    "merge",
    "unmerge",
    "unload",
    "lower",
    "save",
    "load",
    "save_adapter",
    "package",
    "load_package",
    "report",
    "verify",
    "assert_no_recompiles",
    "RankAllocator",
    "orthogonal_loss",
    # what one holds
    "AdaptedProgram",
    "LoraConfig",
    "AdaLoraConfig",
    "OFTConfig",
    "BOFTConfig",
    "HRAConfig",
    "VeraConfig",
    "RandLoraConfig",
    "VBLoRAConfig",
    "LoHaConfig",
    "LoKrConfig",
    "IA3Config",
    "RoadConfig",
    "MissConfig",
    "FourierFTConfig",
    "WaveFTConfig",
    "C3AConfig",
    "ShiraConfig",
    "LNTuningConfig",
    "TrainableTokensConfig",
    # what a method of one's own is made of
    "register_method",
    "TargetedConfig",
    "Method",
    "Slot",
    "Initial",
    "Op",
    # what can go wrong
    "AdaptcError",
    "AdaptcWarning",
    "BackendError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "MergeError",
    "PassError",
    "RecompileError",
    "SwapError",
    "TargetError",
    "__version__",
]

_HOME = {
    "compile": "adaptc.api",
    "swap": "adaptc.api",
    "merge": "adaptc.api",
    "unmerge": "adaptc.api",
    "unload": "adaptc.api",
    "lower": "adaptc.api",
    "save": "adaptc.api",
    "load": "adaptc.api",
    "save_adapter": "adaptc.api",
    "package": "adaptc.api",
    "load_package": "adaptc.api",
    "report": "adaptc.api",
    "verify": "adaptc.api",
    "assert_no_recompiles": "adaptc.runtime",
    "RankAllocator": "adaptc.methods._rank_allocator",
    "orthogonal_loss": "adaptc.methods._rank_allocator",
    "AdaptedProgram": "adaptc.program",
    "LoraConfig": "adaptc.methods.lora",
    "AdaLoraConfig": "adaptc.methods.adalora",
    "OFTConfig": "adaptc.methods.oft",
    "BOFTConfig": "adaptc.methods.boft",
    "HRAConfig": "adaptc.methods.hra",
    "VeraConfig": "adaptc.methods.vera",
    "RandLoraConfig": "adaptc.methods.randlora",
    "VBLoRAConfig": "adaptc.methods.vblora",
    "LoHaConfig": "adaptc.methods.loha",
    "LoKrConfig": "adaptc.methods.lokr",
    "IA3Config": "adaptc.methods.ia3",
    "RoadConfig": "adaptc.methods.road",
    "MissConfig": "adaptc.methods.miss",
    "FourierFTConfig": "adaptc.methods.fourierft",
    "WaveFTConfig": "adaptc.methods.waveft",
    "C3AConfig": "adaptc.methods.c3a",
    "ShiraConfig": "adaptc.methods.shira",
    "LNTuningConfig": "adaptc.methods.ln_tuning",
    "TrainableTokensConfig": "adaptc.methods.trainable_tokens",
    "register_method": "adaptc.methods._registry",
    "TargetedConfig": "adaptc.methods._base",
    "Method": "adaptc.passes._method",
    "Slot": "adaptc.passes._method",
    "Initial": "adaptc.passes._method",
    "Op": "adaptc.passes._kinds",
    "AdaptcError": "adaptc.errors",
    "AdaptcWarning": "adaptc.errors",
    "BackendError": "adaptc.errors",
    "CaptureError": "adaptc.errors",
    "CheckpointError": "adaptc.errors",
    "ConfigError": "adaptc.errors",
    "MergeError": "adaptc.errors",
    "PassError": "adaptc.errors",
    "RecompileError": "adaptc.errors",
    "SwapError": "adaptc.errors",
    "TargetError": "adaptc.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
