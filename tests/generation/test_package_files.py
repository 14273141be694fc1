"""The files that a package of a step carries: what is damaged or does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc.packages.manifest import FILES_PREFIX
from adaptc.packages.packaged_program import PackagedProgram
from tests.generation.models import generator, prompt
from tests.generation.packaged import packaged, tokenizer, written
from tests.support.archives import read_records, with_right_hashes, write_records
from tests.support.families import VOCAB

#: what is compiled once serves all tests of the file
pytestmark = [pytest.mark.long, pytest.mark.few(3)]

GENERATION = FILES_PREFIX + "adaptc.generation.json"


def test_each_is_told_from_the_other(tmp_path: Path) -> None:
    with pytest.raises(adaptc.CheckpointError, match=r"is a package .* open it with adaptc\.load_package"):
        adaptc.load(written("llama"))
    saved = adaptc.save(generator(), tmp_path / "saved.pt2")
    with pytest.raises(adaptc.CheckpointError, match=r"not a package; open it with adaptc\.load"):
        adaptc.load_package(saved)


def test_the_tokenizer_is_in_it() -> None:
    found = packaged("llama").tokenizer
    assert found is packaged("llama").bind(None).tokenizer
    assert found.get_vocab() == tokenizer().get_vocab()
    assert found("w5 w17 nothing").input_ids == [5, 17, 3]
    assert found.pad_token == "w0"


def test_what_is_no_tokenizer_of_it(tmp_path: Path) -> None:
    gen = generator()
    (tmp_path / "empty").mkdir()
    for given, said in (
        (tokenizer(VOCAB + 2), f"has {VOCAB + 2} tokens, and the program was compiled for {VOCAB}"),
        (5, "not a int"),
        (tmp_path / "nowhere", "there is no directory"),
        (tmp_path / "empty", "has no tokenizer that can be read"),
    ):
        with pytest.raises(adaptc.ConfigError, match=said):
            adaptc.package(gen, tmp_path / "out.pt2", tokenizer=given)
    with pytest.raises(adaptc.ConfigError, match="a tokenizer goes into packages of what"):
        adaptc.package(gen.program, tmp_path / "out.pt2", tokenizer=tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_directory_of_a_tokenizer(tmp_path: Path) -> None:
    """Only its own files are taken."""
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    files = generator().package_files(tmp_path)
    assert {n for n in files if n.startswith("tokenizer/")} == {
        n for n in generator().package_files(tokenizer()) if "/" in n
    }
    assert "tokenizer/model.safetensors" not in files


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the code of a package fails the test."""

    def loads(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loads)


def refused(path: Path, said: str) -> None:
    with pytest.raises(adaptc.CheckpointError, match=said) as info:
        adaptc.load_package(path)
    assert str(path) in str(info.value)


@pytest.mark.few(4)
@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("name", [GENERATION, FILES_PREFIX + "tokenizer/tokenizer.json"])
def test_files_that_were_changed(name: str, tmp_path: Path) -> None:
    records = read_records(written("llama"))
    changed = records | {name: records[name][:-1] + bytes([records[name][-1] ^ 1])}
    refused(write_records(tmp_path / "bad.pt2", changed), "does not have the hash of the manifest")
    refused(write_records(tmp_path / "gone.pt2", {k: v for k, v in records.items() if k != name}), "is missing")


FORGED: dict[str, tuple[Any, str]] = {
    "format": (2, "its format is 2, and this adaptc reads 1"),
    "layers": ([{"heads": -1, "key_dim": 1, "value_dim": 1, "sliding": None}], "layers"),
    "max_batch": ("8", "max_batch"),
    "dtype": ("load", "'load' is no dtype"),
    "config": ({"model_type": "nothing"}, "no model_type 'nothing'"),
}


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("field", FORGED)
def test_facts_that_were_forged(field: str, tmp_path: Path) -> None:
    """With the right hashes."""
    records, (value, said) = read_records(written("llama")), FORGED[field]
    stored = json.loads(records[GENERATION])
    records[GENERATION] = json.dumps(stored | {field: value}).encode()
    refused(write_records(tmp_path / "bad.pt2", with_right_hashes(records)), f"adaptc.generation.json.*{said}")
    layers = [*stored["layers"], stored["layers"][0]]
    records[GENERATION] = json.dumps(stored | {"layers": layers}).encode()
    refused(write_records(tmp_path / "more.pt2", with_right_hashes(records)), "its program has no such cache")


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("name", ["../x", ".x", "tokenizer/.x", "tokenizer/a/../../x", "x y", "/x"])
def test_paths_that_no_file_has(name: str, tmp_path: Path) -> None:
    records = read_records(written("llama")) | {FILES_PREFIX + name: b"x"}
    with pytest.raises(adaptc.CheckpointError):
        adaptc.load_package(write_records(tmp_path / "bad.pt2", with_right_hashes(records)))


@pytest.mark.usefixtures("no_code")
def test_files_of_nobody(tmp_path: Path) -> None:
    records = read_records(written("llama"))
    with_more = with_right_hashes(records | {FILES_PREFIX + "strange.json": b"{}"})
    refused(write_records(tmp_path / "more.pt2", with_more), "'strange.json', which is none of what generates")
    without = with_right_hashes({k: v for k, v in records.items() if k != GENERATION})
    refused(write_records(tmp_path / "less.pt2", without), "which is of no program")


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    """Tokens are generated anyhow."""
    records = read_records(written("llama"))
    records[FILES_PREFIX + "tokenizer/tokenizer.json"] = b"{}"
    package = adaptc.load_package(write_records(tmp_path / "bad.pt2", with_right_hashes(records)))
    assert package.generate(**prompt(1, 3), max_new_tokens=2, pad_token_id=0).shape == (1, 5)
    with pytest.raises(adaptc.CheckpointError, match="the tokenizer in the package cannot be read here"):
        _ = package.tokenizer
