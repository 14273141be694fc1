"""Choose per site where an adapter stands: around the layer ("apply") or in front of its weight ("weight").

Both give the same outputs, so the choice is one of cost, and the cost is symbolic: sympy expressions in the program's
own free sizes (batch, sequence) with the layer's widths and the adapter's rank as numbers, read off the traced regions.
Before: jobs whose regions can be traced. After: every job has a form and a reason; a form somebody asked for is never
changed, only refused where it does not exist.

The measure is one call at the sizes of the example inputs. The apply form pays for every token, the weight form for the
weight; in training either pays three times, for the forward and for the backward of both operands. On top, the weight
form is charged one pass of the layer itself: in training that is the gradient of the whole weight, which a frozen
weight does without, and in inference it is what a second weight must save to be worth its memory, slower swaps and the
rounding of a small change in a half-precision weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from adaptc.errors import PassError
from adaptc.passes._kinds import Op
from adaptc.passes._method import Attachment

aten = torch.ops.aten

#: op -> position of the operand whose last axis is summed over
_SUMS = {
    aten.linear: 0,
    aten.matmul: 0,
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.addmm: 1,
    aten.baddbmm: 1,
    aten.linalg_solve_triangular: 0,
    aten.linalg_solve: 0,
    aten.linalg_inv: 0,
}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)


@dataclass(frozen=True)
class Work:
    """Operations of a piece of code: ``moving`` those done for every call's inputs, ``fixed`` those on weights and
    slots alone. sympy expressions in the free sizes of the program."""

    moving: Any = sympy.S.Zero
    fixed: Any = sympy.S.Zero

    def __add__(self, other: Work) -> Work:
        return Work(self.moving + other.moving, self.fixed + other.fixed)


def work(region: fx.Graph, moving: int) -> Work:
    """Of a region whose first ``moving`` inputs differ from call to call."""
    depends: set[fx.Node] = set()
    sums: list[Any] = [sympy.S.Zero, sympy.S.Zero]
    inputs = region.find_nodes(op="placeholder")
    depends.update(inputs[:moving])
    for node in region.nodes:
        if node.op != "call_function":
            continue
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
        sums[node not in depends] += node_work(node)
    return Work(*sums)


def node_work(node: fx.Node) -> Any:
    """Operations of one node: two for each product that is summed, one for each element otherwise, none for a view."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or _is_view(node.target):
        return sympy.S.Zero
    out = _product(value.shape)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _SUMS:
        operand = node.args[_SUMS[packet]].meta["val"]  # type: ignore[union-attr, index]
        return 2 * out * size_expression(operand.shape[-1])
    if packet in _CONVOLUTIONS:
        return 2 * out * _product(node.args[1].meta["val"].shape[1:])  # type: ignore[union-attr]
    return out


def drops(region: fx.Graph) -> bool:
    """Whether a region has dropout, which no other form can stand in for."""
    return any(node.target == aten.dropout.default for node in region.nodes)


def _is_view(target: Any) -> bool:
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _product(shape: Sequence[Any]) -> Any:
    return sympy.Mul(*(size_expression(s) for s in shape))


def size_expression(size: Any) -> Any:
    """A size, a number or symbolic, as a sympy expression of positive integers."""
    return sympy.Integer(size) if isinstance(size, int) else _parsed(str(size))


@cache
def _parsed(text: str) -> Any:
    """A symbolic size as an expression of positive integers."""
    parsed: Any = sympy.sympify(text)
    return parsed.subs({s: sympy.Symbol(str(s), integer=True, positive=True) for s in parsed.free_symbols})


