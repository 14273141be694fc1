"""Print the table of methods in Markdown, or write it between the markers of a page.

Usage: ``python -m adaptc.methods [PAGE.md]``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from adaptc.methods.overview import markdown

BLOCK = re.compile(r"(<!-- methods:[^\n]*-->\n).*?(<!-- /methods -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return ``text`` with the table of methods between its markers."""
    return BLOCK.sub(lambda m: f"{m[1]}{markdown()}\n{m[2]}", text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())
