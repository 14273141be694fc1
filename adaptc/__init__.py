"""adaptc: fine-tuning adapters as a compiler pass over ``torch.export`` programs.

Re-exports only, from one table. Names are looked up when first used (PEP 562), so that ``import adaptc`` loads nothing
heavy: neither torch nor transformers nor triton. Whatever is exported here says that it lives here.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

# Type checkers follow imports, not tables; the tests hold the two against each other.
if TYPE_CHECKING:
    from adaptc.adapters.adapter import Adapter, load_adapter
    from adaptc.adapters.arrow import arrow_adapter
    from adaptc.adapters.combine import combine
    from adaptc.adapters.compose import compose_cartridge_adapters
    from adaptc.adapters.past_key_values import prompt_embeddings_from_past_key_values
    from adaptc.adapters.subtract import subtract_adapter
    from adaptc.adapters.to_lora import convert_to_lora
    from adaptc.api import (
        bind,
        compile,
        create_arrow_model,
        load,
        load_package,
        lower,
        merge,
        package,
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
        MethodError,
        PassError,
        RecompileError,
        SwapError,
        TargetError,
    )
    from adaptc.generation.compile import compile_for_generation
    from adaptc.generation.generator import Generator
    from adaptc.generation.kv_prefix import (
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
    )
    from adaptc.generation.report import report
    from adaptc.generation.scalings import xlora_scalings
    from adaptc.methods import ProgramConfig, TargetedConfig, VirtualTokens, register_method
    from adaptc.methods.adalora import AdaLoraConfig
    from adaptc.methods.adaption_prompt import AdaptionPromptConfig
    from adaptc.methods.arrow import ArrowConfig
    from adaptc.methods.boft import BOFTConfig
    from adaptc.methods.c3a import C3AConfig
    from adaptc.methods.cartridge import CartridgeConfig
    from adaptc.methods.cpt import CPTConfig
    from adaptc.methods.fourierft import FourierFTConfig
    from adaptc.methods.hra import HRAConfig
    from adaptc.methods.ia3 import IA3Config
    from adaptc.methods.lily import LilyConfig
    from adaptc.methods.ln_tuning import LNTuningConfig
    from adaptc.methods.loha import LoHaConfig
    from adaptc.methods.lokr import LoKrConfig
    from adaptc.methods.lora_config import LoraConfig
    from adaptc.methods.miss import MissConfig
    from adaptc.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from adaptc.methods.oft import OFTConfig
    from adaptc.methods.p_tuning import PromptEncoderConfig
    from adaptc.methods.poly import PolyConfig
    from adaptc.methods.prefix_tuning import PrefixTuningConfig
    from adaptc.methods.prompt_tuning import PromptTuningConfig
    from adaptc.methods.randlora import RandLoraConfig
    from adaptc.methods.road import RoadConfig
    from adaptc.methods.shira import ShiraConfig
    from adaptc.methods.trainable_tokens import TrainableTokensConfig
    from adaptc.methods.vblora import VBLoRAConfig
    from adaptc.methods.vera import VeraConfig
    from adaptc.methods.waveft import WaveFTConfig
    from adaptc.methods.xlora_config import XLoraConfig
    from adaptc.passes.ir.coefficients import Extra
    from adaptc.passes.ir.method import Initial, Method, Slot
    from adaptc.passes.ir.ops import Op
    from adaptc.passes.ir.program_method import ProgramMethod
    from adaptc.program.adapted import AdaptedProgram
    from adaptc.program.bank import Bank
    from adaptc.program.checkpoints import last_checkpoint
    from adaptc.program.lorafa import lorafa_optimizer
    from adaptc.program.rank_allocator import RankAllocator, orthogonal_loss
    from adaptc.program.rescale import rescale_adapter_scale
    from adaptc.program.trainer_callback import check_gradients, trainer_callback
    from adaptc.progress import get_verbosity, set_verbosity
    from adaptc.reports.status import get_layer_status, get_model_status
    from adaptc.runtime.recompiles import assert_no_recompiles
    from adaptc.verify.check_method import check_method

__version__ = "0.1.0"

#: public name -> the module it is defined in
PUBLIC = {
    # what one does
    "compile": "adaptc.api",
    "compile_for_generation": "adaptc.generation.compile",
    "create_arrow_model": "adaptc.api",
    "swap": "adaptc.api",
    "bind": "adaptc.api",
    "merge": "adaptc.api",
    "unmerge": "adaptc.api",
    "unload": "adaptc.api",
    "lower": "adaptc.api",
    "save": "adaptc.api",
    "load": "adaptc.api",
    "save_adapter": "adaptc.api",
    "package": "adaptc.api",
    "load_package": "adaptc.api",
    "report": "adaptc.generation.report",
    "verify": "adaptc.api",
    "get_model_status": "adaptc.reports.status",
    "get_layer_status": "adaptc.reports.status",
    "rescale_adapter_scale": "adaptc.program.rescale",
    "load_adapter": "adaptc.adapters.adapter",
    "combine": "adaptc.adapters.combine",
    "arrow_adapter": "adaptc.adapters.arrow",
    "convert_to_lora": "adaptc.adapters.to_lora",
    "subtract_adapter": "adaptc.adapters.subtract",
    "initialize_kv_prefix_from_text": "adaptc.generation.kv_prefix",
    "initialize_kv_prefix_from_past_key_values": "adaptc.generation.kv_prefix",
    "prompt_embeddings_from_past_key_values": "adaptc.adapters.past_key_values",
    "compose_cartridge_adapters": "adaptc.adapters.compose",
    "xlora_scalings": "adaptc.generation.scalings",
    "assert_no_recompiles": "adaptc.runtime.recompiles",
    "RankAllocator": "adaptc.program.rank_allocator",
    "orthogonal_loss": "adaptc.program.rank_allocator",
    "lorafa_optimizer": "adaptc.program.lorafa",
    "trainer_callback": "adaptc.program.trainer_callback",
    "check_gradients": "adaptc.program.trainer_callback",
    "last_checkpoint": "adaptc.program.checkpoints",
    "set_verbosity": "adaptc.progress",
    "get_verbosity": "adaptc.progress",
    # what one holds
    "AdaptedProgram": "adaptc.program.adapted",
    "Bank": "adaptc.program.bank",
    "Adapter": "adaptc.adapters.adapter",
    "Generator": "adaptc.generation.generator",
    "LoraConfig": "adaptc.methods.lora_config",
    "ArrowConfig": "adaptc.methods.arrow",
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
    "XLoraConfig": "adaptc.methods.xlora_config",
    "C3AConfig": "adaptc.methods.c3a",
    "LilyConfig": "adaptc.methods.lily",
    "PolyConfig": "adaptc.methods.poly",
    "ShiraConfig": "adaptc.methods.shira",
    "LNTuningConfig": "adaptc.methods.ln_tuning",
    "TrainableTokensConfig": "adaptc.methods.trainable_tokens",
    "PromptTuningConfig": "adaptc.methods.prompt_tuning",
    "PrefixTuningConfig": "adaptc.methods.prefix_tuning",
    "CartridgeConfig": "adaptc.methods.cartridge",
    "PromptEncoderConfig": "adaptc.methods.p_tuning",
    "CPTConfig": "adaptc.methods.cpt",
    "AdaptionPromptConfig": "adaptc.methods.adaption_prompt",
    "MultitaskPromptTuningConfig": "adaptc.methods.multitask_prompt_tuning",
    # what a method of one's own is made of
    "register_method": "adaptc.methods",
    "check_method": "adaptc.verify.check_method",
    "TargetedConfig": "adaptc.methods",
    "ProgramConfig": "adaptc.methods",
    "VirtualTokens": "adaptc.methods",
    "ProgramMethod": "adaptc.passes.ir.program_method",
    "Extra": "adaptc.passes.ir.coefficients",
    "Method": "adaptc.passes.ir.method",
    "Slot": "adaptc.passes.ir.method",
    "Initial": "adaptc.passes.ir.method",
    "Op": "adaptc.passes.ir.ops",
    # what can go wrong
    "AdaptcError": "adaptc.errors",
    "AdaptcWarning": "adaptc.errors",
    "BackendError": "adaptc.errors",
    "CaptureError": "adaptc.errors",
    "CheckpointError": "adaptc.errors",
    "ConfigError": "adaptc.errors",
    "MergeError": "adaptc.errors",
    "MethodError": "adaptc.errors",
    "PassError": "adaptc.errors",
    "RecompileError": "adaptc.errors",
    "SwapError": "adaptc.errors",
    "TargetError": "adaptc.errors",
}

__all__ = [*PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = PUBLIC.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(home)
    # What came along with it is named as well: a program is made by a function, and its class never asked for.
    for public, where in PUBLIC.items():
        module = sys.modules.get(where)
        value = None if module is None else vars(module).get(public)
        if value is not None:
            value.__module__ = __name__
            globals()[public] = value
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
