"""Packages that are damaged or forged are refused before anything of their code is loaded."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc import AdaptcError, BackendError, CheckpointError, LoraConfig
from adaptc.packages.packaged_program import PackagedProgram
from tests.support.archives import MANIFEST, read_records, with_right_hashes, write_records
from tests.support.damage import BLOCK, mutate_bytes, mutate_json

#: what is compiled once serves all tests of the file
pytestmark = [pytest.mark.long, pytest.mark.few(3)]

INPUT = torch.linspace(-1, 2, 20).view(4, 5)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=INPUT)
    return adaptc.package(program, tmp_path_factory.mktemp("package") / "good.pt2", max_rank=3)


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the code of a package fails the test."""

    def loaded(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loaded)


def refused(path: Path, said: str = "") -> None:
    with pytest.raises(CheckpointError, match=said or None) as info:
        adaptc.load_package(path)
    assert str(path) in str(info.value)


def edit(package: Path, target: Path, change: Callable[[Any], Any], *, hashed: bool = True) -> Path:
    """A copy with another manifest; ``hashed``: with the right hash of itself, as a forger would have it."""
    records = read_records(package)
    data = json.loads(records[MANIFEST])
    change(data)
    records[MANIFEST] = json.dumps(data).encode()
    return write_records(target, with_right_hashes(records) if hashed else records)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("ending", [".so", ".cpp", "archive_version", "serialization_id"])
def test_a_record_that_was_changed(package: Path, tmp_path: Path, ending: str) -> None:
    records = read_records(package)
    name = next(n for n in records if n.endswith(ending))
    records[name] = records[name][:-1] + bytes([records[name][-1] ^ 1])
    refused(write_records(tmp_path / "bad.pt2", records), f"{ending}' does not have the hash of the manifest")
    del records[name]
    refused(write_records(tmp_path / "gone.pt2", records), f"{ending}' is missing")


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    "name", ["models/model.json", "data/weights/weight_0", "data/aotinductor/other/x.so", "data/x"]
)
def test_a_record_too_many(package: Path, tmp_path: Path, name: str) -> None:
    """What torch would unpickle, or load as code of its own, is none of a package's, with hashes or without."""
    records = read_records(package) | {name: b"x"}
    refused(write_records(tmp_path / "bad.pt2", records), "is not in its manifest")
    refused(write_records(tmp_path / "forged.pt2", with_right_hashes(records)), "none that a package has")


@pytest.mark.usefixtures("no_code")
def test_compressed_records(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in read_records(package).items():
            archive.writestr(f"a/{name}", data)
    refused(tmp_path / "bad.pt2", "decompression bomb")


FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an older format": (lambda d: d.update(format=3), "package format 3, and this adaptc reads 4; package the program"),
    "a format as text": (lambda d: d.update(format="4"), "package format '4'"),
    "a list of sites": (lambda d: d.update(sites={}), r"sites: expected a list, found a dict of 0"),
    "a size": (lambda d: d["sites"][0].update(shape=[7, "5"]), r"sites\[0\]\.shape\[1\]: expected a size, found '5'"),
    "a negative size": (lambda d: d["sites"][0].update(shape=[7, -5]), "expected a size, found -5"),
    "a dtype": (lambda d: d["sites"][0].update(dtype="torch.save"), "'torch.save' is no dtype"),
    "an operator": (lambda d: d["sites"][0]["op"].update(target="os.system"), "os.system"),
    "a method": (lambda d: d["sites"][0]["attachment"].update(method="none"), "none"),
    "options": (lambda d: d["sites"][0]["attachment"]["options"].update(r="2"), "damaged"),
    "the header": (lambda d: d["header"].update(present=None), "present: expected a list"),
    "a site of the header": (lambda d: d["header"].update(present=["9.weight|lora"]), "speaks of the site"),
    "a field too many": (lambda d: d.update(more=1), "expected an object of format"),
    "a field too few": (lambda d: d.pop("rooms"), "expected an object of format"),
    "a bank that is too full": (lambda d: d.update(bank={"count": 1, "names": ["a", "b"]}), "has room for 1 adapters"),
    "a name twice in a bank": (lambda d: d.update(bank={"count": 3, "names": ["a", "a"]}), "has room for 3 adapters"),
    "a bank that it was not": (lambda d: d.update(bank={"count": 3, "names": ["a"]}), "missing, or of another shape"),
    "a bank without places": (lambda d: d.update(bank={"names": ["a"]}), "bank: "),
    "a hash": (lambda d: d.update(hashes=[]), "hashes: expected an object"),
}


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("case", list(FIELDS))
def test_the_manifest(package: Path, tmp_path: Path, case: str) -> None:
    change, said = FIELDS[case]
    keep_hashes = case == "a hash"
    bad = edit(package, tmp_path / "bad.pt2", change, hashed=not keep_hashes)
    refused(bad, said)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"[" * 200_000, b"{}", b"\xff", b'{"format": 4}'])
