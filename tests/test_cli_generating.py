"""Commands on what generates text: compiled, packaged with its tokenizer, talked to, merged and shown."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.generation.models import case, generated, prompt
from tests.generation.packaged import tokenizer
from tests.test_cli import call, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and a program that generates."""
    folder = tmp_path_factory.mktemp("generating")
    found = case("llama")
    found.model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    out = call(
        "compile", folder / "model", found.adapters["first"], "-o", folder / "gen.pt2", "--generate", "--max-length", 48
    ).stdout
    assert "cache: 2 layers, 256 B for each row and position" in out
    return folder


@pytest.fixture(scope="module")
def package(made: Path) -> Path:
    path = made / "package.pt2"
    call("package", made / "gen.pt2", "-o", path, "--max-rank", 5, "--tokenizer", made / "model")
    return path


@pytest.mark.long
def test_a_program_that_generates(made: Path, tmp_path: Path) -> None:
    found, text = case("llama"), prompt(2, 5)
    gen = adaptc.load(made / "gen.pt2")
    assert (gen.spec.max_batch, gen.spec.max_length) == (8, 48)
    assert torch.equal(generated(gen, text), found.expected("first", text))
    call("swap", made / "gen.pt2", found.adapters["second"], "-o", tmp_path / "second.pt2")
    assert torch.equal(generated(adaptc.load(tmp_path / "second.pt2"), text), found.expected("second", text))
    assert "merged 14 weights" in call("merge", made / "gen.pt2", "-o", tmp_path / "merged.pt2").stdout
    assert torch.equal(generated(adaptc.load(tmp_path / "merged.pt2"), text), found.expected("first", text))
    assert "no adapter" in call("show", tmp_path / "merged.pt2").stdout
    call("verify", made / "gen.pt2", "--runs", 1)


@pytest.mark.long
def test_a_program_of_quantised_weights(made: Path, tmp_path: Path) -> None:
    found, text = case("llama"), prompt(2, 5)
    adapter, out = found.adapters["first"], tmp_path / "int8.pt2"
    call("compile", made / "model", adapter, "-o", out, "--generate", "--max-length", 48, "--quantize", "int8")
    gen = adaptc.load(out)
    stored = [n for n, t in gen.program.base_tensors.items() if hasattr(t, "scheme")]
    assert len(stored) == 14
    model = adaptc.quantize(copy.deepcopy(found.model), "int8")
    expected = adaptc.compile_for_generation(model, adapter, max_batch=8, max_length=48)
    assert torch.equal(generated(gen, text), generated(expected, text))
    wrong = ["-o", tmp_path / "no.pt2", "--quantize", "int7"]
    refused("compile", made / "model", adapter, *wrong, said="scheme='int7' is not one of")
    assert not (tmp_path / "no.pt2").exists()


@pytest.mark.long
def test_a_package_that_generates(made: Path, package: Path) -> None:
    found, loaded, text = case("llama"), adaptc.load_package(package), prompt(2, 5)
    assert torch.equal(generated(loaded, text), found.expected("first", text))
    assert loaded.tokenizer.get_vocab() == tokenizer().get_vocab()
    shown: Any = json.loads(call("show", package, "--json").stdout)
    assert shown["notes"] == ["cache: 2 layers, 256 B for each row and position"]


@pytest.mark.long
def test_a_program_that_generates_is_not_one_that_serves(
    made: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat needs a server, and a server the paged step."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command changes it, and this process goes on
    for path in (made / "gen.pt2", package):
        refused("chat", path, "--tokenizer", made / "model", said=f"{path} holds no serving model")


@pytest.mark.long
def test_what_makes_no_sense_is_refused(made: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out.pt2", case("llama").adapters["first"]
    for options in (("--max-length", 9), ("--max-batch", 2), ("--generate", "--training")):
        call("compile", made / "model", adapter, "-o", out, *options, code=2)
    refused("compile", made / "gen.pt2", adapter, "-o", out, "--generate", said="gen.pt2")
    refused("package", made / "gen.pt2", "-o", out, "--tokenizer", tmp_path, said="has no tokenizer that can be read")
    plain = adaptc.save(adaptc.load(made / "gen.pt2").program, tmp_path / "plain.pt2")
    refused("package", plain, "-o", out, "--tokenizer", made / "model", said="a tokenizer goes into packages of what")
    assert not out.exists()
