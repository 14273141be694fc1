"""Adapter methods, one file each: a config, the slots, their init, and what the method means as a function.

Other packages import the names below; modules with a leading underscore are private to this package.
"""

from adaptc.methods._shared.adapter_sizes import check_sizes
from adaptc.methods._shared.config import AdapterConfig, TargetedConfig
from adaptc.methods._shared.default_targets import OTHER_MEANING, adapts_defaults
from adaptc.methods._shared.method_parts import MethodPart
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.name_patterns import check_patterns, endings, pattern_value, value_table
from adaptc.methods._shared.program_config import ProgramConfig
from adaptc.methods._shared.registry import check_registered, config_class, is_own, method_of, register_method
from adaptc.methods._shared.saved_modules import TokenRows, Whole
from adaptc.methods._shared.stacked import Stacked
from adaptc.methods._shared.union_configs import exactly, united
from adaptc.methods.lora_family.arrow_experts import names_in, routing
from adaptc.methods.lora_family.experts import Experts, apart, side_by_side
from adaptc.methods.prompt.attention_config import AttentionConfig
from adaptc.methods.prompt.key_values import KeyValueConfig, as_rows
from adaptc.methods.prompt.virtual_token_method import PROMPT
from adaptc.methods.prompt.virtual_tokens import VirtualTokens

__all__ = [
    "OTHER_MEANING",
    "PROMPT",
    "AdapterConfig",
    "AttentionConfig",
    "Experts",
    "KeyValueConfig",
    "ModelFacts",
    "MethodPart",
    "ProgramConfig",
    "Stacked",
    "TargetedConfig",
    "TokenRows",
    "VirtualTokens",
    "Whole",
    "adapts_defaults",
    "apart",
    "as_rows",
    "check_patterns",
    "check_registered",
    "check_sizes",
    "config_class",
    "endings",
    "exactly",
    "is_own",
    "method_of",
    "names_in",
    "pattern_value",
    "register_method",
    "routing",
    "side_by_side",
    "united",
    "value_table",
]
