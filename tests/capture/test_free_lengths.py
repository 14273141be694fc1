"""Models that loop over positions or over chunks are captured for any length, and compute what PEFT computes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from adaptc.capture.replacements.free_lengths import any_length
from adaptc.capture.replacements.parallel_scan import linear_recurrence
from tests.coverage.build import build as build_row
from tests.coverage.configs.tiny_configs import tiny_config
from tests.coverage.rows import Row
from tests.support.families import perturb
from tests.support.oracle import (
    assert_differs,
    assert_same,
    assert_same_gradients,
    gradients,
    lora_twins,
    masked_texts,
)

#: family -> the names of its class, and of the layers that PEFT adapts
FAMILIES = {
    "mamba": ("MambaForCausalLM", ["in_proj", "x_proj"]),
    "falcon_mamba": ("FalconMambaForCausalLM", ["in_proj", "x_proj"]),
    "jamba": ("JambaForCausalLM", ["in_proj", "x_proj", "v_proj"]),
    "zamba": ("ZambaForCausalLM", ["in_proj", "out_proj"]),
    "mamba2": ("Mamba2ForCausalLM", ["in_proj"]),
    "bamba": ("BambaForCausalLM", ["in_proj", "v_proj"]),
    "nemotron_h": ("NemotronHForCausalLM", ["in_proj", "v_proj"]),
    "zamba2": ("Zamba2ForCausalLM", ["out_proj"]),
    "rwkv": ("RwkvForCausalLM", ["key", "value", "receptance"]),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", ["linear_x", "linear_out", "v_proj"]),
}


def build(family: str) -> Any:
    model_class = getattr(transformers, FAMILIES[family][0])
    config = tiny_config(family, model_class)
    config.mamba_chunk_size = 8  # where there is one: that of other names is small in a tiny config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float()
    perturb(model)
    return model.eval()


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts_for_other_lengths(family: str) -> None:
    module, theirs = lora_twins(lambda: build(family), r=3, target_modules=FAMILIES[family][1])
    for batch, length in ((3, 5), (2, 19)):
        inputs = masked_texts(batch, length)
        ours, want = module(**inputs), theirs(**inputs, use_cache=False)
        assert_same(ours.logits, want.logits)
        assert_same_gradients(gradients(module, ours.logits), gradients(theirs, want.logits))
        with theirs.disable_adapter():
            assert_differs(want.logits, theirs(**inputs, use_cache=False).logits, 1e-3)


def lengthwise(length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(length)
    decay = torch.rand(2, length, 3, generator=draw, dtype=torch.float64)
    decay[0, length // 2] = 0  # what was before has no influence, and a quotient of products would not be a number
    return {"decay": decay, "added": torch.randn(2, length, 3, generator=draw, dtype=torch.float64)}


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 131, 1031])
def test_a_recurrence_is_that_of_a_loop_with_its_gradients(length: int) -> None:
    ours, theirs = ({n: t.requires_grad_() for n, t in lengthwise(length).items()} for _ in range(2))
    found = linear_recurrence(ours["decay"], ours["added"])
    state, states = torch.zeros(2, 3, dtype=torch.float64), list[Tensor]()
    for decay, added in zip(theirs["decay"].unbind(1), theirs["added"].unbind(1), strict=True):
        state = decay * state + added
        states.append(state)
    want = torch.stack(states, 1)
    weights = torch.linspace(-1, 2, want.numel(), dtype=torch.float64).view_as(want)
    got, expected = (
        torch.autograd.grad((o * weights).sum(), list(t.values())) for o, t in ((found, ours), (want, theirs))
    )
    for a, b in zip((found, *got), (want, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.detach().abs().max() + 1))


#: changes of what a function gives
CHANGES: dict[str, Callable[[Any], Any]] = {
    "another number": lambda out: out * 1.001,
    "another dtype": lambda out: out.float(),
    "another shape": lambda out: out[:, :-1],
    "what comes later": lambda out: out + out.flip(1),
}


@pytest.mark.parametrize(
    ("family", "name", "change"),
    [
        ("mamba", "mamba_selective_scan", "another number"),
        ("mamba", "mamba_selective_scan", "another dtype"),
        # Whatever a function of chunks gives, it is asked itself. It must only not look ahead.
        ("mamba2", "mamba2_chunk_scan", "what comes later"),
        ("rwkv", "rwkv_linear_attention", "another number"),
        ("rwkv", "rwkv_linear_attention", "another shape"),
        ("recurrent_gemma", "_rnn_scan", "another number"),
        ("funnel", "_relative_shift_gather", "another number"),
        ("funnel", "upsample", "another shape"),
    ],
)
def test_a_function_that_gives_something_else_stays(
    family: str, name: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    owner = getattr(module, "RecurrentGemmaRglru", module)
    original = vars(owner)[name]
    model = build(family) if family in FAMILIES else build_row(Row("funnel", "MASKED_LM", "FunnelForMaskedLM"))
    with any_length(model):
        assert vars(owner)[name] is not original
    assert vars(owner)[name] is original

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = inspect.unwrap(original)(*args, **kwargs)
        return (CHANGES[change](out[0]), out[1]) if isinstance(out, tuple) else CHANGES[change](out)

    changed.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, name, changed)
    with any_length(model):
        assert vars(owner)[name] is changed


@pytest.mark.long
def test_a_model_with_another_scan_is_captured_for_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    original = module.mamba_selective_scan
    monkeypatch.setattr(module, "mamba_selective_scan", lambda *a, **k: 0.5 * inspect.unwrap(original)(*a, **k))
    model = build("mamba")
    config = adaptc.LoraConfig(r=3, target_modules=["in_proj"], init_lora_weights=True)
    with pytest.warns(adaptc.AdaptcWarning, match="captured for some sizes alone: dimension 1"):
        program = adaptc.compile(model, config)
    inputs = masked_texts(2, 7)
    assert_same(program(**inputs).logits, model(**inputs, use_cache=False).logits)


@pytest.mark.long
@pytest.mark.parametrize("family", ["longformer", "led"])
def test_a_model_of_windows_is_pefts_for_any_number_of_them(family: str) -> None:
    """LED pads what it has embedded already."""
    classes: dict[str, Any] = {
        "longformer": transformers.LongformerForMaskedLM,
        "led": transformers.LEDForConditionalGeneration,
    }
    model_class = classes[family]

    def build_windows() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(tiny_config(family, model_class)).float()
        perturb(model)
        return model.eval()

    with pytest.warns(adaptc.AdaptcWarning, match="captured for those of the example inputs alone"):
        module, theirs = lora_twins(build_windows, r=3, target_modules=["query", "value"])
    # Windows of 8: less than one, some and a part, two that are whole, and many.
    for batch, length in ((3, 5), (2, 11), (3, 16), (2, 43)):
        inputs = masked_texts(batch, length)
        if family == "led":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
        ours, want = module(**inputs).logits, theirs(**inputs).logits
        assert_same(ours, want)
        assert_same_gradients(gradients(module, ours), gradients(theirs, want))
        with theirs.disable_adapter():
            assert_differs(want, theirs(**inputs).logits)
