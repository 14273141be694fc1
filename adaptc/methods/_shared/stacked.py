"""Apply a method to a weight that stacks the matrices of experts: once per expert.

Slots are the method's own with an axis of experts in front; slots that all sites share stay shared. Of other libraries
only LoRA has files with adapters of stacked experts, and LoRA defines its own layout for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from adaptc.errors import CheckpointError
from adaptc.methods._shared.per_expert import expert_op, part_per_expert, per_expert
from adaptc.methods._shared.registry import method_from_dict
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method, Slot
from adaptc.passes.protocol.parts.bank_form import BankForm


def _read(self: Any, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inner = self.method.inner
    if not inner.files.defines("read"):
        return dict(found)
    shared = {n for n, s in inner.slots(expert_op(op)).items() if s.shared}
    for name, t in found.items():
        if name not in shared and t.shape[:1] != (op.experts,):
            raise CheckpointError(f"{name!r} has shape {tuple(t.shape)}; the first must be {op.experts} experts")
    return per_expert("files.read")(self, op, found)


@dataclass(frozen=True)
class PerExpertMethod(Method):
    """The method ``inner`` at each expert of a weight (experts, out, in)."""

    name: ClassVar[str] = "stacked"
    stacks: ClassVar[bool] = True
    files = part_per_expert(
        "files", "write", "derived", "needs_base", "keys", "fqn", "inner_path", "in_place", read=_read
    )
    sizes = part_per_expert("sizes", "rank", "with_rank", "minimal", "with_sizes_of", "specialized_for")
    sharing = part_per_expert("sharing", "shares")
    bank = property(lambda self: BankForm(self.inner.bank.row_wise))
    replaces = property(lambda self: self.inner.replaces)  # type: ignore[assignment]  # a class has one answer
    takes_complex = property(lambda self: self.inner.takes_complex)  # type: ignore[assignment]

    inner: Method = field(default_factory=Method)

    init, weight, weight_over, scale = map(per_expert, ("init", "weight", "weight_over", "scale"))
    identity, absent, constrained = map(per_expert, ("identity", "absent", "constrained"))
    rebind, evaluated, trained = map(per_expert, ("rebind", "evaluated", "trained"))
    in_mode_of = per_expert("in_mode_of")
    is_made_by = per_expert("is_made_by")
    structure, family_key, conflict_with = map(per_expert, ("structure", "family_key", "conflict_with"))
    has_weight, looks_at_base, check_merge = map(per_expert, ("has_weight", "looks_at_base", "check_merge"))
    changes_base_at_init, base_needs_data = map(per_expert, ("changes_base_at_init", "base_needs_data"))
    config_from_model = per_expert("config_from_model")
    base_scheme = per_expert("base_scheme")

    def slots(self, op: Op) -> dict[str, Slot]:
        def stack(s: Slot) -> Slot:
            return replace(s, shape=(op.experts, *s.shape), free=tuple(i + 1 for i in s.free))

        return {n: s if s.shared else stack(s) for n, s in self.inner.slots(expert_op(op)).items()}

    def unwrap(self, op: Op) -> tuple[Method, Op]:
        return self.inner, expert_op(op)

    def rewrap(self, inner: Method) -> Method:
        return replace(self, inner=inner)

    def options(self) -> dict[str, Any]:
        return {"method": self.inner.name, "options": self.inner.options()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(method_from_dict(options))