def test_a_manifest_that_is_none(package: Path, tmp_path: Path, text: bytes) -> None:
    refused(write_records(tmp_path / "bad.pt2", read_records(package) | {MANIFEST: text}), "damaged")


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 20))])
def test_any_damage(package: Path, tmp_path: Path, block: int) -> None:
    """Bytes of the file, and values of its manifest: none of it reaches the loader of code."""
    data, records = package.read_bytes(), read_records(package)
    manifest = json.loads(records[MANIFEST])
    for case in range(block * BLOCK, block * BLOCK + BLOCK):
        rng = random.Random(case)
        bad = mutate_bytes(data, rng)
        if bad != data:
            (tmp_path / "bad.pt2").write_bytes(bad)
            try:
                adaptc.load_package(tmp_path / "bad.pt2")
            except (CheckpointError, BackendError) as error:
                assert str(tmp_path) in str(error), case  # noqa: PT017
            except AssertionError:
                assert _same_records(tmp_path / "bad.pt2", records), f"{case}: changed code would be loaded"
            else:
                pytest.fail(f"{case}: it was loaded without its code")
        forged, _ = mutate_json(manifest, rng)
        if forged != manifest:
            records_of = records | {MANIFEST: json.dumps(forged).encode()}
            refused(write_records(tmp_path / "forged.pt2", records_of))


def _same_records(path: Path, records: dict[str, bytes]) -> bool:
    """Whether the damage was to bytes that belong to no record."""
    return read_records(path) == records


@pytest.mark.filterwarnings("ignore:adapter config. dropping unknown")
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 20))])
def test_a_forged_manifest_raises_nothing_else(package: Path, tmp_path: Path, block: int) -> None:
    """With the right hashes: what is accepted loads, what is not says so."""
    records = read_records(package)
    manifest = json.loads(records[MANIFEST])
    for case in range(block * BLOCK // 4, (block + 1) * BLOCK // 4):
        forged, where = mutate_json(manifest, random.Random(50_000 + case))
        if not isinstance(forged, dict):
            continue
        path = write_records(
            tmp_path / "forged.pt2", with_right_hashes(records | {MANIFEST: json.dumps(forged).encode()})
        )
        try:
            adaptc.load_package(path)
        except AdaptcError as error:
            assert isinstance(error, (CheckpointError, BackendError)), (case, where)  # noqa: PT017
            assert str(path) in str(error), (case, where)  # noqa: PT017


def test_a_folder_whose_name_is_no_utf8(package: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(package.parent) + b"/caf\xe9"))
    odd.mkdir()
    (odd / "a.pt2").write_bytes(package.read_bytes())
    assert torch.equal(adaptc.load_package(odd / "a.pt2")(INPUT), adaptc.load_package(package)(INPUT))
    (odd / "b.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"caf\\xe9/b\.pt2 is not a packaged program"):
        adaptc.load_package(odd / "b.pt2")
