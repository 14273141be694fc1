"""Check the docstrings of the source by the rules of CONTRIBUTING.md. ``make lint`` runs it.

A docstring opens with a verb (functions) or a noun phrase (modules, classes), and none of its sentences has more than
:data:`LONGEST` words. Tables, lists, formulas and indented blocks are left alone.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tests.house.docstring_parts import entries as parse_entries
from tests.house.docstring_parts import sections as parse_sections

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("adaptc", "passes", "kernels")
#: words in a sentence, at most
LONGEST = 25
#: words that no docstring opens with: they begin a clause without a subject
NO_SUBJECT = re.compile(
    "what|whether|of|as|those|where|who|whom|whose|that|these|which|how|when|same|beside|behind|before|after|in|with|"
    "without|for|by|from|to|at|see|such|both"
)
#: words that no function's docstring opens with: it says what the function does, and so begins with a verb
NO_VERB = re.compile("a|an|the|no|its|their|every|each|any|all|one|it|they|this|there|some")
_CODE = re.compile(r"``[^`]*``|:\w+:`[^`]*`|`[^`]*`")
_END = re.compile(r"(?<=[.!?:;])\s+")


def faults(text: str, name: str = "") -> Iterator[str]:
    """Yield a line for each docstring of a module's source ``text`` that breaks a rule. ``name``: of its file."""
    for node in ast.walk(ast.parse(text)):
        for note in _notes(node):
            yield f"{name}:{note.lineno}: a string after an assignment is seen by nobody; write a comment, #:, above it"
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        where = f"{name}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', 'the module')}"
        opens = _first_words(docstring)
        if NO_SUBJECT.fullmatch(opens[0]) or opens == ["the", "same"]:
            yield f"{where}: the docstring opens with {' '.join(opens)!r}; name its subject, or begin with a verb"
        elif NO_VERB.fullmatch(opens[0]) and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{where}: the docstring opens with {opens[0]!r}; begin with a verb, such as 'Return'"
        for sentence in sentences(docstring):
            if (count := len(sentence.split())) > LONGEST:
                yield f"{where}: {count} words in a sentence, and at most {LONGEST} are read easily: {sentence[:60]}..."


def sentences(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring's paragraphs and of its sections, with a word for each piece of code."""
    parts = parse_sections(docstring)
    texts = [parts.pop(""), *(e for name, text in parts.items() if name != "Example" for e in _entries(text))]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts)):
        lines = paragraph.splitlines()
        if any(re.match(r"\s*([-*|]|\d+\.)\s|    |\t", line) or line.rstrip().endswith("::") for line in lines):
            continue
        yield from _END.split(" ".join(_CODE.sub("x", paragraph).split()))


def _entries(text: str) -> list[str]:
    """Return what a section says: of each of its entries, or as a whole where it has none."""
    return list(parse_entries(text).values()) or [text]


def _notes(node: ast.AST) -> Iterator[ast.Expr]:
    """Yield the strings that stand as statements after an assignment in the body of ``node``."""
    body = getattr(node, "body", None)
    for one, after in pairwise(body if isinstance(body, list) else []):
        string = (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
        if string and isinstance(one, (ast.Assign, ast.AnnAssign)):
            yield after


def _first_words(docstring: str) -> list[str]:
    """Return the first word in lower case, and after "the" the second."""
    words = [w.strip("`*:.,;()").lower() for w in docstring.split()[:2]]
    return words if words[0] == "the" and words[1:] == ["same"] else words[:1]


def main() -> int:
    """Print what breaks the rules; return the exit status."""
    files = sorted(f for folder in SOURCE for f in (ROOT / folder).rglob("*.py"))
    found = [line for f in files for line in faults(f.read_text(encoding="utf-8"), str(f.relative_to(ROOT)))]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
