"""Certificates of files of other runtimes: what is measured there, and what a changed file or another base does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim
from typer.testing import CliRunner

import adaptc
from adaptc import LoraConfig
from adaptc.cli import app
from tests.exporters.test_slot_program import Net, compiled, inputs

EXPORTERS = {
    ".onnx": (adaptc.exporters.export_onnx, "ONNX Runtime", "onnxruntime", {}),
    ".xml": (adaptc.exporters.export_openvino, "OpenVINO", "openvino", {}),
    ".pte": (adaptc.exporters.export_executorch, "ExecuTorch", "executorch", {}),
}


def program() -> Any:
    """A program with sizes that ExecuTorch can plan memory for."""
    torch.manual_seed(5)
    free = ({0: Dim("batch", max=6), 1: Dim("length", max=9)},)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    return adaptc.compile(Net(), config, example_inputs=(inputs(2, 3),), dynamic_shapes=free)


@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=[pytest.mark.long] if s == ".pte" else []) for s in EXPORTERS]
)
def test_certificates(suffix: str, tmp_path: Path) -> None:
    export, runtime, package, options = EXPORTERS[suffix]
    prog = program()
    file = export(prog, tmp_path / f"model{suffix}", **options)
    with pytest.raises(adaptc.ConfigError, match="compared with the program that it was exported from"):
        adaptc.certify(file)
    with pytest.raises(adaptc.ConfigError, match="compared with the program that it was exported from"):
        adaptc.verify(file)
    certificate = adaptc.certify(file, prog, seed=4, shapes=2)
    assert certificate.measured is not None
    checks = {c["name"]: c for c in certificate.measured["checks"]}
    assert list(checks) == [f"base in {runtime}", f"adapter in {runtime}"]
    assert all(c["passed"] and 0 <= c["error"] <= c["limit"] < 1e-3 for c in checks.values())
    assert certificate.versions[package]
    assert certificate.base == adaptc.certify(adaptc.save(prog, tmp_path / "prog.pt2")).base
    stored = json.loads((tmp_path / f"model{suffix}.certificate.json").read_bytes())
    assert stored == certificate.to_dict()
    report = adaptc.verify(file, prog)
    assert report.ok
    assert report.seed == 4
    names = [c.name for c in report.checks]
    assert names[2:5] == ["certificate: graph", "certificate: base", "certificate: adapters"]
    assert adaptc.verify(file)["certificate: graph"].passed
    other = program()
    with torch.no_grad():
        other.base_tensors["down.weight"].add_(1)
    failed = {c.name for c in adaptc.verify(file, other).checks if c.passed is False}
    assert {f"base in {runtime}", "certificate: base"} <= failed
    with pytest.raises(adaptc.AdaptcError, match=f"base in {runtime}"):
        adaptc.certify(file, other)
    assert json.loads((tmp_path / f"model{suffix}.certificate.json").read_bytes()) == stored
    export(other, file, **options)
    assert adaptc.verify(file)["certificate: graph"].passed is False


@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=[pytest.mark.long] if s == ".pte" else []) for s in EXPORTERS]
)
def test_merged_files(suffix: str, tmp_path: Path) -> None:
    export, runtime, _, options = EXPORTERS[suffix]
    prog = program()
    file = export(prog, tmp_path / f"model{suffix}", adapters="merged", **options)
    certificate = adaptc.certify(file, prog, seed=4, shapes=2)
    assert certificate.measured is not None
    (check,) = certificate.measured["checks"]
    assert check["name"] == f"merged in {runtime}"
    assert check["passed"]
    assert 0 <= check["error"] <= check["limit"] < 1e-3
    assert adaptc.verify(file, prog).ok
    assert adaptc.verify(file)["certificate: graph"].passed
    other = program()
    with torch.no_grad():
        other.base_tensors["down.weight"].add_(1)
    with pytest.raises(adaptc.AdaptcError, match=f"merged in {runtime}"):
        adaptc.certify(file, other)
    export(other, file, adapters="merged", **options)
    assert adaptc.verify(file)["certificate: graph"].passed is False


def test_commands(tmp_path: Path) -> None:
    prog = compiled()
    saved = adaptc.save(prog, tmp_path / "prog.pt2")
    file = adaptc.exporters.export_onnx(prog, tmp_path / "model.onnx")
    runner = CliRunner()
    for command in ("certify", "verify"):
        done = runner.invoke(app, [command, str(file), "--program", str(saved)])
        assert done.exit_code == 0, done.output
        assert "adapter in ONNX Runtime" in done.output
    done = runner.invoke(app, ["certify", str(file)])
    assert done.exit_code == 1
    (tmp_path / "model.onnx.certificate.json").write_text("{}")
    with pytest.raises(adaptc.CheckpointError, match="cannot be read"):
        adaptc.verify(file, prog)


@pytest.mark.long
def test_padding_is_not_compared(tmp_path: Path) -> None:
    """What a token computes that no other is shown to differs between runtimes, and says nothing of them."""
    from tests.exporters.test_onnx_models import llama

    torch.manual_seed(3)
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    prog = adaptc.compile(llama().eval(), config)
    file = adaptc.exporters.export_onnx(prog, tmp_path / "model.onnx")
    certificate = adaptc.certify(file, prog, shapes=5)
    assert certificate.measured is not None
    assert any("attention_mask" in run for run in certificate.measured["runs"])


def test_rows(tmp_path: Path) -> None:
    prog = compiled()
    file = adaptc.exporters.export_onnx(prog, tmp_path / "model.onnx", adapters="rows")
    certificate = adaptc.certify(file, prog)
    assert certificate.measured is not None
    assert all(c["passed"] for c in certificate.measured["checks"])
