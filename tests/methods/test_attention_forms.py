"""Ways to write attention out, which prefixes and adaption prompts understand, or say by name why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptionPromptConfig, PrefixTuningConfig
from adaptc.errors import TargetError
from tests.support.written_out import OPTIONS

HEADS, WIDTH = 3, 4


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) / 2 + mask).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.where(mask < 0, -1e9, (q * 0.5) @ k.transpose(-1, -2))
    return torch.softmax(scores, 3, dtype=torch.float64).to(v.dtype) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).mul_(0.5).masked_fill(mask < 0, -1e9)
    return torch.matmul(scores.softmax(-1), v)


def one_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length, w = q.shape
    q, k, v = (t.reshape(b * h, -1, w) for t in (q, k, v))
    bias = mask.expand(b, h, length, length).reshape(b * h, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.5)
    return torch.bmm(scores.view(b, h, length, length).softmax(-1).view(b * h, length, length), v).view(b, h, length, w)


def turned_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length, w = q.shape
    keys = k.transpose(2, 3).reshape(b * h, w, length)
    scores = torch.bmm(q.reshape(b * h, length, w), keys).view(b, h, length, length) * 0.5 + mask
    return torch.bmm(scores.softmax(-1).reshape(b * h, length, length), v.reshape(b * h, length, w)).view(q.shape)


def sunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One more score that stands for nothing."""
    scores = q @ k.mT * 0.5 + mask
    sink = torch.full((1, 1, 1, 1), 0.3).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Written(nn.Module):
    """An attention of tokens without a mask of the caller's; ``front``: keys and values (heads, count, width)."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend, inner = attend, HEADS * WIDTH
        self.table, self.mix = nn.Embedding(31, 10), nn.Linear(10, 3 * inner)
        self.o, self.out = nn.Linear(inner, 10), nn.Linear(10, 7)

    def forward(self, ids: Tensor, front: Any = None) -> Tensor:
        b, length = ids.shape
        q, k, v = (t.view(b, length, HEADS, WIDTH).transpose(1, 2) for t in self.mix(self.table(ids)).chunk(3, -1))
        there = torch.arange(length)
        mask = torch.where(there[:, None] < there[None, :], -1e9, 0.0)[None, None]
        if front is not None:
            k, v = (torch.cat([f.expand(b, -1, -1, -1), t], 2) for f, t in zip(front, (k, v), strict=True))
            mask = nn.functional.pad(mask, (front[0].shape[1], 0))
        y = self.attend(q, k, v, mask)
        return self.out(self.o(y.transpose(1, 2).reshape(b, length, HEADS * WIDTH)))


@pytest.mark.long
@pytest.mark.parametrize("attend", [plain, chosen, filled, one_axis, turned_before, sunk])
def test_forms(attend: Any) -> None:
    torch.manual_seed(0)
    model, ids = Written(attend).eval(), torch.arange(15).reshape(3, 5)
    program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=4), example_inputs=(ids,))
    by_hand = Written(sunk if attend is sunk else plain).eval()
    by_hand.load_state_dict(model.state_dict())
    for count in (7, 1, 4):
        rows = torch.randn(count, 2 * HEADS * WIDTH)
        adaptc.swap(program, {"prompt_embeddings": rows})
        front = rows.view(count, 2, HEADS, WIDTH).permute(1, 2, 0, 3)
        with torch.no_grad():
            expected = by_hand(ids[:2], front)
            torch.testing.assert_close(program(ids[:2]), expected)
            assert float((expected - model(ids[:2])).abs().max()) > 1e-2
    torch.testing.assert_close(program.bind(None)(ids), model(ids))
    torch.testing.assert_close(adaptc.unload(program)(ids), model(ids))
    if attend in (filled, chosen, one_axis):
        adaption(model, by_hand, ids)


def adaption(model: nn.Module, by_hand: Any, ids: Tensor) -> None:
    program = adaptc.compile(model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1), example_inputs=(ids,))
    slots = {n: program.binding.values[f] for n, f in program.adaptation.attachments[0].slots.items()}
    with torch.no_grad():
        for t in slots.values():
            t.copy_(torch.randn_like(t))
        made = by_hand.mix(slots["adaption_prompt"][0]).view(3, 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        gate = slots["adaption_gate"]
        usual = by_hand.attend
        by_hand.attend = lambda q, k, v, m: usual(q, k, v, m) + gate * ((q @ made[1].mT / 2).softmax(-1) @ made[2])
        torch.testing.assert_close(program(ids[:2]), by_hand(ids[:2]))
    by_hand.attend = usual


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + (q * 2) @ (k + 1).mT + mask).softmax(-1) @ v


def other_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-2) @ v


def turned_chances(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (v.mT @ (q @ k.mT + mask).softmax(-1).mT).mT


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (two_products, r"nearest is 'softmax': its scores are made of 2 products, 'matmul"),
        (other_axis, "nearest is 'softmax': it is not along the last axis"),
        (turned_chances, "nearest is 'softmax': its chances are the second factor of 'matmul_1'"),
    ],
)
@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=4), AdaptionPromptConfig(**OPTIONS)])
def test_what_is_not_understood_is_named(attend: Any, message: str, config: Any) -> None:
    with pytest.raises(TargetError, match=f"looked for scaled_dot_product_attention, and for a softmax.*{message}"):
        adaptc.compile(Written(attend).eval(), config, example_inputs=(torch.arange(15).reshape(3, 5),))


def test_scores_that_other_tokens_have_not() -> None:
    def weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT + mask) * torch.arange(1, k.shape[2] + 1)).softmax(-1) @ v

    ids = torch.arange(15).reshape(3, 5)
    with pytest.raises(TargetError, match=r"'mul' = aten.mul.Tensor changes the scores of 'matmul_1'"):
        adaptc.compile(Written(weighed), AdaptionPromptConfig(adapter_len=3, adapter_layers=1), example_inputs=(ids,))


class WrittenPositions(torch.nn.Module):
    """Positions that are written one after the other into a tensor of zeros."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.table, self.places, self.out = (
            torch.nn.Embedding(31, 12),
            torch.nn.Embedding(40, 12),
            torch.nn.Linear(12, 31),
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.zeros_like(input_ids)
        counted = torch.arange(input_ids.shape[1])
        places = places + counted if self.whole else places
        if not self.whole:
            places[:] = counted
        x = (self.table(input_ids) + self.places(places)).unflatten(-1, (3, 4)).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_written_to_beside_the_tokens_is_not_taken_for_what_it_was(whole: bool) -> None:
    config = adaptc.PrefixTuningConfig(num_virtual_tokens=3)
    given = {"input_ids": torch.randint(31, (2, 5))}
    if whole:
        assert adaptc.compile(WrittenPositions(True).eval(), config, example_inputs=given)(**given).shape == (2, 5, 31)
        return
    with pytest.raises(adaptc.TargetError, match="beside the tokens, and it is not known what it is for more of them"):
        adaptc.compile(WrittenPositions(False).eval(), config, example_inputs=given)
