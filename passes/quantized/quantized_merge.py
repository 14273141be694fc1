"""Say what a merge makes of quantised weights: plain weights, quantised weights, or the same weights and a residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from adaptc.errors import ConfigError, MergeError, short_repr
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor


class QuantizedMerge(Enum):
    """The options of ``adaptc.merge`` for the quantised weights that an adapter changes."""

    DEQUANTIZE = "dequantize=True"
    REQUANTIZE = "requantize=True"
    KEEP_RESIDUAL = 'keep="residual"'


def parse_quantized_merge(dequantize: bool, requantize: bool, keep: str | None) -> QuantizedMerge | None:
    """Return what the options of ``adaptc.merge`` say, None for none. Raises ConfigError for more than one."""
    if keep not in (None, "residual"):
        raise ConfigError(f"keep={short_repr(keep)} is not 'residual'")
    given = {
        QuantizedMerge.DEQUANTIZE: dequantize,
        QuantizedMerge.REQUANTIZE: requantize,
        QuantizedMerge.KEEP_RESIDUAL: keep is not None,
    }
    chosen = [option for option, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise ConfigError(f"{chosen[0].value} and {chosen[1].value} exclude each other: give one of them")
    return chosen[0] if chosen else None


def parse_correction_rank(rank: int | None, quantized: QuantizedMerge | None) -> int:
    """Return the rank of corrections, 0 for none. Raises ConfigError for a rank that goes with no other option."""
    if rank is None:
        return 0
    if rank < 1:
        raise ConfigError(f"correction_rank={short_repr(rank)}: a positive integer, or None for no correction")
    if quantized is not QuantizedMerge.REQUANTIZE:
        raise ConfigError(
            f"correction_rank={rank} corrects the rounding of {QuantizedMerge.REQUANTIZE.value}: give both"
        )
    return rank


def attachments_to_keep(
    base: Mapping[str, Any], present: Sequence[Attachment], quantized: QuantizedMerge | None
) -> list[Attachment]:
    """Return the attachments at quantised weights that stay in the graph, which are none but for ``KEEP_RESIDUAL``.

    ``base`` maps FQNs to base tensors. Raises MergeError where there are quantised weights and ``quantized`` is None.
    """
    weights = {a.id: w for a in present if isinstance(w := base.get(a.fqn), QuantizedTensor)}
    found = [a for a in present if a.id in weights]
    if found and quantized is None:
        ways = " or ".join(option.value for option in QuantizedMerge)
        raise MergeError(
            f"site {found[0].id!r} and {len(found) - 1} more have quantised weights ({weights[found[0].id].scheme}). A "
            f"merge would round or enlarge them: say which, with {ways}"
        )
    return found if quantized is QuantizedMerge.KEEP_RESIDUAL else []


def requantize(fqn: str, old: Tensor, exact: Tensor) -> Tensor:
    """Return the weight ``exact`` as the weight ``old``, called ``fqn``, is stored: by its scheme, or in its dtype."""
    if not isinstance(old, QuantizedTensor):
        return exact.to(old.dtype)
    return QuantizedTensor.quantize(exact.to(old.dtype), old.scheme, old.is_transposed, old.row_axes)
