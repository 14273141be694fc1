"""The tool that examines all families of transformers finds the most used ones as its page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.coverage.examine import examine
from tests.coverage.page import updated
from tests.coverage.rows import SHORT, Row, all_rows

PAGE = Path(__file__).resolve().parents[1] / "coverage.md"
README = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
#: the statuses of a class that adaptc adapts with PEFT's numbers
ADAPTED = ("equal", "one size", "idle layers", "no effect", "runs without PEFT")
ROWS = [row for row in all_rows() if row.family in SHORT]


def status_on_the_page(row: Row) -> str:
    """Return the status in the page's list of all rows."""
    found = re.search(
        rf"^\| {re.escape(row.family)} \| {row.model_class} \| {row.task} \| ([^|]+) \|", PAGE.read_text(), re.M
    )
    assert found is not None, f"{row} is not on the page"
    return found[1].strip()


def test_the_readme_has_the_counts_of_the_page() -> None:
    names = re.search(r"^\| task \|(.*)\|$", PAGE.read_text(), re.M)
    counts = re.search(r"^\| all \|(.*)\|$", PAGE.read_text(), re.M)
    assert names is not None
    assert counts is not None
    found = dict(zip(names[1].split(" | "), counts[1].split(" | "), strict=True))
    of = {name.strip(): int(number) for name, number in found.items() if number.strip().isdigit()}
    adapted = of["equal"] + of["no effect"] + of["runs without PEFT"]
    said = re.findall(r"\d+", README[README.index("Of ") : README.index("[tests/coverage.md]")])
    assert said == [str(n) for n in (of["run"], adapted, of["one size"], of["refused"])]
    assert of["differs"] == of["foreign error"] == 0


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=[r.model_class for r in ROWS])
def test_a_family_is_adapted_as_the_page_says(row: Row) -> None:
    result = examine(row)
    assert result.status == status_on_the_page(row), result.reason
    assert result.status not in ("differs", "foreign error", "crash")


def test_the_page_has_no_wrong_number_among_the_most_used() -> None:
    statuses = {row: status_on_the_page(row) for row in ROWS}
    assert len(statuses) > 50
    assert {s for s in statuses.values() if s not in ADAPTED} <= {"refused", "does not run"}


@pytest.mark.long
def test_the_list_of_classes_imports_few_models() -> None:
    """Whoever lists the rows pays for each class that is imported: torch.fx changes ``Module`` for each graph that it
    traces, which takes time for every subclass."""
    code = """
import sys
from tests.coverage.rows import all_rows
print(len(all_rows()), len({m.split(".")[2] for m in sys.modules if m.startswith("transformers.models.")}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PAGE.parents[1])
    rows, imported = map(int, out.stdout.split())
    assert rows > 500
    assert imported < 40


def test_results_of_some_classes_go_into_the_page() -> None:
    page = PAGE.read_text()
    assert updated(page, []) == page
    (old,) = re.findall(r"^\| llama \| LlamaForCausalLM \|.*$", page, re.M)
    assert "| equal | both | equal |" in old
    result = {
        "family": "llama", "task": "CAUSAL_LM", "model_class": "LlamaForCausalLM", "status": "refused",
        "reason": "it is", "peft": "", "generation": "differs", "generation_reason": "so", "seconds": 2.5, "notes": [],
    }  # fmt: skip
    new = updated(page, [result])
    assert "| llama | LlamaForCausalLM | CAUSAL_LM | refused |  | differs | 2.5 |\n" in new
    assert "\n| CAUSAL_LM | llama | refused | it is; generation differs: so |\n" in new
    assert counts(new, "refused") == [n + 1 for n in counts(page, "refused")]
    assert counts(new, "equal") == [n - 1 for n in counts(page, "equal")]
    back = {**result, "status": "equal", "reason": "", "generation": "equal", "generation_reason": ""}
    seconds = old.split("|")[-2].strip()
    assert updated(new, [{**back, "seconds": float(seconds)}]) == page
    with pytest.raises(ValueError, match="the page lists no class 'Other'"):
        updated(page, [{**back, "model_class": "Other"}])


def counts(page: str, status: str) -> list[int]:
    """Return the counts of a status among causal models and among all."""
    names = re.search(r"^\| task \|(.*)\|$", page, re.M)
    assert names is not None
    place = [name.strip() for name in names[1].split(" | ")].index(status)
    lines = re.findall(r"^\| (?:CAUSAL_LM|all) \|(.*)\|$", page, re.M)
    return [int(line.split(" | ")[place]) for line in lines if line.count("|") > 12]
