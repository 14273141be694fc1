"""Models that take ``len`` of a tensor, make a tensor of a size, convert a module to its dtype, or rescale their
weights once, are captured."""

from __future__ import annotations

import builtins
import sys
import threading
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adaptc
from adaptc.capture.replacements.traceable_calls import free_tensor_lengths, kept_modules, unscaled_layers
from tests.coverage.configs.tiny_configs import tiny_config
from tests.support.families import perturb
from tests.support.oracle import assert_differs, assert_same, file_key_of, quiet, randomize


class Tiles(nn.Module):
    """Repeats rows as often as the batch is long, and keeps its head in a dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head, self.query = nn.Linear(7, 5), nn.Linear(5, 3), nn.Parameter(torch.randn(1, 5))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        self.head = self.head.to(self.dtype)
        names = ["of", "lists"]
        y = self.linear(x) + self.query.tile([len(x), 1]).unsqueeze(1) * len(names)
        return self.head(y.to(self.dtype))


class Long(Tensor):
    """A tensor that says another length than its shape does."""

    def __len__(self) -> int:
        return 99


def length_of(value: Any) -> int:
    return len(value)


def test_the_batch_stays_free() -> None:
    model = Tiles().eval()
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=torch.randn(3, 4, 7))
    for rows in (2, 3, 5):
        x = torch.randn(rows, 4, 7)
        torch.testing.assert_close(program.base(x), model(x))
    assert "to" not in vars(model.head)


class Counts(nn.Module):
    """Adds its input's length, as tensors of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.as_tensor(x.shape[1], device=x.device)
        assert count.dtype == torch.int64
        return self.linear(x) + count + torch.tensor(x.shape[1], dtype=torch.float64).float() / 3


def test_a_size_that_becomes_a_tensor_stays_free() -> None:
    model = Counts().eval()
    config = adaptc.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=torch.randn(3, 4, 7))
    for length in (2, 4, 9):
        x = torch.randn(3, length, 7)
        torch.testing.assert_close(program.base(x), model(x), rtol=0, atol=0)


def test_a_conversion_that_changes_a_module_is_refused() -> None:
    config = adaptc.LoraConfig(r=2, target_modules=["linear"])
    with pytest.raises(adaptc.CaptureError, match="could not be captured"):
        adaptc.compile(Tiles(torch.float64), config, example_inputs=torch.randn(3, 4, 7))


def test_conversions_are_torchs_but_for_the_dtype_that_a_module_has() -> None:
    model = Tiles()
    with kept_modules(model):
        assert model.head.to(torch.float32) is model.head
        assert model.head.to(torch.float64).weight.dtype == torch.float64
        assert model.head.to(dtype=torch.float64, device="cpu").weight.dtype == torch.float64
        with pytest.raises(TypeError, match="floating point"):
            model.head.to(torch.int32)


def test_other_threads_and_what_comes_after_are_untouched() -> None:
    x, seen = torch.randn(3, 4, 7).as_subclass(Long), list[Any]()
    own = vars(sys.modules[__name__])
    with free_tensor_lengths(Tiles()):
        assert own["len"] is not builtins.len
        assert length_of("abcd") == 4
        assert length_of(x) == 3
        with pytest.raises(TypeError, match="0-d"):
            length_of(torch.tensor(1))
        thread = threading.Thread(target=lambda: seen.append(length_of(x)))
        thread.start()
        thread.join()
    assert seen == [99]
    assert "len" not in own


def rescaled_rwkv() -> Any:
    """Return a model that divides weights of its second block by two in its first call."""
    model_class = transformers.RwkvForCausalLM
    config = tiny_config("rwkv", model_class)
    config.rescale_every = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).float()
    perturb(model)
    return model.eval()


@pytest.mark.long
@pytest.mark.parametrize("ran_before", [False, True])
def test_calls_rescale_no_weights(ran_before: bool) -> None:
    inputs = {"input_ids": torch.arange(4, 14).view(2, 5)}
    targets = ["key", "receptance"]
    with quiet():
        theirs = peft.get_peft_model(rescaled_rwkv(), peft.LoraConfig(r=3, target_modules=targets)).eval()
    randomize(theirs)
    model = rescaled_rwkv()
    if ran_before:
        model(**inputs)
    program = adaptc.compile(model, adaptc.LoraConfig(r=3, target_modules=targets))
    module = program.module()
    values = {file_key_of(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[file_key_of(name)])
    for _ in range(3):
        want = theirs(**inputs, use_cache=False).logits
        assert_same(module(**inputs).logits, want, 3e-5)  # a norm's epsilon does not scale
    with theirs.disable_adapter():
        assert_differs(want, theirs(**inputs, use_cache=False).logits)


def test_another_method_of_that_name_stays() -> None:
    class Other(nn.Module):
        def _rescale_layers(self) -> None:
            self.layers_are_rescaled = True

    with unscaled_layers(rescaled_rwkv()):
        assert transformers.RwkvModel._rescale_layers.__wrapped__ is not None  # type: ignore[attr-defined]
    original = Other._rescale_layers
    with unscaled_layers(Other()):
        assert Other._rescale_layers is original
