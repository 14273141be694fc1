"""Loops over the experts that tokens chose are captured in each form that models write them, and no other loop is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc.capture import model_state
from adaptc.capture.replacements.visited_experts import visited_experts

EXPERTS, WIDTH, CHOSEN = 5, 6, 2


class Experts(nn.Module):
    """Experts of one matrix each, in a loop that ``way`` tells."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.num_experts = way, EXPERTS
        made = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=made))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        classes = EXPERTS + (self.way == "one class more")
        mask = F.one_hot(chosen, num_classes=classes).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            at: Any = expert[0]
            if self.way == "number":
                at = int(expert.item())
            place, token = torch.where(mask[expert].squeeze(0) if self.way == "row" else mask[at])
            if self.way == "number" and token.numel() == 0:
                continue
            if self.way == "counts":
                out = out + 1
            made = F.linear(x[token], self.weight[at]) * weights[token, place, None]
            out.index_add_(0, token, made)
        return out


class Mixture(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(way)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).flatten(0, 1)
        # A row of several places is no row after squeeze(0), so such loops choose one expert.
        weights, chosen = self.router(y).softmax(-1).topk(1 if self.experts.way == "row" else CHOSEN)
        return self.experts(y, chosen, weights).view_as(x)


def numbers(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(rows))


def compiled(way: str, **options: Any) -> tuple[Mixture, adaptc.AdaptedProgram]:
    model = Mixture(way).eval()
    config = adaptc.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    return model, adaptc.compile(model, config, example_inputs=numbers(3, 7), **options)


@pytest.mark.parametrize("way", ["plain", "one class more", "number", "row"])
def test_every_form_gives_the_models_numbers(way: str) -> None:
    model, program = compiled(way)
    # One token leaves most experts without any.
    for rows, length in ((3, 7), (2, 11), (1, 1)):
        x = numbers(rows, length)
        torch.testing.assert_close(program.base(x), model(x))
    assert "forward" not in vars(model.experts)


def test_gradients_are_the_models() -> None:
    model, program = compiled("number", training=True)
    module = program.module()
    for rows, length in ((3, 7), (2, 11)):
        x = numbers(rows, length)
        ours, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = (p for _, p in sorted(module.named_parameters()) if p.requires_grad)
        found = module(ours)
        found.square().sum().backward()
        weight = model.first.weight + 8 / 2 * b.detach() @ a.detach()
        y = F.linear(wanted, weight, model.first.bias).flatten(0, 1)
        weights, chosen = model.router(y).softmax(-1).topk(CHOSEN)
        out = model.experts(y, chosen, weights).view_as(x)
        out.square().sum().backward()
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-4)


def test_a_loop_that_counts_its_experts_is_refused() -> None:
    with pytest.raises(adaptc.CaptureError, match="could not be captured"):
        compiled("counts")


def test_a_model_that_is_not_run_is_still_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_state, "MAX_BYTES", 100)
    model, program = compiled("plain")
    torch.testing.assert_close(program.base(numbers(2, 11)), model(numbers(2, 11)))


def test_only_zero_is_known_of_the_number_of_tokens() -> None:
    model, x = Mixture("plain"), numbers(3, 7)
    seen: list[Any] = []

    def forward(y: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        (token,) = torch.where(chosen[:, 0] == 0)
        seen.append(token.numel())
        return y

    model.experts.forward = forward  # type: ignore[method-assign]
    with visited_experts(model, (x,), {}):
        assert "forward" in vars(model.experts)
        vars(model.experts)["forward"](x.flatten(0, 1), torch.zeros(21, 2).long(), torch.zeros(21, 2))
    assert seen[-1] != 0
    with pytest.raises(TypeError, match="known to the graph only"):
        assert seen[-1] == 3
