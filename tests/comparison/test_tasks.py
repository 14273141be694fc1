"""The tasks: what counts as a right answer, and parts that do not overlap."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaptc
from tests.comparison import text_task
from tests.comparison.run_method import logits_of
from tests.comparison.text_task import IGNORED, answers_are_greedy, collate, score_answers
from tests.comparison.vision_task import FIRST_NEW, digit_images, split_parts

STOP = 2


@functools.cache
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, eos_token_id=STOP, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generated(prompt: list[int], count: int) -> list[int]:
    """What greedy decoding says after a prompt, by transformers' own generate."""
    out = model().generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def rows() -> tuple[list[dict[str, torch.Tensor]], list[bool]]:
    """Rows of several lengths: the answer as it is generated, and with one token changed, the first or a later one.

    ``min_new_tokens`` keeps the end of a text out of what is generated, so this is greedy decoding without that token.
    """
    made, right = [], []
    for seed in range(11):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, 61, (3 + seed % 5,), generator=generator).tolist()
        count = 2 + seed % 3
        answer = generated(prompt, count)
        if wrong := seed % 3:
            place = 0 if wrong == 1 else count - 1
            answer[place] = 3 + (answer[place] - 2) % 58
        ids = prompt + answer
        made.append({"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORED] * len(prompt) + answer)})
        right.append(generated(prompt, count) == answer)
    return made, right


def test_one_forward_tells_what_greedy_decoding_says() -> None:
    made, right = rows()
    assert 3 <= sum(right) <= 8
    batch = collate(made)
    labels = batch.pop("labels")
    with torch.no_grad():
        assert answers_are_greedy(model()(**batch).logits, labels).tolist() == right
    accuracy, loss = score_answers(logits_of(model()), made)
    assert accuracy == sum(right) / len(right)
    with torch.no_grad():
        expected = model()(**batch, labels=labels).loss
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_batches_of_a_score_have_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = rows()
    whole = score_answers(logits_of(model()), made)
    monkeypatch.setattr(text_task, "_SCORED_ROWS", 4)
    assert score_answers(logits_of(model()), made) == pytest.approx(whole, rel=1e-5)


@pytest.mark.long
def test_virtual_tokens_are_left_out_of_the_logits() -> None:
    config = adaptc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    program = adaptc.compile(model(), config)
    ids = torch.randint(3, 61, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = logits_of(program)(inputs)
    assert found.shape == (2, 7, 61)
    torch.testing.assert_close(found, program(**inputs).logits[:, 3:])


def test_questions_are_made_of_seeds_that_no_other_part_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """In reasoning-gym item i of seed s is item 0 of seed s + i."""
    asked: list[int] = []

    def create_dataset(name: str, seed: int, size: int, min_words: int, max_words: int) -> list[Any]:
        assert (name, min_words, max_words) == ("word_sequence_reversal", 2, 2)
        asked.extend(range(seed, seed + size))
        return [{"metadata": {"words": [f"w{s}", "on"]}, "answer": f"on, w{s}"} for s in range(seed, seed + size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    questions = {part: text_task._questions(part) for part in text_task.PARTS}
    assert len(questions["train"]) > 1000
    assert len(asked) == len({*asked}) == sum(map(len, questions.values()))
    assert questions["test"][0] == ("w1000000, on ->", "on, w1000000")


def test_without_its_library_the_task_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(adaptc.ConfigError, match=r"pip install 'adaptc\[compare\]'"):
        text_task._questions("test")


def test_parts_of_the_images_do_not_overlap() -> None:
    images, digits = digit_images()
    parts = split_parts(len(digits))
    assert torch.equal(torch.cat([*parts.values()]).sort().values, torch.arange(len(digits)))
    assert images.shape == (len(digits), 1, 8, 8)
    assert float(images.max()) == 1
    for part in parts.values():
        assert 0.4 < float((digits[part] < FIRST_NEW).float().mean()) < 0.6
