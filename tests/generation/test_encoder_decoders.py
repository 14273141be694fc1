"""Models with an encoder: the tokens of transformers' generate on a PEFT model, and one swap for both sides."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc.errors import AdaptcError, CaptureError
from adaptc.generation.spec import cache_argument_name
from tests.generation.models import case, generated, generator, prompt
from tests.support.families import FAMILIES, VOCAB

FAMILY = "bart"
WITH_ENCODER = ["t5", "bart", "mbart", "whisper"]


def read(family: str, rows: int = 3, length: int = 7, padding: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """What the encoder of a family reads."""
    if family == "whisper":
        return {"input_features": FAMILIES[family].inputs(rows, length)["input_features"]}
    return prompt(rows, length, padding)


def said(model: Any, given: dict[str, Tensor], **how: Any) -> Any:
    return generated(model, given, **{"eos_token_id": VOCAB - 1, "decoder_start_token_id": 1, **how})


def expected(family: str, name: str | None, given: dict[str, Tensor], **how: Any) -> Any:
    found = case(family)
    if name is None:
        with found.oracle.disable_adapter():
            return said(found.oracle, given, **how)
    found.oracle.set_adapter(name)
    return said(found.oracle, given, **how)


@pytest.mark.long
@pytest.mark.parametrize("family", WITH_ENCODER)
def test_tokens_are_those_of_peft(family: str) -> None:
    """Padded on the left, greedy, drawn, in beams; and of what the adapter is swapped to, on both sides at once."""
    gen, given = generator(family), read(family, 3, 9, (4, 0, 1))
    for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
        assert torch.equal(said(gen, given, **how), expected(family, "first", given, **how))
    drawn: dict[str, Any] = {"do_sample": True, "new": 20}
    try:
        adaptc.swap(gen, case(family).adapters["second"])
        assert torch.equal(said(gen, given, **drawn), expected(family, "second", given, **drawn))
    finally:
        adaptc.swap(gen, case(family).adapters["first"])
    assert torch.equal(said(gen.base, given, **drawn), expected(family, None, given, **drawn))
    assert not torch.equal(said(gen.base, given, **drawn), said(gen, given, **drawn))


@pytest.mark.long
def test_padding_on_the_right_and_an_answer_that_was_begun() -> None:
    gen, given = generator(FAMILY), prompt(3, 9)
    given["attention_mask"][0, 6:] = 0
    begun = torch.randint(4, VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))
    begun[:, 0] = 1
    more = {**given, "decoder_input_ids": begun}
    assert torch.equal(said(gen, given), expected(FAMILY, "first", given))
    assert torch.equal(said(gen, more), expected(FAMILY, "first", more))


@pytest.mark.long
def test_what_the_encoder_gave_is_taken() -> None:
    """The encoder's own output, of one row and for beams."""
    gen, given = generator(FAMILY), prompt(3, 9, (4, 0, 1))
    states = gen.get_encoder()(**given)
    mask = {"attention_mask": given["attention_mask"]}
    for how in ({}, {"num_beams": 3}):
        again = said(gen, {**mask, "encoder_outputs": type(states)(last_hidden_state=states[0].clone())}, **how)
        assert torch.equal(again, said(gen, given, **how))


@pytest.mark.long
def test_steps_of_several_tokens_are_taken_back() -> None:
    """Tokens that were looked up in the text, of which the cache forgets those that are not the model's."""
    gen, given = generator(FAMILY), prompt(1, 9)
    begun = {**given, "decoder_input_ids": torch.tensor([[1, 38, 33, 38, 33]])}
    assert torch.equal(said(gen, begun, prompt_lookup_num_tokens=3), expected(FAMILY, "first", begun))


@pytest.mark.long
def test_a_cache_goes_on() -> None:
    """What was encoded once is decoded several times, from copies, by beams, and after some tokens."""
    gen, given = generator(FAMILY), prompt(3, 9, (4, 0, 1))
    cache = gen.prefill(given["input_ids"], given["attention_mask"])
    assert torch.equal(said(gen, {"past_key_values": cache.copy()}), said(gen, given))
    beams = said(gen, {"past_key_values": cache.copy()}, num_beams=2)
    assert torch.equal(beams, said(gen, given, num_beams=2))
    # BART ends a text that has as many tokens as were asked for.
    on: dict[str, Any] = {"forced_eos_token_id": None}
    short = said(gen, {"past_key_values": cache}, new=4, **on)
    assert cache.length == 4
    assert "9 states" in repr(cache)
    rest = said(gen, {"past_key_values": cache, "decoder_input_ids": short}, new=5, **on)
    assert torch.equal(rest, said(gen, given, **on))
    with pytest.raises(AdaptcError, match="holds 9 positions of one sequence each"):
        said(gen, {"past_key_values": cache, "decoder_input_ids": rest}, num_beams=2)


