"""Every method that banks take, and every kind of layer: adapters trained together are what each becomes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.support.method_checks import cases
from tests.support.method_table import ENTRIES
from tests.support.subject import Subject, save_random_adapter, subject

ROWS = ["one", "two", None, "one", "two", "two", "one"]
STEPS = 3


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def loss(out: Tensor, target: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype).reshape(out.shape[1:])).sum() + (
        out - target
    ).square().mean()


#: options that adapters of one training share (what it draws, what its backward keeps), or that end it
COMMON = ("velora_config", "monteclora_config", "save_only_topk_weights", "module_dropout", "boft_dropout")


def check(s: Subject, tmp_path: Any) -> None:
    other = s.config(**{k: v for k, v in s.entry.other_config.items() if k not in COMMON})
    adapters = {"one": s.directory, "two": save_random_adapter(s, other, tmp_path, seed=9)}
    bank = s.compile(other, training=True).bank(adapters, training=True, optimizer=adam)
    args = s.args(len(ROWS))
    target = torch.randn(s.program(*args).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = {}
    for name, source in adapters.items():
        module = s.compile(source, training=True).module()
        module.eval()
        alone[name] = module, adam([p for p in module.parameters() if p.requires_grad])
    for _ in range(STEPS):
        found = bank.forward_backward(args, ROWS, loss, target)
        for name, (module, optimizer) in alone.items():
            rows = [i for i, n in enumerate(ROWS) if n == name]
            want = loss(module(*(a[rows] for a in args)), target[rows])
            want.backward()
            torch.testing.assert_close(found[name].loss, want.detach(), rtol=1e-9, atol=1e-9)
            own = bank.trainer(name).parameters
            parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
            assert parameters
            for fqn, p in parameters.items():
                size = max(1.0, float(p.grad.abs().max()))
                torch.testing.assert_close(own[fqn].grad, p.grad, rtol=1e-9, atol=1e-9 * size)
            optimizer.step()
            optimizer.zero_grad()
        assert not bank.step().skipped
    for name, (module, _) in alone.items():
        own = bank.trainer(name).parameters
        for fqn, p in module.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(own[fqn].detach(), p.detach(), rtol=1e-9, atol=1e-9)


def taken(entry: str, layer: str) -> bool:
    return layer != "functional" and next(e for e in ENTRIES if e.name == entry).rows


@pytest.mark.parametrize("entry", [e.name for e in ENTRIES if e.rows])
def test_a_linear_layer(entry: str, tmp_path: Any) -> None:
    check(subject(entry, "linear"), tmp_path)


@pytest.mark.long
@pytest.mark.few(60)
@pytest.mark.parametrize(("entry", "layer"), [c for c in cases() if c.values[1] != "linear" and taken(*c.values)])
def test_other_layers(entry: str, layer: str, tmp_path: Any) -> None:
    check(subject(entry, layer), tmp_path)


def test_adapters_that_banks_refuse_do_not_train_there_either() -> None:
    refused = [e.name for e in ENTRIES if not e.rows]
    assert refused
    for name in refused:
        s = subject(name, "linear")
        with pytest.raises(adaptc.TargetError, match="another adapter for each row"):
            s.compile(training=True).bank(training=True)
