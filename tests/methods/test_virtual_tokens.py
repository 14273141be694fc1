"""What holds for all that puts tokens in front: any sizes and swaps, task heads, and the places that are found."""

from __future__ import annotations

from functools import cache

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc import MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig
from adaptc.errors import ConfigError, TargetError
from tests.support.cover import examples
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import (
    Oracle,
    assert_same,
    assert_same_gradients,
    gradients,
    quiet,
    shared_base_program,
    with_head,
)
from tests.support.prompts import CALLS, PROMPT_WARNINGS, run_quietly, text


@cache
def programs():
    config = PromptTuningConfig(num_virtual_tokens=3)
    return {
        name: (FAMILIES[name].build(), adaptc.compile(shared_base_program(name), config))
        for name in ("llama", "gpt2", "bert")
    }


@pytest.mark.long
@settings(max_examples=examples(25))
@given(
    name=st.sampled_from(["llama", "gpt2", "bert"]),
    calls=CALLS,
    seed=st.integers(0, 1000),
)
def test_any_sizes(name, calls, seed):
    """Numbers of tokens, batches, lengths and paddings, in any order, through one program; the base's own embeddings
    in front of those of the call say what is right."""
    model, program = programs()[name]
    generator = torch.Generator().manual_seed(seed)
    for count, batch, length, padding in calls:
        rows = torch.randn(count, 24, generator=generator)
        inputs = text(batch, length, padding, seed)
        table = model.get_input_embeddings()(inputs["input_ids"])
        mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.int64))
        longer = {
            "inputs_embeds": torch.cat([rows.expand(batch, -1, -1), table], 1),
            "attention_mask": nn.functional.pad(mask, (count, 0), value=1),
        }
        expected = run_quietly(model, longer)
        bound = program.bind({"prompt_embeddings": rows})
        assert_same(run_quietly(bound, inputs), expected)
        adaptc.swap(program, {"prompt_embeddings": rows})
        assert_same(run_quietly(program, inputs), expected)


HEADS = {
    "bert": ("BertForSequenceClassification", "SEQ_CLS"),
    "roberta": ("RobertaForSequenceClassification", "SEQ_CLS"),
    "tokens": ("BertForTokenClassification", "TOKEN_CLS"),
    "llama": ("LlamaForSequenceClassification", "SEQ_CLS"),
    "features": ("BertModel", "FEATURE_EXTRACTION"),
}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("head", HEADS)
def test_task_heads(head, tmp_path):
    """Logits stand where PEFT's do, and heads are trained whole beside the rows; encoders find no padding in front."""
    import transformers

    name, task = HEADS[head]
    family = {"tokens": "bert", "features": "bert"}.get(head, head)
    kind = getattr(transformers, name)
    oracle = Oracle.wrap_and_save(
        family,
        peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5),
        tmp_path,
        model=with_head(kind, family, num_labels=3),
    )
    model = with_head(kind, family, num_labels=3)
    program = adaptc.compile(model, tmp_path, training=task != "TOKEN_CLS")
    inputs = {"labels": torch.tensor([0, 2, 1])} if task == "SEQ_CLS" else {}
    for padding in ("right", "left") if family != "roberta" else (None,):
        given_ = {**text(3, 7, padding), **inputs}
        assert_same(run_quietly(program, given_), run_quietly(oracle.model, given_))
    if task == "TOKEN_CLS":  # PEFT leaves labels as short as they were, and fails
        return
    module = program.module().eval()
    with quiet(*PROMPT_WARNINGS):
        got, want = gradients(module, module(**given_)), gradients(oracle.model, oracle.model(**given_))
    want = {key.removeprefix("base_model."): value for key, value in want.items()}
    assert_same_gradients(got, want)


@pytest.mark.long
def test_labels_in_all_batches_of_a_step():
    """The first label counts, since a token in front has it as its next one; logits of labelled tokens alone."""
    model = FAMILIES["llama"].build()
    program = adaptc.compile(model, PromptTuningConfig(num_virtual_tokens=4), training=True)
    inputs = text(3, 7)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][1, 3:] = -100
    module = program.module().eval()
    assert module.accepts_loss_kwargs
    rows = dict(module.named_parameters())["prompt_encoder.default.embedding.weight"]
    table = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(
        inputs_embeds=torch.cat([rows.expand(3, -1, -1), table], 1),
        attention_mask=nn.functional.pad(inputs["attention_mask"], (4, 0), value=1),
        labels=nn.functional.pad(inputs["labels"], (4, 0), value=-100),
        num_items_in_batch=29,
    )
    torch.testing.assert_close(module(**inputs, num_items_in_batch=29).loss, expected.loss)
    labelled = program.module(logits="labelled").eval()
    torch.testing.assert_close(labelled(**inputs, num_items_in_batch=29).loss, expected.loss)


