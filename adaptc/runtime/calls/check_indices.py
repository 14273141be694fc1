"""Refuse inputs with which compiled code would end the process or compute nonsense.

Indices into a table must be within its rows, and no derivative may be followed through an input. An error says which
input is wrong. Values that are not on the CPU are not checked, since that would wait for the device. There the code
itself raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, BackendError
from adaptc.torch_modes import is_wrapped_or_dual


def check_index_bounds(name: str, value: Tensor, bounds: tuple[int, int]) -> None:
    """Raise AdaptcError for a number in the input ``name`` that is outside ``bounds`` (least, greatest), inclusive."""
    if value.device.type != "cpu" or not value.numel():
        return
    low, high = bounds
    found = tuple(map(int, value.aminmax()))
    if low <= found[0] and found[1] <= high:
        return
    wrong = found[0] if found[0] < low else found[1]
    raise AdaptcError(
        f"input {name!r} has {wrong}, and the model looks up a row from {max(low, 0)} to {high} with it: a token that "
        "the vocabulary lacks, a position beyond the last, or their like. Nothing was computed"
    )


#: what to do in place of a call of compiled code
USE_EAGER_ADVICE = "Set prog.backend = 'eager', or call prog.module()"


def check_not_transformed(
    expected: Sequence[tuple[str, Any]], flat: Sequence[Any], advice: str = USE_EAGER_ADVICE
) -> None:
    """Raise BackendError for an input that a transform of ``torch.func`` or a forward-mode derivative follows.

    Compiled code would silently lose the derivative. ``expected`` has the names of the inputs, as ``Inputs`` has them.
    ``advice`` is the advice that ends the message.
    """
    for (name, _), value in zip(expected, flat, strict=True):
        if is_wrapped_or_dual(value):
            raise BackendError(
                f"input {name!r} is followed by a transform of torch.func or a forward-mode derivative, and compiled "
                f"code has no derivatives and no rule for vmap. {advice}"
            )
