"""LoftQ next to PEFT's: first values and base, then the base in few bits; and what is refused.

PEFT's function asks for a GPU by name. Here its source runs with the CPU's name there, on the same bitsandbytes.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import loftq_utils
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import LoraConfig
from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.methods.lora_family.loftq import LoftQConfig, loftq_init
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.table_scheme import TableScheme

X = torch.linspace(-2, 2, 5 * 39).reshape(5, 39)
BITS = {4: "nf4", 8: "int8"}


def peft_loftq(weight: Tensor, bits: int, rank: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The base, A and B of PEFT's own function, on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    namespace: dict[str, Any] = {}
    exec(source, dict(vars(loftq_utils)), namespace)
    return namespace["loftq_init"](weight, num_bits=bits, reduced_rank=rank, num_iter=steps)


class Net(nn.Module):
    """A linear layer, then GPT-2's, whose weight is stored transposed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(39, 53), Conv1D(31, 53)
        self.down.weight.data.normal_()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def config(bits: int = 4, steps: int = 1, **options: Any) -> LoraConfig:
    options = {"r": 5, "lora_alpha": 5, "target_modules": ["up", "down"], **options}
    return LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": steps}, **options)


def program(*args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(Net(dtype), config(*args, **options), example_inputs=X.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("bits", BITS)
def test_values_are_peft_s(bits, steps, dtype):
    """At a scale of one. Blocks of 64 begin in other rows than the first, and the last one is short."""
    net, prog = Net(dtype), program(bits, steps, dtype=dtype)
    # PEFT takes a Conv1D's weight as it is stored, and its factors do not fit the layer.
    for name, weight in (("up", net.up.weight.detach()), ("down", net.down.weight.detach().T.contiguous())):
        expected, A, B = peft_loftq(weight, bits, 5, steps)
        found, factors = prog.state_dict[f"{name}.weight"].detach(), prog.binding.values
        found = found.T if name == "down" else found
        own_A, own_B = (factors[f"{name}.lora_{n}.default.weight"].detach() for n in "AB")
        if bits == 4 or (steps == 1 and dtype == torch.float32):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(own_A, A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own_B, B, rtol=1e-4, atol=1e-5)
            continue
        # bitsandbytes divides in another order, so that a number half way between two codes may get the other one.
        step = weight.float().abs().amax(1, keepdim=True) / 127
        differ = (found.float() - expected.float()).abs() / step
        assert float(differ.max()) < 1.1 + 127 * torch.finfo(dtype).eps
        assert float((differ > 0.1).float().mean()) < (0.01 if steps == 1 else 0.15)
        left = [torch.linalg.matrix_norm(weight - q - b @ a) for q, a, b in ((found, own_A, own_B), (expected, A, B))]
        torch.testing.assert_close(*left, rtol=0.02, atol=0)


@given(st.data())
def test_the_scale_is_part_of_the_product(data):
    """At any scale the product is what it is at one; PEFT's is that only at one."""
    rows, columns = data.draw(st.integers(3, 40)), data.draw(st.integers(3, 40))
    rank, scale = data.draw(st.integers(1, min(rows, columns))), data.draw(st.floats(0.25, 8))
    options = LoftQConfig(data.draw(st.sampled_from([4, 8])), data.draw(st.integers(1, 3)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    W = torch.randn(rows, columns)
    A, B, stored = loftq_init(W, rank, scale, options)
    error = W - stored.dequantize()
    left = torch.linalg.matrix_norm(error - scale * B @ A)
    singular = torch.linalg.svdvals(error)
    torch.testing.assert_close(left, torch.linalg.vector_norm(singular[rank:]), rtol=1e-3, atol=1e-4)
    A_one, B_one, stored_one = loftq_init(W, rank, 1.0, LoftQConfig(options.loftq_bits))
    if options.loftq_iter == 1:
        torch.testing.assert_close(scale * B @ A, B_one @ A_one, rtol=1e-3, atol=1e-4)
        assert torch.equal(stored.dequantize(), stored_one.dequantize())


def test_more_steps_come_nearer():
    W = torch.randn(60, 70, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (1, 2, 5):
        A, B, stored = loftq_init(W, 16, 2.0, LoftQConfig(4, steps))
        errors.append(float(torch.linalg.matrix_norm(W - stored.dequantize() - 2.0 * B @ A)))
    plain = float(torch.linalg.matrix_norm(W - QuantizedTensor.quantize(W, TableScheme("nf4", 64)).dequantize()))
    assert plain > errors[0] > errors[1] > errors[2]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_the_base_in_few_bits(bits, steps, dtype, tmp_path):
    """The quantised program computes the float one's outputs, with the codes of bitsandbytes."""
    prog, x = program(bits, steps, dtype=dtype, lora_alpha=9), X.to(dtype)
    before, expected = dict(prog.state_dict), prog(x)
    small = adaptc.quantize(prog, BITS[bits])
    assert all(t is before[n] for n, t in prog.state_dict.items())
    assert torch.equal(prog(x), expected)
    # The float program has the values in its dtype, and the error is that of its rounding.
    assert max(r.error for r in small.quantize_report.weights) < torch.finfo(dtype).eps / 2
    for name in ("up.weight", "down.weight"):
        stored = small.state_dict[name]
        assert isinstance(stored, QuantizedTensor)
        assert torch.equal(stored.dequantize(), prog.state_dict[name])
    if bits == 4:
        weight = prog.state_dict["up.weight"].float()
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        count = weight.numel() // 2  # the half byte behind the last number means nothing
        assert torch.equal(small.state_dict["up.weight"].stored["codes"][:count], packed.flatten()[:count])
        if dtype == torch.float32:
            torch.testing.assert_close(small.state_dict["up.weight"].stored["scales"], state.absmax)
    # In bfloat16 layers round elsewhere: a weight's values in one, the results in the other.
    if dtype == torch.bfloat16:
        assert (small(x) - expected).float().norm() < 2e-2 * expected.float().norm()
    else:
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    plain = adaptc.quantize(adaptc.unload(prog), BITS[bits])
    assert not torch.allclose(small(x), plain(x), rtol=1e-3, atol=1e-4)
    # A file of the adapter keeps the base that it finds in few bits, and makes it where the weight is a float one.
    path = adaptc.save_adapter(small, tmp_path / "adapter")
    stored = json.loads((path / "adapter_config.json").read_text())
    assert stored["loftq_config"] == {"loftq_bits": bits, "loftq_iter": steps}
    found = small(x)
    adaptc.swap(small, path)
    assert torch.equal(small(x), found)
    again = adaptc.compile(Net(dtype), path, example_inputs=x)
    torch.testing.assert_close(again(x), expected)
    assert all(torch.equal(t, prog.state_dict[n]) for n, t in again.state_dict.items())
    loaded = adaptc.load(adaptc.save(small, tmp_path / "small.pt2"))
    assert torch.equal(loaded(x), found)
    assert torch.equal(adaptc.unload(prog)(x), adaptc.unload(again)(x))


@pytest.mark.long
def test_training_merging_and_a_bank_of_the_quantised_program(tmp_path):
    small = adaptc.quantize(adaptc.compile(Net(), config(lora_alpha=9), example_inputs=X, training=True), "nf4")
    module = small.module()
    module(X).square().sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert len(grads) == 4
    assert all(bool(g.any()) for g in grads.values())
    exact = adaptc.merge(small, dequantize=True)
    torch.testing.assert_close(exact(X), small(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(adaptc.unmerge(exact)(X), small(X))
    path = str(adaptc.save_adapter(small, tmp_path))
    rows = small.bank({"one": path})(X, adapters=["one", None, "one", None, "one"])
    torch.testing.assert_close(rows[::2], small(X)[::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[1::2], adaptc.unload(small)(X)[1::2], rtol=1e-5, atol=1e-5)


def test_dora_measures_the_quantised_base():
    """DoRA's first lengths are those of Q + s B A, so that a fresh adapter changes nothing more."""
    plain, dora = program(lora_alpha=9), program(lora_alpha=9, use_dora=True)
    torch.testing.assert_close(dora(X), plain(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adaptc.quantize(dora, "nf4")(X), plain(X), rtol=1e-5, atol=1e-5)


def test_some_weights_stay_as_they_are():
    prog = program()
    part = adaptc.quantize(prog, "nf4", exclude=["down"])
    assert torch.equal(part(X), prog(X))
    assert isinstance(part.state_dict["up.weight"], QuantizedTensor)
    assert [*part.originals] == ["down.weight"]
    assert torch.equal(adaptc.unload(part).state_dict["down.weight"], Net().down.weight)
    both = adaptc.quantize(part, "nf4", exclude=["up"])
    assert torch.equal(both(X), prog(X))


def test_a_quantised_weight_gets_its_adapter_from_the_float_model():
    """What PEFT's ``replace_lora_weights_loftq`` does for layers that are quantised already."""
    quantised = adaptc.quantize(Net(), "nf4")
    adapter = adaptc.subtract_adapter(Net(), quantised, rank=6)
    prog = adaptc.compile(quantised, adapter, example_inputs=X)
    for name, layer in (("up", quantised.up), ("down", quantised.down)):
        error = Net().get_parameter(f"{name}.weight") - layer.weight.dequantize()
        merged = adaptc.merge(prog, dequantize=True).state_dict[f"{name}.weight"]
        left = torch.linalg.matrix_norm(Net().get_parameter(f"{name}.weight") - merged)
        torch.testing.assert_close(
            left, torch.linalg.vector_norm(torch.linalg.svdvals(error)[6:]), rtol=1e-4, atol=1e-4
        )


def test_a_config_of_peft():
    theirs = peft.LoraConfig(target_modules=["up"])  # which asks for scipy with "loftq" as an argument
    theirs.init_lora_weights, theirs.loftq_config = "loftq", vars(peft.LoftQConfig(8, 2))
    prog = adaptc.compile(Net(), theirs, example_inputs=X)
    assert prog.binding.config.loftq_config == {"loftq_bits": 8, "loftq_iter": 2}
    for value in (peft.LoftQConfig(8, 2), adaptc.LoftQConfig(8, 2), {"loftq_bits": 8, "loftq_iter": 2}):
        assert LoraConfig(init_lora_weights="loftq", loftq_config=value).loftq_config == theirs.loftq_config
    with pytest.warns(AdaptcWarning, match="loftq_config=.* has no effect without init_lora_weights='loftq'"):
        assert LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}


def test_what_is_refused(tmp_path):
    for options, said in (
        ({"loftq_config": {}}, "needs its options"),
        ({"loftq_config": {"loftq_bits": 2}}, "loftq_bits=2 has no quantiser: there are 4 and 8 bits"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter must be a positive integer"),
        ({"loftq_config": {"bits": 4}}, "LoftQConfig has no field 'bits'"),
        ({"loftq_config": 4}, "loftq_config"),
        ({"loftq_config": {"loftq_bits": 4}, "alora_invocation_tokens": [3]}, "aLoRA"),
        ({"loftq_config": {"loftq_bits": 4}, "lora_bias": True}, "lora_bias"),
        ({"loftq_config": {"loftq_bits": 4}, "use_qalora": True}, "QA-LoRA"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoraConfig(init_lora_weights="loftq", **options)
    prog = program()
    with pytest.raises(ConfigError, match=r"error of nf4 in blocks of 64 at 'up.weight', and not for that of int8"):
        adaptc.quantize(prog, "int8")
    with pytest.raises(ConfigError, match="not for that of nf4 in blocks of 32"):
        adaptc.quantize(prog, "nf4", group_size=32)
    pissa = adaptc.compile(Net(), LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"), example_inputs=X)
    with pytest.raises(ConfigError, match=r"initialisation changed 'up.weight'.*unload"):
        adaptc.quantize(pissa, "nf4")
    assert isinstance(adaptc.quantize(pissa, "nf4", exclude=["up"]).state_dict["down.weight"], QuantizedTensor)
    with pytest.raises(ConfigError, match=r"'up.weight' is quantised already.*subtract_adapter"):
        adaptc.compile(adaptc.quantize(Net(), "nf4"), config(), example_inputs=X)
    conv = nn.Sequential(nn.Conv1d(39, 5, 3))
    with pytest.raises(ConfigError, match="loftq"):
        adaptc.compile(conv, config(target_modules=["0"]), example_inputs=torch.randn(2, 39, 9))
