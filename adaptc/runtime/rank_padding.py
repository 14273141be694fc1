"""Find how to pad slots to a larger rank without changing what their site computes.

Compiled code has fixed shapes, so a package holds slots for one rank, and smaller adapters are padded up to it. A
recorded call has fixed shapes, too: its adapters are padded to one of a few ranks.

The right padding depends on how a method lays its tensors out: stacked experts keep one block of ranks per expert.
Methods do not declare it. The few possible paddings are tried on random values, and one that leaves the method's own
result unchanged is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, BackendError
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method

#: the tolerance of the comparison: padding changes the order of sums, and a wrong padding is off by whole values
TOLERANCE = 1e-3
#: the smallest rank that adapters are padded to where calls are recorded
SMALLEST_BUCKET = 8


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


@lru_cache(maxsize=512)
def find_paddings(method: Method, op: Op, form: str) -> Mapping[str, Padding] | None:
    """Return how to pad each slot of ``method`` that has a free axis from one rank to a larger one, by slot name.

    ``form`` is the form the site was injected in, "apply" or "weight". Returns None where the method has no rank, or
    where no padding works.
    """
    with torch.device("cpu"):  # whatever the caller's default device is
        return _try_paddings(method, op, form)


def _try_paddings(method: Method, op: Op, form: str) -> Mapping[str, Padding] | None:
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


def pad_rank_one(
    values: list[Any],
    *,
    names: Sequence[str | None],
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    training: bool,
) -> list[Any]:
    """Pad lifted inputs of rank one to rank two, in ``values`` itself, and return them.

    Compiled code would be specialised on sizes 0 and 1. ``names`` are the FQNs of ``values``. Raises BackendError where
    the program is ``training``: a padded copy would not follow what training writes to the slots.
    """
    position_of = {n: i for i, n in enumerate(names)}
    for a in attachments:
        op = ops[a.id]
        if a.method.sizes.exact:  # their code is right for sizes of one and zero as well, so nothing is padded
            continue
        wanted: dict[str, tuple[int, ...]] = {}
        for slot, spec in a.method.sizes.minimal(op).slots(op).items():
            have = values[position_of[a.slots[slot]]].shape
            wanted[slot] = tuple(max(h, spec.shape[i]) if i in spec.free else h for i, h in enumerate(have))
        short = {s: shape for s, shape in wanted.items() if shape != tuple(values[position_of[a.slots[s]]].shape)}
        if short and training:
            raise BackendError(
                f"site {a.fqn!r}: inductor needs a rank of two or more in a program that trains; compile with r=2 "
                "or more, or with backend='eager'"
            )
        how = (find_paddings(a.method, op, a.form) or {}) if short else {}
        for slot, shape in short.items():
            i = position_of[a.slots[slot]]
            values[i] = how.get(slot, Padding())(values[i], shape)
    return values


def pad_to_buckets(
    values: Sequence[Any], names: Sequence[str | None], attachments: Sequence[Attachment], ops: Mapping[str, Op]
) -> list[Any]:
    """Return lifted inputs in which ranks are powers of two, of at least SMALLEST_BUCKET. A rank of zero stays zero.

    A site with groups has the next multiple of them. ``names`` are the FQNs of ``values``. Slots that no padding leaves
    as they are keep their sizes.
    """
    padded, position_of = list(values), {n: i for i, n in enumerate(names)}
    for a in attachments:
        op, method = ops[a.id], a.method
        followers = {n: s.free for n, s in method.slots(op).items() if s.free and not s.apart}
        have = {n: tuple(padded[position_of[a.slots[n]]].shape) for n in followers}
        wanted = {} if method.sizes.exact else _bucket_shapes(method, op, have, followers)
        how = (find_paddings(method, op, a.form) or {}) if wanted != have else {}
        for slot in wanted.keys() & how.keys():
            i = position_of[a.slots[slot]]
            padded[i] = how[slot](padded[i], wanted[slot])
    return padded


def _bucket_shapes(
    method: Method, op: Op, have: Mapping[str, tuple[int, ...]], free: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of slots at the smallest bucket that holds shapes ``have``; {} where there is none.

    ``free`` are the axes that follow the rank. Others may be longer than the site's, in a slot that sites share.
    """
    sizes = [have[n][i] for n, axes in free.items() for i in axes]
    rank = SMALLEST_BUCKET
    while sizes and all(sizes) and rank < 2 * max(*sizes, SMALLEST_BUCKET):
        larger = method.sizes.with_rank(op, rank)
        try:
            specs = {} if larger is None else larger.slots(op)
        except AdaptcError:  # a rank that the method does not take
            break
        if not have.keys() <= specs.keys():
            break
        shapes = {
            n: tuple(specs[n].shape[i] if i in free[n] else size for i, size in enumerate(shape))
            for n, shape in have.items()
        }
        if all(w >= h for n in have for h, w in zip(have[n], shapes[n], strict=True)):
            return shapes
        rank *= 2
    return {}


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