@pytest.mark.long
def test_whisper_knows_languages_and_long_recordings() -> None:
    """Whisper's own generation: the language is found, its tokens come first, and a recording is cut in pieces."""
    gen, model = generator("whisper"), case("whisper").oracle
    model.set_adapter("first")
    given = read("whisper", 2)["input_features"]
    for one in (gen, model):
        config = one.generation_config
        config.is_multilingual, config.lang_to_id = True, {"<|en|>": 40, "<|de|>": 41, "<|fr|>": 42}
        config.task_to_id = {"transcribe": 45, "translate": 46}
        config.no_timestamps_token_id, config.eos_token_id, config.pad_token_id = 47, 2, 0
        config.max_length, config.max_new_tokens = None, 8
    assert torch.equal(gen.detect_language(given), model.detect_language(given))
    found = {"language": "de", "task": "translate", "return_dict_in_generate": True}
    assert torch.equal(gen.generate(given, **found).sequences, model.generate(given, **found).sequences)
    long = torch.cat([given, given.flip(-1)], -1)
    mask = torch.ones(2, long.shape[-1], dtype=torch.int64)
    mask[1, 40:] = 0
    how = {"return_timestamps": True, "language": "en", "return_segments": True, "attention_mask": mask}
    assert torch.equal(gen.generate(long, **how)["sequences"], model.generate(long, **how)["sequences"])


