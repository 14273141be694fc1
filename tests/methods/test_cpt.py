"""CPT next to PEFT's: bounded steps, losses over the context's labels with and without decay, and files."""

from __future__ import annotations

import peft
import pytest
import torch

import adaptc
from adaptc import CPTConfig
from adaptc.errors import ConfigError
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, file_tensors, load_peft, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, run_quietly, text

#: two examples of a context: templates, inputs, templates and labels
IDS = [7, 30, 31, 8, 50, 9, 33, 8, 51, 52]
TYPES = [1, 2, 2, 3, 4, 5, 6, 7, 8, 8]


def options(decay=None, **more):
    own = {"task_type": "CAUSAL_LM", "cpt_token_ids": IDS, "cpt_mask": [1] * 10, "cpt_tokens_type_mask": TYPES}
    weights = {} if decay is None else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    return {**own, **weights, **more}


def batch(types=True):
    """Rows that continue the context, of which the last has two groups of labels."""
    inputs = text(3, 6)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][1, 2] = -100
    if types:
        inputs["input_type_mask"] = torch.tensor([[1, 2, 2, 3, 4, 4], [1, 2, 4, 4, 4, 0], [2, 4, 4, 6, 8, 8]])
    return inputs


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("types", [True, False])
def test_training(decay, types, tmp_path):
    """Steps of an optimizer: losses, gradients and bounded steps are PEFT's, and files both ways."""
    with quiet(*PROMPT_WARNINGS):
        theirs = peft.get_peft_model(FAMILIES["llama"].build(), peft.CPTConfig(**options(decay))).eval()
    program = adaptc.compile(FAMILIES["llama"].build(), CPTConfig(**options(decay)), training=True)
    module = program.module().eval()
    (ours,) = [p for p in module.parameters() if p.requires_grad]
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    assert delta.requires_grad
    for _ in range(3):
        # PEFT adds to the types it is given.
        want = theirs(**{k: v.clone() for k, v in batch(types).items()})
        got = module(**batch(types))
        torch.testing.assert_close(got.loss, want.loss)
        assert_same(got, want)
        for p, out in ((ours, got), (theirs.prompt_encoder["default"].delta_embedding.weight, want)):
            p.grad = None
            out.loss.backward()
        delta = theirs.prompt_encoder["default"].delta_embedding.weight
        torch.testing.assert_close(ours.grad, delta.grad, rtol=1e-4, atol=1e-6 * float(delta.grad.abs().max()))
        assert not ours.grad[4].any(), "a label of the context stays"
        with torch.no_grad():
            for p in (ours, delta):
                p -= 0.3 * p.grad
    module(**text(2, 5)), theirs(**text(2, 5))
    torch.testing.assert_close(ours.detach(), theirs.prompt_encoder["default"].delta_embedding.weight.detach())
    theirs.save_pretrained(str(tmp_path / "peft"))
    saved = adaptc.save_adapter(module.program, tmp_path / "ours")
    torch.testing.assert_close(
        file_tensors(saved)["prompt_embeddings"], file_tensors(tmp_path / "peft")["prompt_embeddings"]
    )
    with quiet(*PROMPT_WARNINGS):
        loaded = load_peft(FAMILIES["llama"].build(), saved)
    read = adaptc.compile(shared_base_program("llama"), tmp_path / "peft")
    assert_same(run_quietly(read, text(2, 5)), run_quietly(loaded, text(2, 5)))
    again = adaptc.compile(FAMILIES["llama"].build(), saved, training=True)
    for name, value in again.binding.values.items():
        want = dict(module.named_parameters()).get(name, program.binding.values[name])
        torch.testing.assert_close(value, want, msg=name)


@pytest.mark.long
def test_swaps_and_the_base(tmp_path):
    """Other contexts, of other lengths, in a program without labels, which takes no types."""
    program = adaptc.compile(shared_base_program("gpt2"), CPTConfig(**options()))
    assert adaptc.verify(program, FAMILIES["gpt2"].build()).ok
    with quiet(*PROMPT_WARNINGS):
        short = {"cpt_token_ids": [7, 8, 9], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 4]}
        theirs = peft.get_peft_model(FAMILIES["gpt2"].build(), peft.CPTConfig(**{**options(), **short})).eval()
        theirs.save_pretrained(str(tmp_path))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, tmp_path)
        assert_same(run_quietly(program, text(2, 5)), run_quietly(theirs, text(2, 5)))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_same(run_quietly(loaded, text(3, 4)), run_quietly(theirs, text(3, 4)))
    assert_same(run_quietly(adaptc.unload(program), text(2, 5)), run_quietly(FAMILIES["gpt2"].build(), text(2, 5)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"cpt_tokens_type_mask": [1, 2]}, "10, 10 and 2 entries"),
        ({"opt_weighted_loss_type": "half"}, "not one of none, decay"),
        ({"opt_projection_epsilon": -1.0}, "opt_projection_epsilon"),
    ],
)
def test_bad_options(more, message):
    with pytest.raises(ConfigError, match=message):
        CPTConfig(**{**options(), **more})


def test_tokens_that_there_are_not():
    with pytest.raises(ConfigError, match=r"cpt_token_ids has 61, and .* rows 0 to 60"):
        adaptc.compile(shared_base_program("llama"), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 61]))
