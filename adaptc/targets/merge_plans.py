"""Unite the plans of several adapters for one program.

Every plan finds all its attachments in the list. Two plans share an attachment where their methods differ only in what
a swap may change. Where the structure differs (DoRA and LoRA, another block size), each gets an attachment of its own,
a variant; an adapter leaves the other variants at their identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptc.passes.adapt.choose_forms import with_compilable_form
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method_names import check_class
from adaptc.passes.protocol.program_method import PROGRAM_FORM, ProgramMethod
from adaptc.targets.plan_layers import Plan


def merge_plans(
    plans: Sequence[Plan], training: bool, backend: str, form: str = "auto", *, separate: bool = False
) -> list[Attachment]:
    """Return the attachments of all ``plans``, in the order of injection; those of the first plan keep their ids.

    First come attachments that replace whole weights, then those at other weights. Last come those that change the
    program as it then is: methods that add to attentions, KV prefixes, and virtual tokens.

    ``form``: the form of attachments that allow any. ``separate``: no two plans share an attachment, since their
    adapters, which have different names, are to act together.
    """
    out: list[Attachment] = []
    for p in plans:
        for a in p.attachments:
            rivals = [o for o in out if o.fqn == a.fqn and o.method.is_variant_of(a.method)]
            if not separate and any(o.method.structure() == a.method.structure() for o in rivals):
                continue
            a = replace(a, variant=len(rivals))
            if not separate and (number := _name_number(a, out, rivals)):
                a = replace(a, adapter=f"{a.adapter}_{number}")
            if training:
                a = replace(a, method=a.method.trained())
            if a.form == "auto":
                a = replace(a, form=form)
            out.append(with_compilable_form(a, backend))
    return sorted(out, key=lambda a: (_injection_stage(a), not a.method.replaces))


def _injection_stage(a: Attachment) -> int:
    if a.form != PROGRAM_FORM:
        return 0
    if not isinstance(a.method, ProgramMethod):
        return 1
    return 2 if a.method.changes("past_key_values") else 3


def _name_number(a: Attachment, others: Sequence[Attachment], variants: Sequence[Attachment]) -> int:
    """Return a number for the adapter name of ``a``, so that its slots have names of their own; 0 for the plain name.

    A method without shared slots needs a name that no rival at its weight has. Sites that share a slot must have one
    structure, so each structure of such a method gets its own number.
    """
    check_class(type(a.method))
    if not a.method.sharing.shares():
        taken = {o.adapter for o in variants}
        return next(n for n in range(len(variants) + 1) if (f"{a.adapter}_{n}" if n else a.adapter) not in taken)
    known = [o.method.structure() for o in others if o.method.is_variant_of(a.method)]
    distinct = [s for i, s in enumerate(known) if s not in known[:i]]
    return distinct.index(a.method.structure()) if a.method.structure() in distinct else len(distinct)