@pytest.mark.long
def test_one_swap_moves_both_sides_between_calls_and_not_in_one() -> None:
    """A swap in the middle of a generation: that one finishes with the adapter it began with, in all its parts."""
    gen, given, found = generator(FAMILY), prompt(2, 6), case(FAMILY)
    alone = expected(FAMILY, "first", given)
    after = expected(FAMILY, "second", given)
    assert not torch.equal(alone, after)

    def swapping(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 3:
            adaptc.swap(gen, found.adapters["second"])
        return scores

    try:
        during = said(gen, given, logits_processor=transformers.LogitsProcessorList([swapping]))
        assert torch.equal(during, alone)
        assert torch.equal(said(gen, given), after)
    finally:
        adaptc.swap(gen, found.adapters["first"])


def test_two_threads_with_an_adapter_each() -> None:
    gen, given, found = generator(FAMILY), prompt(2, 6), case(FAMILY)
    bound = {name: gen.bind(found.adapters[name]) for name in ("first", "second")}
    results: dict[str, list[Tensor]] = {name: [] for name in bound}

    def work(name: str) -> None:
        for _ in range(3):
            results[name].append(bound[name].generate(**given, max_new_tokens=9, do_sample=False))

    threads = [threading.Thread(target=work, args=(name,)) for name in bound]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name, got in results.items():
        found.oracle.set_adapter(name)
        alone = found.oracle.generate(**given, max_new_tokens=9, do_sample=False)
        assert len(got) == 3
        assert all(torch.equal(one, alone) for one in got)


def test_an_adapter_in_its_own_weights() -> None:
    """What is bound in the weight form has weights of its own on both sides."""
    gen, given = generator(FAMILY), prompt(2, 6)
    bound = gen.bind(case(FAMILY).adapters["second"], form="weight")
    assert torch.equal(said(bound, given), expected(FAMILY, "second", given))


@pytest.mark.long
def test_files_hold_both_sides(tmp_path: Path) -> None:
    """Saved, merged and written as one; an adapter with a key that neither side has is refused."""
    gen, given = generator(FAMILY), prompt(2, 6)
    alone = said(gen, given)
    assert torch.equal(said(adaptc.merge(gen), given), alone)
    assert torch.equal(said(adaptc.unload(gen), given), expected(FAMILY, None, given))
    again = adaptc.load(adaptc.save(gen, tmp_path / "both.pt2"))
    assert torch.equal(said(again, given), alone)
    assert torch.equal(said(again, given, num_beams=2), said(gen, given, num_beams=2))
    folder = adaptc.save_adapter(gen, tmp_path / "written")
    adaptc.swap(gen, folder)
    assert torch.equal(said(gen, given), alone)
    sites = {a.module for a in gen.program.adaptation.attachments}
    assert any("encoder.layers" in s for s in sites)
    assert any("encoder_attn.k_proj" in s for s in sites)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "encoder_attn.k_proj" in n)
    tensors[name.replace("encoder_attn", "other_attn")] = tensors[name].clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdaptcError, match="other_attn"):
        adaptc.swap(gen, folder)
    assert torch.equal(said(gen, given), alone)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to encode: give input_ids"),
    "a token of no vocabulary": ({"input_ids": torch.tensor([[3, VOCAB]])}, str(VOCAB)),
    "a mask of another shape": (
        {**prompt(2, 5), "attention_mask": torch.ones(2, 4)},
        "attention_mask must be a tensor",
    ),
    "more rows": (prompt(13, 5), "more than max_batch=12"),
    "longer than the encoder": (prompt(1, 65), "65 tokens are more than the 64 that the encoder is for"),
    "too long an answer": ({**prompt(1, 5), "max_new_tokens": 90}, "more than max_length=48"),
    "states of another width": ({"encoder_outputs": (torch.zeros(1, 5, 7),)}, r"\(batch, positions, 24\)"),
    "states and a mask": (
        {"encoder_outputs": (torch.zeros(1, 5, 24),), "attention_mask": torch.ones(1, 4)},
        "one number for each position of the encoder",
    ),
    "more answers than questions": (
        {**prompt(2, 5), "decoder_input_ids": torch.ones(3, 1, dtype=torch.int64)},
        "2 rows were encoded, and decoder_input_ids has 3",
    ),
    "an answer that is a list": (
        {**prompt(1, 5), "decoder_input_ids": [[1, 2]]},
        "^decoder_input_ids must be a tensor",
    ),
    "an answer of no vocabulary": (
        {**prompt(1, 5), "decoder_input_ids": torch.tensor([[3, VOCAB]])},
        "^decoder_input_ids has tokens from 3",
    ),
    "a mask of another answer": (
        {
            **prompt(1, 5),
            "decoder_input_ids": torch.ones(1, 2, dtype=torch.int64),
            "decoder_attention_mask": torch.ones(1, 3),
        },
        "^decoder_attention_mask must be a tensor",
    ),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 5, 24)}, "inputs_embeds is not taken"),
    "attentions": ({**prompt(1, 5), "output_attentions": True}, "output_attentions is not taken"),
    "no cache": ({**prompt(1, 5), "use_cache": False}, "use_cache=False is not taken"),
    "a cache of nothing": ({"past_key_values": "empty"}, "the cache holds nothing"),
    "a cache and more": ({**prompt(1, 5), "past_key_values": "full"}, "leave input_ids out, or the cache"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_runs(what: str) -> None:
    gen, (given, message) = generator(FAMILY), BAD[what]
    past = given.get("past_key_values")
    if past is not None:
        cache = gen.new_cache() if past == "empty" else gen.prefill(prompt(1, 4)["input_ids"])
        given = {**given, "past_key_values": cache}
    with pytest.raises(AdaptcError, match=message):
        gen.generate(**given)


ANSWER = torch.tensor([[4, 5, 6]])
BAD_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to decode": ({}, "a step takes decoder_input_ids"),
    "one row": ({"decoder_input_ids": ANSWER[0]}, r"^decoder_input_ids must be a tensor .batch, tokens."),
    "a token of no vocabulary": ({"decoder_input_ids": ANSWER + VOCAB}, "^decoder_input_ids has tokens from"),
    "no tokens": ({"decoder_input_ids": ANSWER[:, :0]}, "a step has no tokens"),
    "a longer mask": (
        {"decoder_input_ids": ANSWER, "decoder_attention_mask": torch.ones(1, 4)},
        r"^decoder_attention_mask must be a tensor \(1, 3\)",
    ),
    "positions of others": (
        {"decoder_input_ids": ANSWER, "decoder_position_ids": torch.zeros(1, 2, dtype=torch.int64)},
        r"^decoder_position_ids must be a tensor \(1, 3\)",
    ),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_bad_step_names_the_decoders_argument(what: str) -> None:
    """The names are those of the decoder's arguments, and a cache that is given stays as it was."""
    gen, (given, message) = generator("whisper"), BAD_STEPS[what]
    features = torch.zeros(1, *gen.spec.feature_shape)
    past = gen.prefill(features)
    for more in ({"input_features": features}, {"past_key_values": past}):
        with pytest.raises(AdaptcError, match=message):
            gen(**more, **given)
    assert past.length == 0
    assert past.is_intact


def test_a_step_alone() -> None:
    """Without a cache, where none is wanted; what it does not do is refused."""
    assert isinstance(generator(FAMILY), adaptc.Generator)
    gen, given = generator(FAMILY), {**prompt(1, 5), "decoder_input_ids": torch.ones(1, 1, dtype=torch.int64)}
    with torch.no_grad():
        found, other = gen.forward(**given, use_cache=False), gen.forward(**given)
    assert torch.equal(found.logits, other.logits)
    name = cache_argument_name()
    assert name not in found  # outputs of transformers leave out what is None
    assert other[name].length == 1
    with pytest.raises(AdaptcError, match="use_cache=False is not taken"):
        gen.forward(decoder_input_ids=given["decoder_input_ids"], past_key_values=other[name], use_cache=False)
    assert torch.equal(gen.forward(**given, return_dict=False)[0], found.logits)


def test_it_is_verified_against_its_model() -> None:
    """The program as a whole, on random inputs of all its parts."""
    report = adaptc.verify(generator(FAMILY), case(FAMILY).model)
    assert report.ok
    assert report["base equals model"].passed


def test_a_model_of_two_models_is_refused() -> None:
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    both = [transformers.BertConfig(vocab_size=VOCAB, **small) for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*both)
    model = transformers.EncoderDecoderModel(config)
    with pytest.raises(CaptureError, match="put together of two models"):
        adaptc.compile_for_generation(model, adaptc.LoraConfig(r=2), max_length=9)


@pytest.mark.slow
def test_inductor_compiles_each_part_once() -> None:
    """Other lengths, rows and beams take the code that there is."""
    family, gen = "t5", generator("t5", "inductor")
    for given, how in ((read(family, 2, 7), {}), (read(family, 1, 11), {}), (read(family, 3, 4), {"num_beams": 2})):
        assert torch.equal(said(gen, given, **how), expected(family, "first", given, **how))
        with adaptc.debug.assert_no_recompiles():
            said(gen, given, **how)
