"""Find how to pad slots to a larger rank without changing what their site computes.

Compiled code has fixed shapes, so a package holds slots for one rank, and smaller adapters are padded up to it. The
right padding depends on how a method lays its tensors out: stacked experts keep one block of ranks per expert. Methods
do not declare it. The few possible paddings are tried on random values, and one that leaves the method's own result
unchanged is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method

#: the tolerance of the comparison: padding changes the order of sums, and a wrong padding is off by whole values
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Padding:
    """A way to pad a slot: each axis that grows is ``blocks`` equal blocks, and each gets ``fill`` at its end."""

    blocks: int = 1
    fill: float = 0.0

    def can_pad(self, old_shape: tuple[int, ...], new_shape: tuple[int, ...]) -> bool:
        """Return whether shape ``old_shape`` can be padded to ``new_shape``.

        No axis may shrink, and both sizes of an axis that grows must be multiples of ``blocks``.
        """
        pairs = zip(old_shape, new_shape, strict=False)
        grows = [h == w or (h < w and not h % self.blocks and not w % self.blocks) for h, w in pairs]
        return len(old_shape) == len(new_shape) and all(grows)

    def __call__(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``tensor`` padded to ``shape``. Raises ValueError where it does not fit."""
        if not self.can_pad(tuple(tensor.shape), shape):
            raise ValueError(f"{tuple(tensor.shape)} cannot be padded to {shape}")
        for axis, (have, want) in enumerate(zip(tensor.shape, shape, strict=True)):
            if have == want:
                continue
            apart = tensor.unflatten(axis, (self.blocks, have // self.blocks))
            room = list(apart.shape)
            room[axis + 1] = (want - have) // self.blocks
            tensor = torch.cat([apart, apart.new_full(room, self.fill)], axis + 1).flatten(axis, axis + 1)
        return tensor


def find_paddings(method: Method, op: Op, form: str) -> dict[str, Padding] | None:
    """Return how to pad each slot of ``method`` that has a free axis from one rank to a larger one, by slot name.

    ``form`` is the form the site was injected in, "apply" or "weight". Returns None where the method has no rank, or
    where no padding works.
    """
    method = method.noiseless()  # random numbers would differ from one try to the next
    small, large = (method.sizes.with_rank(op, n * op.groups) for n in (2, 5))
    if small is None or large is None:
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        specs, shapes = small.slots(op), {n: s.shape for n, s in large.slots(op).items()}
    except AdaptcError:
        return None
    free = [n for n, s in specs.items() if s.free]
    W = torch.randn(op.shape, generator=generator)
    values = small.identity(op, W, torch.float32)
    values |= {n: _random_like(t, generator) for n, t in values.items() if t.is_floating_point()}
    values = {n: _random_if_resized(values[n], s.shape, generator) for n, s in specs.items()}
    scale = None if small.scale(op) is None else torch.tensor(0.7)
    x = random_input(op, generator)

    def result(m: Method, slots: Mapping[str, Tensor]) -> Tensor:
        if form == "apply":
            return m.call_adapted(op, x, W, None, slots, scale)
        return m.weight(op, W, slots, scale)

    with torch.no_grad():
        expected = result(small, values)
        for choice in _candidate_paddings(op, [specs[n].fill for n in free]):
            by_slot = dict(zip(free, choice, strict=True))
            try:
                padded = {n: by_slot[n](t, shapes[n]) if n in by_slot else t for n, t in values.items()}
                found = result(small, padded)
            except (ValueError, RuntimeError):  # this layout does not even fit the method's reshapes
                continue
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
                return by_slot
    return None


def _candidate_paddings(op: Op, fills: list[float]) -> Iterator[tuple[Padding, ...]]:
    blocks = list(dict.fromkeys([1, max(op.experts, 1), op.groups]))
    return product(*([Padding(b, f) for f in dict.fromkeys([0.0, fill]) for b in blocks] for fill in fills))


def _random_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator)


def _random_if_resized(t: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return t if tuple(t.shape) == shape or not t.is_floating_point() else torch.randn(shape, generator=generator)


def random_input(op: Op, generator: torch.Generator) -> Any:
    if not op.callable:
        return None
    if op.kind == "embedding":
        return torch.randint(0, op.in_features, (7,), generator=generator)
    dilation = op.other_args[2] if op.is_conv else ()
    size = [d * (k - 1) + 3 for k, d in zip(op.kernel, dilation, strict=True)]
    return torch.randn(2, op.in_features, *size, generator=generator)
