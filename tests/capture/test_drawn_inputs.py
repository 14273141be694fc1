"""Models of several inputs, and denoisers: captured without example inputs, by one export, equal at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaptc.capture.capture import capture
from adaptc.errors import AdaptcWarning, CaptureError
from tests.support.other_models import MODELS, MultiInputModel

CACHES = {"past_key_values", "cache"}


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert set(expected) - set(found) <= CACHES
    for name in found:
        pairs = zip(pytree.tree_leaves(found[name]), pytree.tree_leaves(expected[name]), strict=True)
        for value, wanted in pairs:
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to torch.export.export."""
    calls: list[Any] = []
    real = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [name for name, other in MODELS.items() if other.cached_model])
@pytest.mark.parametrize("given", ["made", "given"])
def test_one_export_without_example_inputs(name: str, given: str, exports: list[Any]) -> None:
    other = MODELS[name]
    model = other.build()
    program = capture(model, None if given == "made" else other.inputs(3)).program
    assert len(exports) == 1
    run = program.module()
    for n in (1, 4) if given == "made" else (2,):
        inputs = other.inputs(n)
        with torch.no_grad():
            same(run(**inputs), model(**inputs))


@pytest.mark.slow
def test_a_known_limit_is_that_of_the_model() -> None:
    """Upsampling takes another way from 64 rows on, which a program must not do for fewer."""
    program = capture(MODELS["unet"].build(), training=True).program
    (batch,) = {str(v): v for v in program.range_constraints.values() if v.upper == 63}.values()
    assert batch.lower == 0
    height = next(n for n in program.graph.nodes if n.name == "sample").meta["val"].shape[2]
    assert str(height).startswith("2*")  # what it halves, it must be able to double
    steps = next(n for n in program.graph.nodes if n.name == "timestep").meta["val"]
    assert steps.ndim == 1  # one for each row


class Limited(nn.Module):
    """Another branch from nine rows on, and a free dimension that torch is to find out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if x.shape[0] >= 9 else x.sum(1, keepdim=True)


def test_a_limit_that_torch_finds_leaves_one_row_in_range(exports: list[Any]) -> None:
    program = capture(Limited(), torch.randn(3, 5)).program
    assert [int(v.lower) for v in program.range_constraints.values() if v.upper == 8] == [0]
    assert len(exports) == 2
    for rows in (1, 8):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program.module()(x), Limited()(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 5}, "encoder_hid_dim_type='image_proj'"),
    ],
)
def test_denoisers_that_take_more_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    model = MODELS["unet"].build()
    model.register_to_config(**change)
    with pytest.raises(CaptureError, match=f"UNet2DConditionModel with {said} are not known.*example_inputs"):
        capture(model)


def test_other_models_of_diffusers_ask_for_inputs() -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(CaptureError, match=r"AutoencoderKL are not known.*forward takes sample"):
        capture(model)


# -- what failures say -------------------------------------------------------------------------------------------------


def test_inputs_that_were_made_are_not_the_user_s_to_check() -> None:
    class Odd(type(MODELS["clip_vision"].build())):
        def forward(self, pixel_values: Tensor, boxes: Tensor | None = None, **more: Any) -> Any:
            return super().forward(pixel_values) if boxes.shape else None  # type: ignore[union-attr]

    model = Odd(MODELS["clip_vision"].build().config)
    with pytest.raises(CaptureError) as raised:
        capture(model)
    text = str(raised.value)
    assert "No example_inputs were given" in text
    assert "pixel_values float32[3, 3, 14, 14]" in text
    assert "forward takes pixel_values, boxes, more" in text
    assert "check example_inputs" not in text
    assert isinstance(raised.value.__cause__, AttributeError)
    with pytest.raises(CaptureError, match="check example_inputs"):
        capture(model, {"pixel_values": torch.ones(2, 3, 14, 14)})


def test_a_cache_among_the_inputs_is_named() -> None:
    """Of a class of its own: those of transformers are known to torch where somebody has registered them."""

    class DynamicCache:
        keys = torch.ones(3, 5)

    class Net(nn.Module):
        def forward(self, x: Tensor, *, past_key_values: Any) -> Tensor:
            return x + past_key_values.keys

    with pytest.raises(CaptureError, match=r"input 'past_key_values' is a DynamicCache, .*Leave it out.*exporters"):
        capture(Net(), {"x": torch.randn(3, 5), "past_key_values": DynamicCache()})


def test_an_object_among_the_inputs_is_named() -> None:
    class Sizes:
        factor = 3

    class Net(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Any]) -> Tensor:
            return x * more["sizes"].factor

    with pytest.raises(CaptureError, match=r"input \"?'?more\['sizes'\]'?\"? is a Sizes.*register_pytree_node"):
        capture(Net(), (torch.randn(3, 5), {"sizes": Sizes()}))


@pytest.mark.slow
def test_a_dual_encoder_has_no_loss_and_says_how_to_have_one() -> None:
    other: MultiInputModel = MODELS["clip"]
    model = other.build()
    with pytest.warns(AdaptcWarning, match="return_loss=True"):
        captured = capture(model, training=True)
    assert captured.training
    both = {**other.inputs(3), "pixel_values": other.inputs(2)["pixel_values"]}
    with pytest.warns(AdaptcWarning, match="fixed at 3"):  # its labels are made for one number of rows
        program = capture(model, {**both, "return_loss": True}, training=True).program
    torch.testing.assert_close(
        program.module()(**both, return_loss=True).loss, model.train()(**both, return_loss=True).loss
    )
