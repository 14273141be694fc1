"""Gradients through a bank, half precision, inductor, and banks as plain exported programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from tests.support.gated_net import X, adapter_tensors, compile_net, config, net
from tests.support.rounding import assert_no_less_accurate

CHOSEN = ["a", None, {"a": 0.5, "b": -2.0}]


def weight(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_gradients_reach_the_adapters_of_each_row(options: dict[str, Any]) -> None:
    made = adaptc.compile(net(), config(2, **options), example_inputs=torch.randn(2, 5), training=True)
    named = {"a": 2, "b": 5, "c": 3}
    more = (
        {}
        if not options
        else {f"{n}.lora_magnitude_vector": torch.rand(o) + 0.5 for n, o in (("up", 7), ("side", 7), ("down", 3))}
    )
    bank = made.bank({n: {**adapter_tensors(r), **more} for n, r in named.items()})
    rows = ["a", None, "b"]
    out = bank(X, adapters=rows)
    (out * weight(out)).sum().backward()
    for name in ("a", "b"):
        one = made.bind(bank[name])
        want = torch.autograd.grad(
            sum((one(X) * weight(out))[i].sum() for i, n in enumerate(rows) if n == name),
            [t for t in bank[name].values.values() if t.requires_grad],
        )
        found = [t.grad for t in bank[name].values.values() if t.requires_grad]
        assert len(found) == len(want) > 5
        for f, w in zip(found, want, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)
    assert all(t.grad is None for t in bank["c"].values.values())


def test_rows_of_one_adapter_alone_train_it_too() -> None:
    made = adaptc.compile(net(), config(2), example_inputs=torch.randn(2, 5), training=True)
    bank = made.bank({"a": adapter_tensors(2)})
    before = bank(X, adapters=["a"] * 3).detach()
    parameters = [t for t in bank["a"].values.values() if t.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    bank(X, adapters=["a"] * 3).square().mean().backward()
    optimizer.step()
    after = bank(X, adapters=["a"] * 3).detach()
    assert not torch.allclose(before, after, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bank(X, adapters=["a", None, "a"])[0], after[0], rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_rounds_no_more_than_an_adapter_alone(dtype: torch.dtype, autocast: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, generator=draw).to(dtype)
    options = {"autocast_adapter_dtype": autocast}
    made = adaptc.compile(net().to(dtype), config(2), example_inputs=x[:2], **options)
    exact = adaptc.compile(net().to(dtype).double(), config(2), example_inputs=x[:2].double())
    adapters = {
        n: {k: (0.5 * t).to(dtype).float() for k, t in adapter_tensors(r).items()} for n, r in (("a", 2), ("b", 5))
    }
    bank, rows = made.bank(adapters), ["a", "b"] * 32
    found = bank(x, adapters=rows)
    assert found.dtype == dtype
    for i, name in enumerate(("a", "b")):
        alone, want = made.bind(adapters[name])(x), exact.bind(adapters[name])(x.double())
        # One adapter in half precision is held in float32 for few rows, and several side by side are not.
        assert_no_less_accurate(found[i::2], alone[i::2], want[i::2], factor=1.2 if autocast else 1.6)


@pytest.mark.long
def test_inductor_compiles_once(tmp_path: Path) -> None:
    made = compile_net(2, backend="inductor")
    bank = made.bank({"a": adapter_tensors(2), "b": adapter_tensors(5)}, capacity=4)
    eager = compile_net(2).bank({"a": adapter_tensors(2), "b": adapter_tensors(5), "c": adapter_tensors(3)})

    def close(adapters: Any, x: torch.Tensor = X) -> None:
        torch.testing.assert_close(bank(x, adapters=adapters), eager(x, adapters=adapters), rtol=1e-4, atol=1e-4)

    close([None] * 3)
    with adaptc.debug.assert_no_recompiles():
        close(["a"] * 3)
        close(["a", None, "b"])
        close(CHOSEN)
        bank.add("c", adapter_tensors(3))
        close(["c", "b", "a"])
        close(["c", {"a": 1e-3}, None])
        bank.replace("c", adapter_tensors(3))
        bank.remove("b")
        close(["c", "c", "a"])
        close(["c", "c", "a", None, "a"], torch.randn(5, 5))
        close(["c"] * 3)


SCRIPT = """
import sys, torch
program = torch.export.load(sys.argv[1])
x, c, want = torch.load(sys.argv[2])
found = program.module()(x, adapter_coefficients=c)
torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
assert not any(m.split(".")[0] == "adaptc" for m in sys.modules)
"""


@pytest.mark.long
@pytest.mark.parametrize("names", [["a", "b"], ["b"]])
def test_an_exported_bank_needs_no_adaptc(names: list[str], tmp_path: Path) -> None:
    bank = compile_net(2).bank({"a": adapter_tensors(2), "b": adapter_tensors(5)})
    x = torch.randn(4, 5)
    mixes = [{names[0]: 1.0}, {}, {n: 0.5 * i - 0.2 for i, n in enumerate(names)}, {names[-1]: 1.0}]
    want = bank(x, adapters=mixes)
    c = torch.tensor([[mix.get(n, 0.0) for n in names] for mix in mixes])
    torch.export.save(bank.exported(names), tmp_path / "bank.pt2")
    torch.save((x, c, want), tmp_path / "call.pt")
    files = [str(tmp_path / "bank.pt2"), str(tmp_path / "call.pt")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(adaptc.ConfigError, match="the bank is empty"):
        compile_net(2).bank().exported()


@pytest.mark.parametrize("names", ["a", [None], [3]])
def test_what_is_exported_is_named_in_a_list(names: Any) -> None:
    made = adaptc.compile(nn.Linear(5, 7), adaptc.LoraConfig(r=2, target_modules="all-linear"), example_inputs=X[:2])
    with pytest.raises(adaptc.ConfigError, match="must be a list of names"):
        made.bank({"a": made.binding}).exported(names)


@pytest.mark.long
def test_a_program_read_from_a_file_has_banks(tmp_path: Path) -> None:
    made = compile_net(2)
    loaded = adaptc.load(adaptc.save(made, tmp_path / "program.pt2"))
    adapters = {"a": adapter_tensors(2), "b": adapter_tensors(5)}
    want = made.bank(adapters)(X, adapters=CHOSEN)
    torch.testing.assert_close(loaded.bank(adapters)(X, adapters=CHOSEN), want, rtol=1e-5, atol=1e-5)
