"""Certificates say what a file is made of and what was measured, and checking one again tells a file that changed."""

from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import adaptc
from adaptc import AdaptcError, AdaptcWarning, CheckpointError, ConfigError, LoraConfig
from adaptc.archives.added_files import ADDED_FOLDER
from adaptc.archives.certificate import read_certificate
from adaptc.cli import app
from adaptc.program.files.base_fingerprint import base_fingerprints, joint_fingerprint
from adaptc.verification.verify import verify_program
from tests.support.archives import WEIGHTS, read_records, write_records
from tests.support.damage import BLOCK, mutate_json

RECORD = ADDED_FOLDER + "certificate.json"
X = torch.linspace(-1, 2, 35).view(7, 5)


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


def compiled(model: nn.Module, rank: int = 2) -> Any:
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
    return adaptc.compile(model, config, example_inputs=X)


class Files:
    def __init__(self, root: Path) -> None:
        self.root, self.model = root, model_of(0)
        self.program = compiled(self.model)
        self.adapter = adaptc.save_adapter(compiled(self.model, 3), root / "fr")
        self.file = adaptc.save(self.program, root / "x.pt2", adapters={"fr": self.adapter})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certified"))


def record_of(path: Path) -> Any:
    return json.loads(read_records(path)[RECORD])


def checks(report: Any) -> dict[str, bool | None]:
    return {c.name: c.passed for c in report.checks if c.name.startswith("certificate")}