def example_sizes(program: ExportedProgram) -> dict[str, int]:
    """Free size -> its value in the example inputs; empty where a program was saved without them."""
    if program.example_inputs is None:
        return {}
    values = pytree.tree_leaves(program.example_inputs)
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    out: dict[str, int] = {}
    if len(values) != len(names):
        return {}
    for name, value in zip(names, values, strict=True):
        fake = nodes[name].meta.get("val") if name in nodes else None
        if isinstance(value, Tensor) and isinstance(fake, Tensor):
            out |= {str(s): int(n) for s, n in zip(fake.shape, value.shape, strict=True) if not isinstance(s, int)}
    return out


@dataclass(frozen=True)
class Choice:
    form: str
    why: str


def cheaper(outside: Work, weight: Work, base: Work, sizes: Mapping[str, int], training: bool) -> Choice:
    """The cheaper of two forms for one call; ``base`` is the work of the layer itself."""
    t = sympy.Symbol("t", positive=True)
    passes = 3 if training else 1
    apply_cost = passes * (at_sizes(outside.moving, sizes) * t + at_sizes(outside.fixed, sizes))
    weight_cost = passes * at_sizes(weight.fixed, sizes) + at_sizes(base.moving, sizes) * t
    here = [float(e.subs(t, 1)) for e in (apply_cost, weight_cost)]
    form = "apply" if here[0] <= here[1] else "weight"
    text = f"{here[0]:.2g} operations per call around the layer, {here[1]:.2g} on the weight"
    text += " at the sizes of the example inputs" if sizes else ""
    equal = [float(r) for r in sympy.solve(apply_cost - weight_cost, t) if r.is_positive]
    if equal:
        text += f"; equal at {equal[0]:.2g} times that"
    return Choice(form, text)


def at_sizes(expression: Any, sizes: Mapping[str, int]) -> Any:
    """An expression in free sizes at their values."""
    # A size that is not an input's own (what a program computes from its data) counts as one.
    return expression.subs({s: sizes.get(str(s), 1) for s in expression.free_symbols})


class Job(Protocol):
    """What is asked of an attachment that is about to be injected."""

    a: Attachment
    op: Op
    form: str
    why: str

    def reads_weight(self) -> bool: ...

    def choice(self) -> Choice: ...

    def drops_outside(self) -> bool: ...


def choose_forms(jobs: Sequence[Job]) -> None:
    """Set ``form`` and ``why`` of every job. An attachment on whose change of the weight another one builds, or whose
    inputs another one turns, has the weight form. Raises PassError where a form asked for does not exist."""
    by_id = {job.a.id: job for job in jobs}
    if len(by_id) != len(jobs):
        raise PassError(f"a site is given twice: {[j.a.id for j in jobs if by_id[j.a.id] is not j]}")
    count = Counter(job.a.fqn for job in jobs)
    needed: set[str] = set()
    for job in reversed(jobs):
        a, method = job.a, job.a.method
        missing = ""
        if not method.has_outside(job.op):
            missing = f"{method.name} has no form around a consumer of kind {a.kind!r}"
        elif a.fqn in needed:
            missing = "a later adapter of this weight builds on the weight it makes"
        elif method.has_input(job.op) and count[a.fqn] > 1:
            missing = "it would turn the inputs of the other adapters of this weight"
        if a.form == "apply" and missing:
            raise PassError(f"site {a.id!r} cannot take the apply form: {missing}. Use form='auto' or 'weight'.")
        if a.form != "auto":
            job.form, job.why = a.form, a.why or "asked for"
        elif missing:
            job.form, job.why = "weight", missing
        elif not method.has_weight():
            job.form, job.why = "apply", f"{method.name} has no form on the weight"
        else:
            choice = job.choice()
            job.form, job.why = choice.form, choice.why
        if job.form == "weight" and method.has_outside(job.op) and job.drops_outside():
            raise PassError(
                f"site {a.id!r} would lose its dropout, which acts on what the layer reads, in the weight form "
                f"({job.why}). Set the dropout to 0, or leave out what needs this form."
            )
        if count[a.fqn] > 1 and (job.form == "weight" or job.reads_weight()):
            needed.add(a.fqn)
