"""Models that keep states beside keys and values: read token by token from both, with the tokens of PEFT."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.archives.refusal import UnsafeFile
from adaptc.generation.cache.cache_layout import CacheLayout, HybridLayout
from adaptc.generation.description import SPEC_FILE, facts_of, spec_to_json
from adaptc.generation.modes.prefill_part import prompt_input_names
from tests.coverage.build import build
from tests.coverage.rows import Row
from tests.generation.models import Case, case_of, check_tokens, generated, prompt

LIMITS: dict[str, Any] = {"max_batch": 12, "max_length": 48}
#: layers of either kind in turn, both in a layer, layers that keep nothing, delta rules, sliding windows, convolutions
FAMILIES = {
    "jamba": ("JambaForCausalLM", ["q_proj", "in_proj"]),
    "falcon_h1": ("FalconH1ForCausalLM", ["q_proj", "in_proj"]),
    "nemotron_h": ("NemotronHForCausalLM", ["q_proj", "in_proj"]),
    "qwen3_next": ("Qwen3NextForCausalLM", ["q_proj", "in_proj_qkvz"]),
    "inkling2_text": ("Inkling2ForCausalLM", ["linear"]),
    "lfm2_moe": ("Lfm2MoeForCausalLM", ["q_proj", "in_proj"]),
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@cache
def both(family: str = "falcon_h1") -> tuple[Case, Any]:
    """A model with PEFT's adapters, and what generates with the first of them."""
    model_class, targets = FAMILIES[family]
    of = case_of(build(Row(family, "CAUSAL_LM", model_class)), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", adaptc.AdaptcWarning)
        return of, adaptc.compile_for_generation(of.model, of.adapters["first"], **LIMITS)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_peft(family: str) -> None:
    """Rows of different lengths; greedy, drawn, in beams, and of what the adapter is swapped to."""
    of, gen = both(family)
    assert isinstance(gen.spec.layout, HybridLayout)
    check_tokens(of, gen, [prompt(3, 9, (4, 0, 1)), prompt(1, 1)])


@pytest.mark.long
def test_a_cache_goes_on_and_is_forked(tmp_path: Path) -> None:
    """Its keys and values grow, its states do not, and nothing of it is taken back."""
    of, gen = both()
    text = prompt(2, 9, (3, 0))
    alone = of.expected("first", text)
    start = gen.prefill(text["input_ids"][:, :5], text["attention_mask"][:, :5])
    for _ in range(2):
        assert torch.equal(generated(gen, text, past_key_values=start.copy()), alone)
    assert start.length == 5
    layout, sizes = gen.spec.layout, {n: t.shape for n, t in zip(gen.spec.layout.names, start.tensors, strict=True)}
    assert [n for n, is_state in zip(layout.names, layout.is_state, strict=True) if is_state] == [
        n for n in sizes if n.startswith("state_")
    ]
    before = [t.clone() for t in start.filled_tensors()]
    start.reserve(2, start.allocated_length + 1)
    for old, new, is_state in zip(before, start.filled_tensors(), layout.is_state, strict=True):
        assert torch.equal(old, new)
        assert is_state or new.shape[2] == 5
    assert "and a state of" in str(adaptc.report(gen))
    again = adaptc.load(adaptc.save(gen, tmp_path / "hybrid.pt2"))
    assert torch.equal(generated(again, text), alone)
    assert torch.equal(generated(adaptc.merge(gen), text), alone)
    assert adaptc.verify(gen, of.model).ok
    with pytest.raises(adaptc.AdaptcError, match="a state of 5 positions cannot be taken back to 3"):
        start.crop(-2)
    with pytest.raises(adaptc.AdaptcError, match="keeps states, and no keys and values of single tokens"):
        iter(start)
    start.reset()
    assert torch.equal(generated(gen, text, past_key_values=start), alone)
    with pytest.raises(adaptc.AdaptcError, match="assisted decoding takes back what was guessed wrong"):
        generated(gen, prompt(1, 5), prompt_lookup_num_tokens=3)


@pytest.mark.long
def test_rows_of_a_bank_have_adapters_of_their_own() -> None:
    of, gen = both()
    bank, text = gen.bank({"a": of.adapters["first"], "b": of.adapters["second"]}), prompt(3, 7)
    found = bank.generate(**text, adapters=["b", None, "a"], max_new_tokens=5, do_sample=False)
    for i, name in ((0, "second"), (2, "first")):
        alone = {n: t[i : i + 1] for n, t in text.items()}
        assert torch.equal(found[i], of.expected(name, alone, max_new_tokens=5)[0])


@pytest.mark.slow
def test_as_a_package(tmp_path: Path) -> None:
    of, gen = both()
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "hybrid.pt2", max_rank=5))
    text = prompt(3, 9, (4, 0, 1))
    for name in ("second", "first"):
        adaptc.swap(package, of.adapters[name])
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(generated(package, text, **how), of.expected(name, text, **how))
    assert adaptc.verify(package, of.model).ok


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": [0]}, "its layers with keys and values are not those that it numbers"),
        ({"count": 1}, "its layers with keys and values are not those that it numbers"),
        (None, "what it keeps is 'hybrid'"),
    ],
)
def test_a_file_that_numbers_other_layers_is_refused(change: dict[str, Any] | None, said: str) -> None:
    _, gen = both()
    stored = json.loads(spec_to_json(gen.spec)[SPEC_FILE])
    inputs = {*gen.spec.layout.names, "slots", "attention_mask", "input_ids", *prompt_input_names(gen.spec)}
    outputs = [name for names in gen.spec.part_outputs.values() for name in names]
    assert facts_of(stored, inputs, outputs=outputs).layout == gen.spec.layout
    with pytest.raises(UnsafeFile, match="its program has no such parts"):
        facts_of(stored, inputs)
    stored["hybrid"] = None if change is None else stored["hybrid"] | change
    if change is None:
        del stored["hybrid"]
    with pytest.raises(UnsafeFile, match=said):
        facts_of(stored, inputs, outputs=outputs)


def test_layers_of_another_kind_are_named() -> None:
    model = build(Row("falcon_h1", "CAUSAL_LM", FAMILIES["falcon_h1"][0]))
    with torch.no_grad():
        out = model(torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    made = getattr(out, "cache", None) or out.past_key_values

    class OtherLayer:
        pass

    made.layers[0] = OtherLayer()
    with pytest.raises(adaptc.CaptureError, match="layer 0 of Model keeps a OtherLayer"):
        CacheLayout.from_cache("Model", made)