@pytest.mark.long
def test_classifiers_find_their_last_token():
    """By its id, behind the tokens in front: each row as if it were alone, and not padded."""
    import transformers

    model = with_head(transformers.LlamaForSequenceClassification, "llama", num_labels=3)
    program = adaptc.compile(model, PromptTuningConfig(num_virtual_tokens=4))
    inputs = text(3, 7)
    inputs["input_ids"] *= inputs["attention_mask"]  # its padding is zero
    out = run_quietly(program, inputs).logits
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        kept = ids[mask.bool()][None]
        torch.testing.assert_close(out[row], run_quietly(program, {"input_ids": kept}).logits[0])


@pytest.mark.long
def test_labels_of_tokens():
    """Tokens in front have none that count."""
    import transformers

    model = with_head(transformers.BertForTokenClassification, "bert", num_labels=3)
    program = adaptc.compile(model, PromptTuningConfig(num_virtual_tokens=4), training=True)
    module, inputs = program.module().eval(), text(3, 7)
    labels = torch.arange(21).reshape(3, 7) % 3
    out = module(**inputs, labels=labels)
    assert out.logits.shape == (3, 11, 3)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits[:, 4:].flatten(0, 1), labels.flatten()))


@pytest.mark.long
def test_one_program_for_several_methods(tmp_path):
    """An adapter of one method leaves the other's places alone."""
    one, other = PromptTuningConfig(num_virtual_tokens=3), PromptEncoderConfig(num_virtual_tokens=5)
    alone = [
        adaptc.compile(shared_base_program("llama"), c, generator=torch.Generator().manual_seed(1))
        for c in (one, other)
    ]
    saved = [adaptc.save_adapter(p, tmp_path / str(i)) for i, p in enumerate(alone)]
    both = adaptc.compile(shared_base_program("llama"), saved)
    for path, program in zip([*saved, saved[0]], [*alone, alone[0]], strict=True):
        adaptc.swap(both, path)
        assert_same(run_quietly(both, text(3, 7)), run_quietly(program, text(3, 7)))


def test_two_prompts_do_not_act_together():
    configs = {f"of_{n}": PromptTuningConfig(num_virtual_tokens=n) for n in (2, 5)}
    with pytest.raises(ConfigError, match="the first tokens"):
        adaptc.compile(shared_base_program("llama"), configs)


class Scaled(nn.Embedding):
    """An embedding that scales what it gives."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Positions(nn.Module):
    """Reads positions and token types that a caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.kinds = Scaled(31, 12), nn.Embedding(40, 12), nn.Embedding(2, 12)

    def forward(self, input_ids, position_ids, token_type_ids):
        return self.table(input_ids) + self.places(position_ids) + self.kinds(token_type_ids)


def test_places():
    """Rows are what the module of the embedding gives, not what it looks up; positions count on behind them."""
    model = Positions()
    ids = torch.arange(15).reshape(3, 5)
    inputs = {"input_ids": ids, "position_ids": torch.arange(5).expand(3, -1), "token_type_ids": ids % 2}
    program = adaptc.compile(model, PromptTuningConfig(num_virtual_tokens=4), example_inputs=inputs)
    rows = torch.randn(7, 12)
    adaptc.swap(program, {"prompt_embeddings": rows})
    with torch.no_grad():
        expected = torch.cat([rows.expand(3, -1, -1), 3 * model.table.weight[ids]], 1)
        expected = expected + model.places(torch.arange(12))
        expected = expected + model.kinds(nn.functional.pad(ids % 2, (7, 0)))
    torch.testing.assert_close(program(**inputs), expected)


class TwoLookups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(31, 12), nn.Embedding(VOCAB, 12)

    def forward(self, a, b):
        return self.one(a) + self.other(b)


def test_several_lookups_are_named():
    ids = torch.arange(15).reshape(3, 5)
    with pytest.raises(TargetError, match=r"2 times: 'one' \(by 'a'\), 'other' \(by 'b'\)"):
        adaptc.compile(TwoLookups(), PromptTuningConfig(num_virtual_tokens=4), example_inputs=(ids, ids.clone()))


def test_inputs_that_are_taken_already():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(31, 12)

        def forward(self, input_ids, task_ids):
            return self.table(input_ids) * task_ids[:, None, None]

    config = MultitaskPromptTuningConfig(num_virtual_tokens=4)
    inputs = {"input_ids": torch.arange(15).reshape(3, 5), "task_ids": torch.arange(3)}
    with pytest.raises(ConfigError, match="an input or a value called 'task_ids' already"):
        adaptc.compile(Own(), config, example_inputs=inputs)
