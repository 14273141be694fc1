"""The table of methods: what the guide says is what the methods say."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from typer.testing import CliRunner

import adaptc
from adaptc.cli import app
from adaptc.methods import TargetedConfig
from adaptc.methods.__main__ import insert_table
from adaptc.methods._shared.registry import CONFIGS, config_class
from adaptc.methods.overview import SAMPLE_OPS, coverage_rows, method_rows, render_markdown
from tests.support.method_table import ENTRIES

PAGE = Path(__file__).parents[2] / "examples" / "methods.md"


def test_the_guide_has_the_table_of_the_registry():
    text = PAGE.read_text(encoding="utf-8")
    assert render_markdown() in text, "run: python -m adaptc.methods examples/methods.md"
    assert insert_table(text) == text


def test_every_config_has_a_row_and_a_name_of_its_own():
    rows = method_rows()
    assert {r.config.partition("(")[0] for r in rows} == {config_class(k).__name__ for k in CONFIGS}
    assert len({r.method for r in rows}) == len(rows)
    assert all(r.meaning for r in rows)
    for r in rows:
        if r.kinds:
            assert list(r.kinds) == list(SAMPLE_OPS)
            assert r.kinds["linear"], r.method
        assert hasattr(adaptc, r.config.partition("(")[0])


def test_every_config_is_in_the_table_of_tests():
    """But for those whose sites are whole modules or the program, or whose programs take an input or a pass more: tests
    of their own cover these."""
    tested = {e.cls for e in ENTRIES}
    missing = {c.__name__ for k in CONFIGS if issubclass(c := config_class(k), TargetedConfig)} - tested
    assert missing <= {"LNTuningConfig", "PolyConfig", "XLoraConfig"}


@pytest.mark.parametrize("kind", list(SAMPLE_OPS))
def test_what_the_table_says_of_a_layer_is_what_tests_see(kind: str):
    """A dash stands where the generic tests expect a refusal, and nowhere else."""
    layers = {"linear": "linear", "embedding": "embedding", "conv": "conv2d", "any other": "functional"}
    if kind not in layers:
        layers[kind] = {"grouped conv": "conv2d_groups", "experts": "experts"}[kind]
    compared = 0
    for row in method_rows():
        if not row.kinds:
            continue
        entries = [e for e in ENTRIES if e.cls == row.config.partition("(")[0] and e.cls != "LoraConfig"]
        if entries:
            assert bool(row.kinds[kind]) == any(layers[kind] not in e.refused_layers for e in entries), (
                row.method,
                kind,
            )
            compared += 1
    assert compared > 10


def test_the_command_prints_it():
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    assert "HRAConfig" in result.stdout


def test_every_type_of_peft_is_here_or_refused_with_a_reason():
    rows = {row.peft_type: row for row in coverage_rows()}
    # PEFT's list has an older name of MiSS no longer.
    assert rows.keys() - {"BONE"} == {t.value for t in peft.PeftType}
    assert all(len(why) > 20 for row in rows.values() for why in row.refused.values())
    assert [k for k, row in rows.items() if row.config == "-"] == ["SHADOW"]


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"BONE"}))
def test_every_option_of_peft_is_here_or_refused_with_a_reason(kind: str):
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__.keys()
    ours = config_class(kind).__dataclass_fields__.keys()
    refused = next(row.refused for row in coverage_rows() if row.peft_type == kind)
    of_files = {"peft_type", "auto_mapping", "peft_version"}
    assert theirs - ours - refused.keys() <= of_files


def test_the_readme_counts_the_methods():
    text = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"(LoRA and {len(CONFIGS.keys() - {'BONE'}) - 1} other methods)" in text


def test_the_command_lists_what_is_refused():
    done = CliRunner().invoke(app, ["methods", "--coverage"])
    assert done.exit_code == 0
    assert "SHADOW" in done.stdout
    assert "megatron_config" in done.stdout
