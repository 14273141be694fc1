"""Take a docstring in Google's style apart: its sections, and their entries."""

from __future__ import annotations

import re

#: the section of a class that describes the arguments of its functions
SHARED_ARGS = "Arguments of the functions"
SECTIONS = (SHARED_ARGS, "Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def sections(docstring: str) -> dict[str, str]:
    """Return name -> text of the sections of a docstring, indentation removed; '' is what stands before and between."""
    found: dict[str, list[str]] = {"": []}
    now = ""
    for line in docstring.splitlines():
        if (title := line.rstrip().removesuffix(":")) in SECTIONS and line.rstrip().endswith(":"):
            now = title
            found.setdefault(now, [])
        elif line and not line[0].isspace():
            now = ""
            found[now].append(line)
        else:
            found[now].append(line[4:] if now else line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def entries(text: str) -> dict[str, str]:
    """Return name -> text of the entries of a section, such as the parameters under ``Args:``."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        match = re.match(r"(?:- `)?(\*{0,2}\w+)`?(?: \([^)]*\))?: ?(.*)", line)
        if match:
            name = match[1].lstrip("*")
            found[name] = match[2]
        elif name:
            found[name] += f"\n{line.strip()}"
    return found
