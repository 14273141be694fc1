"""Merge the adapter of a program into its weights, or unload it, and give back the program that a merge came from.

A merged program is a plain program with the adapter folded into its weights. It remembers the program it came from. Its
graph does not depend on the adapter's values, so it is made once for each set of sites and remembered without its
weights. A later merge at the same sites computes new weights and no graph.

The graph is remembered only where a merge changes nothing but weights, and these keep their shapes. It is not
remembered where biases are merged, grouped convolutions become dense, or the base is given up.

Unmerge returns the original program by reference. Nothing is subtracted, so no rounding error can build up. Unload
gives the base, in which every tensor is the object that it was before compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from adaptc.errors import MergeError
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.merging.correct_merge import AddCorrections, CorrectedStorage, check_correctable
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.adapt.merging.site_merge import SiteMerge
from adaptc.passes.adapt.unload import KeepRegions, Unload
from adaptc.passes.graph.graph_lock import hold_graph_lock, with_graph_lock
from adaptc.passes.graph.pass_infra import Pass, PassManager
from adaptc.passes.quantized.quantized_merge import QuantizedMerge, attachments_to_keep, requantize
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.train.set_mode import SetMode
from adaptc.progress import stage
from adaptc.state.core import MergeOrigin, ProgramCore

P = TypeVar("P", bound=ProgramCore)


@dataclass(frozen=True, eq=False)
class MergeMemo:
    """A merged program without its merged weights.

    ``names``: for each merged weight, its names in the state dict. ``order``: all names of the state dict, in order.
    ``untied``: for each merged weight, whether the merge untied it.
    """

    program: ProgramCore
    names: Sequence[Sequence[str]]
    order: Sequence[str]
    untied: Sequence[bool]

    @classmethod
    def from_merged(cls, merged: ProgramCore, rows: Sequence[SiteMerge]) -> MergeMemo:
        state = merged.state_dict
        names = [[n for n, t in state.items() if t is state[r.fqn]] for r in rows]
        gone = {n for group in names for n in group}
        kept = merged.with_tensors({n: t for n, t in state.items() if n not in gone})
        return cls(kept, names, list(state), [r.untied for r in rows])

    def with_weights(self, weights: Sequence[Tensor]) -> ProgramCore:
        """Return a new program that shares this graph and has ``weights`` as its merged weights, one for each entry of
        ``names``."""
        own = {n: w for names, w in zip(self.names, weights, strict=True) for n in names}
        state = self.program.state_dict
        return self.program.with_tensors({n: own[n] if n in own else state[n] for n in self.order})


def merge_program(
    program: P,
    *,
    safe: bool = True,
    keep_base: bool = True,
    progress: bool = False,
    quantized: QuantizedMerge | None = None,
    correction_rank: int = 0,
) -> tuple[P, Sequence[SiteMerge]]:
    """Return the merged program, and one :class:`SiteMerge` per merged weight; ``adaptc.merge`` tells more.

    ``progress``: show progress in a terminal from the start. ``quantized``: what becomes of weights that are quantised;
    None refuses them. ``correction_rank``: the rank of what is kept beside weights that are requantised. Raises
    MergeError, and leaves ``program`` unchanged.
    """
    with hold_graph_lock(), stage(f"merging {len(program.binding.methods)} sites", always=progress) as merging:
        if keep_base:
            still = program.snapshot()
            origin = MergeOrigin(program, still.binding)
            return _merge(still, origin, None, safe, merging.track, quantized, correction_rank)
        with program.swap_lock():
            release = program.release_base_tensor
            return _merge(program, None, release, safe, merging.track, quantized, correction_rank)


def _merge(
    program: P,
    origin: MergeOrigin | None,
    release: Callable[[str], None] | None,
    safe: bool,
    progress: Callable[[Sequence[Any]], Any],
    quantized: QuantizedMerge | None,
    correction_rank: int,
) -> tuple[P, Sequence[SiteMerge]]:
    program.check_base()
    binding = program.binding
    present = [a for a in program.adaptation.attachments if a.id in binding.methods]
    rest = tuple(a.id for a in program.adaptation.attachments if a.id not in binding.methods)
    kept = attachments_to_keep(program.base_tensors, present, quantized)
    present = [a for a in present if a not in kept]
    values = dict(binding.values)
    merge_pass = Merge(present, values, safe, release, progress, rest)
    if quantized is QuantizedMerge.REQUANTIZE:
        merge_pass = replace(merge_pass, store=requantize)
    corrected = CorrectedStorage(correction_rank) if correction_rank else None
    if corrected is not None:
        for a in (a for a in present if isinstance(program.base_tensors.get(a.fqn), QuantizedTensor)):
            check_correctable(a, program.ops[a.id])
        merge_pass = replace(merge_pass, store=corrected)
    del binding  # it may hold base tensors, which ``release`` could not free then
    key = (quantized, *(a.id for a in present))
    is_reusable = release is None and not kept and corrected is None and not any(a.method.has_bias() for a in present)
    base: Mapping[str, Any] = program.base_tensors  # objects that are no tensors, too
    shapes = {k: t.shape for k, t in base.items() if isinstance(t, Tensor)}
    del base  # as above
    memo = program.run_state.merged_programs
    known: MergeMemo | None = memo.get(key) if is_reusable else None
    if known is not None:
        weights, rows = merge_pass.merged_weights(program)
        if all(w.shape == shapes[r.fqn] for w, r in zip(weights, rows, strict=True)):
            made = known.with_weights(weights)
            rows = [replace(r, untied=u) for r, u in zip(rows, known.untied, strict=True)]
            return _make_program(program, made, made.adaptation, origin), rows
    keeping = [KeepRegions(frozenset(a.id for a in kept), values)] if kept else []
    correcting = [AddCorrections(present, corrected.corrections, _correction_method)] if corrected is not None else []
    modes = [SetMode(training=False)] if program.adaptation.training else []
    passes: list[Pass] = [*keeping, merge_pass, *correcting, *modes]
    done = PassManager(passes)(program)
    rows = done.data[len(keeping)]
    if corrected is not None:
        rows = [corrected.row(r) for r in rows]
    bare = program.adaptation.without_adapters()
    new = _make_program(program, done.output, replace(bare, trail=(*bare.trail, *done.trail)), origin)
    if is_reusable and all(new.state_dict[r.fqn].shape == shapes[r.fqn] for r in rows):
        memo[key] = MergeMemo.from_merged(new, rows)
    return new, rows


def _correction_method(rank: int) -> Lora:
    return Lora(r=rank, alpha=rank)


def _make_program(program: P, exported: Any, adaptation: Any, origin: MergeOrigin | None) -> P:
    return type(program)(exported, adaptation, options=replace(program.options, fuse=False), origin=origin)


def unmerge_program(program: ProgramCore) -> ProgramCore:
    """Return the program that ``program`` was merged from, with the binding it had then, on the device of ``program``.

    Raises MergeError where that program was given up (``keep_base=False``) or never known.
    """
    origin = program.origin
    if origin is None:
        raise MergeError(
            "this program cannot be unmerged: it was merged with keep_base=False, loaded from a file, or never merged. "
            "Compile the base again, or keep the adapted program: save() it before merging."
        )
    return origin.program.with_binding(origin.binding).to(program.device)


@with_graph_lock
def unload_program(program: P) -> P:
    """Return the base of ``program``; ``adaptc.unload`` tells more. Raises MergeError where the base is not known."""
    program = program.snapshot()
    record = program.adaptation
    if record.residual:
        raise MergeError(
            f"the file this program came from holds only the adapter's own version of {list(record.residual)[:3]} (its "
            "initialisation changed the base), so the base cannot be given back. Compile the original model instead."
        )
    base = program.base_tensors
    passes: list[Pass] = [Unload({k: base[k] for k in program.originals})]
    passes += [SetMode(training=False)] if record.training else []
    done = PassManager(passes)(program)
    bare = record.without_adapters()
    adaptation = replace(bare, trail=(*bare.trail, *done.trail))
    return type(program)(done.output, adaptation, options=replace(program.options, fuse=False))
