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
    from adaptc.adapters.arrow_adapter import arrow_adapter
    from adaptc.adapters.combine import combine
    from adaptc.adapters.compose import compose_cartridge_adapters
    from adaptc.adapters.past_key_values import prompt_embeddings_from_past_key_values
    from adaptc.adapters.subtract import subtract_adapter
    from adaptc.adapters.to_lora import convert_to_lora
    from adaptc.api.adapt_model import compile, create_arrow_model
    from adaptc.api.any_report import report
    from adaptc.api.change_adapter import bind, swap
    from adaptc.api.merge_and_lower import lower, merge, unload, unmerge, verify
    from adaptc.api.save_and_load import load, load_package, package, save, save_adapter
    from adaptc.api.scalings_of import xlora_scalings
    from adaptc.bank.bank import Bank
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
    from adaptc.generation.compile_generation import compile_for_generation
    from adaptc.generation.generator import Generator
    from adaptc.methods import ProgramConfig, TargetedConfig, VirtualTokens, register_method
    from adaptc.methods.lora_family.adalora import AdaLoraConfig
    from adaptc.methods.lora_family.arrow import ArrowConfig
    from adaptc.methods.lora_family.lily import LilyConfig
    from adaptc.methods.lora_family.lora_config import LoraConfig
    from adaptc.methods.lora_family.miss import MissConfig
    from adaptc.methods.lora_family.randlora import RandLoraConfig
    from adaptc.methods.lora_family.vblora import VBLoRAConfig
    from adaptc.methods.lora_family.vera import VeraConfig
    from adaptc.methods.lycoris.loha import LoHaConfig
    from adaptc.methods.lycoris.lokr import LoKrConfig
    from adaptc.methods.orthogonal.boft import BOFTConfig
    from adaptc.methods.orthogonal.hra import HRAConfig
    from adaptc.methods.orthogonal.oft import OFTConfig
    from adaptc.methods.orthogonal.road import RoadConfig
    from adaptc.methods.prompt.adaption_prompt import AdaptionPromptConfig
    from adaptc.methods.prompt.cartridge import CartridgeConfig
    from adaptc.methods.prompt.cpt import CPTConfig
    from adaptc.methods.prompt.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from adaptc.methods.prompt.p_tuning import PromptEncoderConfig
    from adaptc.methods.prompt.prefix_tuning import PrefixTuningConfig
    from adaptc.methods.prompt.prompt_tuning import PromptTuningConfig
    from adaptc.methods.routed.poly import PolyConfig
    from adaptc.methods.routed.xlora_config import XLoraConfig
    from adaptc.methods.sparse.c3a import C3AConfig
    from adaptc.methods.sparse.fourierft import FourierFTConfig
    from adaptc.methods.sparse.ia3 import IA3Config
    from adaptc.methods.sparse.ln_tuning import LNTuningConfig
    from adaptc.methods.sparse.shira import ShiraConfig
    from adaptc.methods.sparse.trainable_tokens import TrainableTokensConfig
    from adaptc.methods.sparse.waveft import WaveFTConfig
    from adaptc.passes.graph.ops import Op
    from adaptc.passes.protocol.coefficients import Extra
    from adaptc.passes.protocol.method import Initial, Method, Slot
    from adaptc.passes.protocol.program_method import ProgramMethod
    from adaptc.prefixes.init_kv_prefix import (
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
    )
    from adaptc.program.adapted_program import AdaptedProgram
    from adaptc.program.rescale import rescale_adapter_scale
    from adaptc.progress import get_verbosity, set_verbosity
    from adaptc.reports.status import get_layer_status, get_model_status
    from adaptc.runtime.recompiles import assert_no_recompiles
    from adaptc.training.checkpoints import last_checkpoint
    from adaptc.training.lorafa import lorafa_optimizer
    from adaptc.training.rank_allocator import RankAllocator, orthogonal_loss
    from adaptc.training.trainer_callback import check_gradients, trainer_callback
    from adaptc.verify.check_method import check_method

__version__ = "0.1.0"

