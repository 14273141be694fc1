"""Whole programs as AOTInductor packages: a language model, other processes, PiSSA, other methods, merged programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc import ConfigError, LoraConfig, SwapError
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import Padding, find_paddings
from tests.support import odd_methods
from tests.support.families import FAMILIES
from tests.support.packaged_nets import Packaged, adapter

aten = torch.ops.aten


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    model = FAMILIES["llama"].build()
    config = LoraConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        program = adaptc.compile(model, config)
    path = adaptc.package(program, tmp_path_factory.mktemp("llama") / "llama.pt2", max_rank=5)
    return Packaged(program, adaptc.load_package(path), path)


@pytest.mark.slow
def test_llama(llama: Packaged) -> None:
    for batch, seq in [(1, 1), (1, 9), (3, 7), (5, 2)]:
        inputs = FAMILIES["llama"].inputs(batch, seq)
        got, want = llama.runner(**inputs), llama.program(**inputs)
        assert type(got) is type(want)
        torch.testing.assert_close(got.logits, want.logits, rtol=2e-5, atol=2e-5)
    short = llama.runner(input_ids=inputs["input_ids"])  # the mask is filled in
    assert torch.equal(
        short.logits, llama.runner(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}).logits
    )


FRESH = """
import json, sys, torch
path, adapter, out = sys.argv[1:]
inputs = torch.load(out)
import transformers.modeling_outputs
sys.modules["adaptc"] = None
plain = torch._inductor.aoti_load_package(path)(**inputs).logits
del sys.modules["adaptc"], transformers.modeling_outputs, sys.modules["transformers.modeling_outputs"]
import adaptc
runner = adaptc.load_package(path)
first = runner(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
report = runner.swap(adapter)
second = runner(**inputs)
assert "transformers.models.llama" not in sys.modules
torch.save({"plain": plain, "first": first.logits, "second": second.logits, "type": type(second).__name__}, out)
"""


@pytest.mark.long
def test_llama_in_another_process_and_peft(llama: Packaged, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    family = FAMILIES["llama"]
    inputs = family.inputs(3, 7)
    torch.manual_seed(2)
    config = PeftConfig(
        r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_rslora=True
    )
    oracle = get_peft_model(family.build(), config).eval()
    oracle.save_pretrained(str(tmp_path / "adapter"))
    out = tmp_path / "out.pt"
    torch.save(inputs, out)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(llama.path), str(tmp_path / "adapter"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    with torch.no_grad():
        wanted = oracle(**inputs).logits
    first = llama.program(**inputs).logits
    assert found["type"] == "CausalLMOutputWithPast"
    torch.testing.assert_close(found["plain"], first, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found["first"], first, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found["second"], wanted, rtol=2e-5, atol=2e-5)
    assert (wanted - first).abs().max() > 1e-2


# -- adapters that change the base, training programs, no adapter ----------------------------------------------------


def _two_layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


@pytest.mark.slow
def test_pissa_training_program(tmp_path: Path) -> None:
    """A package whose own adapter changes base weights holds them, so it swaps to others like it, and to plain ones."""
    x = torch.randn(4, 7)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa", lora_dropout=0.3)
    program = adaptc.compile(_two_layers(), config, example_inputs=(x,), training=True)
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "a.pt2"))
    assert runner.ranks == {"0.weight": 2}
    torch.testing.assert_close(runner(x), program(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(runner(x), _two_layers().eval()(x), rtol=2e-5, atol=2e-5)
    plain = config.replace(init_lora_weights=True, r=1, lora_alpha=5)
    for other in (plain, config, plain):
        tensors = adapter(program, other)
        adaptc.swap(program, tensors, config=other)
        runner.swap(tensors, config=other)
        torch.testing.assert_close(runner(x), program(x), rtol=2e-5, atol=2e-5)
    assert (runner(x) - _two_layers().eval()(x)).abs().max() > 1e-2
    torch.testing.assert_close(runner.base(x), _two_layers().eval()(x), rtol=2e-5, atol=2e-5)
    first = adaptc.load_package(runner.path)
    out, bound = first(x), first.bind(adapter(program, plain), config=plain)
    torch.testing.assert_close(bound(x), program(x), rtol=2e-5, atol=2e-5)
    assert torch.equal(first(x), out)  # the changed base comes back with its adapter
    for model in (program, _two_layers().eval()):
        report = adaptc.verify(first, model)
        assert report.ok, report
    assert not torch.equal(bound(x), out)
    with pytest.raises(adaptc.AdaptcError, match="captured for exactly 7"):
        first(torch.randn(4, 6))  # the code would read past its end


@pytest.mark.slow
def test_methods_with_one_number_and_with_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of one element times a scale is a number to a compiler; a rank that cannot be padded stays what it is."""
    odd_methods.register(monkeypatch)
    x = torch.randn(4, 7)
    shift = odd_methods.ShiftConfig(target_modules=["3"], factor=2.0)
    soft = odd_methods.SoftmaxedConfig(target_modules=["0"], r=3)
    program = adaptc.compile(_two_layers().eval(), [shift, soft], example_inputs=(x,))
    with pytest.raises(
        ConfigError, match=r"'0\.weight'.*'softmaxed' cannot be padded to rank 5; package without max_rank"
    ):
        adaptc.package(program, tmp_path / "a.pt2", max_rank=5)
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "a.pt2"))
    base = _two_layers().eval()(x)
    torch.testing.assert_close(runner(x), program(x), rtol=2e-5, atol=2e-5)
    runner.swap({"3.shift": torch.tensor([0.7])}, config=shift.replace(factor=3.0))
    torch.testing.assert_close(runner(x) - base, torch.full_like(base, 2.1), rtol=2e-5, atol=2e-5)


