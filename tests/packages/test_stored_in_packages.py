"""A package holds adapters by name beside its code, a certificate of both, and nothing of it reaches the loader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adaptc
from adaptc import AdaptcError, BackendError, CheckpointError, ConfigError, LoraConfig, SwapError
from adaptc.archives.added_files import ADDED_FOLDER
from adaptc.cli import app
from adaptc.packages.packaged_program import PackagedProgram
from tests.support.archives import read_records, with_right_hashes, write_records
from tests.support.damage import BLOCK, mutate_json

#: what is compiled once serves all tests of the file
pytestmark = [pytest.mark.long, pytest.mark.few(3)]

X = torch.linspace(-1, 2, 20).view(4, 5)
RECORD = ADDED_FOLDER + "certificate.json"


class Files:
    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root = root
        self.model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
        self.program = self.compile(2)
        self.directories = {
            name: adaptc.save_adapter(self.compile(rank), root / name)
            for name, rank in (("fr", 4), ("de", 1), ("über alles", 3))
        }
        self.file = adaptc.package(self.program, root / "all.pt2", adapters=self.directories, verify=True)

    def compile(self, rank: int) -> Any:
        config = LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
        return adaptc.compile(self.model, config, example_inputs=X)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("packaged"))


@pytest.fixture(scope="module")
def package(files: Files) -> Any:
    return adaptc.load_package(files.file, strict=True)


def test_names_are_adapters(files: Files, package: Any) -> None:
    assert list(package.adapters) == list(files.directories)
    assert set(package.ranks.values()) == {4}  # room for the largest of them
    for name, directory in files.directories.items():
        wanted = package.bind(directory)(X)
        package.swap(name)
        assert torch.equal(package(X), wanted)
        assert torch.equal(package.bind(name)(X), wanted)
        torch.testing.assert_close(wanted, files.program.bind(directory)(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(SwapError, match="no adapter 'frr': the program's file has 'fr', 'de'"):
        package.swap("frr")
    with pytest.raises(ConfigError, match=r"^component is for files"):
        package.swap("fr", component="unet")


def test_the_bytes_of_the_file(files: Files, tmp_path: Path) -> None:
    plain = adaptc.package(files.program, tmp_path / "plain.pt2", max_rank=4)
    adapters = sum(f.stat().st_size for d in files.directories.values() for f in d.iterdir() if f.name != "README.md")
    code = {n: len(d) for n, d in read_records(plain).items() if not n.startswith(ADDED_FOLDER)}
    found = {n: len(d) for n, d in read_records(files.file).items() if not n.startswith(ADDED_FOLDER)}
    assert sum(found.values()) - sum(code.values()) < 6000
    added = sum(len(d) for n, d in read_records(files.file).items() if n.startswith(ADDED_FOLDER))
    assert added <= adapters + 4000 * (len(files.directories) + 1)


def test_room_for_them(files: Files, tmp_path: Path) -> None:
    with pytest.raises(SwapError, match=r"^'fr': .*the adapter has rank 4, and the package has room for 2"):
        adaptc.package(files.program, tmp_path / "x.pt2", max_rank=2, adapters=files.directories)
    bank = files.program.bank(files.directories)
    with pytest.raises(ConfigError, match=r"this is a bank: add them to it"):
        adaptc.package(bank, tmp_path / "x.pt2", adapters=files.directories)
    with pytest.raises(ConfigError, match="a bank has many"):
        adaptc.package(bank, tmp_path / "x.pt2", verify=True)
    assert not list(tmp_path.iterdir())


def test_a_fresh_process(files: Files, tmp_path: Path) -> None:
    wanted = {name: files.program.bind(d)(X) for name, d in files.directories.items()}
    torch.save([X, wanted], tmp_path / "wanted.pt")
    code = (
        "import sys, torch, adaptc\n"
        "x, wanted = torch.load('wanted.pt')\n"
        "package = adaptc.load_package(sys.argv[1])\n"
        "for name, out in wanted.items():\n"
        "    package.swap(name)\n"
        "    torch.testing.assert_close(package(x), out, rtol=1e-5, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(files.file)], cwd=tmp_path, check=True)


def test_threads(files: Files, package: Any) -> None:
    wanted = {name: package.bind(d)(X) for name, d in files.directories.items()}
    faults: list[Any] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(30):
            name = chosen.choice(list(wanted))
            package.swap(name)
            found = package(X)
            if not any(torch.equal(found, out) for out in wanted.values()):
                faults.append("a mix of adapters")
            if not torch.equal(package.bind(name)(X), wanted[name]):
                faults.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_certificate(files: Files, tmp_path: Path) -> None:
    found = json.loads(read_records(files.file)[RECORD])
    saved = adaptc.save(files.program, tmp_path / "saved.pt2", adapters=files.directories)
    same = json.loads(read_records(saved)[RECORD])
    assert {n for n in found if found[n] != same[n]} == {"graph", "measured"}
    assert found["graph"]["of"] == "code"
    assert {c["name"]: c["passed"] for c in found["measured"]["checks"]} == {
        "package equals program": True,
        "base equals model": True,
        "swap and back is bitwise": True,
    }
    report = adaptc.verify(files.file, files.program)
    assert report.ok
    assert report["certificate: base"].passed
    assert report["certificate: package equals program"].passed
    assert adaptc.verify(files.file)["certificate: base"].passed is None
    assert adaptc.verify(files.file, files.compile(1))["certificate: base"].passed
    other = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    of_other = adaptc.compile(other, LoraConfig(target_modules=["0", "2"]), example_inputs=X)
    assert adaptc.verify(files.file, of_other)["certificate: base"].passed is False


def test_certified_again(files: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    file.write_bytes(files.file.read_bytes())
    certificate = adaptc.certify(file, files.program, seed=3, shapes=1)
    assert certificate.to_dict() == json.loads(read_records(file)[RECORD])
    before, after = read_records(files.file), read_records(file)
    assert {n for n in before if before[n] != after.get(n)} == {RECORD, "data/extra/adaptc.json"}
    package = adaptc.load_package(file)
    package.swap("de")
    torch.testing.assert_close(package(X), files.program.bind(files.directories["de"])(X), rtol=1e-5, atol=1e-6)
    runner = torch._inductor.aoti_load_package(str(file))
    torch.testing.assert_close(runner(X), files.program(X), rtol=1e-5, atol=1e-6)
    result = CliRunner().invoke(app, ["verify", str(file)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "certificate: graph" in result.output


def test_shown_without_loading_its_code(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loaded)
    result = CliRunner().invoke(app, ["show", str(files.file)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "über alles" in result.output
    found = json.loads(CliRunner().invoke(app, ["show", str(files.file), "--json"]).output)
    assert found["stored"]["fr"] == {"peft_type": "LORA", "tensors": 4, "parameters": 88, "bytes": 352}


def test_entries_that_are_missing(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loaded)
    records, bad = read_records(files.file), tmp_path / "bad.pt2"
    for record in [n for n in records if n.startswith(ADDED_FOLDER + "adapters/")]:
        name = record.split("/")[3]
        less = {n: data for n, data in records.items() if n != record}
        for forge in (lambda r: r, with_right_hashes):
            with pytest.raises(CheckpointError, match=name):
                adaptc.load_package(write_records(bad, forge(less)))
            with pytest.raises(CheckpointError, match=name):
                adaptc.load_package(write_records(bad, forge(records | {record: records[record][:-9]})))


@pytest.mark.filterwarnings("ignore:adapter config. dropping unknown")
@pytest.mark.filterwarnings("ignore::adaptc.AdaptcWarning")
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_forged_texts_raise_nothing_else(files: Files, tmp_path: Path, block: int) -> None:
    records = read_records(files.file)
    texts = [n for n in records if n.startswith(ADDED_FOLDER) and n.endswith(".json")]
    for case in range(block * BLOCK // 2, (block + 1) * BLOCK // 2):
        rng = random.Random(case)
        name = rng.choice(texts)
        forged = json.dumps(mutate_json(json.loads(records[name]), rng)[0]).encode()
        path = write_records(tmp_path / "forged.pt2", with_right_hashes(records | {name: forged}))
        try:
            package = adaptc.load_package(path)
            for adapter in package.adapters:
                package.swap(adapter)
        except AdaptcError as error:
            assert isinstance(error, (CheckpointError, BackendError, ConfigError, SwapError)), case  # noqa: PT017
