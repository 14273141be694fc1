"""Keep copies of base weights in oneDNN's packed layout, where the user allows the memory (``AdaptedProgram.pack``).

A layer is called as before. At numbers of rows where a packed weight was measured to be faster, it reads a packed copy.
The first such call makes the copy. Values are not rounded: a weight is packed in its own dtype. A copy lives as long as
both the code of calls and the weight it was made of. A weight that was written to, or moved to other memory, is packed
anew. Programs that read one weight share one copy.

Where a packed weight is faster than the weight as it lies is measured once per machine, and kept in a file.

Private torch use, with the public route that was tried:
- ``torch.ops.mkldnn._reorder_linear_weight``: packs. Public: ``torch.utils.mkldnn.to_mkldnn`` packs modules, for
  tensors of its own layout.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from adaptc.locks import reset_after_fork
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import LINEAR, PACKED, can_use_onednn, linear_matmul, onednn_matmul
from adaptc.torch_modes import outside_modes
from adaptc.tuning.matmul_table import MIN_SIZE, matmul_table
from adaptc.tuning.matmul_times import Times, least_times, make_operands, measure_times, unpacked_matmuls

_lock = reset_after_fork(threading.Lock())
#: (address, shape, strides, dtype) of a weight -> a packed copy that some layer holds
_copies_by_memory: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()


class PackedLayers:
    """The layers of one piece of code that read packed weights of ``dtype``, and the choices that were made."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.layers: list[PackedLayer] = []
        self.choices: list[MatmulChoice] = []

    def make_layer(self, out: int, width: int, dtype: torch.dtype, matmul_args: Sequence[Any]) -> PackedLayer | None:
        """Return a layer that reads packed copies of a weight (out, width), or None where that is not faster.

        It is the ``make`` of ``passes.lower.pack_products``: ``matmul_args`` has the other arguments of
        ``adaptc::product``.
        """
        if dtype != self.dtype:
            return None
        choice = choose_packed(out, width, dtype)
        self.choices.append(choice)
        if choice.kind != PACKED:
            return None
        self.layers.append(PackedLayer(choice.classes, matmul_args))
        return self.layers[-1]


class PackedLayer:
    """A linear layer: x (..., K), weight (N, K), bias (N,) or None -> (..., N).

    It reads a packed copy of the weight in calls whose number of rows is in one of the classes ``packed_classes``. All
    other calls, and those that need a gradient, are ``adaptc::product`` with the arguments ``matmul_args``.
    """

    __name__ = "packed_layer"

    def __init__(self, packed_classes: Sequence[int], matmul_args: Sequence[Any]) -> None:
        self.packed_classes, self.matmul_args = packed_classes, matmul_args
        #: id of a weight -> the weight, its address, its version (count of writes), its packed copy
        self._copies_by_id: dict[int, tuple[ref[Tensor], int, int, Tensor]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if can_use_onednn(x, weight, bias, self.packed_classes) and not weight.is_inference():
            return onednn_matmul(x, self._current_copy(weight), bias)
        return linear_matmul(x, weight, bias, *self.matmul_args)

    @property
    def copies(self) -> list[Tensor]:
        """Return the packed copies that are held now."""
        return [copy for *_, copy in list(self._copies_by_id.values())]

    def _current_copy(self, weight: Tensor) -> Tensor:
        found = self._copies_by_id.get(id(weight))
        if found is None:
            return self._make_copy(weight)
        known, place, version, copy = found
        fresh = known() is weight and place == weight.data_ptr() and version == weight._version
        return copy if fresh else self._make_copy(weight)

    def _make_copy(self, weight: Tensor) -> Tensor:
        with _lock, outside_modes(), torch.no_grad():
            # Both are read before the copy is made, so that a write in between makes the copy stale.
            place, version = weight.data_ptr(), weight._version
            key = (place, tuple(weight.shape), weight.stride(), weight.dtype)
            copy = _copies_by_memory.get(key)
            # The address may belong to another weight by now, or a write may have gone through another tensor object.
            if copy is None or not torch.equal(copy.to_dense(), weight):
                copy = _copies_by_memory[key] = pack_weight(weight)
            name, held = id(weight), self._copies_by_id
            gone = ref(weight, lambda r: held.pop(name) if name in held and held[name][0] is r else None)
            held[name] = gone, place, version, copy
            return copy


#: the number of rows that the packed layout is made for; it is right for any number
PACK_ROWS = 128


_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def choose_packed(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    """Return the classes of rows at which a packed copy of a weight (out, width) is faster than the best other kind."""
    if min(out, width) < MIN_SIZE:
        return MatmulChoice(LINEAR, (), f"fewer than {MIN_SIZE} rows or columns")
    if _reorder is None:
        return MatmulChoice(LINEAR, (), "torch packs nothing here")
    found = matmul_table(dtype, measure_packed, PACKED).choose_by_class(out, width)
    if found.kind == LINEAR:
        return replace(found, reason=found.reason.replace("the fastest here", "no faster here"))
    return replace(found, kind=PACKED, reason="measured: faster than the weight as it lies")


def measure_packed(dtype: torch.dtype) -> Times:
    """Measure the best matmul on weights as they lie and the one on packed copies, and return their times."""
    return measure_times(dtype, _time_packed, PACKED)


def _time_packed(pool: Tensor, size: tuple[int, int], rows: int, end: float) -> tuple[float, float] | None:
    x, weights = make_operands(pool, size, rows)
    copies = [pack_weight(w) for w in weights]
    best = least_times([*unpacked_matmuls(x, weights), lambda n: onednn_matmul(x, copies[n % len(copies)], None)], end)
    return None if best is None else (min(best[:-1]), best[-1])


def pack_weight(weight: Tensor) -> Tensor:
    """Return a copy of a weight (N, K) in oneDNN's packed layout: an opaque tensor of the weight's dtype."""
    return _reorder(weight.detach(), PACK_ROWS)
