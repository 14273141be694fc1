"""What compiled code must not be given, found before it meets it: it would end the process, or compute nonsense.

Before: the values of a call's inputs. After: they are as they were, and numbers that name a row of a table are within
its bounds, and nobody follows a derivative through them; or an error says which input is wrong. Values on another
device than the processor are not waited for: there the code itself says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, BackendError
from adaptc.torch_modes import transformed


def check_bounds(name: str, value: Tensor, bounds: tuple[int, int]) -> None:
    """Raises AdaptcError for a number in the input ``name`` that is not within ``bounds``, both of which may be."""
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
EAGER = "Set prog.backend = 'eager', or call prog.module()"


def check_followed(expected: Sequence[tuple[str, Any]], flat: Sequence[Any], way: str = EAGER) -> None:
    """Raises BackendError for an input that a transform of ``torch.func`` or a forward-mode derivative follows: code
    that is compiled is not told. ``expected``: the names of the inputs, as ``Inputs`` has them; ``way``: what to do."""
    for (name, _), value in zip(expected, flat, strict=True):
        if transformed(value):
            raise BackendError(
                f"input {name!r} is followed by a transform of torch.func or a forward-mode derivative, and compiled "
                f"code has no derivatives and no rule for vmap. {way}"
            )