def test_what_it_says(files: Files) -> None:
    found = record_of(files.file)
    assert found["versions"] == {
        "adaptc": adaptc.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert found["base"] == {
        "sha256": joint_fingerprint(base_fingerprints(adaptc.unload(files.program))),
        "weights": 4,
        "changed": [],
    }
    assert found["graph"]["of"] == "graph"
    assert found["current"]["default"]["config"]["r"] == 2
    assert found["adapters"]["fr"]["config"]["r"] == 3
    assert found["adapters"]["fr"]["base"] == found["base"]["sha256"]
    assert found["measured"] is None
    assert list(adaptc.load(files.file, strict=True).adapters) == ["fr"]


def test_what_changes_it(files: Files, tmp_path: Path) -> None:
    """Equal programs have equal certificates. Another adapter, base or graph changes its own part, and no other."""
    was = record_of(files.file)
    again = adaptc.save(adaptc.load(files.file), tmp_path / "again.pt2")
    assert record_of(again) == was
    other = compiled(files.model)
    adaptc.swap(other, 0.5 * adaptc.load_adapter(adaptc.save_adapter(files.program, tmp_path / "own")))
    found = record_of(adaptc.save(other, tmp_path / "other.pt2", adapters={"fr": files.adapter}))
    assert {n for n in was if found[n] != was[n]} == {"current"}
    based = record_of(adaptc.save(compiled(model_of(1)), tmp_path / "based.pt2", adapters={"fr": files.adapter}))
    assert {n for n in was if based[n] != was[n]} == {"base", "adapters"}
    assert based["adapters"]["fr"] | {"base": None} == was["adapters"]["fr"] | {"base": None}
    merged = record_of(adaptc.save(adaptc.merge(files.program), tmp_path / "merged.pt2"))
    assert merged["graph"] != was["graph"]
    assert merged["base"] != was["base"]
    assert merged["current"] == {}
    referring = record_of(adaptc.save(files.program, tmp_path / "r.pt2", base="reference"))
    assert referring["base"] == was["base"]


def test_certify(files: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    file.write_bytes(files.file.read_bytes())
    certificate = adaptc.certify(file, files.model, seed=5, shapes=2)
    assert record_of(file) == certificate.to_dict() == json.loads(json.dumps(certificate.to_dict()))
    measured = certificate.measured
    assert measured is not None
    assert (measured["seed"], measured["shapes"], len(measured["runs"])) == (5, 2, 2)
    wanted = adaptc.verify(files.program, files.model, seed=5, shapes=2)
    assert [c["name"] for c in measured["checks"]] == [c.name for c in wanted.checks]
    assert [c["error"] for c in measured["checks"]] == [c.error for c in wanted.checks]
    assert record_of(file) | {"measured": None} == record_of(files.file)
    before, after = read_records(files.file), read_records(file)
    assert {n for n in before if before[n] != after.get(n)} == {RECORD, "data/extra/adaptc.sha256"}
    assert torch.equal(adaptc.load(file)(X), adaptc.load(files.file)(X))
    assert torch.equal(torch.export.load(file).module()(X), torch.export.load(files.file).module()(X))
    report = adaptc.verify(file)
    assert report.ok
    assert report.seed == 5
    assert len(report.runs) == 2
    assert checks(report) == dict.fromkeys(
        [
            *("certificate: graph", "certificate: base", "certificate: adapters"),
            *("certificate: identity equals base", "certificate: merged equals adapted"),
            "certificate: unmerge is bitwise",
        ],
        True,
    )
    assert "certificate: base equals model" in checks(adaptc.verify(file, files.model))
    assert "measured with seed 5" in str(certificate)


def test_verify_while_saving(files: Files, tmp_path: Path) -> None:
    file = adaptc.save(files.program, tmp_path / "x.pt2", base="reference", adapters={"fr": files.adapter}, verify=True)
    found = {c["name"]: c["passed"] for c in record_of(file)["measured"]["checks"]}
    assert found["base equals model"]
    assert found["merged equals adapted"]
    assert adaptc.verify(file, base=files.model).ok
    with pytest.raises(CheckpointError, match="saved by reference"):
        adaptc.verify(file)
    with pytest.raises(ConfigError, match="base= is for the path"):
        adaptc.verify(files.program, base=files.model)
    merged = adaptc.save(adaptc.merge(files.program), tmp_path / "merged.pt2")
    with pytest.raises(AdaptcError, match="NOT verified: nothing could be checked"):
        adaptc.certify(merged)
    assert record_of(merged)["measured"] is None
    adaptc.certify(merged, adaptc.merge(files.program).module())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["merged.pt2", "x.pt2"]


def test_a_failed_check_writes_nothing(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[verify_program.__module__], "TOLERANCE", dict.fromkeys([torch.float32], 1e-30))
    with pytest.raises(AdaptcError, match="NOT verified: merged equals adapted"):
        adaptc.save(files.program, tmp_path / "x.pt2", verify=True)
    file = tmp_path / "y.pt2"
    file.write_bytes(files.file.read_bytes())
    with pytest.raises(AdaptcError, match="NOT verified"):
        adaptc.certify(file)
    assert file.read_bytes() == files.file.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["y.pt2"]


def test_what_no_longer_holds(files: Files, tmp_path: Path) -> None:
    records = read_records(files.file)
    table = json.loads(records[WEIGHTS])["config"]
    weight = "data/weights/" + table["2.weight"]["path_name"]
    slot = "data/weights/" + table["2.lora_B.default.weight"]["path_name"]
    stored = ADDED_FOLDER + "adapters/fr/adapter_model.safetensors"
    graph = records["models/model.json"].replace(b"aten.tanh.default", b"aten.relu.default")
    cases = {
        "base": {weight: records[weight][:-4] + b"\0\0\0\0"},
        "adapters": {slot: records[slot][:-4] + b"\0\0\0\0"},
        "the stored ones": {stored: records[stored][:-4] + b"\0\0\0\0"},
        "graph": {"models/model.json": graph},
    }
    for part, changes in cases.items():
        report = adaptc.verify(write_records(tmp_path / "forged.pt2", records | changes))
        failed = [n for n, passed in checks(report).items() if passed is False]
        assert failed == [f"certificate: {'adapters' if part == 'the stored ones' else part}"]
        assert not report.ok
    more = copy.deepcopy(record_of(files.file))
    more["adapters"]["gone"] = more["adapters"]["fr"]
    report = adaptc.verify(write_records(tmp_path / "forged.pt2", records | {RECORD: json.dumps(more).encode()}))
    assert report["certificate: adapters"].note == "not as certified: 'gone'"


def test_measured_limits(files: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    file.write_bytes(files.file.read_bytes())
    adaptc.certify(file)
    data = record_of(file)
    for check in data["measured"]["checks"]:
        check["limit"] = 1e-30
    report = adaptc.verify(write_records(tmp_path / "y.pt2", read_records(file) | {RECORD: json.dumps(data).encode()}))
    assert report["merged equals adapted"].passed
    assert report["certificate: merged equals adapted"].passed is False
    assert not report.ok


def test_files_without_one(files: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    torch.export.save(files.program, file)
    assert read_certificate(file) is None
    assert not checks(adaptc.verify(file))
    adaptc.certify(file)
    assert record_of(file)["base"] == record_of(files.file)["base"]
    assert adaptc.verify(file).ok
    with pytest.raises(CheckpointError, match="there is no file"):
        adaptc.certify(tmp_path / "none.pt2")
    (tmp_path / "none.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="certificate cannot be read"):
        adaptc.verify(tmp_path / "none.pt2")


# -- other bases -------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base(files: Files, tmp_path: Path) -> None:
    """An adapter that was stored with one base is warned of where it meets a file of another, or refused."""
    fr = adaptc.load(files.file).adapters["fr"]
    file = adaptc.save(compiled(model_of(1)), tmp_path / "x.pt2")
    program = adaptc.load(file)
    with pytest.warns(AdaptcWarning, match=r"fr \(x.pt2\) was stored with the base .*, and the certificate"):
        program.swap(fr)
    strict = adaptc.load(file, strict=True)
    before = strict.binding
    for call in (strict.swap, strict.bind):
        with pytest.raises(CheckpointError, match="was stored with the base"):
            call(fr)
    assert strict.binding is before
    with pytest.warns(AdaptcWarning):
        mixed = adaptc.save(program, tmp_path / "mixed.pt2", adapters={"fr": fr})
    with pytest.warns(AdaptcWarning, match="was stored with the base"):
        adaptc.load(mixed)
    with pytest.raises(CheckpointError, match="was stored with the base"):
        adaptc.load(mixed, strict=True)
    same = adaptc.load(files.file, strict=True)
    same.swap(fr)
    compiled(model_of(1)).bind(fr)  # no certificate, so nothing is known of its base


def test_a_table_of_another_base(files: Files, tmp_path: Path) -> None:
    file = adaptc.save(files.program, tmp_path / "x.pt2", base="reference")
    data = record_of(file)
    data["base"]["sha256"] = "0" * 64
    bad = write_records(tmp_path / "bad.pt2", read_records(file) | {RECORD: json.dumps(data).encode()})
    with pytest.warns(AdaptcWarning, match="refers to another base than its certificate says"):
        assert torch.equal(adaptc.load(bad, base=files.model)(X), files.program(X))
    with pytest.raises(CheckpointError, match="refers to another base than its certificate says"):
        adaptc.load(bad, base=files.model, strict=True)


# -- damage, and the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_a_damaged_certificate(files: Files, tmp_path: Path, block: int) -> None:
    records, data = read_records(files.file), record_of(files.file)
    for case in range(block * BLOCK // 2, (block + 1) * BLOCK // 2):
        bad, where = mutate_json(data, random.Random(case))
        path = write_records(tmp_path / "bad.pt2", records | {RECORD: json.dumps(bad).encode()})
        for read in (adaptc.load, read_certificate):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", AdaptcWarning)
                    read(path)
            except CheckpointError as error:
                assert "certificate" in str(error), (case, where)  # noqa: PT017


def test_the_command_line(files: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    file.write_bytes(files.file.read_bytes())

    def call(*arguments: Any, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
        assert result.exit_code == code, result.output
        return result.output

    assert "certificate: measured" in call("verify", file)
    assert "measured with seed 3" in call("certify", file, "--seed", 3, "--runs", 2)
    out = call("verify", file)
    assert out.startswith("verified (seed 3)")
    assert "run 2" in out
    assert "run 3" not in out
    assert json.loads(call("certify", file, "--json"))["measured"]["seed"] == 0
    call("swap", file, "fr", "-o", tmp_path / "fr.pt2")
    assert torch.equal(adaptc.load(tmp_path / "fr.pt2")(X), files.program.bind(files.adapter)(X))
    assert "adapter in the file" in call("show", tmp_path / "fr.pt2")
    base = adaptc.save(adaptc.unload(files.program), tmp_path / "base.pt2")
    named = f"more={files.adapter}"
    call("compile", base, files.adapter, "-o", tmp_path / "r.pt2", "--by-reference", "--adapter", named)
    assert "was saved by reference" in call("show", tmp_path / "r.pt2", code=1)
    save_file(files.model.state_dict(), tmp_path / "base.safetensors")
    assert "more" in call("show", tmp_path / "r.pt2", "--base", tmp_path / "base.safetensors")
    call("verify", tmp_path / "r.pt2", "--base", tmp_path / "base.safetensors")
