"""Print the table of methods in Markdown, or write it between the markers of a page.

Usage: ``python -m adaptc.methods [PAGE.md]``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from adaptc.methods.overview import render_markdown

TABLE_MARKERS = re.compile(r"(<!-- methods:[^\n]*-->\n).*?(<!-- /methods -->)", re.DOTALL)


def insert_table(text: str) -> str:
    """Return ``text`` with the table of methods between its markers."""
    return TABLE_MARKERS.sub(lambda m: f"{m[1]}{render_markdown()}\n{m[2]}", text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(insert_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(render_markdown())
