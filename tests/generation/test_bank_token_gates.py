"""Banks of what generates with aLoRA and Poly: a prompt is invoked by its own adapter, and has a task of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.errors import AdaptcError, ConfigError
from tests.generation import test_alora as invoked
from tests.generation import test_task_ids as tasks
from tests.generation.models import generated
from tests.generation.test_bank import Mixed, row
from tests.generation.test_packaged_token_gates import LONG, longer
from tests.support.families import FAMILIES
from tests.support.invoked import alora_oracle

FAMILY = "llama"
ROWS: list[Any] = ["one", "other", None, "other", "same", {"one": 0.6, "same": -0.3}]


@cache
def same() -> Path:
    """Invoked as "one" is."""
    return alora_oracle(FAMILY, Path(mkdtemp()), invoked.CALL, seed=7, r=5).path


@cache
def directories() -> dict[str, Path]:
    paths = {"one": invoked.oracle(FAMILY).path, "other": invoked.oracle(FAMILY, invoked.OTHER).path}
    return {**paths, "same": same()}


def alora_bank() -> Any:
    return invoked.generator(FAMILY).bank(directories())


def alora_text() -> dict[str, Tensor]:
    """Each row has the tokens of both, at other places."""
    inputs = invoked.text(6, 13, tokens=())
    inputs["input_ids"][:, 4:6] = torch.tensor(invoked.CALL)
    inputs["input_ids"][:, 7:10] = torch.tensor(invoked.OTHER)
    return inputs


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_each_prompt_is_invoked_by_its_own_adapter(how: dict[str, Any]) -> None:
    gen, bank, inputs = invoked.generator(FAMILY), alora_bank(), alora_text()
    out = generated(Mixed(bank, ROWS), inputs, **how)
    each = len(out) // len(ROWS)
    for i, name in enumerate(ROWS[:5]):
        alone = gen.base if name is None else gen.bind(directories()[name])
        assert torch.equal(out[i * each : (i + 1) * each], generated(alone, row(inputs, i), **how))
    assert torch.equal(out[5 * each :], generated(Mixed(bank, ROWS[5:]), row(inputs, 5), **how))
    if not how:
        for i, name in ((0, "one"), (1, "other")):
            theirs = invoked.oracle(FAMILY, invoked.CALL if name == "one" else invoked.OTHER).model
            assert torch.equal(out[i : i + 1], generated(theirs, row(inputs, i)))
        assert torch.equal(generated(Mixed(bank, ROWS), inputs, prefill_chunk_size=4), out)
        assert not torch.equal(out, generated(Mixed(bank, ["one"] * 6), inputs))


def test_caches_of_prompts_are_continued() -> None:
    """Of the bank and of the base; what a row was invoked by is remembered."""
    gen, bank, inputs = invoked.generator(FAMILY), alora_bank(), alora_text()
    expected = generated(Mixed(bank, ROWS), inputs)
    past = bank.prefill(inputs["input_ids"][:, :6], inputs["attention_mask"][:, :6], adapters=ROWS)
    assert [n < 6 for n in past.active_from["alora_acts"].tolist()] == [True, False, False, False, True, True]
    assert torch.equal(generated(Mixed(bank, ROWS), inputs, past_key_values=past), expected)
    past = gen.base.prefill(inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4])
    assert torch.equal(generated(Mixed(bank, ROWS), inputs, past_key_values=past), expected)
    sampled = generated(Mixed(bank, ROWS), inputs, do_sample=True, num_return_sequences=2)
    assert torch.equal(sampled, generated(Mixed(bank, ROWS), inputs, do_sample=True, num_return_sequences=2))


def test_mixes_that_begin_apart_are_refused() -> None:
    bank, inputs = alora_bank(), alora_text()
    mixed = [*ROWS[:5], {"one": 0.5, "other": 0.5}]
    with pytest.raises(ConfigError, match="mixes 'one' and 'other', which begin to act at other tokens"):
        generated(Mixed(bank, mixed), inputs)
    with pytest.raises(ConfigError, match=r"give input_ids, or use gen.base"):
        bank.generate(inputs_embeds=torch.zeros(1, 3, 24), adapters=["one"], max_new_tokens=2)
    bank.replace("other", directories()["one"])
    assert len(generated(Mixed(bank, mixed), inputs)) == 6


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tasks_of_prompts(family: str) -> None:
    one, other, gen = tasks.oracle(family), tasks.oracle(family, seed=1), tasks.generator(family)
    bank = gen.bank({"one": one.path, "other": other.path})
    inputs = tasks.text(4, 7, [4, 0, 2, 3], (2,))
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    names: list[Any] = ["one", None, "other", "one"]
    out = tasks.said(Mixed(bank, names), inputs)
    for i, model in ((0, one.model), (2, other.model), (3, one.model)):
        assert torch.equal(out[i : i + 1], tasks.said(model, row(inputs, i))[:, : out.shape[1]])
    assert torch.equal(out[1:2], tasks.said(FAMILIES[family].build(), row(plain, 1)))
    beams = tasks.said(Mixed(bank, names), inputs, num_beams=3)
    for i, name in enumerate(names):
        alone = gen.base if name is None else gen.bind((one if name == "one" else other).path)
        assert torch.equal(beams[i : i + 1], tasks.said(alone, row(plain if name is None else inputs, i), num_beams=3))
    assert torch.equal(tasks.said(Mixed(bank, ["other"] * 4), inputs), tasks.said(other.model, inputs))
    assert torch.equal(tasks.said(Mixed(bank, [None] * 4), plain), tasks.said(gen.base, plain))
    for bad, message in (
        (plain, "task_ids is missing: give a tensor of 4 whole numbers"),
        ({**plain, "task_ids": torch.tensor([0, 5, 1, 0])}, "task_ids has 5, and the adapter has tasks from 0 to 4"),
    ):
        with pytest.raises(AdaptcError, match=message):
            tasks.said(Mixed(bank, names), bad)
    given = {"inputs" if family == "t5" else "input_ids": inputs["input_ids"]}
    past = bank.prefill(**given, attention_mask=inputs["attention_mask"], task_ids=inputs["task_ids"], adapters=names)
    more = {"task_ids": inputs["task_ids"]} if family == "t5" else inputs
    assert torch.equal(tasks.said(Mixed(bank, names), more, past_key_values=past), out)


@pytest.mark.long
def test_packages(tmp_path: Path) -> None:
    """Of the bank in compiled code, and of an adapter that is put in, with more tokens and a larger rank."""
    bank, inputs = alora_bank(), alora_text()
    package = adaptc.load_package(adaptc.package(bank, tmp_path / "package.pt2", capacity=4))
    for how in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert torch.equal(generated(Mixed(package, ROWS), inputs, **how), generated(Mixed(bank, ROWS), inputs, **how))
    inputs["input_ids"][:, 2:11] = torch.tensor(LONG)
    for one in (bank, package):
        one.add("long", longer().path)
    rows = ["long", None, "one", {"long": 0.5}, "same", "long"]
    out = generated(Mixed(package, rows), inputs)
    assert torch.equal(out, generated(Mixed(bank, rows), inputs))
    assert torch.equal(out[:1], generated(longer().model, row(inputs, 0)))
    assert torch.equal(out[1:2], generated(package.select([None]), row(inputs, 1)))
    with pytest.raises(ConfigError, match="mixes 'one' and 'other', which begin to act at other tokens"):
        generated(Mixed(package, [{"one": 0.5, "other": 0.5}] * 6), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_packages_with_tasks(family: str, tmp_path: Path) -> None:
    adapters = {"one": tasks.oracle(family).path, "other": tasks.oracle(family, seed=1).path}
    bank, names = tasks.generator(family).bank(adapters), ["one", None, "other", "one"]
    package = adaptc.load_package(adaptc.package(bank, tmp_path / "package.pt2", capacity=3))
    inputs = tasks.text(4, 7, [4, 0, 2, 3], (2,))
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    for how in ({}, {"num_beams": 2}):
        expected = tasks.said(Mixed(bank, names), inputs, **how)
        assert torch.equal(tasks.said(Mixed(package, names), inputs, **how), expected)
    none: list[Any] = [None] * 4
    assert torch.equal(tasks.said(Mixed(package, none), plain), tasks.said(Mixed(bank, none), plain))
    for bad in (5, -1):  # which would end the process
        with pytest.raises(AdaptcError, match=f"'task_ids' has {bad}, and the model looks up a row from 0 to 4"):
            tasks.said(Mixed(package, names), {**plain, "task_ids": torch.tensor([0, bad, 1, 0])})
