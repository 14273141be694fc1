"""One program for several adapters: the union of what their configs ask for.

Before: one plan per config. After: one list of attachments in which every plan finds all of its own. Two plans share an
attachment where their methods differ only in what a swap may change; where the structure differs (DoRA beside LoRA,
another block size), each gets a variant of its own, and an adapter leaves the other's at its identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptc.passes.adapt.choose_forms import compilable
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method_checks import check_class
from adaptc.passes.ir.program_method import PROGRAM, ProgramMethod
from adaptc.targets.plan import Plan


def union(
    plans: Sequence[Plan], training: bool, backend: str, form: str = "auto", *, apart: bool = False
) -> list[Attachment]:
    """All attachments, what replaces whole weights first, and last what changes the program as it then is: what adds
    to attentions, keys and values in front of the program's own tokens, and tokens in front of those. The first plan's
    own keep their ids. ``form`` is for those that do not need a certain one. ``apart``: no two plans share one, since
    their adapters, of different names, are to act together."""
    out: list[Attachment] = []
    for p in plans:
        for a in p.attachments:
            rivals = [o for o in out if o.fqn == a.fqn and o.method.akin(a.method)]
            if not apart and any(o.method.structure() == a.method.structure() for o in rivals):
                continue
            a = replace(a, variant=len(rivals))
            if not apart and (number := _number(a, out, rivals)):
                a = replace(a, adapter=f"{a.adapter}_{number}")
            if training:
                a = replace(a, method=a.method.trained())
            if a.form == "auto":
                a = replace(a, form=form)
            out.append(compilable(a, backend))
    return sorted(out, key=lambda a: (_of_program(a), not a.method.replaces))


def _of_program(a: Attachment) -> int:
    if a.form != PROGRAM:
        return 0
    if not isinstance(a.method, ProgramMethod):
        return 1
    return 2 if a.method.changes("cached") else 3


def _number(a: Attachment, others: Sequence[Attachment], rivals: Sequence[Attachment]) -> int:
    """Which of the adapters its slots belong to: one of its own at its weight. Sites that share a slot must be of one
    structure, and have a number that no other one has."""
    check_class(type(a.method))
    if not a.method.shares():
        taken = {o.adapter for o in rivals}
        return next(n for n in range(len(rivals) + 1) if (f"{a.adapter}_{n}" if n else a.adapter) not in taken)
    known = [o.method.structure() for o in others if o.method.akin(a.method)]
    distinct = [s for i, s in enumerate(known) if s not in known[:i]]
    return distinct.index(a.method.structure()) if a.method.structure() in distinct else len(distinct)
