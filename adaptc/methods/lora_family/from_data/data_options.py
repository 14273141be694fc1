"""Define the base class of the options of first values that are made of data, under PEFT's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptc.methods._shared.option_checks import OptionGroup


@dataclass
class DataOptions(OptionGroup):
    """The options of one scheme. ``scheme`` is its ``init_lora_weights``."""

    scheme: ClassVar[str]
