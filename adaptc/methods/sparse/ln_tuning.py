"""LN tuning: modules are trained as whole copies, by default the LayerNorms (Zhao et al., arXiv 2312.11420).

The method is ``TrainedParameter`` at every parameter of a targeted module, whatever the module's type, with PEFT's keys
``<module>.ln_tuning_layers.<parameter>``. For parameters of submodules PEFT leaves the adapter's name in the key,
``<module>.ln_tuning_layers.default.<path>``, and reads no other keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from adaptc.methods._shared.config import TargetedConfig
from adaptc.methods._shared.model_facts import ModelFacts
from adaptc.methods._shared.saved_modules import TrainedParameter

PEFT_MODULE = "ln_tuning_layers"
_NORM = re.compile(r"(Layer|RMS)_?Norm\w*$", re.IGNORECASE)


@dataclass
class LNTuningConfig(TargetedConfig):
    """PEFT's ``LNTuningConfig``: same names, same defaults.

    ``target_modules`` may name modules of any type. The default is PEFT's table; for an architecture that is not in it,
    every LayerNorm and RMSNorm.

    Example:
        >>> config = adaptc.LNTuningConfig(target_modules=["norm"])
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    target_unit: ClassVar[str] = "modules"
    unsupported_fields: ClassVar[Mapping[str, str]] = {
        "target_parameters": "modules are trained as a whole; name the module in target_modules",
    }

    modules_to_save: list[str] | str | None = None  # PEFT takes one name as well

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]

    def with_model_defaults(self, facts: ModelFacts) -> Self:
        new = super().with_model_defaults(facts)
        paths = [path for path, cls in facts.module_types.items() if path and _NORM.search(cls)]
        names = {path.rpartition(".")[2] for path in paths}
        others = [path for path in facts.module_types if path.rpartition(".")[2] in names and path not in paths]
        found = paths if others else list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        return new.with_missing_filled({"target_modules": found}) if found else new

    def method(self, name: str, kind: str) -> TrainedParameter:
        return TrainedParameter(f"{PEFT_MODULE}.", place=PEFT_MODULE, submodules="default.")