#: public name -> the module it is defined in
PUBLIC = {
    # what one does
    "compile": "adaptc.api.adapt_model",
    "compile_for_generation": "adaptc.generation.compile_generation",
    "create_arrow_model": "adaptc.api.adapt_model",
    "swap": "adaptc.api.change_adapter",
    "bind": "adaptc.api.change_adapter",
    "merge": "adaptc.api.merge_and_lower",
    "unmerge": "adaptc.api.merge_and_lower",
    "unload": "adaptc.api.merge_and_lower",
    "lower": "adaptc.api.merge_and_lower",
    "save": "adaptc.api.save_and_load",
    "load": "adaptc.api.save_and_load",
    "save_adapter": "adaptc.api.save_and_load",
    "package": "adaptc.api.save_and_load",
    "load_package": "adaptc.api.save_and_load",
    "report": "adaptc.api.any_report",
    "verify": "adaptc.api.merge_and_lower",
    "get_model_status": "adaptc.reports.status",
    "get_layer_status": "adaptc.reports.status",
    "rescale_adapter_scale": "adaptc.program.rescale",
    "load_adapter": "adaptc.adapters.adapter",
    "combine": "adaptc.adapters.combine",
    "arrow_adapter": "adaptc.adapters.arrow_adapter",
    "convert_to_lora": "adaptc.adapters.to_lora",
    "subtract_adapter": "adaptc.adapters.subtract",
    "initialize_kv_prefix_from_text": "adaptc.prefixes.init_kv_prefix",
    "initialize_kv_prefix_from_past_key_values": "adaptc.prefixes.init_kv_prefix",
    "prompt_embeddings_from_past_key_values": "adaptc.adapters.past_key_values",
    "compose_cartridge_adapters": "adaptc.adapters.compose",
    "xlora_scalings": "adaptc.api.scalings_of",
    "assert_no_recompiles": "adaptc.runtime.recompiles",
    "RankAllocator": "adaptc.training.rank_allocator",
    "orthogonal_loss": "adaptc.training.rank_allocator",
    "lorafa_optimizer": "adaptc.training.lorafa",
    "trainer_callback": "adaptc.training.trainer_callback",
    "check_gradients": "adaptc.training.trainer_callback",
    "last_checkpoint": "adaptc.training.checkpoints",
    "set_verbosity": "adaptc.progress",
    "get_verbosity": "adaptc.progress",
    # what one holds
    "AdaptedProgram": "adaptc.program.adapted_program",
    "Bank": "adaptc.bank.bank",
    "Adapter": "adaptc.adapters.adapter",
    "Generator": "adaptc.generation.generator",
    "LoraConfig": "adaptc.methods.lora_family.lora_config",
    "ArrowConfig": "adaptc.methods.lora_family.arrow",
    "AdaLoraConfig": "adaptc.methods.lora_family.adalora",
    "OFTConfig": "adaptc.methods.orthogonal.oft",
    "BOFTConfig": "adaptc.methods.orthogonal.boft",
    "HRAConfig": "adaptc.methods.orthogonal.hra",
    "VeraConfig": "adaptc.methods.lora_family.vera",
    "RandLoraConfig": "adaptc.methods.lora_family.randlora",
    "VBLoRAConfig": "adaptc.methods.lora_family.vblora",
    "LoHaConfig": "adaptc.methods.lycoris.loha",
    "LoKrConfig": "adaptc.methods.lycoris.lokr",
    "IA3Config": "adaptc.methods.sparse.ia3",
    "RoadConfig": "adaptc.methods.orthogonal.road",
    "MissConfig": "adaptc.methods.lora_family.miss",
    "FourierFTConfig": "adaptc.methods.sparse.fourierft",
    "WaveFTConfig": "adaptc.methods.sparse.waveft",
    "XLoraConfig": "adaptc.methods.routed.xlora_config",
    "C3AConfig": "adaptc.methods.sparse.c3a",
    "LilyConfig": "adaptc.methods.lora_family.lily",
    "PolyConfig": "adaptc.methods.routed.poly",
    "ShiraConfig": "adaptc.methods.sparse.shira",
    "LNTuningConfig": "adaptc.methods.sparse.ln_tuning",
    "TrainableTokensConfig": "adaptc.methods.sparse.trainable_tokens",
    "PromptTuningConfig": "adaptc.methods.prompt.prompt_tuning",
    "PrefixTuningConfig": "adaptc.methods.prompt.prefix_tuning",
    "CartridgeConfig": "adaptc.methods.prompt.cartridge",
    "PromptEncoderConfig": "adaptc.methods.prompt.p_tuning",
    "CPTConfig": "adaptc.methods.prompt.cpt",
    "AdaptionPromptConfig": "adaptc.methods.prompt.adaption_prompt",
    "MultitaskPromptTuningConfig": "adaptc.methods.prompt.multitask_prompt_tuning",
    # what a method of one's own is made of
    "register_method": "adaptc.methods",
    "check_method": "adaptc.verify.check_method",
    "TargetedConfig": "adaptc.methods",
    "ProgramConfig": "adaptc.methods",
    "VirtualTokens": "adaptc.methods",
    "ProgramMethod": "adaptc.passes.protocol.program_method",
    "Extra": "adaptc.passes.protocol.coefficients",
    "Method": "adaptc.passes.protocol.method",
    "Slot": "adaptc.passes.protocol.method",
    "Initial": "adaptc.passes.protocol.method",
    "Op": "adaptc.passes.graph.ops",
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
