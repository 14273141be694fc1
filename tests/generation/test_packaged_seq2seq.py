"""Packages of models with an encoder: three models of code in one file, which a swap moves together."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adaptc
from adaptc.packages.manifest import MANIFEST
from adaptc.packages.packaged_program import PackagedProgram
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import packaged, written
from tests.generation.test_encoder_decoders import WITH_ENCODER, expected, read, said
from tests.support.archives import read_records, with_right_hashes, write_records
from tests.support.families import FAMILIES

#: what is compiled once serves all tests of the file
pytestmark = pytest.mark.long

FAMILY = "t5"


@pytest.mark.few(1)
@pytest.mark.parametrize("family", WITH_ENCODER)
def test_tokens_are_those_of_peft(family: str) -> None:
    """Greedy, drawn, in beams, and of whatever is swapped or bound: one swap moves all parts."""
    package, found, given = packaged(family), case(family), read(family, 3, 9, (4, 0, 1))
    try:
        for name in ("second", "first"):
            adaptc.swap(package, found.adapters[name])
            for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
                assert torch.equal(said(package, given, **how), expected(family, name, given, **how))
    finally:
        adaptc.swap(package, found.adapters["first"])
    assert torch.equal(said(package.base, given), expected(family, None, given))
    bound = adaptc.bind(package, found.adapters["second"])
    assert torch.equal(said(bound, given), expected(family, "second", given))
    assert package.generation_config.to_dict() == generator(family).generation_config.to_dict()
    for model in (generator(family), found.model):
        assert adaptc.verify(package, model).ok
    report = adaptc.report(package)
    assert len(report.sites) == len(generator(family).program.adaptation.attachments)
    assert "cache of the encoder's states" in str(report)


def test_what_was_encoded_is_decoded_again() -> None:
    package, given = packaged(FAMILY), prompt(3, 9, (4, 0, 1))
    cache = package.prefill(given["input_ids"], given["attention_mask"])
    alone = expected(FAMILY, "first", given)
    for _ in range(2):
        assert torch.equal(said(package, {"past_key_values": cache.copy()}), alone)
    with pytest.raises(adaptc.AdaptcError, match="of another program"):
        said(generator(FAMILY), {"past_key_values": cache})


def test_a_generation_keeps_its_adapter_in_all_parts() -> None:
    package, given, found = packaged(FAMILY), prompt(2, 6), case(FAMILY)

    def swapping(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        adaptc.swap(package, found.adapters["second"])
        return scores

    try:
        during = said(package, given, logits_processor=transformers.LogitsProcessorList([swapping]))
        assert torch.equal(during, expected(FAMILY, "first", given))
        assert torch.equal(said(package, given), expected(FAMILY, "second", given))
    finally:
        adaptc.swap(package, found.adapters["first"])


def test_threads() -> None:
    package, found, given = packaged(FAMILY), case(FAMILY), prompt(2, 6)
    wanted = {name: expected(FAMILY, name, given) for name in ("first", "second")}
    got: dict[str, list[Any]] = {name: [] for name in wanted}
    bound = {name: package.bind(found.adapters[name]) for name in wanted}

    def work(name: str) -> None:
        for _ in range(3):
            got[name].append(bound[name].generate(**given, max_new_tokens=9, do_sample=False))

    threads = [threading.Thread(target=work, args=(name,)) for name in bound]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name, texts in got.items():
        alone = generated(bound[name], given, eos_token_id=package.generation_config.eos_token_id)
        assert len(texts) == 3
        assert all(torch.equal(t, alone) for t in texts)
        assert not torch.equal(texts[0], got["first" if name == "second" else "second"][0])


FRESH = """
import sys, torch, adaptc
path, second, out = sys.argv[1:]
gen = adaptc.load_package(path)
text = gen.tokenizer("w5 w17 w9", return_tensors="pt")
how = dict(do_sample=False, max_new_tokens=9, eos_token_id=60, pad_token_id=0, decoder_start_token_id=1)
text = {n: text[n] for n in ("input_ids", "attention_mask")}
found = {"first": gen.generate(**text, **how), "beams": gen.generate(**text, **how, num_beams=3)}
adaptc.swap(gen, second)
found["second"] = gen.generate(**text, **how)
torch.save(found, out)
strange = [n for n in sys.modules if ".modeling_t5" in n]
assert not strange, strange
"""


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """It needs torch and transformers, and none of the model's code."""
    out, ids = tmp_path / "out.pt", torch.tensor([[5, 17, 9]])
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    command += [str(written(FAMILY)), str(case(FAMILY).adapters["second"]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = {
        "first": expected(FAMILY, "first", text),
        "beams": expected(FAMILY, "first", text, num_beams=3),
        "second": expected(FAMILY, "second", text),
    }
    assert {n: t.tolist() for n, t in torch.load(out).items()} == {n: t.tolist() for n, t in wanted.items()}


@pytest.mark.slow
def test_an_adapter_of_one_part(tmp_path: Path) -> None:
    """The other parts have nothing to be filled."""
    model, given = FAMILIES[FAMILY].build(), prompt(2, 6)
    config = adaptc.LoraConfig(r=3, target_modules=r"encoder\..*\.[qv]", init_lora_weights=False)
    gen = adaptc.compile_for_generation(model, config, max_length=48)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "one.pt2"))
    assert torch.equal(said(package, given), said(gen, given))
    assert torch.equal(said(package.base, given), said(model, given))
    assert torch.equal(said(package, given), said(gen, given))
    merged = adaptc.load_package(adaptc.package(adaptc.merge(gen), tmp_path / "merged.pt2"))
    assert torch.equal(said(merged, given), said(gen, given))


def test_parts_that_were_forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right hashes, and refused before any code is loaded."""

    def loads(self: PackagedProgram) -> None:
        raise AssertionError("its code was loaded")

    monkeypatch.setattr(PackagedProgram, "_load", loads)
    records = read_records(written(FAMILY))
    changes: dict[str, Any] = {
        "is none that a package has": lambda parts: {n: p for n, p in parts.items() if n != "cross"},
        "it has no code of 'more'": lambda parts: {**parts, "more": parts["cross"]},
        "which is no input of the whole": lambda parts: {
            **parts,
            "step": {**parts["step"], "inputs": [{**parts["step"]["inputs"][0], "name": "strange"}]},
        },
        "its program has no such parts": lambda parts: {**parts, "cross": {**parts["cross"], "outputs": ["logits"]}},
        "parts": lambda parts: {**parts, "step": 5},
    }
    for said_, change in changes.items():
        manifest = json.loads(records[MANIFEST])
        manifest["parts"] = change(manifest["parts"])
        forged = with_right_hashes(records | {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(adaptc.CheckpointError, match=said_):
            adaptc.load_package(write_records(tmp_path / "bad.pt2", forged))
