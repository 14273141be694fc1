"""What is published: tables and a picture that follow from the results, and from nothing else."""

from __future__ import annotations

import copy
import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import adaptc
from tests.comparison import publish as publishing
from tests.comparison.compared import COMPARED
from tests.comparison.picture import spread, svg
from tests.comparison.publish import GUIDE, PICTURE, README, contents, filled, publish
from tests.comparison.results import RESULTS, make_run, read_all, write_result
from tests.comparison.tables import short_table, task_table
from tests.comparison.task import SEARCH

SVG = "{http://www.w3.org/2000/svg}"


def result(task: str, method: str, **values: Any) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "settings": {"steps": 43, "batch": 7, "budget": 7919, "learning_rate": 0.01},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a processor", "threads": 3},
        "date": "2026-11-05",
        "option": {"r": 5},
        "parameters": 7703,
        "accuracy": 0.8125,
        "base_accuracy": 0.0625,
        "forgetting": 0.1234,
        "base_known_loss": 1.5,
        "final_loss": 0.5678,
        "step_seconds": 0.0123,
        "peak_bytes": 345_000_000,
        "file_bytes": 31_200,
        "swap_seconds": 0.00127,
        **values,
    }


RESULTS_OF_TWO = [
    result("text", "LoRA"),
    result("text", "IA3", accuracy=0.9, parameters=11, option={}, forgetting=-0.02),
    {"task": "text", "method": "OFT", "settings": {}, "versions": {}, "date": "", "error": "MethodError: a|b\nno"},
    result("vision", "LoRA", accuracy=1.0),
]


def test_a_table_has_the_best_first_and_failures_last() -> None:
    text = task_table(RESULTS_OF_TWO, "text")
    assert "Without an adapter the accuracy is 6.2 %, and the loss on what the model knew is 1.500." in text
    assert "43 steps of 7 rows, a budget of 7,919 parameters." in text
    assert "a processor, 3 threads, torch 2.13.0, 2026-11-05." in text
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| IA3 |  | 0.01 | 11 | 90.0 % | -0.020 | 0.568 | 12 | 345 | 31 | 1.3 |",
        "| LoRA | `r=5` | 0.01 | 7,703 | 81.2 % | +0.123 | 0.568 | 12 | 345 | 31 | 1.3 |",
        "| OFT |  |  |  |  |  |  |  |  |  | failed: MethodError: a\\|b no |",
    ]


def test_methods_that_have_not_run_are_named() -> None:
    some, everything = RESULTS_OF_TWO, [result("text", m) for m in COMPARED]
    assert task_table(some, "text").splitlines()[-1].startswith("Not run yet: DoRA, AdaLoRA, LoHa, ")
    assert ", OFT," not in task_table(some, "text").splitlines()[-1]
    assert "Prompt tuning" not in task_table(some, "vision").splitlines()[-1]
    assert f"\n{len(COMPARED) - 3} of {len(COMPARED)} methods have not run" in short_table(some)
    assert "not run" not in task_table(everything, "text") + short_table(everything)


def test_results_of_other_settings_are_told() -> None:
    other = copy.deepcopy(RESULTS_OF_TWO[0]) | {"method": "DoRA", "date": "2026-12-01"}
    other["settings"]["steps"] = 47
    text = task_table([*RESULTS_OF_TWO, other], "text")
    assert "43 or 47 steps" in text
    assert "2026-11-05 to 2026-12-01" in text


def test_the_short_table_has_both_tasks() -> None:
    lines = short_table(RESULTS_OF_TWO).splitlines()
    assert lines[2:4] == ["| IA3 | 11 | 90.0 % | -0.020 |  |", "| LoRA | 7,703 | 81.2 % | +0.123 | 100.0 % |"]
    many = [result("text", f"m{n}", accuracy=n / 20) for n in range(19)]
    assert [line.split("|")[1].strip() for line in short_table(many).splitlines()[2:10]] == [
        f"m{n}" for n in range(18, 10, -1)
    ]


def test_no_results_are_told() -> None:
    assert task_table([], "text") == "No results yet.\n"
    assert short_table([]) == "No results yet.\n"
    assert svg([]).count("no results yet") == 2


