"""Generation of encoder-decoders whose encoder reads virtual tokens first: the tokens of PEFT's own generate."""

from __future__ import annotations

import pytest
import torch

import adaptc
from adaptc.errors import AdaptcError, TargetError
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import file_tensors, quiet
from tests.support.prompts import PROMPT_WARNINGS, prompt_oracle, text

CASES = {
    "prompt": ("PromptTuningConfig", {}),
    "network": ("PromptEncoderConfig", {"encoder_hidden_size": 13}),
    "tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB - 1, "decoder_start_token_id": 1}


def said(model, inputs, **how):
    with quiet(*PROMPT_WARNINGS, ".*should not be passed.*"), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        return model.generate(**inputs, max_new_tokens=7, **{**OPTIONS, **how})


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_peft(family, case, tmp_path):
    """After a swap to another number; greedy, drawn, in beams, by parts, and as read from a file."""
    cls, options = CASES[case]
    config = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 5, **options}
    oracle = prompt_oracle(family, tmp_path / "peft", cls, **config)
    made = getattr(adaptc, cls)(**{**config, "num_virtual_tokens": 3})
    gen = adaptc.compile_for_generation(FAMILIES[family].build(), made, max_batch=12, max_length=40)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "saved.pt2"))
    start = torch.ones(2, 1, dtype=torch.int64)
    more = {} if case != "tasks" else {"task_ids": torch.tensor([2, 0, 1])}
    said(gen, {**text(3, 7, "left"), **more})
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(gen, oracle.path)
        for inputs in (text(3, 7, "left"), text(3, 5, "right"), text(3, 4, None)):
            for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
                expected = said(oracle.model, {**inputs, **more}, **how)
                assert torch.equal(said(gen, {**inputs, **more}, **how), expected)
    adaptc.swap(loaded, oracle.path)
    assert torch.equal(said(loaded, {**inputs, **more}), said(oracle.model, {**inputs, **more}))
    inputs = text(2, 5, "left")
    more = {n: t[:2] for n, t in more.items()}
    expected = said(oracle.model, {**inputs, **more})
    past = gen.prefill(inputs["input_ids"], inputs["attention_mask"], **more)
    assert past.states.shape[1] == past.states_mask.shape[1] == 5 + 5
    assert torch.equal(said(gen, {}, past_key_values=past, decoder_input_ids=start), expected)
    assert torch.equal(said(gen.base, inputs), said(FAMILIES[family].build(), inputs))
    if case == "tasks":
        for bad, message in (
            ({}, "the adapter needs task_ids"),
            ({"task_ids": torch.tensor([0, 7])}, "task_ids has 7, and the adapter has tasks from 0 to 2"),
        ):
            with pytest.raises(AdaptcError, match=message):
                said(gen, {**inputs, **bad})
        return
    states = gen.get_encoder()(**inputs)
    mask = {"attention_mask": inputs["attention_mask"]}
    assert torch.equal(said(gen, mask, encoder_outputs=states), expected)
    with pytest.raises(AdaptcError, match="'task_ids' is not an input of the program"):
        gen.prefill(inputs["input_ids"], task_ids=start)
    written = file_tensors(adaptc.save_adapter(gen, tmp_path / "ours"))["prompt_embeddings"]
    torch.testing.assert_close(written, file_tensors(oracle.path)["prompt_embeddings"])
    with pytest.raises(TargetError, match="_tuning has no form there that can be given to each row"):
        gen.bank({})


@pytest.mark.long
def test_whisper_is_refused():
    config = adaptc.PromptTuningConfig(num_virtual_tokens=3)
    with pytest.raises(TargetError, match="the encoder of this program reads no token ids"):
        adaptc.compile_for_generation(FAMILIES["whisper"].build(), config)
