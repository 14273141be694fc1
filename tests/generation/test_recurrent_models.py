"""Models that keep a state instead of keys and values: prompts read at once, then token by token, as PEFT says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adaptc
from adaptc.generation import causal_generator
from adaptc.generation.causal_generator import CausalGenerator
from tests.generation.models import Case, case_of, check_tokens, generated, prompt
from tests.support.families import FAMILIES, VOCAB, perturb

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
LIMITS: dict[str, Any] = {"max_batch": 12, "max_length": 48}


def built(family: str) -> Any:
    if family == "mamba":
        return FAMILIES[family].build()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "falcon_mamba":
            config: Any = transformers.FalconMambaConfig(**SIZES, intermediate_size=40)
            model: Any = transformers.FalconMambaForCausalLM(config)
        else:
            config = transformers.Mamba2Config(**SIZES, num_heads=6, head_dim=8, n_groups=2)
            model = transformers.Mamba2ForCausalLM(config)
    perturb(model)
    return model.eval()


@cache
def both(family: str = "mamba") -> tuple[Case, Any]:
    """A model with PEFT's adapters, and what generates with the first of them."""
    of = case_of(built(family), ["in_proj"] if family == "mamba2" else ["in_proj", "x_proj"])
    return of, adaptc.compile_for_generation(of.model, of.adapters["first"], **LIMITS)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_tokens_are_those_of_peft(family: str) -> None:
    """Rows of different lengths; greedy, drawn, in beams, and of what the adapter is swapped to."""
    check_tokens(*both(family), [prompt(3, 9, (4, 0, 1)), prompt(1, 1)])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_state_goes_on_and_is_forked(tmp_path: Path) -> None:
    """Its size is the same at every length, and nothing of it is taken back."""
    of, gen = both()
    text = prompt(2, 9, (3, 0))
    alone = of.expected("first", text)
    start = gen.prefill(text["input_ids"][:, :5], text["attention_mask"][:, :5])
    for _ in range(2):
        assert torch.equal(generated(gen, text, past_key_values=start.copy()), alone)
    assert (start.length, start.nbytes) == (5, gen.spec.layout.nbytes(2, 5))
    assert gen.prefill(text["input_ids"]).nbytes == start.nbytes
    assert "state: 2.8 KiB for each row" in str(adaptc.report(gen))
    again = adaptc.load(adaptc.save(gen, tmp_path / "state.pt2"))
    assert torch.equal(generated(again, text), alone)
    assert torch.equal(generated(adaptc.merge(gen), text), alone)
    assert adaptc.verify(gen, of.model).ok
    for keep in (1, 3, torch.tensor([0, 4])):
        kept = gen.forward(text["input_ids"], logits_to_keep=keep).logits
        whole = gen.forward(text["input_ids"]).logits
        torch.testing.assert_close(kept, whole[:, torch.arange(9)[-keep:] if isinstance(keep, int) else keep])
    with pytest.raises(adaptc.AdaptcError, match="a state of 5 positions cannot be taken back to 3"):
        start.crop(-2)
    with pytest.raises(adaptc.AdaptcError, match="a state of 5 positions cannot be taken back to 4"):
        generated(gen, text["input_ids"][:, :5], past_key_values=start)
    assert start.length == 5
    start.reset()
    assert torch.equal(generated(gen, text, past_key_values=start), alone)
    with pytest.raises(adaptc.AdaptcError, match="assisted decoding takes back what was guessed wrong"):
        generated(gen, prompt(1, 5), prompt_lookup_num_tokens=3)
    embedded = of.model.get_input_embeddings()(text["input_ids"])
    mask = text["attention_mask"]
    assert torch.equal(generated(gen, {"inputs_embeds": embedded, "attention_mask": mask}), alone[:, 9:])


@pytest.mark.slow
def test_as_a_package(tmp_path: Path) -> None:
    of, gen = both()
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "state.pt2", max_rank=5))
    text = prompt(3, 9, (4, 0, 1))
    for name in ("second", "first"):
        adaptc.swap(package, of.adapters[name])
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(generated(package, text, **how), of.expected(name, text, **how))
    assert adaptc.verify(package, gen).ok
    assert adaptc.verify(package, of.model).ok


@pytest.mark.slow
def test_inductor_compiles_once() -> None:
    of, _ = both()
    gen, text = (
        adaptc.compile_for_generation(of.model, of.adapters["first"], **LIMITS, backend="inductor"),
        prompt(3, 9),
    )
    assert torch.equal(generated(gen, text), of.expected("first", text))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(gen, of.adapters["second"])
        assert torch.equal(generated(gen, text), of.expected("second", text))
        assert torch.equal(generated(gen, prompt(1, 4)), of.expected("second", prompt(1, 4)))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prompt_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits and states are those that the steps give, which are not run for it."""
    _, gen = both()
    text = prompt(2, 17, (3, 0))
    steps: list[int] = []
    original = CausalGenerator.run_step_program
    monkeypatch.setattr(CausalGenerator, "run_step_program", lambda *a, **k: steps.append(1) or original(*a, **k))
    at_once = gen.prefill(text["input_ids"], text["attention_mask"])
    assert steps == []
    monkeypatch.setattr(causal_generator, "can_prefill", lambda *_: False)
    by_steps = gen.prefill(text["input_ids"], text["attention_mask"])
    assert len(steps) == 17
    for ours, theirs in zip(at_once.tensors, by_steps.tensors, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_texts_are_read_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single token, padding that is not at the start, and tokens after others are not read at once."""
    of, gen = both()
    asked: list[int] = []
    original = causal_generator.run_prefill
    monkeypatch.setattr(causal_generator, "run_prefill", lambda *a, **k: asked.append(1) or original(*a, **k))
    whole = prompt(2, 9)
    for hole in (4, 8):
        mask = whole["attention_mask"].clone()
        mask[1, hole] = 0
        past = gen.prefill(whole["input_ids"], mask)
        assert asked == []
        kept = whole["input_ids"][1:][:, mask[1].bool()]
        without = gen.prefill(kept, torch.ones_like(kept))
        assert asked.pop() == 1
        for one, row in zip(without.tensors, past.tensors, strict=True):
            torch.testing.assert_close(one, row[1:])
    assert torch.equal(generated(gen, prompt(1, 1)), of.expected("first", prompt(1, 1)))
    assert asked == []
    past = gen.prefill(whole["input_ids"][:, :4], whole["attention_mask"][:, :4])
    assert asked.pop() == 1
    assert torch.equal(generated(gen, whole, past_key_values=past), of.expected("first", whole))
    assert asked == []
