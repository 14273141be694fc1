"""Virtual tokens in front of what an encoder reads, in models that have a decoder too, next to PEFT's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc import CPTConfig, MultitaskPromptTuningConfig, PromptTuningConfig
from adaptc.errors import CheckpointError, ConfigError, TargetError
from tests.support.cover import examples
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import assert_same, file_tensors, load_peft, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, prompt_oracle, run_quietly, text

SEQ = {"task_type": "SEQ_2_SEQ_LM"}
LSTM = {"encoder_hidden_size": 13, "encoder_reparameterization_type": "LSTM"}
CASES = {
    "prompt": ("PromptTuningConfig", {}),
    "one stack": ("PromptTuningConfig", {"num_transformer_submodules": 1}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 13}),
    "lstm": ("PromptEncoderConfig", LSTM),
    "tasks": ("MultitaskPromptTuningConfig", {"num_transformer_submodules": 1, "num_tasks": 3, "num_ranks": 2}),
    "tasks of both": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}


def inputs(batch, length, padding, decoded=5, name="decoder_input_ids"):
    ids = torch.randint(4, VOCAB, (batch, decoded), generator=torch.Generator().manual_seed(batch))
    return {**text(batch, length, padding), name: ids}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_training(family, case, tmp_path):
    """Losses and gradients, and files both ways: half of the rows is PEFT's decoder's, where there are any."""
    cls, options = CASES[case]
    config = {**SEQ, "num_virtual_tokens": 5, **options}
    oracle = prompt_oracle(family, tmp_path / "peft", cls, **config)
    program = adaptc.compile(FAMILIES[family].build(), getattr(adaptc, cls)(**config), training=True)
    module, theirs = program.module(), dict(oracle.model.named_parameters(remove_duplicate=False))
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, p in theirs.items() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(theirs[name].view_as(p))
    module.eval()
    given_ = inputs(3, 7, "left", name="labels")
    if case.startswith("tasks"):
        given_["task_ids"] = torch.tensor([2, 0, 1])
    got, want = module(**given_), oracle.model(**given_)
    assert got.logits.shape == want.logits.shape
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    for name, p in trained.items():
        wanted = theirs[name].grad
        torch.testing.assert_close(p.grad.view_as(wanted), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    mine, peers = file_tensors(saved), file_tensors(oracle.path)
    for name, tensor in peers.items():
        torch.testing.assert_close(mine[name], tensor)
    if not case.startswith("tasks"):
        with quiet(*PROMPT_WARNINGS):
            loaded = load_peft(FAMILIES[family].build(), saved)
        assert_same(run_quietly(loaded, inputs(2, 5, "left")), run_quietly(oracle.model, inputs(2, 5, "left")))


@cache
def program(family):
    return adaptc.compile(shared_base_program(family), PromptTuningConfig(**SEQ, num_virtual_tokens=3))


@pytest.mark.long
@settings(max_examples=examples(12))
@given(
    family=st.sampled_from(["t5", "bart"]),
    count=st.integers(1, 9),
    size=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6)),
    padding=st.sampled_from(["left", "right", None]),
)
def test_any_sizes(family, count, size, padding):
    """The base's own embeddings behind the rows say what is right."""
    rows = torch.randn(2 * count, 24, generator=torch.Generator().manual_seed(count))
    model, (batch, length, decoded) = FAMILIES[family].build(), size
    given_ = inputs(batch, length, padding, decoded)
    mask = given_.get("attention_mask", torch.ones(batch, length, dtype=torch.int64))
    table = model.get_input_embeddings()(given_["input_ids"])
    longer = {
        "inputs_embeds": torch.cat([rows[:count].expand(batch, -1, -1), table], 1),
        "attention_mask": torch.nn.functional.pad(mask, (count, 0), value=1),
        "decoder_input_ids": given_["decoder_input_ids"],
    }
    bound = program(family).bind({"prompt_embeddings": rows})
    full = {**given_, "attention_mask": mask}
    assert_same(run_quietly(bound, full).logits, run_quietly(model, longer).logits)
    adaptc.swap(program(family), {"prompt_embeddings": rows})
    assert_same(run_quietly(program(family), full).logits, run_quietly(model, longer).logits)
    assert_same(run_quietly(program(family).bind(None), full).logits, run_quietly(model, full).logits)


