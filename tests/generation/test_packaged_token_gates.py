"""Packages of what generates with aLoRA and Poly: the tokens of PEFT, invoked by the text, or by the task of a row."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import AdaptcError, ConfigError, SwapError
from tests.generation import test_alora as invoked
from tests.generation import test_task_ids as tasks
from tests.generation.models import generated
from tests.support.families import FAMILIES
from tests.support.invoked import alora_oracle
from tests.support.oracle import Oracle

#: more tokens than there is room for in the slot of the adapter that is packaged
LONG = tuple(range(20, 29))
ROOM = 5


@cache
def longer() -> Oracle:
    return alora_oracle("llama", Path(mkdtemp()), LONG, seed=3, r=ROOM, lora_alpha=17)


@cache
def written(kind: str) -> Path:
    path = Path(mkdtemp()) / f"{kind}.pt2"
    if kind == "alora":
        return adaptc.package(invoked.generator("llama"), path, max_rank=ROOM)
    return adaptc.package(tasks.generator("llama"), path)


@cache
def packaged(kind: str) -> Any:
    """Tests that swap it give its adapter back."""
    return adaptc.load_package(written(kind))


@pytest.mark.long
def test_alora_says_what_peft_says() -> None:
    package, peft = packaged("alora"), invoked.oracle("llama").model
    for rows, length, padding in ((4, 9, "left"), (4, 11, None), (1, 1, None)):
        inputs = invoked.text(rows, length, padding)
        expected = generated(peft, inputs)
        assert torch.equal(generated(package, inputs), expected)
        assert torch.equal(generated(package, inputs, prefill_chunk_size=3), expected)
        with peft.disable_adapter():
            plain = generated(peft, inputs)
        assert torch.equal(generated(package.base, inputs), plain)
    inputs = invoked.text(4, 9)
    for how in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        assert torch.equal(generated(package, inputs, **how), generated(invoked.generator("llama"), inputs, **how))
    bound, given = package.bind(longer().path), invoked.text(4, 20, "left", LONG)
    other = generated(longer().model, given)
    assert torch.equal(generated(bound, given), other)
    with longer().model.disable_adapter():
        assert not torch.equal(generated(longer().model, given), other)
    try:
        adaptc.swap(package, longer().path)
        assert torch.equal(generated(package, given), other)
    finally:
        adaptc.swap(package, invoked.oracle("llama").path)
    assert torch.equal(generated(package, inputs), generated(peft, inputs))


@pytest.mark.long
def test_alora_goes_on_from_a_cache_of_the_base() -> None:
    """The tokens that invoke it in the cache or behind it; what was invoked stays so."""
    package, gen, inputs = packaged("alora"), invoked.generator("llama"), invoked.text(3, 14, None)
    inputs["input_ids"][:, :8] = inputs["input_ids"][:, :8].clamp(min=20)
    inputs["input_ids"][:, 8:10] = torch.tensor(invoked.CALL)
    said = package.base.prefill(inputs["input_ids"][:, :8])
    before = said.copy()
    expected = generated(invoked.oracle("llama").model, inputs)
    assert torch.equal(generated(package, inputs, past_key_values=said.copy()), expected)
    assert all(torch.equal(a, b) for a, b in zip(said.tensors, before.tensors, strict=True))
    # Where the cache has some of them, the others know of it. The second row is invoked once more.
    for count in (9, 12):
        found = []
        for one in (package, gen):
            past = (one.base if count == 9 else one).prefill(inputs["input_ids"][:, :count])
            found.append(
                (generated(one, inputs, past_key_values=past).tolist(), past.active_from["alora_acts"].tolist())
            )
        assert found[0] == found[1]
    with pytest.raises(ConfigError, match=r"give input_ids, or use gen.base"):
        package.generate(inputs_embeds=torch.zeros(1, 3, package.spec.hidden_size), max_new_tokens=2)
    with pytest.raises(SwapError, match=r"rank 7.*room for 5"):
        adaptc.swap(package, alora_oracle("llama", Path(mkdtemp()), invoked.CALL, r=7).path)
    assert adaptc.verify(package, invoked.generator("llama")).ok


FRESH = """
import sys, torch, adaptc
path, other, inputs, given, out = sys.argv[1:]
gen = adaptc.load_package(path)
how = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
found = [gen.generate(**torch.load(inputs), **how)]
adaptc.swap(gen, other)
torch.save([*found, gen.generate(**torch.load(given), **how)], out)
strange = [n for n in sys.modules if ".modeling_llama" in n]
assert not strange, strange
"""


@pytest.mark.long
def test_alora_in_a_fresh_process(tmp_path: Path) -> None:
    inputs, given = invoked.text(4, 9), invoked.text(4, 20, "left", LONG)
    files = [tmp_path / name for name in ("inputs.pt", "given.pt", "out.pt")]
    for value, file in ((inputs, files[0]), (given, files[1])):
        torch.save(value, file)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, written("alora"), longer().path, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [generated(invoked.oracle("llama").model, inputs), generated(longer().model, given)]
    assert [t.tolist() for t in torch.load(files[2])] == [t.tolist() for t in expected]


@pytest.mark.long
def test_poly_says_what_peft_says() -> None:
    """A task for each prompt, of an adapter of the same sizes after a swap; numbers that are no task change nothing."""
    package, one = packaged("poly"), tasks.oracle("llama")
    inputs = tasks.text(3, 7, [4, 0, 2], (2,))
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    for how in ({}, {"do_sample": True}):
        assert torch.equal(generated(package, inputs, **how), generated(one.model, inputs, **how))
    for how in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        assert torch.equal(generated(package, inputs, **how), generated(tasks.generator("llama"), inputs, **how))
    past = package.prefill(inputs["input_ids"], inputs["attention_mask"], task_ids=inputs["task_ids"])
    assert torch.equal(generated(package, inputs, past_key_values=past), generated(one.model, inputs))
    for base in (package.base, package.bind(None), tasks.generator("llama").bind(None)):
        assert torch.equal(generated(base, plain), generated(FAMILIES["llama"].build(), plain))
        with pytest.raises(AdaptcError, match="task_ids"):
            generated(base, inputs)
    other = tasks.oracle("llama", seed=1)
    try:
        adaptc.swap(package, other.path)
        assert torch.equal(generated(package, inputs), generated(other.model, inputs))
        with pytest.raises(SwapError, match=r"the compiled code takes .* alone; package the program with this adapter"):
            adaptc.swap(package, tasks.oracle("llama", seed=1, r=5, n_tasks=2, n_skills=7).path)
    finally:
        adaptc.swap(package, one.path)
    for given, message in (
        (None, "task_ids is missing: give a tensor of 3 whole numbers"),
        (torch.tensor([1, 2]), "must be a tensor of 3 whole numbers"),
        (torch.tensor([0, 5, 1]), "'task_ids' has 5, and the model looks up a row from 0 to 4"),
        (torch.tensor([0, -1, 1]), "'task_ids' has -1, and the model looks up a row from 0 to 4"),
    ):
        with pytest.raises(AdaptcError, match=message):
            generated(package, plain if given is None else {**plain, "task_ids": given})
    assert torch.equal(generated(package, inputs), generated(one.model, inputs))
    assert adaptc.verify(package, tasks.generator("llama")).ok


@pytest.mark.slow
def test_poly_with_an_encoder(tmp_path: Path) -> None:
    gen, inputs = tasks.generator("t5"), tasks.text(3, 7, [4, 0, 2], (2,))
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "package.pt2"))
    for how in ({}, {"do_sample": True}):
        assert torch.equal(tasks.said(package, inputs, **how), tasks.said(tasks.oracle("t5").model, inputs, **how))
    assert torch.equal(tasks.said(package, inputs, num_beams=3), tasks.said(gen, inputs, num_beams=3))
    adaptc.swap(package, tasks.oracle("t5", seed=1).path)
    assert torch.equal(tasks.said(package, inputs), tasks.said(tasks.oracle("t5", seed=1).model, inputs))
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    assert torch.equal(tasks.said(package.base, plain), tasks.said(FAMILIES["t5"].build(), plain))
