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
from adaptc.passes.analysis.costs import OperationCount, evaluate_at_sizes
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment

#: the forms of an attachment; "auto" until one is chosen
FORMS = ("auto", "apply", "weight")


@dataclass(frozen=True)
class FormChoice:
    form: str
    reason: str


def choose_cheaper(
    apply_work: OperationCount,
    weight_work: OperationCount,
    layer_work: OperationCount,
    sizes: Mapping[str, int],
    training: bool,
) -> FormChoice:
    """Return the cheaper form for one call with these ``sizes``.

    ``apply_work`` is the work of the apply form, ``weight`` that of the weight form, ``layer_work`` that of the layer
    itself.
    """
    t = sympy.Symbol("t", positive=True)
    passes = 3 if training else 1
    apply_cost = passes * (
        evaluate_at_sizes(apply_work.per_call, sizes) * t + evaluate_at_sizes(apply_work.hoistable, sizes)
    )
    weight_cost = (
        passes * evaluate_at_sizes(weight_work.hoistable, sizes) + evaluate_at_sizes(layer_work.per_call, sizes) * t
    )
    here = [float(e.subs(t, 1)) for e in (apply_cost, weight_cost)]
    form = "apply" if here[0] <= here[1] else "weight"
    text = f"{here[0]:.2g} operations per call around the layer, {here[1]:.2g} on the weight"
    text += " at the sizes of the example inputs" if sizes else ""
    equal = [float(r) for r in sympy.solve(apply_cost - weight_cost, t) if r.is_positive]
    if equal:
        text += f"; equal at {equal[0]:.2g} times that"
    return FormChoice(form, text)


class FormCandidate(Protocol):
    """An attachment that is about to be injected, as :func:`choose_forms` needs it."""

    attachment: Attachment
    op: Op
    form: str
    reason: str

    def is_in_subgraph(self) -> bool: ...

    def reads_weight(self) -> bool: ...

    def cheaper_form(self) -> FormChoice: ...

    def has_dropout_outside(self) -> bool: ...


def choose_forms(candidates: Sequence[FormCandidate]) -> None:
    """Set ``form`` and ``why`` of every job.

    An attachment gets the weight form where a later one at the same weight builds on the weight that it makes. It also
    gets it where it would transform the inputs of other attachments at its weight. It gets the apply form where a later
    one has to find the base weight at the layer. Otherwise the cheaper form is taken.

    Raises ConfigError where a form asked for does not exist or would lose dropout. Raises TargetError where no form
    exists, and PassError where a site is given twice.
    """
    by_id = {job.attachment.id: job for job in candidates}
    if len(by_id) != len(candidates):
        raise PassError(
            f"a site is given twice: {[j.attachment.id for j in candidates if by_id[j.attachment.id] is not j]}"
        )
    count = Counter(job.attachment.fqn for job in candidates)
    weight_form_fqns: set[str] = set()
    apply_form_fqns: set[str] = set()
    for i, candidate in reversed(list(enumerate(candidates))):
        a, method = candidate.attachment, candidate.attachment.method
        why_no_apply = _why_no_apply_form(candidate, count[a.fqn])
        if not why_no_apply and a.fqn in weight_form_fqns:
            why_no_apply = "a later adapter of this weight builds on the weight it makes"
        # In the apply form, a method that looks at the base weight takes the one that the layer reads for it.
        before = [o for o in candidates[:i] if o.attachment.fqn == a.fqn]
        needs_base_weight = method.looks_at_base() and bool(before)
        if (
            not why_no_apply
            and needs_base_weight
            and any(_changes_weight(o, k, count[a.fqn]) for k, o in enumerate(before))
        ):
            why_no_apply = (
                "it looks at the base's weight, and an adapter before it changes the weight that the layer reads"
            )
        if a.form == "apply" and why_no_apply:
            raise ConfigError(f"site {a.id!r} cannot take the apply form: {why_no_apply}. Use form='auto' or 'weight'.")
        if a.form == "weight" and not method.has_weight():
            raise ConfigError(
                f"site {a.id!r} cannot take the weight form: {method.name} has no form on the weight. Use form='auto' "
                "or 'apply'."
            )
        if a.form != "auto":
            candidate.form, candidate.reason = a.form, a.why or "asked for"
        elif why_no_apply and not method.has_weight():
            raise TargetError(
                f"site {a.id!r} cannot be adapted by {method.name}, which has no form on the weight: {why_no_apply}. "
                "Leave the module out, or call it outside of the block."
            )
        elif why_no_apply:
            candidate.form, candidate.reason = "weight", why_no_apply
        elif not method.has_weight():
            candidate.form, candidate.reason = "apply", f"{method.name} has no form on the weight"
        elif needs_base_weight or a.fqn in apply_form_fqns:
            candidate.form, candidate.reason = (
                "apply",
                "the last adapter of this weight that looks at the base's finds it at the layer",
            )
        else:
            choice = candidate.cheaper_form()
            candidate.form, candidate.reason = choice.form, choice.reason
        if candidate.form == "weight" and method.has_apply_form(candidate.op) and candidate.has_dropout_outside():
            what = "derivative, which is" if method.trains_at_layer() else "dropout or noise, which act"
            raise ConfigError(
                f"site {a.id!r} would lose its {what} at the layer, in the weight form ({candidate.reason}). Take that "
                "out of the config, or leave out what needs this form."
            )
        if needs_base_weight and candidate.form == "apply":
            apply_form_fqns.add(a.fqn)
        elif count[a.fqn] > 1 and (candidate.form == "weight" or candidate.reads_weight()):
            weight_form_fqns.add(a.fqn)


def _why_no_apply_form(candidate: FormCandidate, count: int) -> str:
    """Return why an attachment, one of ``count`` at its weight, can have no apply form; '' if it can.

    The forms of the other attachments are not looked at.
    """
    a, method = candidate.attachment, candidate.attachment.method
    if not method.has_apply_form(candidate.op):
        return f"{method.name} has no form around a consumer of kind {a.kind!r}"
    if candidate.is_in_subgraph():
        return "the layer is called inside a block (no_grad, autocast, cond, map, ...), where no adapter can stand"
    if method.has_input(candidate.op) and count > 1:
        return "it would turn the inputs of the other adapters of this weight"
    return ""


def _changes_weight(job: FormCandidate, place: int, count: int) -> bool:
    """Return whether an attachment changes the weight that the layer reads, or makes those before it do so.

    ``place`` is its number among the ``count`` attachments at its weight.
    """
    if job.attachment.form == "weight" or _why_no_apply_form(job, count):
        return True
    return place > 0 and job.reads_weight() and not job.attachment.method.looks_at_base()


def with_compilable_form(a: Attachment, backend: str) -> Attachment:
    """Return the attachment in the form that ``backend`` needs.

    Inductor fixes the channel counts of convolutions when it compiles. In the apply form of a convolution the rank is
    one of them, so convolutions get the weight form. Raises BackendError for dropout on the adapter's input, which that
    form cannot have.
    """
    if backend != "inductor" or not a.kind.startswith("conv"):
        return a
    if a.method.is_random():
        raise BackendError(
            f"dropout or noise in the adapter of the convolution {a.fqn!r} cannot be compiled by inductor for every "
            "rank; train with backend='eager'"
        )
    return replace(a, form="weight")
