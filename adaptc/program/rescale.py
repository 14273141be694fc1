"""PEFT's ``rescale_adapter_scale``, for programs and what holds one."""

from __future__ import annotations

from contextlib import AbstractContextManager

from adaptc.program.adapted import AdaptedProgram
from adaptc.program.holder import of_programs


@of_programs
def rescale_adapter_scale(program: AdaptedProgram, multiplier: float) -> AbstractContextManager[None]:
    """A block in which calls of ``program`` have the scales of all its adapters multiplied by ``multiplier``; after it
    they are what they were. A factor between 0 and 1 lies between the base and the fine-tuned model (WiSE-FT).

    It holds for calls that this thread, or this task of asyncio, begins in the block; ``merge`` and ``save``, which
    would see nothing of it, are refused there. Raises ConfigError for what is no finite number, and where no method has
    a scale. It is ``program.rescaled(multiplier)``.
    """
    return program.rescaled(multiplier)