def test_the_picture_has_a_point_for_each_method() -> None:
    root = ET.fromstring(svg(RESULTS_OF_TWO))
    text, vision = root.findall(f"{SVG}g")
    names = [[t.text for t in panel.findall(f"{SVG}text")] for panel in (text, vision)]
    assert {"LoRA", "IA3"} <= {*names[0]}
    assert "OFT" not in names[0]
    assert "IA3" not in names[1]
    points = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in text.findall(f"{SVG}circle")]
    (x_best, y_best), (x_other, y_other) = points
    assert x_best < x_other  # 11 parameters, and 7,703
    assert y_best < y_other  # 90 %, and 81 %: pixels are counted from the top
    # Equal ratios are equal distances.
    three = [result("text", str(n), parameters=n) for n in (20, 200, 2000)]
    panel = ET.fromstring(svg(three)).find(f"{SVG}g")
    assert panel is not None
    x = sorted(float(c.attrib["cx"]) for c in panel.findall(f"{SVG}circle"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)


def test_the_base_is_a_line_where_it_is_near_the_methods() -> None:
    """Where all methods are far above it, its place goes to them."""
    assert ("no adapter" in svg([result("text", "LoRA", base_accuracy=0.85)])) is True
    assert ("no adapter" in svg([result("text", "LoRA", base_accuracy=0.3)])) is False


def test_names_are_a_line_apart_inside_of_the_picture() -> None:
    for wanted in ([40.0] * 3, [485.0, 488.0, 490.0], [40.0, 41.0, 300.0, 489.0], [450.0] * 37, [77.0]):
        places = spread(wanted)
        assert all(after - before > 10 for before, after in itertools.pairwise(places)), wanted
        assert places[-1] < 495
        assert places[0] > 30
    assert spread([40.0, 80.0]) == [40.0, 80.0]
    near = [result("text", f"method {n}", accuracy=0.5 + n / 1000) for n in range(5)]
    panel = ET.fromstring(svg(near)).find(f"{SVG}g")
    assert panel is not None
    names = [str(t.text) for t in panel.findall(f"{SVG}text") if str(t.text).startswith("method ")]
    assert names == [f"method {n}" for n in (4, 3, 2, 1, 0)]


def test_accuracies_of_none_and_all_are_within_the_axes() -> None:
    text = svg([result("text", "none", accuracy=0.0), result("text", "all", accuracy=1.0)])
    assert ">0 %<" in text
    assert ">100 %<" in text
    assert ">105 %<" not in text
    assert ">-5 %<" not in text


def test_parameters_are_told_in_ones_twos_and_fives() -> None:
    text = svg([result("text", "few", parameters=900), result("text", "many", parameters=21_000)])
    assert all(f">{number}<" in text for number in ("1,000", "2,000", "5,000", "10,000", "20,000"))
    assert ">500<" not in text
    assert ">50,000<" not in text


def test_names_are_escaped() -> None:
    ET.fromstring(svg([result("text", "a<b&c")]))


def test_pages_are_filled_between_their_markers() -> None:
    page = "a\n<!-- comparison of text: how -->\nold\n<!-- /comparison of text -->\nb\n"
    table = task_table(RESULTS_OF_TWO, "text")
    new = f"a\n<!-- comparison of text: how -->\n{table}<!-- /comparison of text -->\nb\n"
    assert filled(page, RESULTS_OF_TWO) == new
    assert filled(new, RESULTS_OF_TWO) == new
    with pytest.raises(adaptc.ConfigError, match="has no markers"):
        filled("nothing", RESULTS_OF_TWO)


def test_other_results_are_published_in_their_folder(tmp_path: Path) -> None:
    for one in RESULTS_OF_TWO:
        write_result(tmp_path / f"{one['task']}-{one['method']}.json", one)
    before = [path.read_bytes() for path in (GUIDE, README, PICTURE)]
    paths = publish(tmp_path)
    assert {p.name for p in paths} == {"tables.md", "picture.svg"}
    assert all(table in paths[0].read_text(encoding="utf-8") for table in contents(read_all(tmp_path)).values())
    assert before == [path.read_bytes() for path in (GUIDE, README, PICTURE)]


def test_the_projects_results_are_published_in_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GUIDE", "README"):
        (tmp_path / name).write_text("<!-- comparison in short: -->\n<!-- /comparison in short -->\n", encoding="utf-8")
    for name in ("GUIDE", "README", "PICTURE"):
        monkeypatch.setattr(publishing, name, tmp_path / name)
    assert {*publish(RESULTS)} == {tmp_path / name for name in ("GUIDE", "README", "PICTURE")}
    assert short_table(read_all(RESULTS)) in (tmp_path / "README").read_text(encoding="utf-8")


# -- what is committed -------------------------------------------------------------------------------------------------

AGAIN = "run: python -m tests.comparison --report"


@pytest.mark.parametrize("page", [GUIDE, README], ids=lambda p: p.name)
def test_pages_say_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text, read_all(RESULTS)) == text, AGAIN


def test_the_picture_shows_what_the_results_say() -> None:
    assert PICTURE.read_text(encoding="utf-8") == svg(read_all(RESULTS)), AGAIN


def test_the_tables_are_where_readers_look() -> None:
    guide, readme = (p.read_text(encoding="utf-8") for p in (GUIDE, README))
    assert {*re.findall(r"<!-- (comparison [^:]+):", guide)} == {"comparison of text", "comparison of vision"}
    assert {*re.findall(r"<!-- (comparison [^:]+):", readme)} == {"comparison in short"}
    assert "](method_comparison.svg)" in guide
    assert "](examples/method_comparison.svg)" in readme


def test_all_committed_results_are_readable_and_of_methods_that_exist() -> None:
    files = [*RESULTS.glob("*.json")]
    results = read_all(RESULTS)
    assert len(results) == len(files) > 0
    assert {r["method"] for r in results} <= {*COMPARED}
    assert {r["task"] for r in results} <= {SEARCH, "vision", "text"}
    assert sum(f.stat().st_size for f in files) < 500_000


def test_committed_results_are_those_of_the_settings_of_today() -> None:
    """A table never mixes settings, and the next run begins with what is missing."""
    for r in read_all(RESULTS):
        run = make_run(r["task"], r["method"], RESULTS)
        assert r["settings"] == run.settings, f"remove {run.path(RESULTS).name}, and run again"
