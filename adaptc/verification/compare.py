"""Measure differences between outputs, and between states, for a verification.

Nothing here knows of adapters. Outputs of any structure become a flat dict. Two outputs are compared leaf by leaf, in
float64; NaN and infinities equal themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.passes.graph.storage import storage_key
from adaptc.verification.report import Check

Leaves = dict[str, Any]


def output_leaves(output: Any) -> Leaves:
    """Return the tensors and numbers of an output by their path, copied so that a later call cannot write to them."""
    named = {_readable_path(path): v for path, v in named_leaves(output)}
    return {k: clone_tensor(v) for k, v in named.items() if isinstance(v, (Tensor, int, float, bool))}


def _readable_path(path: str) -> str:
    """Return the readable form of a path in an output: ``pair[1]`` for ``['pair'][1]``."""
    name = re.sub(r"\['([^']*)'\]", r".\1", path).strip(".")
    return f"output{name}" if not name or name[0] == "[" else name


def clone_tensor(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def clone_tensors(value: Any) -> Any:
    """Return a copy of the inputs in ``value`` for one call, since a model may write to its inputs."""
    return pytree.tree_map(clone_tensor, value)


def difference(want: Any, got: Any) -> tuple[float, float]:
    """Return (largest absolute difference, largest finite magnitude of ``want``).

    Equal infinities, and NaN in both, are no difference. The difference is infinite for another shape, for NaN in one
    only, and for unequal values that are no tensors.
    """
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return (0.0 if want == got else inf), 1.0
    if want.shape != got.shape or want.is_floating_point() != got.is_floating_point():
        return inf, 1.0
    if want.numel() == 0:
        return 0.0, 0.0
    wide_dtype = torch.complex128 if want.is_complex() or got.is_complex() else torch.float64
    a, b = want.to(wide_dtype), got.to(wide_dtype)
    is_same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(is_same, 0.0, (a - b).abs())
    error = float(torch.where(gap.isnan(), inf, gap).max())
    finite = a[a.isfinite()].abs()
    return error, float(finite.max()) if finite.numel() else 0.0


def compare(
    name: str, expected: Sequence[Leaves], found: Sequence[Leaves], tolerance: float, atol: float | None = None
) -> Check:
    """Return the check for the worst difference over all runs and outputs, relative to the limit of its output.

    The limit is ``atol``, or else ``tolerance`` times the largest magnitude of the output. ``expected`` may have more
    outputs than ``found``, such as a model's cache; every output in ``found`` must be in ``expected``.
    """
    worst_ratio, worst = -1.0, Check(name, False, note="there are no outputs to compare")
    for i, (want, got) in enumerate(zip(expected, found, strict=True), 1):
        if missing := sorted(got.keys() - want.keys()):
            return Check(name, False, note=f"outputs differ in structure: {', '.join(missing[:3])}")
        for key in got:
            error, scale = difference(want[key], got[key])
            limit = tolerance * scale if atol is None else atol
            ratio = error / limit if limit else (inf if error else 0.0)
            if ratio > worst_ratio:
                worst_ratio, where = ratio, f"{key}, run {i}" if error else ""
                worst = Check(name, error <= limit, error, error / scale if scale else error, limit, where)
    return worst


def differ(a: Leaves, b: Leaves) -> bool:
    """Return whether two outputs differ in any leaf, or in their structure."""
    return a.keys() != b.keys() or any(difference(a[k], b[k])[0] for k in a)


def digests(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return a checksum of each tensor's bytes by name: it shows changes in place, too, and no copy is kept."""
    digest_by_storage: dict[Any, bytes] = {}
    out: dict[str, bytes] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            key = storage_key(value)
            if key not in digest_by_storage:
                data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest_by_storage[key] = hashlib.blake2b(data, digest_size=16).digest()
            out[name] = digest_by_storage[key]
    return out
