"""Models that keep a state instead of keys and values: read token by token, with the tokens of PEFT."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
import transformers

import adaptc
from tests.generation.models import generated, prompt
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
def both(family: str = "mamba") -> tuple[Any, Any, Any, Path]:
    """The model, what generates, PEFT's model, and where its adapters are."""
    model, folder = built(family), Path(mkdtemp())
    targets = ["in_proj"] if family == "mamba2" else ["in_proj", "x_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        oracle: Any = None
        for name, rank in (("first", 3), ("second", 5)):
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
            if oracle is None:
                oracle = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
            else:
                oracle.add_adapter(name, config)
    oracle.save_pretrained(str(folder))
    return model, adaptc.compile_for_generation(model, folder / "first", **LIMITS), oracle.eval(), folder


def expected(name: str, text: Any, family: str = "mamba", **how: Any) -> Any:
    oracle = both(family)[2]
    oracle.set_adapter(name)
    return generated(oracle, text, **how)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_tokens_are_those_of_peft(family: str) -> None:
    """Rows of different lengths; greedy, drawn, in beams, and of what the adapter is swapped to."""
    model, gen, _, folder = both(family)
    for text in (prompt(3, 9, (4, 0, 1)), prompt(1, 1)):
        for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
            assert torch.equal(generated(gen, text, **how), expected("first", text, family, **how))
    try:
        adaptc.swap(gen, folder / "second")
        assert torch.equal(generated(gen, text, do_sample=True), expected("second", text, family, do_sample=True))
    finally:
        adaptc.swap(gen, folder / "first")
    assert torch.equal(generated(gen.base, text), generated(model, text))
    assert not torch.equal(gen.base.forward(text["input_ids"]).logits, gen.forward(text["input_ids"]).logits)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_state_goes_on_and_is_forked(tmp_path: Path) -> None:
    """Its size is the same at every length, and nothing of it is taken back."""
    model, gen, _, _ = both()
    text = prompt(2, 9, (3, 0))
    alone = expected("first", text)
    start = gen.prefill(text["input_ids"][:, :5], text["attention_mask"][:, :5])
    for _ in range(2):
        assert torch.equal(generated(gen, text, past_key_values=start.copy()), alone)
    assert (start.length, start.nbytes) == (5, gen.spec.layout.nbytes(2, 5))
    assert gen.prefill(text["input_ids"]).nbytes == start.nbytes
    assert "state: 2.8 KiB for each row" in str(adaptc.report(gen))
    again = adaptc.load(adaptc.save(gen, tmp_path / "state.pt2"))
    assert torch.equal(generated(again, text), alone)
    assert torch.equal(generated(adaptc.merge(gen), text), alone)
    assert adaptc.verify(gen, model).ok
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
    embedded = model.get_input_embeddings()(text["input_ids"])
    mask = text["attention_mask"]
    assert torch.equal(generated(gen, {"inputs_embeds": embedded, "attention_mask": mask}), alone[:, 9:])


@pytest.mark.slow
def test_as_a_package(tmp_path: Path) -> None:
    model, gen, _, folder = both()
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "state.pt2", max_rank=5))
    text = prompt(3, 9, (4, 0, 1))
    for name in ("second", "first"):
        adaptc.swap(package, folder / name)
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(generated(package, text, **how), expected(name, text, **how))
    assert adaptc.verify(package, gen).ok
    assert adaptc.verify(package, model).ok


@pytest.mark.slow
def test_inductor_compiles_once() -> None:
    model, _, _, folder = both()
    gen, text = adaptc.compile_for_generation(model, folder / "first", **LIMITS, backend="inductor"), prompt(3, 9)
    assert torch.equal(generated(gen, text), expected("first", text))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(gen, folder / "second")
        assert torch.equal(generated(gen, text), expected("second", text))
        assert torch.equal(generated(gen, prompt(1, 4)), expected("second", prompt(1, 4)))