@pytest.mark.long
def test_a_merged_program(tmp_path: Path) -> None:
    x = torch.randn(4, 7)
    program = adaptc.compile(
        _two_layers().eval(), LoraConfig(r=2, target_modules=["3"], init_lora_weights=False), example_inputs=(x,)
    )
    runner = adaptc.load_package(adaptc.package(adaptc.merge(program), tmp_path / "a.pt2"))
    torch.testing.assert_close(runner(x), program(x), rtol=2e-5, atol=2e-5)
    with pytest.raises(SwapError, match=r"no adapter sites.*Package the adapted program"):
        runner.swap({})


# -- padding ---------------------------------------------------------------------------------------------------------


OPS = {
    "linear": Op("linear", (7, 5), aten.linear.default, ()),
    "addmm": Op("addmm", (5, 11), aten.addmm.default, ()),
    "embedding": Op("embedding", (3, 13), aten.embedding.default, (-1, False, False)),
    "conv2d": Op("conv2d", (5, 3, 3, 2), aten.conv2d.default, ((2, 1), (1, 2), (1, 2), 1)),
    "grouped": Op("conv1d", (9, 2, 3), aten.conv1d.default, ((1,), (0,), (2,), 3)),
    "experts": Op("experts", (3, 5, 7)),
    "experts_t": Op("experts_t", (4, 5, 3)),
    "weight": Op("weight", (5, 3, 2)),
}


@given(st.sampled_from(sorted(OPS)), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_padding_leaves_lora_unchanged(kind: str, rank: int, more: int, with_bias: bool) -> None:
    op = OPS[kind]
    method = Lora(alpha=7, with_bias=with_bias and kind == "linear").sizes.with_rank(op, rank)
    large = method.sizes.with_rank(op, rank + more)
    found = find_paddings(method, op, "apply" if method.has_apply(op) else "weight")
    W = torch.randn(op.shape, dtype=torch.float64)
    slots = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in method.slots(op).items()}
    shapes = {n: s.shape for n, s in large.slots(op).items()}
    padded = {n: found[n](t, shapes[n]) if n in found else t for n, t in slots.items()}
    assert {n: tuple(t.shape) for n, t in padded.items()} == shapes
    scale = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(method.weight(op, W, padded, scale), method.weight(op, W, slots, scale))


def test_no_padding_is_better_than_a_wrong_one() -> None:
    assert find_paddings(odd_methods.Softmaxed(), OPS["linear"], "weight") is None
    assert find_paddings(Lora(), OPS["linear"], "weight") == {n: Padding() for n in Lora().slots(OPS["linear"])}
