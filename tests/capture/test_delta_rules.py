"""Models of the gated delta rule are captured for texts of any number of chunks, and compute what PEFT computes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from adaptc.capture.replacements.free_lengths import any_length
from tests.coverage.configs.tiny_configs import tiny_config
from tests.support.families import perturb
from tests.support.oracle import assert_differs, gradients, lora_twins, masked_texts

#: family -> its class and file, the names of its rule by chunks and by positions, and the layers that PEFT adapts
FAMILIES = {
    "qwen3_5_text": (
        "Qwen3_5ForCausalLM",
        "qwen3_5",
        ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        ["in_proj_qkv", "in_proj_b", "v_proj"],
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "kimi_linear",
        ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
        ["v_proj", "o_proj", "g_b_proj"],
    ),
}


def build(family: str) -> Any:
    model_class = getattr(transformers, FAMILIES[family][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(tiny_config(family, model_class)).float()
    perturb(model)
    return model.eval()


def file_of(family: str) -> Any:
    name = FAMILIES[family][1]
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.detach().abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts_for_any_number_of_chunks(family: str) -> None:
    module, theirs = lora_twins(lambda: build(family), r=3, target_modules=FAMILIES[family][3])
    for batch, length in ((3, 5), (2, 63), (3, 65), (2, 131)):
        inputs = masked_texts(batch, length)
        ours, want = module(**inputs), theirs(**inputs, use_cache=False)
        # The model's own rounding: its functions compute in float32, chunk by chunk.
        assert_close(ours.logits, want.logits, 2e-5)
        found, expected = gradients(module, ours.logits), gradients(theirs, want.logits)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, 1e-4)
        with theirs.disable_adapter():
            assert_differs(want.logits, theirs(**inputs, use_cache=False).logits, 1e-3)


def draw_call(family: str, length: int) -> dict[str, Any]:
    """Return a call of a family's rule, with heads of values that share those of keys where the rule allows it."""
    draw = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(3, length, *shape, generator=draw)

    by_channel = family == "kimi_linear"
    heads = 6 if by_channel else 2
    decay = -F.softplus(5 * random(6, *[7] * by_channel))  # some so strong that nothing is left
    call = {"query": random(heads, 7), "key": random(heads, 7), "value": random(6, 5), "g": decay}
    return {**call, "beta": random(6).sigmoid(), "use_qk_l2norm_in_kernel": True}


@pytest.mark.parametrize("length", [1, 2, 64, 67, 131, 523])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_is_that_of_a_loop_over_positions_with_its_gradients(family: str, length: int) -> None:
    by_chunks, by_positions = FAMILIES[family][2]
    loop = inspect.unwrap(getattr(file_of(family), by_positions))
    with any_length(build(family)):
        ours = getattr(file_of(family), by_chunks)
        results = []
        for function, state in ((ours, {}), (loop, {"initial_state": None, "output_final_state": False})):
            call = draw_call(family, length)
            leaves = [t.requires_grad_() for t in call.values() if isinstance(t, Tensor)]
            out = function(**call, **state)[0]
            weights = torch.linspace(-1, 2, out.numel()).view_as(out)
            results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_with_states_is_that_of_the_function(family: str) -> None:
    name = FAMILIES[family][2][0]
    original = inspect.unwrap(getattr(file_of(family), name))
    call = draw_call(family, 67)
    state = torch.linspace(-1, 1, 3 * 6 * 7 * 5).view(3, 6, 7, 5)
    with any_length(build(family)):
        ours = getattr(file_of(family), name)
        for given, error in (({"initial_state": state}, 0.0), ({"output_final_state": True}, 3e-5)):
            for got, want in zip(ours(**call, **given), original(**call, **given), strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    assert_close(got, want, error)


#: changes of what a function gives
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another number": lambda out: out * 1.001,
    "another dtype": lambda out: out.double(),
    "another chunk": lambda out: torch.cat([out[:, :64], 1.001 * out[:, 64:]], 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_that_gives_something_else_stays(family: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name = file_of(family), FAMILIES[family][2][0]
    original, model = getattr(file, name), build(family)
    with any_length(model):
        assert getattr(file, name) is not original
    assert getattr(file, name) is original

    def changed(*args: Any, **kwargs: Any) -> Any:
        out, state = inspect.unwrap(original)(*args, **kwargs)
        return CHANGES[change](out), state

    changed.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(file, name, changed)
    with any_length(model):
        assert getattr(file, name) is changed
