"""What adaptc.report and adaptc.verify say of a package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adaptc
from adaptc import AdaptcError
from adaptc.cli import app
from adaptc.packages.packaged_program import PackagedProgram
from tests.support.archives import read_records, write_records
from tests.support.packaged_nets import NET_CONFIG, Net, Packaged, adapter

EQUAL, BASE, BACK = "package equals program", "base equals model", "swap and back is bitwise"


def swapped(net: Packaged, **options: Any) -> None:
    config = NET_CONFIG.replace(r=5, lora_alpha=4, rank_pattern={"conv": 3}, **options)
    net.swap(adapter(net.program, config, lambda fqn: fqn != "experts", seed=21), config)


# -- report ------------------------------------------------------------------------------------------------------------


def test_a_report(net: Packaged) -> None:
    swapped(net)
    report = adaptc.report(net.runner)
    assert (report.path, report.device, report.torch) == (net.path, "cpu", torch.__version__)
    assert report.nbytes == net.path.stat().st_size
    assert (report.adapter, report.peft_type) == ("state dict", "LORA")
    sites = {s.fqn: (s.kind, s.method, s.rank, s.room, s.present) for s in report.sites}
    assert sites == {
        "head.weight": ("weight", "whole", None, None, True),
        "head.bias": ("weight", "whole", None, None, True),
        "emb.weight": ("embedding", "lora", 5, 6, True),
        "conv.weight": ("conv1d", "lora", 3, 6, True),
        "lin.weight": ("linear", "lora", 5, 6, True),
        "experts": ("experts", "lora", None, 6, False),
    }
    x, ids, gain = report.inputs
    assert (x.name, x.dtype, x.sizes[2]) == ("x", torch.float32, 13)
    assert (ids.name, ids.dtype, ids.sizes) == ("ids", torch.int64, x.sizes[:2])
    assert (gain.sizes, gain.constant) == ((3,), None)
    assert set(report.ranges) == set(ids.sizes)


def test_a_report_prints_as_tables(net: Packaged) -> None:
    swapped(net)
    text = str(adaptc.report(net.runner))
    assert text.startswith(f"package {net.path}: ")
    assert "LORA adapter (state dict): 6 sites, 1 of them left at the base" in text
    assert re.search(r"^ lin +linear +apply +lora +5 +6$", text, re.MULTILINE)
    assert re.search(r"^ experts +experts +weight +lora +base +6$", text, re.MULTILINE)
    assert re.search(r"^ ids +int64 +s\d+ x s\d+$", text, re.MULTILINE)
    assert re.search(r"^ s\d+ +2 +any$", text, re.MULTILINE)


def test_the_command_line_shows_a_file_without_loading_its_code(
    net: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loaded)
    result = CliRunner().invoke(app, ["show", str(net.path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert f"package {net.path}: " in result.output
    assert re.search(r"^ lin +linear +apply +lora +3 +6$", result.output, re.MULTILINE)
    records = read_records(net.path)
    name = next(n for n in records if n.endswith(".so"))
    records[name] += b"x"
    bad = write_records(tmp_path / "bad.pt2", records)
    for command in (["show", bad], ["merge", net.path, tmp_path / "out.pt2"]):
        result = CliRunner().invoke(app, [str(c) for c in command], env={"COLUMNS": "120"})
        assert result.exit_code == 1
        assert ("does not have the hash" if "show" in command else "adaptc.load_package") in result.output
        assert not (tmp_path / "out.pt2").exists()


def test_changes_need_the_program(net: Packaged) -> None:
    with pytest.raises(AdaptcError, match="compiled code alone; ask the program"):
        adaptc.report(net.runner, changes=True)


# -- verify ------------------------------------------------------------------------------------------------------------


def test_against_the_program(net: Packaged) -> None:
    swapped(net)
    adaptc.swap(net.runner, net.runner.base.binding)  # the program's adapter is what counts
    current, state = net.runner.binding, torch.random.get_rng_state()
    report = adaptc.verify(net.runner, net.program, shapes=4)
    assert report.ok, report
    assert [c.passed for c in report.checks] == [True, True, True]
    assert 0 < report[EQUAL].error <= report[EQUAL].limit
    assert len(set(report.runs)) > 1
    assert net.runner.binding is current
    assert torch.equal(torch.random.get_rng_state(), state)


def test_against_the_model(net: Packaged) -> None:
    swapped(net)
    net.model.train()
    report = adaptc.verify(net.runner, net.model)
    assert net.model.training
    assert report.ok, report
    assert [c.passed for c in report.checks] == [None, True, True]
    report = adaptc.verify(net.runner, net.model, shapes=[{"x": (4, 9, 13)}])
    assert report.runs == ("0 4x9x13, ids 4x9, gain 3",)
    assert report.ok, report


def test_alone(net: Packaged) -> None:
    report = adaptc.verify(net.runner)
    assert [c.passed for c in report.checks] == [None, None, True]
    assert report.ok


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([{"y": (1, 2)}], "no tensor input 'y'"),
        ([{"ids": (4, 5, 6)}], "'ids' has 2 axes"),
        ([{"gain": (4,)}], r"'gain' cannot have shape \(4,\)"),
        ([{"ids": (4, 5), "x": (3, 5, 13)}], "'x' cannot have shape"),
        ([], "at least one"),
    ],
)
def test_shapes_that_are_refused(net: Packaged, shapes: Any, match: str) -> None:
    with pytest.raises(AdaptcError, match=match):
        adaptc.verify(net.runner, net.model, shapes=shapes)


def test_another_base_is_found(net: Packaged) -> None:
    torch.manual_seed(5)
    report = adaptc.verify(net.runner, Net())
    assert report[BASE].passed is False
    assert report[BASE].error > 1e-2
    with pytest.raises(AdaptcError, match="NOT verified: base equals model"):
        adaptc.verify(net.runner, Net(), raise_on_failure=True)


def test_code_that_computes_something_else_is_found(net: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped(net)
    run = PackagedProgram.run
    calls = iter(range(1000))

    def wrong(self: Any, adapter: Any, args: Any, kwargs: Any) -> Any:
        out = run(self, adapter, args, kwargs)
        return {**out, "y": out["y"] + 1e-6 * next(calls) + 1e-3}

    monkeypatch.setattr(PackagedProgram, "run", wrong)
    report = adaptc.verify(net.runner, net.program)
    assert [c.passed for c in report.checks] == [False, False, False]
    monkeypatch.setattr(PackagedProgram, "run", lambda self, adapter, a, k: run(self, net.runner.binding, a, k))
    report = adaptc.verify(net.runner, net.program)
    assert report[BACK].passed is False
    assert "slots are not read" in report[BACK].note


def test_an_adapter_that_the_package_has_no_room_for(net: Packaged) -> None:
    config = NET_CONFIG.replace(r=9)
    adaptc.swap(net.program, adapter(net.program, config), config=config)
    report = adaptc.verify(net.runner, net.program)
    assert report[EQUAL].passed is False
    assert "SwapError" in report[EQUAL].note
    assert "room for 6" in report[EQUAL].note
    assert report[BASE].passed
