"""Rows that hold several sequences train as PEFT's model does with them, under TRL and by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from adaptc import AdaptcError, LoraConfig, compile
from tests.support.training import CONFIG, arguments, model, module, peft_model, trainable
from tests.support.words import text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])


def rows() -> Dataset:
    rng = random.Random(0)
    sizes = [(3 + i % 4, 2 + i % 3) for i in range(24)]
    return Dataset.from_list([{"prompt": text(rng, p), "completion": text(rng, c)} for p, c in sizes])


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        {"packing": True, "max_length": 16},
        {"padding_free": True, "max_length": None, "neftune_noise_alpha": 5, "gradient_checkpointing": True},
    ],
    ids=["packing", "padding_free"],
)
def test_packed_losses_are_pefts(more: dict[str, Any], tmp_path: Path) -> None:
    """Packing gives positions, and the bounds of sequences by five other names; there is no mask."""

    def run(trained: Any) -> list[tuple[float, float]]:
        options = arguments(tmp_path, **{"max_steps": 3, "bf16": False, "gradient_checkpointing": False, **more})
        trainer = SFTTrainer(trained, args=SFTConfig(**options), train_dataset=rows(), processing_class=tokenizer())
        trainer.train()
        return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]

    ours, theirs = run(module()), run(peft_model())
    assert len({loss for loss, _ in ours}) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 90, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "position_ids": POSITIONS, "labels": ids.masked_fill(POSITIONS == 0, -100)}


@pytest.mark.long
def test_positions_with_a_mask_and_without() -> None:
    """Sequences are apart where there is no mask, as in transformers, and one text where there is."""
    trained, theirs = module(), peft_model()
    seen = []
    for more in ({}, {"attention_mask": torch.ones_like(POSITIONS)}):
        found, wanted = trained(**inputs(), **more), theirs(**inputs(), **more, use_cache=False)
        torch.testing.assert_close((found.loss, found.logits), (wanted.loss, wanted.logits), rtol=1e-5, atol=1e-6)
        seen.append(found.loss.item())
        found.loss.backward()
        wanted.loss.backward()
        for own, other in zip(trainable(trained), trainable(theirs), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert abs(seen[0] - seen[1]) > 1e-3


@pytest.mark.long
def test_both_kinds_of_calls_are_of_one_module() -> None:
    """Modes, checkpointing, replaced and trained parameters are those of either call."""
    trained = module({**CONFIG, "lora_dropout": 0.5})
    trained.eval()
    before = trained(**inputs()).loss
    assert torch.equal(before, trained(**inputs()).loss), "dropout in eval mode"
    trained.gradient_checkpointing_enable()
    trained.train()
    assert not torch.equal(trained(**inputs()).loss, trained(**inputs()).loss), "no dropout in train mode"
    trained.eval()
    trained.load_state_dict({k: 2 * t for k, t in trained.state_dict().items()}, assign=True)
    after = trained(**inputs()).loss
    assert not torch.equal(before, after)
    whole = {k: v for k, v in inputs().items() if k != "position_ids"}
    assert trained(**whole, position_ids=torch.arange(11)[None]).loss.item() == pytest.approx(
        trained(**whole).loss.item()
    )


def bounds() -> dict[str, Any]:
    ends = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    index = torch.tensor([[0] * 4 + [1] * 2 + [2] * 5], dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5, "seq_idx": index}


class Reads(transformers.LlamaForCausalLM):
    """Computes something else with ``seq_idx``, as layers that keep a state do."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        seq_idx: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        out = super().forward(input_ids=input_ids, **given, **kwargs)
        if seq_idx is not None:
            out.logits = out.logits + seq_idx[..., None]
        return out


@pytest.mark.long
def test_bounds_that_the_model_reads_are_refused_by_name() -> None:
    torch.manual_seed(0)
    trained = compile(Reads(model().config).eval(), LoraConfig(**CONFIG), training=True).module()
    with pytest.raises(AdaptcError, match=r"'seq_idx' cannot be given: the model computes something else"):
        trained(**inputs(), **bounds())
    told = {n: v for n, v in bounds().items() if n != "seq_idx"}
    assert trained(**inputs(), **told).loss.isfinite()


def test_bounds_without_positions_are_refused_by_name() -> None:
    with pytest.raises(AdaptcError, match="'cu_seq_lens_q' is not an input of the program"):
        module()(input_ids=inputs()["input_ids"], **bounds())


@pytest.mark.long
def test_a_program_for_inference_takes_no_positions() -> None:
    trained = compile(model(), LoraConfig(**CONFIG)).module()
    with pytest.raises(
        AdaptcError, match="'position_ids' is an input of the model, but the program was captured without"
    ):
        trained(input_ids=inputs()["input_ids"], position_ids=POSITIONS)
