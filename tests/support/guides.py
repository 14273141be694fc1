"""The pages of the guide: what they hold, and how their snippets are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from adaptc.cli import app

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted((ROOT / "examples").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "benchmarks" / "README.md"]


def blocks(page: Path, language: str | None = None) -> list[tuple[str, str]]:
    """(language, text) of each block of code, in order."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(lang, text) for lang, text in found if language in (None, lang)]


def run(page: Path, space: dict[str, Any]) -> dict[str, Any]:
    """Run the Python snippets of a page and its ``adaptc`` commands, in order, in the current directory."""
    space |= {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), space)
        elif language == "sh":
            for line in text.splitlines():
                command(line)
    return space


def command(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "adaptc", line
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}"
