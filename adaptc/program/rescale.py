"""PEFT's ``rescale_adapter_scale``, for programs and objects that hold one."""

from __future__ import annotations

from contextlib import AbstractContextManager

from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import needs_graph
from adaptc.public_names import warn_renamed


@needs_graph
def rescale_adapter_scale(program: AdaptedProgram, multiplier: float) -> AbstractContextManager[None]:
    """Run the block with the scales of all adapters of ``program`` multiplied by ``multiplier``, as its calls see them.

    Deprecated: use ``program.scaled(multiplier)``.

    After the block they are what they were. A factor between 0 and 1 lies between the base and the fine-tuned model
    (WiSE-FT). It holds for calls that this thread, or this task of asyncio, begins in the block. ``merge`` and ``save``
    are refused there, since they would not see it.

    Args:
        program: a program.
        multiplier: the factor on each scale.

    Returns:
        a context manager.

    Raises:
        ConfigError: the multiplier is not a finite number, or no method has a scale.

    Example:
        >>> with prog.scaled(0.5):
        ...     prog(x).shape
        torch.Size([2, 3])
    """
    warn_renamed("adaptc.rescale_adapter_scale(program, factor)", "program.scaled(factor)")
    return program.scaled(multiplier)
