"""First values through compile: the program starts as the base, whatever moves into the adapter, and gives it back."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import LoraConfig
from adaptc.errors import ConfigError
from tests.support.custom_models import Attention, FunctionalHead, Mixture, Net, Shared, Tied
from tests.support.oracle import assert_differs, quiet
from tests.support.site_cases import ids
from tests.support.site_checks import adapter_parameters, assert_close, assert_valid

SCHEMES = [True, "gaussian", "orthogonal", "pissa", "PiSSA_niter_5", "olora"]
CHANGING = [s for s in SCHEMES if str(s).lower().startswith(("pissa", "olora"))]


class Both(nn.Module):
    """A linear layer and one of transformers' transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 13), Conv1D(11, 13)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def both(dtype=torch.float64):
    torch.manual_seed(6)
    return Both().to(dtype).eval()


def config(scheme, **more):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": scheme, **more}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_program_starts_as_the_base(scheme, tmp_path):
    model, x = both(), torch.randn(5, 7, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    program = adaptc.compile(model, LoraConfig(**config(scheme)), example_inputs=torch.randn(3, 7).double())
    assert_valid(program)
    # The orthogonal scheme draws float32 numbers, orthogonal to that precision.
    tolerance = 1e-7 if scheme == "orthogonal" else 1e-10
    assert_close(program(x), model(x), tolerance)
    slots = adapter_parameters(program)
    assert scheme in (True, "gaussian") or all(bool(t.abs().max() > 0) for t in slots.values())
    assert all(t.requires_grad for t in slots.values())
    merged = adaptc.merge(program)
    assert_close(merged(x), model(x), tolerance)
    unloaded = adaptc.unload(program)
    assert_valid(unloaded)
    assert all(torch.equal(unloaded.state_dict[k], v) for k, v in state.items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    for p in slots.values():
        p.data.add_(torch.randn_like(p))
    assert_differs(program(x), model(x), at_least=0.1)
    assert_close(program.module()(x), program(x))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_close(loaded(x), program(x))


@pytest.mark.few(2)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "niter" not in str(s)])
def test_trained_files_both_ways(scheme, tmp_path):
    """A file of PiSSA or OLoRA is relative to a base that both sides must derive from the same weights."""
    x = torch.randn(5, 7)
    # PEFT's OLoRA takes the transposed weight of a Conv1D for a plain one, and makes factors that do not fit.
    options = config(scheme, target_modules=["first"]) if scheme == "olora" else config(scheme)
    with quiet("fan_in_fan_out.*"):
        wrapped = peft.get_peft_model(both(torch.float32), peft.LoraConfig(**options)).eval()
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        wrapped.save_pretrained(str(tmp_path / "a"))
        model = both(torch.float32)
        program = adaptc.compile(model, tmp_path / "a", example_inputs=torch.randn(3, 7))
        assert_close(program(x), wrapped(x), 2e-5)
        adaptc.save_adapter(program, tmp_path / "b")
        again = peft.PeftModel.from_pretrained(both(torch.float32), str(tmp_path / "b")).eval()
    assert_close(again(x), wrapped(x), 2e-5)
    plain = adaptc.compile(model, LoraConfig(**config(True, r=7)), example_inputs=x[:3])
    adaptc.swap(plain, tmp_path / "a")
    assert_valid(plain)
    assert_close(plain(x), wrapped(x), 2e-5)
    assert torch.equal(adaptc.unload(plain)(x), model(x))


@pytest.mark.long
@pytest.mark.parametrize("scheme", CHANGING)
@pytest.mark.parametrize(
    ("build", "target", "inputs"),
    [
        (Tied, "head", ids(5, 29)(3)),
        (Shared, "second", torch.randn(3, 7)),
        (FunctionalHead, "mid", None),
    ],
    ids=["tied", "shared", "apart"],
)
def test_a_base_weight_that_others_read_is_not_changed(scheme, build, target, inputs):
    model = build().eval()
    options = LoraConfig(**config(scheme, target_modules=[target]))
    if inputs is None:
        program = adaptc.compile(model, options, example_inputs=ids(5, 29)(3))
        x = ids(5, 29)(2)[0]
        assert_close(program(x), model(x), 1e-4)
        return
    with pytest.raises(ConfigError, match=r"other layers read|embedding"):
        adaptc.compile(model, options, example_inputs=inputs)


@pytest.mark.parametrize("scheme", CHANGING)
def test_attention_and_experts(scheme):
    torch.manual_seed(8)
    model, x = Attention().double().eval(), torch.randn(3, 5, 15).double()
    program = adaptc.compile(
        model, LoraConfig(**config(scheme, target_modules=["self_attn"])), example_inputs=x.clone()
    )
    assert_close(program(x), model(x), 1e-9)
    with pytest.raises(ConfigError, match="one weight matrix"):
        adaptc.compile(
            Mixture(False).eval(),
            LoraConfig(**config(scheme, target_modules=[], target_parameters=["experts.up"])),
            example_inputs=torch.randn(3, 7),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", CHANGING)
def test_half_precision_loses_no_more_than_a_rounding(scheme, dtype):
    model, x = both(dtype), torch.randn(5, 7).to(dtype)
    program = adaptc.compile(model, LoraConfig(**config(scheme)), example_inputs=torch.randn(3, 7).to(dtype))
    torch.testing.assert_close(program(x), model(x), rtol=0.05, atol=0.05)
    assert torch.equal(adaptc.unload(program)(x), model(x))


@pytest.mark.long
def test_schemes_that_draw_take_a_generator():
    def slots(seed):
        program = adaptc.compile(
            Net().eval(),
            LoraConfig(target_modules=["up"], r=3),
            example_inputs=ids(5, 29)(3),
            generator=torch.Generator().manual_seed(seed),
        )
        return adapter_parameters(program)["up.lora_A.weight"]

    state = torch.random.get_rng_state()
    first = slots(1)
    torch.random.set_rng_state(state)
    assert torch.equal(first, slots(1))
    assert not torch.equal(first, slots(2))
