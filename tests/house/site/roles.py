"""Read docstrings for the site: roles become links, and ``Example:`` is a section."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import griffe

from tests.house.public import MEMBERS, PACKAGES, source

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([\w.]+)`")


@cache
def link_targets() -> dict[str, str]:
    """Return every way to write a public name -> its path: ``Bank``, ``Bank.add``, ``adaptc.Bank.add``."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for public in source().names(package):
            for member in ("", *(f".{m}" for m in MEMBERS.get(public.name, ()))):
                path = f"{public.path}{member}"
                for written in (path, f"{public.name}{member}", f"{public.module}.{public.name}{member}"):
                    found.setdefault(written, path)
    return found


def to_markdown(text: str, owner: str = "") -> str:
    """Return a docstring's ``text`` for Markdown. ``owner``: the class whose members may be written without it."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        path = link_targets().get(f"{owner}.{name}") or link_targets().get(name)
        return f"[`{name}`][{path}]" if path else f"`{name}`"

    text = _ROLE.sub(link, text)
    text = re.sub(r", \*(?=\w)", r", \\*", text)  # the sizes of a shape, which would be emphasis
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"(?<=\w)::$", ":", text, flags=re.MULTILINE)


class Roles(griffe.Extension):
    """An extension of griffe that rewrites the docstrings of public classes, functions and members."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, which griffe has just read."""
        if obj.docstring is not None:
            owner = obj if obj.is_class else obj.parent
            obj.docstring.value = to_markdown(obj.docstring.value, owner.name if owner is not None else "")
