"""Choose per site where an adapter stands: around the layer ("apply") or in front of its weight ("weight").

Both forms give the same outputs, so the choice is one of cost. Costs are sympy expressions in the program's free sizes
(batch, sequence), read off the traced regions. The layer's widths and the adapter's rank are numbers in them.

Takes jobs whose regions can be traced, and gives every job a form and a reason. A form that the caller asked for is
never changed, only refused where it does not exist.

The measure is one call at the sizes of the example inputs. The apply form pays for every token, the weight form for the
weight. In training either pays three times, for the forward and for the backward of both operands.

The weight form is also charged one pass of the layer itself. In training that is the gradient of the whole weight,
which a frozen weight does without. In inference it stands for the drawbacks of a second weight: its memory, slower
swaps, and the rounding of a small change in a half-precision weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import sympy

from adaptc.errors import BackendError, ConfigError, PassError, TargetError
from adaptc.passes.analysis.costs import Work, at_sizes
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment

#: the forms of an attachment; "auto" until one is chosen
FORMS = ("auto", "apply", "weight")


@dataclass(frozen=True)
class FormChoice:
    form: str
    why: str


def cheaper(outside: Work, weight: Work, base: Work, sizes: Mapping[str, int], training: bool) -> FormChoice:
    """Return the cheaper form for one call with these ``sizes``.

    ``outside`` is the work of the apply form, ``weight`` that of the weight form, ``base`` that of the layer itself.
    """
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
    return FormChoice(form, text)


class Job(Protocol):
    """An attachment that is about to be injected, as :func:`choose_forms` needs it."""

    a: Attachment
    op: Op
    form: str
    why: str

    def enclosed(self) -> bool: ...

    def reads_weight(self) -> bool: ...

    def choice(self) -> FormChoice: ...

    def drops_outside(self) -> bool: ...


def choose_forms(jobs: Sequence[Job]) -> None:
    """Set ``form`` and ``why`` of every job.

    An attachment gets the weight form where a later one at the same weight builds on the weight that it makes. It also
    gets it where it would transform the inputs of other attachments at its weight. It gets the apply form where a later
    one has to find the base weight at the layer. Otherwise the cheaper form is taken.

    Raises ConfigError where a form asked for does not exist or would lose dropout. Raises TargetError where no form
    exists, and PassError where a site is given twice.
    """
    by_id = {job.a.id: job for job in jobs}
    if len(by_id) != len(jobs):
        raise PassError(f"a site is given twice: {[j.a.id for j in jobs if by_id[j.a.id] is not j]}")
    count = Counter(job.a.fqn for job in jobs)
    needed: set[str] = set()
    around: set[str] = set()
    for i, job in reversed(list(enumerate(jobs))):
        a, method = job.a, job.a.method
        missing = _why_not_around(job, count[a.fqn])
        if not missing and a.fqn in needed:
            missing = "a later adapter of this weight builds on the weight it makes"
        # In the apply form, a method that looks at the base weight takes the one that the layer reads for it.
        before = [o for o in jobs[:i] if o.a.fqn == a.fqn]
        over = method.looks_at_base() and bool(before)
        if not missing and over and any(_in_front(o, k, count[a.fqn]) for k, o in enumerate(before)):
            missing = "it looks at the base's weight, and an adapter before it changes the weight that the layer reads"
        if a.form == "apply" and missing:
            raise ConfigError(f"site {a.id!r} cannot take the apply form: {missing}. Use form='auto' or 'weight'.")
        if a.form == "weight" and not method.has_weight():
            raise ConfigError(
                f"site {a.id!r} cannot take the weight form: {method.name} has no form on the weight. Use form='auto' "
                "or 'apply'."
            )
        if a.form != "auto":
            job.form, job.why = a.form, a.why or "asked for"
        elif missing and not method.has_weight():
            raise TargetError(
                f"site {a.id!r} cannot be adapted by {method.name}, which has no form on the weight: {missing}. Leave "
                "the module out, or call it outside of the block."
            )
        elif missing:
            job.form, job.why = "weight", missing
        elif not method.has_weight():
            job.form, job.why = "apply", f"{method.name} has no form on the weight"
        elif over or a.fqn in around:
            job.form, job.why = (
                "apply",
                "the last adapter of this weight that looks at the base's finds it at the layer",
            )
        else:
            choice = job.choice()
            job.form, job.why = choice.form, choice.why
        if job.form == "weight" and method.has_apply_form(job.op) and job.drops_outside():
            raise ConfigError(
                f"site {a.id!r} would lose its dropout, which acts on what the layer reads, in the weight form "
                f"({job.why}). Set the dropout to 0, or leave out what needs this form."
            )
        if over and job.form == "apply":
            around.add(a.fqn)
        elif count[a.fqn] > 1 and (job.form == "weight" or job.reads_weight()):
            needed.add(a.fqn)


def _why_not_around(job: Job, count: int) -> str:
    """Return why an attachment, one of ``count`` at its weight, can have no apply form; '' if it can.

    The forms of the other attachments are not looked at.
    """
    a, method = job.a, job.a.method
    if not method.has_apply_form(job.op):
        return f"{method.name} has no form around a consumer of kind {a.kind!r}"
    if job.enclosed():
        return "the layer is called inside a block (no_grad, autocast, cond, map, ...), where no adapter can stand"
    if method.has_input(job.op) and count > 1:
        return "it would turn the inputs of the other adapters of this weight"
    return ""


def _in_front(job: Job, place: int, count: int) -> bool:
    """Return whether an attachment changes the weight that the layer reads, or makes those before it do so.

    ``place`` is its number among the ``count`` attachments at its weight.
    """
    if job.a.form == "weight" or _why_not_around(job, count):
        return True
    return place > 0 and job.reads_weight() and not job.a.method.looks_at_base()


def compilable(a: Attachment, backend: str) -> Attachment:
    """Return the attachment in the form that ``backend`` needs.

    Inductor fixes the channel counts of convolutions when it compiles. In the apply form of a convolution the rank is
    one of them, so convolutions get the weight form. Raises BackendError for dropout on the adapter's input, which that
    form cannot have.
    """
    if backend != "inductor" or not a.kind.startswith("conv"):
        return a
    if a.method.drops_input():
        raise BackendError(
            f"dropout on the adapter input of the convolution {a.fqn!r} cannot be compiled by inductor for every rank; "
            "train with backend='eager'"
        )
    return replace(a, form="weight")