@pytest.mark.long
def test_saved_programs(tmp_path):
    oracle = prompt_oracle("bart", tmp_path / "peft", **SEQ, num_virtual_tokens=5)
    found = adaptc.compile(shared_base_program("bart"), oracle.path)
    found.validate()
    assert adaptc.verify(found, FAMILIES["bart"].build()).ok
    loaded = adaptc.load(adaptc.save(found, tmp_path / "ours.pt2"))
    assert_same(
        run_quietly(loaded, inputs(3, 7, "left")).logits, run_quietly(oracle.model, inputs(3, 7, "left")).logits
    )
    with pytest.raises(CheckpointError, match=r"'prompt_embeddings' has 7 rows, and .* as many for each of 2 stacks"):
        adaptc.swap(loaded, {"prompt_embeddings": torch.zeros(7, 24)})


TASKS = {**SEQ, "num_tasks": 3, "num_ranks": 2}


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_in_front_of_decoders(family, tmp_path):
    """With the decoder's ids given, padded or not, through swaps to other numbers; PEFT takes their embeddings."""
    program = adaptc.compile(shared_base_program(family), MultitaskPromptTuningConfig(**TASKS, num_virtual_tokens=3))
    program.validate()
    run_quietly(program, {**inputs(2, 5, None), "task_ids": torch.tensor([0, 1])})
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    with adaptc.debug.assert_no_recompiles():
        for count in (1, 4, 7):
            path = tmp_path / str(count)
            oracle = prompt_oracle(
                family, path, "MultitaskPromptTuningConfig", seed=count, **TASKS, num_virtual_tokens=count
            )
            for p in (program, loaded):
                adaptc.swap(p, path)
                for batch, length, padding, decoded in ((3, 7, "left", 5), (1, 2, None, 1), (2, 9, "right", 8)):
                    mine = {**inputs(batch, length, padding, decoded), "task_ids": torch.arange(batch) % 3}
                    theirs = {**mine, "decoder_inputs_embeds": None}
                    theirs["decoder_inputs_embeds"] = oracle.model.word_embeddings(theirs.pop("decoder_input_ids"))
                    expected = run_quietly(oracle.model, theirs).logits
                    assert expected.shape == (batch, count + decoded, VOCAB)
                    assert_same({"y": run_quietly(p, mine).logits}, {"y": expected})
            p.validate()
    plain = inputs(3, 7, "left")
    for p in (program.bind(None), adaptc.unload(program)):
        assert_same(run_quietly(p, plain).logits, run_quietly(FAMILIES[family].build(), plain).logits)
    with pytest.raises(CheckpointError, match="as many for each of 2 stacks"):
        adaptc.swap(program, {**file_tensors(path), "prompt_embeddings": torch.zeros(7, 24)})


class Reversed(torch.nn.Module):
    """A decoder that reads its tokens from the last one on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(31, 12), torch.nn.Linear(12, 31)

    def forward(self, input_ids, decoder_input_ids):
        return self.out(self.table(decoder_input_ids.flip(1))) + self.table(input_ids).mean((1, 2), keepdim=True)


def test_decoders_that_are_not_understood():
    config = MultitaskPromptTuningConfig(**SEQ, num_virtual_tokens=3)
    given_ = {"input_ids": torch.arange(15).reshape(3, 5), "decoder_input_ids": torch.arange(12).reshape(3, 4)}
    with pytest.raises(
        TargetError, match="0 lookups by 'decoder_input_ids' were found: looked for one by token ids as"
    ):
        adaptc.compile(Reversed(), config, example_inputs=given_)


@pytest.mark.long
def test_refusals():
    with pytest.raises(TargetError, match="CPT is not supported for models with an encoder and a decoder"):
        adaptc.compile(shared_base_program("t5"), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 5]))
    with pytest.raises(TargetError, match="the encoder of this program reads no token ids"):
        adaptc.compile(shared_base_program("whisper"), PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="num_transformer_submodules=2 is not supported for a model of one stack"):
        adaptc.compile(shared_base_program("llama"), PromptTuningConfig(**SEQ, num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="num_transformer_submodules=3 is not supported"):
        adaptc.compile(
            shared_base_program("t5"), PromptTuningConfig(num_virtual_tokens=3, num_transformer_submodules=3)
        )
