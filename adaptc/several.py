"""One program for several adapters: the union of what their configs ask for.

Before: one plan per config. After: one list of attachments in which every plan finds all of its own. Two plans share an
attachment where their methods differ only in what a swap may change; where the structure differs (DoRA beside LoRA,
another block size), each gets a variant of its own, and an adapter leaves the other's at its identity. Adapters with
names of their own act together instead: each has its own attachments, one composed on the other in the order given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptc.binding import Binding, Slate, joined
from adaptc.errors import ConfigError
from adaptc.inductor import compilable
from adaptc.passes._method import Attachment
from adaptc.targets import Plan

#: where a region may stand: see the ``form`` argument of ``adaptc.compile``
FORMS = ("auto", "apply", "weight")


def union(
    plans: Sequence[Plan], training: bool, backend: str, form: str = "auto", *, apart: bool = False
) -> list[Attachment]:
    """All attachments, what replaces whole weights first; the first plan's own keep their ids. ``form`` is for those
    that do not need a certain one. ``apart``: no two plans share one, since their adapters, of different names, are to
    act together."""
    out: list[Attachment] = []
    for p in plans:
        for a in p.attachments:
            rivals = [o for o in out if o.fqn == a.fqn and o.method.akin(a.method)]
            if not apart and any(o.method.structure() == a.method.structure() for o in rivals):
                continue
            a = replace(a, variant=len(rivals))
            if not apart and (number := _number(a, out)):
                a = replace(a, adapter=f"{a.adapter}_{number}")
            if training:
                a = replace(a, method=a.method.trained())
            if a.form == "auto":
                a = replace(a, form=form)
            out.append(compilable(a, backend))
    return sorted(out, key=lambda a: not a.method.replaces)


def _number(a: Attachment, others: Sequence[Attachment]) -> int:
    """Which of the adapters its slots belong to: the variant; but sites that share a slot must be of one structure."""
    if not a.method.shares():
        return a.variant
    known = [s for o in others if (s := o.method.structure())["method"] == a.method.structure()["method"]]
    distinct = [s for i, s in enumerate(known) if s not in known[:i]]
    return distinct.index(a.method.structure()) if a.method.structure() in distinct else len(distinct)


def part_of(slate: Slate, name: str) -> Slate:
    """The slate of one of several adapters that act together."""
    return replace(slate, attachments=[a for a in slate.attachments if a.adapter == name])


def together(parts: Mapping[str, Binding]) -> Binding:
    """One binding of several adapters that act together. Raises ConfigError where two of them change a base weight."""
    first = next(iter(parts.values()))
    out = replace(first, values={}, methods={}, base={}, carried={}, parts=dict(parts))
    changed: dict[str, str] = {}
    for name, part in parts.items():
        for fqn in part.base:
            if changed.setdefault(fqn, name) != name:
                raise ConfigError(
                    f"the adapters {changed[fqn]!r} and {name!r} both change the base weight {fqn!r} (PiSSA and OLoRA "
                    "initialisations do), so they cannot act together; merge one of them first"
                )
        for mine, theirs in ((out.values, part.values), (out.methods, part.methods), (out.base, part.base)):
            mine.update(theirs)  # type: ignore[attr-defined]  # made here
        out.carried.update(part.carried)  # type: ignore[attr-defined]
    return replace(out, source=" + ".join(p.source for p in parts.values()))


def named(config: Any) -> dict[str, Any] | None:
    """``config`` as adapters by name, if that is what it is, and not the content of one config."""
    if not isinstance(config, Mapping) or "peft_type" in config or not config:
        return None
    bad = [n for n in config if not isinstance(n, str) or not n or "." in n]
    if bad:
        raise ConfigError(f"names of adapters must be texts without dots, which are parts of names; found {bad[0]!r}")
    return dict(config)


def joint_slate(slate: Slate) -> Slate:
    """The slate with methods that know of each other, over all plans: shared slots are large enough for every site."""
    by_adapter: dict[str, list[Attachment]] = {}
    for a in slate.attachments:
        by_adapter.setdefault(a.adapter, []).append(a)
    methods = {}
    for group in by_adapter.values():
        methods |= joined({a.id: a.method for a in group}, slate.ops)
    return replace(slate, attachments=[replace(a, method=methods[a.id]) for a in slate.attachments])
