"""Each prompt of a batch generates with adapters of its own, and gives what it gives alone and what PEFT gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.generation.models import case, generated, generator, prompt
from tests.support.builds import record_builds

NAMES: list[Any] = ["first", None, "second", {"first": 0.6, "second": -0.4}]


class Mixed:
    """A bank that generates with one assignment."""

    def __init__(self, bank: Any, adapters: list[Any]) -> None:
        self.bank, self.adapters = bank, adapters

    def generate(self, **how: Any) -> Any:
        return self.bank.generate(**how, adapters=self.adapters)


def bank(family: str = "llama") -> Any:
    return generator(family).bank(case(family).adapters)


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: v[i : i + 1] for k, v in inputs.items()}


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_peft_says_the_same(family):
    inputs, oracle = prompt(4, 6, (0, 2)), case(family).oracle
    names = ["first", None, "second", "first"]
    expected = generated(oracle, inputs, adapter_names=[n or "__base__" for n in names])
    assert torch.equal(generated(Mixed(bank(family), names), inputs), expected)


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_a_prompt_gets_what_it_gets_alone(how):
    made, gen, inputs = bank(), generator(), prompt(4, 6, (0, 2))
    out = generated(Mixed(made, NAMES), inputs, **how)
    each = len(out) // 4
    for i, name in enumerate(NAMES[:3]):
        alone = gen.base if name is None else gen.bind(case("llama").adapters[name])
        assert torch.equal(out[i * each : (i + 1) * each], generated(alone, row(inputs, i), **how))
    mix = generated(Mixed(made, NAMES[3:]), row(inputs, 3), **how)
    assert torch.equal(out[3 * each :], mix)


@pytest.mark.long
def test_samples_keep_their_adapters():
    out = generated(Mixed(bank(), NAMES), prompt(4, 6), do_sample=True, num_return_sequences=3, new=5)
    assert out.shape == (12, 11)


@pytest.mark.long
def test_a_generation_keeps_its_adapters():
    """What is put in the place of an adapter while a text is generated is for the next one."""
    made, inputs, dirs = bank(), prompt(4, 6), case("llama").adapters
    expected = generated(Mixed(made, NAMES), inputs)

    def replacing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 9:
            made.replace("first", dirs["second"])
        return scores

    assert torch.equal(generated(Mixed(made, NAMES), inputs, logits_processor=[replacing]), expected)
    assert not torch.equal(generated(Mixed(made, NAMES), inputs), expected)


@pytest.mark.long
def test_a_prefix_with_adapters_is_continued():
    made, inputs = bank(), prompt(4, 6)
    expected = generated(Mixed(made, NAMES), inputs)
    cache = made.prefill(inputs["input_ids"][:, :4], adapters=NAMES)
    assert torch.equal(generated(Mixed(made, NAMES), inputs, past_key_values=cache), expected)


def test_a_prefill_of_other_rows_is_refused() -> None:
    made, inputs = bank(), prompt(4, 6)
    for rows in (["first"], ["first", "second"], [None] * 5):
        with pytest.raises(adaptc.AdaptcError, match=f"{len(rows)} entries, and there are 4 prompts"):
            made.prefill(**inputs, adapters=rows)
    assert "2 adapters" in repr(made)


@pytest.mark.long
def test_a_call_of_other_rows_loads_nothing():
    dirs, asked = case("llama").adapters, []

    def loader(name: str) -> Any:
        asked.append(name)
        return dirs["first" if name < "c" else "second"]

    made, inputs = generator().bank(capacity=2, evict=True, loader=loader), prompt(4, 6)
    generated(Mixed(made, ["a", "b", None, "a"]), inputs, new=2)
    for call in (made.generate, made.prefill):
        with pytest.raises(adaptc.AdaptcError, match="2 entries, and there are 4 prompts"):
            call(inputs["input_ids"], adapters=["c", "d"])
    assert (sorted(made), asked) == (["a", "b"], ["a", "b"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_warm_bank_makes_nothing_while_it_generates(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, built = bank(family), record_builds(monkeypatch)
    made.warm()
    assert built
    before = len(built)
    for adapters in (NAMES, [None] * 4, ["first"] * 4, ["first", None, "second", "second"]):
        generated(Mixed(made, adapters), prompt(4, 6), new=2)
    assert len(built) == before, built[before:]
