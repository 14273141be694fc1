"""Numbers that name no row of a table, found before compiled code meets them: it would end the process.

Before: the values of a call's inputs. After: they are as they were, and each is within its bounds, or an error that
says which is not. Values on another device than the processor are not waited for: there the code itself says it.
"""

from __future__ import annotations

from torch import Tensor

from adaptc.errors import AdaptcError


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
