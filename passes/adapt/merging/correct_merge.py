"""Keep a low-rank correction beside each weight that a merge stored in few bits again.

A merged weight M is stored as Q. The correction B A has the largest singular terms of M - Q: no other matrix of its
rank brings Q nearer to M. It becomes a part of the graph, as an adapter does that is kept beside a quantised weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import MergeError
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.site_merge import SiteMerge
from adaptc.passes.adapt.unload import KeepRegions
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.passes.protocol.regions import site_op
from adaptc.passes.quantized.quantized_merge import requantize
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.torch_typing import reduced_svd


@dataclass(frozen=True, eq=False)
class Correction:
    """The correction of a weight as it is stored: ``up`` (rows, rank) and ``down`` (rank, columns), in its dtype.

    ``error`` is the largest difference of an element that it leaves.
    """

    up: Tensor
    down: Tensor
    error: float


@dataclass(frozen=True, eq=False)
class CorrectedStorage:
    """A way to store merged weights for ``Merge.store``: by their scheme, with a correction of ``rank`` for each.

    ``corrections`` is filled, by FQN.
    """

    rank: int
    corrections: dict[str, Correction] = field(default_factory=dict[str, Correction])

    def __call__(self, fqn: str, old: Tensor, exact: Tensor) -> Tensor:
        stored = requantize(fqn, old, exact)
        # A merge that gives up the base makes each weight twice.
        if isinstance(stored, QuantizedTensor) and fqn not in self.corrections:
            self.corrections[fqn] = _correct(exact, stored, self.rank)
        return stored

    def row(self, row: SiteMerge) -> SiteMerge:
        """Return ``row`` with the rank of the correction, and the error that it leaves."""
        found = self.corrections.get(row.fqn)
        return row if found is None else replace(row, correction_rank=found.down.shape[0], left_error=found.error)


def _correct(exact: Tensor, stored: QuantizedTensor, rank: int) -> Correction:
    error = (exact - stored.dequantize(exact.dtype)).reshape(exact.shape[0], -1)
    U, S, Vh = reduced_svd(error)
    root = S[:rank].sqrt()
    # Rounded to the weight's dtype, in which the layer computes; what that costs is part of the error.
    up, down = (t.to(stored.dtype).contiguous() for t in (U[:, :rank] * root, root[:, None] * Vh[:rank]))
    left = error - up.to(error.dtype) @ down.to(error.dtype)
    return Correction(up, down, float(left.abs().max()) if left.numel() else 0.0)


@dataclass(frozen=True)
class AddCorrections(Pass):
    """A pass that adds corrections behind the layers ``sites`` of merged weights; its count is that of the weights.

    ``corrections`` are by FQN, and may be filled by a pass before this one. ``method_of_rank`` makes the method whose
    region adds B A with a scale of 1.
    """

    name: ClassVar[str] = "add_corrections"

    sites: Sequence[Attachment] = field(repr=False)
    corrections: Mapping[str, Correction] = field(repr=False)
    method_of_rank: Callable[[int], Method] = field(repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject, edit=False)
        first = {a.fqn: a for a in reversed(self.sites) if a.fqn in self.corrections}
        attachments: list[Attachment] = []
        values: dict[str, Tensor] = {}
        for fqn, correction in self.corrections.items():
            site = first[fqn]
            made = Attachment(
                **{n: getattr(site, n) for n in ("key", "module", "param", "kind", "consumers", "name", "tied")},
                method=self.method_of_rank(correction.down.shape[0]),
                adapter="correction",
            )
            op = site_op(lifted, made)
            check_correctable(made, op)
            has_apply = made.method.has_apply_form(op)
            attachments.append(replace(made, form="apply" if has_apply else "auto"))
            values |= _slot_values(made, op, correction)
        done = Inject(attachments, values)(subject)
        injected: Sequence[Attachment] = done.data
        kept = KeepRegions(frozenset(a.id for a in injected), values)(done.output)
        return PassResult(kept.output, len(injected))


def check_correctable(site: Attachment, op: Op) -> None:
    """Raise MergeError for a layer beside which no low-rank correction stands."""
    if op.groups > 1 or op.max_norm is not None or op.experts:
        what = "an embedding with max_norm" if op.max_norm is not None else f"a {op.kind} of several matrices"
        raise MergeError(
            f"site {site.id!r} is {what}, which takes no correction: merge without correction_rank, or with "
            'keep="residual"'
        )


def _slot_values(site: Attachment, op: Op, correction: Correction) -> dict[str, Tensor]:
    method, up, down = site.method, correction.up, correction.down
    if op.kind in ("addmm", "embedding"):  # whose weights are stored transposed
        up, down = down.t(), up.t()
    slots = method.slots(op)
    like = {n: torch.empty(s.shape, device="meta") for n, s in slots.items()}
    tensors = method.files.with_low_rank(LowRank(down[None], up[None]), like)
    values: dict[str, Tensor] = {site.slot_fqn(n, s): tensors[n].contiguous() for n, s in slots.items()}
    scale: Any = method.scale(op)
    if scale is not None:
        kind = torch.float64 if up.dtype == torch.float64 else torch.float32
        values[site.scale_fqn] = torch.tensor(scale, dtype=kind, device=up.device)
    return values
