"""adaptc: fine-tuning adapters as a compiler pass over ``torch.export`` programs.

Re-exports only, from one table. Names are looked up when first used (PEP 562), so that ``import adaptc`` loads nothing
heavy: neither torch nor transformers nor triton. Whatever is exported here says that it lives here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import VERSION as __version__
from adaptc.public_names import lazy_names

# Type checkers follow imports, not tables; the tests hold the two against each other.
if TYPE_CHECKING:
    from adaptc import debug, distributed, engines, exporters, methods, prefixes, training
    from adaptc.adapters.adapter import Adapter, load_adapter
    from adaptc.adapters.combine import combine
    from adaptc.adapters.subtract import subtract_adapter
    from adaptc.adapters.to_lora import convert_to_lora
    from adaptc.api.adapt_model import compile
    from adaptc.api.certify import certify, verify
    from adaptc.api.change_adapter import bind, swap
    from adaptc.api.from_pretrained import from_pretrained
    from adaptc.api.merge_and_lower import merge, merge_directory, unload, unmerge
    from adaptc.api.quantize import quantize
    from adaptc.api.reporting import report
    from adaptc.api.save_and_load import load, load_package, package, save, save_adapter
    from adaptc.bank.bank import Bank
    from adaptc.binding.binding import Binding
    from adaptc.distributed.split_program import split
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
    from adaptc.methods.lora_family.adalora import AdaLoraConfig
    from adaptc.methods.lora_family.arrow import ArrowConfig
    from adaptc.methods.lora_family.from_data.corda import CordaConfig
    from adaptc.methods.lora_family.from_data.eva import EvaConfig
    from adaptc.methods.lora_family.from_data.lora_ga import LoraGAConfig
    from adaptc.methods.lora_family.gralora import GraloraConfig
    from adaptc.methods.lora_family.loftq import LoftQConfig
    from adaptc.methods.lora_family.lora_config import LoraConfig
    from adaptc.methods.lora_family.miss import MissConfig
    from adaptc.methods.lora_family.variants.bdlora import BdLoraConfig
    from adaptc.methods.lora_family.variants.kasa import KasaConfig
    from adaptc.methods.lora_family.variants.monteclora import MontecloraConfig
    from adaptc.methods.lora_family.variants.velora import VeloraConfig
    from adaptc.methods.lycoris.loha import LoHaConfig
    from adaptc.methods.lycoris.lokr import LoKrConfig
    from adaptc.methods.orthogonal.boft import BOFTConfig
    from adaptc.methods.orthogonal.hra import HRAConfig
    from adaptc.methods.orthogonal.oft import OFTConfig
    from adaptc.methods.orthogonal.osf import OSFConfig
    from adaptc.methods.orthogonal.psoft import PsoftConfig
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
    from adaptc.methods.shared_factors.frod import FrodConfig
    from adaptc.methods.shared_factors.lily import LilyConfig
    from adaptc.methods.shared_factors.pvera import PveraConfig
    from adaptc.methods.shared_factors.randlora import RandLoraConfig
    from adaptc.methods.shared_factors.tinylora import TinyLoraConfig
    from adaptc.methods.shared_factors.unilora import UniLoraConfig
    from adaptc.methods.shared_factors.vblora import VBLoRAConfig
    from adaptc.methods.shared_factors.vera import VeraConfig
    from adaptc.methods.sparse.adamss import AdamssConfig
    from adaptc.methods.sparse.beft import BeftConfig
    from adaptc.methods.sparse.c3a import C3AConfig
    from adaptc.methods.sparse.fourierft import FourierFTConfig
    from adaptc.methods.sparse.ia3 import IA3Config
    from adaptc.methods.sparse.ln_tuning import LNTuningConfig
    from adaptc.methods.sparse.shira import ShiraConfig
    from adaptc.methods.sparse.supertuning import SupertuningConfig
    from adaptc.methods.sparse.trainable_tokens import TrainableTokensConfig
    from adaptc.methods.sparse.waveft import WaveFTConfig
    from adaptc.methods.weight_dependent.deft import DeftConfig
    from adaptc.methods.weight_dependent.delora import DeloraConfig
    from adaptc.methods.weight_dependent.glora import GloraConfig
    from adaptc.methods.weight_dependent.hira import HiraConfig
    from adaptc.methods.weight_dependent.peanut import PeanutConfig
    from adaptc.packages.packaged_program import PackagedProgram
    from adaptc.pictures.draw import draw
    from adaptc.program.adapted_program import AdaptedProgram
    from adaptc.program.rescale import rescale_adapter_scale
    from adaptc.progress import get_verbosity, set_verbosity
    from adaptc.serving.compile_for_serving import compile_for_serving
    from adaptc.serving.serving_model import ServingModel
    from adaptc.state.runner import Runner

#: public name -> the module it is defined in
PUBLIC = {
    # what one does
    "compile": "adaptc.api.adapt_model",
    "compile_for_generation": "adaptc.generation.compile_generation",
    "compile_for_serving": "adaptc.serving.compile_for_serving",
    "swap": "adaptc.api.change_adapter",
    "bind": "adaptc.api.change_adapter",
    "merge": "adaptc.api.merge_and_lower",
    "merge_directory": "adaptc.api.merge_and_lower",
    "unmerge": "adaptc.api.merge_and_lower",
    "unload": "adaptc.api.merge_and_lower",
    "split": "adaptc.distributed.split_program",
    "save": "adaptc.api.save_and_load",
    "from_pretrained": "adaptc.api.from_pretrained",
    "load": "adaptc.api.save_and_load",
    "save_adapter": "adaptc.api.save_and_load",
    "certify": "adaptc.api.certify",
    "package": "adaptc.api.save_and_load",
    "load_package": "adaptc.api.save_and_load",
    "quantize": "adaptc.api.quantize",
    "report": "adaptc.api.reporting",
    "draw": "adaptc.pictures.draw",
    "verify": "adaptc.api.certify",
    "rescale_adapter_scale": "adaptc.program.rescale",
    "load_adapter": "adaptc.adapters.adapter",
    "combine": "adaptc.adapters.combine",
    "convert_to_lora": "adaptc.adapters.to_lora",
    "subtract_adapter": "adaptc.adapters.subtract",
    "set_verbosity": "adaptc.progress",
    "get_verbosity": "adaptc.progress",
    # what one holds
    "AdaptedProgram": "adaptc.program.adapted_program",
    "Runner": "adaptc.state.runner",
    "Bank": "adaptc.bank.bank",
    "Adapter": "adaptc.adapters.adapter",
    "Generator": "adaptc.generation.generator",
    "ServingModel": "adaptc.serving.serving_model",
    "Binding": "adaptc.binding.binding",
    "PackagedProgram": "adaptc.packages.packaged_program",
    "LoraConfig": "adaptc.methods.lora_family.lora_config",
    "ArrowConfig": "adaptc.methods.lora_family.arrow",
    "BdLoraConfig": "adaptc.methods.lora_family.variants.bdlora",
    "KasaConfig": "adaptc.methods.lora_family.variants.kasa",
    "LoftQConfig": "adaptc.methods.lora_family.loftq",
    "CordaConfig": "adaptc.methods.lora_family.from_data.corda",
    "EvaConfig": "adaptc.methods.lora_family.from_data.eva",
    "LoraGAConfig": "adaptc.methods.lora_family.from_data.lora_ga",
    "MontecloraConfig": "adaptc.methods.lora_family.variants.monteclora",
    "VeloraConfig": "adaptc.methods.lora_family.variants.velora",
    "AdaLoraConfig": "adaptc.methods.lora_family.adalora",
    "OFTConfig": "adaptc.methods.orthogonal.oft",
    "BOFTConfig": "adaptc.methods.orthogonal.boft",
    "HRAConfig": "adaptc.methods.orthogonal.hra",
    "VeraConfig": "adaptc.methods.shared_factors.vera",
    "PveraConfig": "adaptc.methods.shared_factors.pvera",
    "RandLoraConfig": "adaptc.methods.shared_factors.randlora",
    "VBLoRAConfig": "adaptc.methods.shared_factors.vblora",
    "FrodConfig": "adaptc.methods.shared_factors.frod",
    "TinyLoraConfig": "adaptc.methods.shared_factors.tinylora",
    "UniLoraConfig": "adaptc.methods.shared_factors.unilora",
    "LoHaConfig": "adaptc.methods.lycoris.loha",
    "LoKrConfig": "adaptc.methods.lycoris.lokr",
    "IA3Config": "adaptc.methods.sparse.ia3",
    "PsoftConfig": "adaptc.methods.orthogonal.psoft",
    "OSFConfig": "adaptc.methods.orthogonal.osf",
    "RoadConfig": "adaptc.methods.orthogonal.road",
    "MissConfig": "adaptc.methods.lora_family.miss",
    "GraloraConfig": "adaptc.methods.lora_family.gralora",
    "FourierFTConfig": "adaptc.methods.sparse.fourierft",
    "WaveFTConfig": "adaptc.methods.sparse.waveft",
    "XLoraConfig": "adaptc.methods.routed.xlora_config",
    "C3AConfig": "adaptc.methods.sparse.c3a",
    "DeftConfig": "adaptc.methods.weight_dependent.deft",
    "GloraConfig": "adaptc.methods.weight_dependent.glora",
    "BeftConfig": "adaptc.methods.sparse.beft",
    "LilyConfig": "adaptc.methods.shared_factors.lily",
    "PolyConfig": "adaptc.methods.routed.poly",
    "ShiraConfig": "adaptc.methods.sparse.shira",
    "HiraConfig": "adaptc.methods.weight_dependent.hira",
    "DeloraConfig": "adaptc.methods.weight_dependent.delora",
    "PeanutConfig": "adaptc.methods.weight_dependent.peanut",
    "SupertuningConfig": "adaptc.methods.sparse.supertuning",
    "AdamssConfig": "adaptc.methods.sparse.adamss",
    "LNTuningConfig": "adaptc.methods.sparse.ln_tuning",
    "TrainableTokensConfig": "adaptc.methods.sparse.trainable_tokens",
    "PromptTuningConfig": "adaptc.methods.prompt.prompt_tuning",
    "PrefixTuningConfig": "adaptc.methods.prompt.prefix_tuning",
    "CartridgeConfig": "adaptc.methods.prompt.cartridge",
    "PromptEncoderConfig": "adaptc.methods.prompt.p_tuning",
    "CPTConfig": "adaptc.methods.prompt.cpt",
    "AdaptionPromptConfig": "adaptc.methods.prompt.adaption_prompt",
    "MultitaskPromptTuningConfig": "adaptc.methods.prompt.multitask_prompt_tuning",
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

#: packages of further public names, by what one does with them
NAMESPACES = ("training", "distributed", "prefixes", "engines", "exporters", "methods", "debug")

#: names that were public here -> what they are called now
MOVED = {
    "BoundProgram": "adaptc.Runner",
    "RankAllocator": "adaptc.training.RankAllocator",
    "orthogonal_loss": "adaptc.training.orthogonal_loss",
    "lorafa_optimizer": "adaptc.training.lorafa_optimizer",
    "trainer_callback": "adaptc.training.trainer_callback",
    "check_gradients": "adaptc.training.check_gradients",
    "last_checkpoint": "adaptc.training.last_checkpoint",
    "initialize_kv_prefix_from_text": "adaptc.prefixes.initialize_kv_prefix_from_text",
    "initialize_kv_prefix_from_past_key_values": "adaptc.prefixes.initialize_kv_prefix_from_past_key_values",
    "prompt_embeddings_from_past_key_values": "adaptc.prefixes.prompt_embeddings_from_past_key_values",
    "compose_cartridge_adapters": "adaptc.prefixes.compose_cartridge_adapters",
    "register_method": "adaptc.methods.register_method",
    "check_method": "adaptc.methods.check_method",
    "create_arrow_model": "adaptc.methods.create_arrow_model",
    "arrow_adapter": "adaptc.methods.arrow_adapter",
    "TargetedConfig": "adaptc.methods.TargetedConfig",
    "ProgramConfig": "adaptc.methods.ProgramConfig",
    "VirtualTokens": "adaptc.methods.VirtualTokens",
    "ProgramMethod": "adaptc.methods.ProgramMethod",
    "Extra": "adaptc.methods.ExtraInput",
    "Method": "adaptc.methods.Method",
    "Slot": "adaptc.methods.Slot",
    "Initial": "adaptc.methods.InitialValues",
    "Op": "adaptc.methods.Op",
    "assert_no_recompiles": "adaptc.debug.assert_no_recompiles",
    "lower": "adaptc.debug.lower",
    "xlora_scalings": "adaptc.debug.xlora_scalings",
    "get_model_status": "adaptc.debug.get_model_status",
    "get_layer_status": "adaptc.debug.get_layer_status",
}

__all__ = [*PUBLIC, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy_names(__name__, PUBLIC, MOVED, NAMESPACES)
