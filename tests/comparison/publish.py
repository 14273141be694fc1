"""Write what the results say: the tables of the guide and the README between their markers, and the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptc import ConfigError
from tests.comparison.picture import svg
from tests.comparison.results import RESULTS, read_all
from tests.comparison.tables import left_out_list, short_table, task_table

ROOT = Path(__file__).resolve().parents[2]
GUIDE, README = ROOT / "examples" / "method_comparison.md", ROOT / "README.md"
PICTURE = ROOT / "examples" / "method_comparison.svg"


def contents(results: Sequence[Any]) -> dict[str, str]:
    """Return name of the markers -> what stands between them."""
    return {
        "comparison of text": task_table(results, "text"),
        "comparison of vision": task_table(results, "vision"),
        "comparison in short": short_table(results),
        "not compared": left_out_list(),
    }


def filled(page: str, results: Sequence[Any], name: str = "the page") -> str:
    """Return a page with the tables of the results between its markers. Raises ConfigError where it has none."""
    found = 0
    for marker, table in contents(results).items():
        pattern = re.compile(rf"(<!-- {marker}:[^\n]*-->\n).*?(<!-- /{marker} -->)", re.DOTALL)
        page, count = pattern.subn(lambda m, table=table: f"{m[1]}{table}{m[2]}", page)
        found += count
    if not found:
        raise ConfigError(f"{name} has no markers for tables, such as <!-- comparison of text: ... -->: put them back")
    return page


def publish(folder: Path) -> list[Path]:
    """Write the outputs of the results in ``folder`` and return their paths.

    Those of the project's own results go into the guide and the README, those of others into their folder.
    """
    results = read_all(folder)
    if folder.resolve() == RESULTS.resolve():
        texts = {page: filled(page.read_text(encoding="utf-8"), results, page.name) for page in (GUIDE, README)}
        texts[PICTURE] = svg(results)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tables = contents(results)
        texts = {
            folder / "tables.md": "\n".join(f"## {marker}\n\n{table}" for marker, table in tables.items()),
            folder / "picture.svg": svg(results),
        }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return [*texts]
