"""Adapter methods, one file each: a config, the slots, their init, and what the method means as a function.

Other packages import the names below; modules with a leading underscore are private to this package.
"""

from typing import TYPE_CHECKING

from adaptc.methods._shared.adapter_sizes import check_sizes
from adaptc.methods._shared.config import AdapterConfig, TargetedConfig
from adaptc.methods._shared.default_targets import NO_GRAPH_DEFAULTS, adds_default_modules
from adaptc.methods._shared.method_parts import ExpertAdapter
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.name_patterns import check_patterns, default_and_pattern, proper_suffixes
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods._shared.registry import (
    check_registered,
    config_class,
    is_builtin,
    method_from_dict,
    register_method,
)
from adaptc.methods._shared.saved_modules import TokenRows, TrainedParameter
from adaptc.methods._shared.stacked import PerExpertMethod
from adaptc.methods._shared.union_configs import exact_names_regex, union_target_fields
from adaptc.methods.lora_family.arrow_experts import make_arrow_adapter, routed_adapter_names
from adaptc.methods.lora_family.experts import JoinedExperts, join_experts, split_experts
from adaptc.methods.prompt.attention_config import AttentionConfig
from adaptc.methods.prompt.key_values import KVPrefixConfig, rows_from_kv_prefix
from adaptc.methods.prompt.virtual_token_method import PROMPT_EMBEDDINGS
from adaptc.methods.prompt.virtual_tokens import VirtualTokens
from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.methods._rooms_above import (  # pyright: ignore[reportMissingModuleSource]  # it is a stub
        arrow_adapter,
        check_method,
        create_arrow_model,
        initialize_from_data,
        reduce_intruder_dimension,
    )
    from adaptc.passes.graph.ops import Op
    from adaptc.passes.protocol.coefficients import ExtraInput
    from adaptc.passes.protocol.method import InitialValues, Method, Slot
    from adaptc.passes.protocol.parts.bank_form import BankForm
    from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
    from adaptc.passes.protocol.parts.file_format import FileFormat
    from adaptc.passes.protocol.parts.kernel_form import KernelForm
    from adaptc.passes.protocol.parts.shared_slots import SharedSlots
    from adaptc.passes.protocol.parts.size_rule import SizeRule
    from adaptc.passes.protocol.program_method import ProgramMethod

#: public name -> the module that defines it; the other names below are for the rest of adaptc
PUBLIC = {
    "register_method": "adaptc.methods._shared.registry",
    "check_method": "adaptc.verification.check_method",
    "create_arrow_model": "adaptc.api.adapt_model",
    "arrow_adapter": "adaptc.adapters.arrow_adapter",
    "reduce_intruder_dimension": "adaptc.adapters.intruders",
    "initialize_from_data": "adaptc.training.from_data.initialize",
    "TargetedConfig": "adaptc.methods._shared.config",
    "ProgramConfig": "adaptc.methods._shared.program_config",
    "VirtualTokens": "adaptc.methods.prompt.virtual_tokens",
    "ProgramMethod": "adaptc.passes.protocol.program_method",
    "ExtraInput": "adaptc.passes.protocol.coefficients",
    "Method": "adaptc.passes.protocol.method",
    "Slot": "adaptc.passes.protocol.method",
    "InitialValues": "adaptc.passes.protocol.method",
    "FileFormat": "adaptc.passes.protocol.parts.file_format",
    "SizeRule": "adaptc.passes.protocol.parts.size_rule",
    "BankForm": "adaptc.passes.protocol.parts.bank_form",
    "KernelForm": "adaptc.passes.protocol.parts.kernel_form",
    "SharedSlots": "adaptc.passes.protocol.parts.shared_slots",
    "ExtraInputs": "adaptc.passes.protocol.parts.extra_inputs",
    "Op": "adaptc.passes.graph.ops",
}

__all__ = [
    *PUBLIC,  # pyright: ignore[reportUnsupportedDunderAll]
    "NO_GRAPH_DEFAULTS",
    "PROMPT_EMBEDDINGS",
    "AdapterConfig",
    "AttentionConfig",
    "JoinedExperts",
    "KVPrefixConfig",
    "ModelFacts",
    "ExpertAdapter",
    "ProgramConfig",
    "PerExpertMethod",
    "TargetedConfig",
    "TokenRows",
    "VirtualTokens",
    "TrainedParameter",
    "adds_default_modules",
    "split_experts",
    "rows_from_kv_prefix",
    "check_patterns",
    "check_registered",
    "check_sizes",
    "config_class",
    "proper_suffixes",
    "exact_names_regex",
    "is_builtin",
    "method_from_dict",
    "routed_adapter_names",
    "register_method",
    "make_arrow_adapter",
    "join_experts",
    "union_target_fields",
    "default_and_pattern",
]

# Looked up when used: some lie in rooms above this one, which it does not import; ``_rooms_above.pyi`` tells type
# checkers of those.
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
