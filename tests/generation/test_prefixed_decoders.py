"""Generation where the decoder of a model with an encoder begins with an adapter's keys and values: PEFT's tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import AdaptcError, ConfigError
from tests.generation.test_prompted_encoders import said
from tests.support.families import VOCAB
from tests.support.oracle import quiet
from tests.support.prefixed import TASK_OPTIONS, build, prefix_oracle, random_prefix, run_with_cache_prefix
from tests.support.prompts import PROMPT_WARNINGS, generate_with_peft, text

START = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": VOCAB - 1, "do_sample": False}
HOWS: list[dict[str, Any]] = [{}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
CASES = {
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 13}),
    "cartridge": ("CartridgeConfig", {}),
}


@cache
def theirs(family: str, case: str, count: int) -> Any:
    cls, options = CASES[case]
    return prefix_oracle(family, Path(mkdtemp()), cls, num_virtual_tokens=count, seed=count, **options)


@cache
def generator(family: str, case: str = "prefix", each: int = 2) -> Any:
    """Behind two tokens. Tests that swap it leave it so."""
    cls, options = CASES[case]
    config = getattr(adaptc, cls)(num_virtual_tokens=2, num_transformer_submodules=each, **options)
    return adaptc.compile_for_generation(build(family), config, max_batch=12, max_length=40)


def peft_said(family: str, case: str, count: int, inputs: Any, **how: Any) -> Any:
    with quiet(*PROMPT_WARNINGS), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        model = theirs(family, case, count).model
        return generate_with_peft(model, **inputs, max_new_tokens=7, **{**START, **how})


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_peft(family, case, tmp_path):
    """After swaps to other numbers; greedy, drawn, in beams, by parts, of what is bound, and as read from a file."""
    gen = generator(family, case)
    differ = 0
    for count in (5, 1):
        adaptc.swap(gen, theirs(family, case, count).path)
        with adaptc.debug.assert_no_recompiles():
            for inputs in (text(3, 7, "left"), text(3, 5, "right"), text(2, 4, None)):
                for how in HOWS:
                    expected = peft_said(family, case, count, inputs, **how)
                    assert torch.equal(said(gen, inputs, **how), expected)
                    plain = said(build(family), inputs, **how)
                    differ += plain.shape != expected.shape or not torch.equal(plain, expected)
    assert differ > 6
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "saved.pt2"))
    bound = loaded.bind(theirs(family, case, 5).path)
    assert torch.equal(said(loaded, inputs), peft_said(family, case, 1, inputs))
    assert torch.equal(said(bound, inputs), peft_said(family, case, 5, inputs))
    assert torch.equal(said(adaptc.unload(loaded), inputs), said(build(family), inputs))


@pytest.mark.long
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_caches(family):
    """What is told of a cache is of decoded tokens; it is continued, forked and taken back like any other."""
    gen, inputs = generator(family), text(2, 5, "left")
    adaptc.swap(gen, theirs(family, "prefix", 5).path)
    expected = peft_said(family, "prefix", 5, inputs)
    past = gen.prefill(inputs["input_ids"], inputs["attention_mask"])
    start = torch.ones(2, 1, dtype=torch.int64)
    assert (past.get_seq_length(), past.decoded_length, past.length, past.prefix_length) == (0, 0, 5, 5)
    with quiet(*PROMPT_WARNINGS):
        how = {**START, "max_new_tokens": 3}
        for one in (past.copy(), past):  # BART ends its answers, however long they may be
            begun = gen.generate(past_key_values=one, decoder_input_ids=start, **how)
            assert torch.equal(begun[:, :3], expected[:, :3])
        assert past.decoded_length == past.get_seq_length() == 3
        again = past.copy()
        given = {"decoder_input_ids": expected[:, :4], "max_new_tokens": 4}
        assert torch.equal(gen.generate(past_key_values=past, **{**how, **given}), expected)
        again.crop(-2)
        assert (again.decoded_length, again.length) == (1, 6)
        rest = gen.generate(past_key_values=again, decoder_input_ids=expected[:, :3], **{**how, "max_new_tokens": 5})
        assert torch.equal(rest, expected)
        again.crop(1)
        assert again.decoded_length == 1
    again.reset()
    assert (again.length, again.states) == (5, None)
    whole = gen(**inputs, decoder_input_ids=expected[:, :-1]).logits
    assert torch.equal(whole[:, -1:].argmax(-1), expected[:, -1:]) or bool((expected[:, -1] == 2).any())
    with pytest.raises(AdaptcError, match="5 of them of tokens that the adapter has in front"):
        gen.generate(**inputs, **{**START, "max_new_tokens": 36})
    assert torch.equal(said(gen, inputs), expected)


@pytest.mark.long
def test_whisper():
    """Token by token what the model computes behind a cache with those keys and values."""
    model, gen = build("whisper"), generator("whisper", each=1)
    c, made = model.config, torch.Generator().manual_seed(2)
    features = torch.randn(3, c.num_mel_bins, 2 * c.max_source_positions, generator=made)
    fronts = {"four": random_prefix(model, 4, 4), "one": random_prefix(model, 1, 1)}

    def alone(front: Any) -> torch.Tensor:
        ids = torch.full((3, 1), c.decoder_start_token_id)
        for _ in range(5):
            given = {"input_features": features, "decoder_input_ids": ids}
            logits = (model(**given) if front is None else run_with_cache_prefix(model, front, given)).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids[:, 1:]

    def generated(runs: Any, **how: Any) -> torch.Tensor:
        with quiet(*PROMPT_WARNINGS):
            return runs.generate(input_features=features, max_new_tokens=5, do_sample=False, **how)

    with torch.no_grad():
        expected = {name: alone(front) for name, front in fronts.items()} | {None: alone(None)}
    for name, front in fronts.items():
        adaptc.swap(gen, {"prompt_embeddings": front})
        assert torch.equal(generated(gen), expected[name])
        assert not torch.equal(expected[name], expected[None])
    bank = gen.bank({name: {"prompt_embeddings": front} for name, front in fronts.items()})
    names: list[Any] = ["one", None, "four"]
    wanted = torch.stack([expected[name][i] for i, name in enumerate(names)])
    assert torch.equal(generated(bank, adapters=names), wanted)


@pytest.mark.long
def test_rows_that_begin_at_several_places():
    """A model that counts positions by itself has one number of them for all rows."""
    gen, inputs = generator("bart"), text(3, 7, "left")
    fronts = {
        name: {"prompt_embeddings": random_prefix(build("bart"), n, n)}
        for name, n in (("two", 2), ("four", 4), ("more", 4))
    }
    bank = gen.bank(fronts)
    with pytest.raises(ConfigError, match="several numbers of tokens in front, up to 4"):
        said(bank, inputs, adapters=["two", "four", "two"])
    with pytest.raises(ConfigError, match="several numbers of tokens in front, up to 2"):
        said(bank, inputs, adapters=["two", None, "two"])
    for how in HOWS[::2]:
        each = how.get("num_return_sequences", 1)
        alone = {n: said(gen.bind(fronts[n]), inputs, **how) for n in ("four", "more")}
        found = said(bank, inputs, adapters=["four", "more", "four"], **how)
        for i, name in enumerate(("four", "more", "four")):
            assert torch.equal(found[each * i : each * (i + 1)], alone[name][each * i : each * (i + 1)])
        assert torch.equal(said(bank, inputs, adapters=[None] * 3, **how), said(build("bart"), inputs, **how))


@pytest.mark.long
def test_packages(tmp_path):
    """Swaps to any number of tokens, none of which counts among the positions of the encoder."""
    gen, inputs = generator("bart"), text(3, 7, "left")
    adaptc.swap(gen, theirs("bart", "prefix", 5).path)
    package = adaptc.load_package(adaptc.package(gen, tmp_path / "package.pt2"))
    assert package.spec.max_source_length == build("bart").config.max_position_embeddings
    for count in (5, 1, 9):
        adaptc.swap(package, theirs("bart", "prefix", count).path)
        for how in HOWS:
            assert torch.equal(said(package, inputs, **how), peft_said("bart", "prefix", count, inputs, **how))
    assert torch.equal(said(package.base, inputs), said(build("bart"), inputs))
    assert adaptc.verify(package, gen).ok


@pytest.mark.long
def test_defaults_are_those_of_the_task():
    gen = adaptc.compile_for_generation(build("bart"), adaptc.PrefixTuningConfig(**TASK_OPTIONS, num_virtual_tokens=3))
    assert gen.program.binding.config.num_transformer_submodules == 2
    assert adaptc.verify(gen, build("bart")).ok
