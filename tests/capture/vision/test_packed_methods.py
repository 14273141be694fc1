"""Methods that loop over images are replaced where the replacement gives the same, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.capture.vision.methods.class_tokens import equal_class_token_forward
from adaptc.capture.vision.methods.image_codes import find_codes
from adaptc.capture.vision.methods.packed_methods import equal_packed_forward, equal_unshuffle
from adaptc.capture.vision.methods.padded_towers import equal_padded_forward
from adaptc.capture.vision.methods.tiled_features import equal_packing
from adaptc.capture.vision.tower_facts import find_towers
from tests.support.sized_images import call_with_images, model_of

Method = Callable[..., Any]
#: name -> family, path of the module, name of its method, what finds a replacement
METHODS: dict[str, tuple[str, str, str, Callable[[Any, Method], Method | None]]] = {
    "merger": ("mistral3", "multi_modal_projector.patch_merger", "forward", equal_packed_forward),
    "projector": ("paddleocr_vl", "projector", "forward", equal_packed_forward),
    "convolution": ("lfm3_vl", "vision_tower.layers.0.conv", "forward", equal_packed_forward),
    "unshuffle": ("video_llama_3", "vision_model", "pixel_unshuffle", equal_unshuffle),
    "tower": ("mistral3", "vision_tower", "forward", equal_padded_forward),
    "tower with class tokens": ("llava_onevision1_5", "visual", "forward", equal_class_token_forward),
    "packing": ("llava_next", "", "pack_image_features", equal_packing),
    "packing that scales down": ("llava_onevision", "", "pack_image_features", equal_packing),
}


def _changed(value: Any) -> Any:
    """Return what a method gives, with its first tensor's last row a bit larger."""
    if isinstance(value, Tensor):
        rows = torch.zeros_like(value)
        rows[-1] = 1e-3
        return value + rows
    if isinstance(value, (tuple, list)):
        return type(value)([_changed(value[0]), *value[1:]])
    value.last_hidden_state = _changed(value.last_hidden_state)
    return value


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_gives_something_else_stays(name: str) -> None:
    family, path, method, find = METHODS[name]
    module: Any = model_of(family).model.get_submodule(path)
    original = getattr(module, method)
    assert find(module, original) is not None

    @functools.wraps(original)
    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _changed(original(*args, **kwargs))

    assert find(module, MethodType(planted, module)) is None


def test_another_number_of_tiles_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llava_next import modeling_llava_next

    model, original = model_of("llava_next").model, modeling_llava_next.image_size_to_num_patches
    monkeypatch.setattr(
        modeling_llava_next, "image_size_to_num_patches", lambda size, *rest: original(size, *rest) + int(size[0] > 99)
    )
    assert equal_packing(model, model.pack_image_features) is None


def test_codes_that_are_mapped_in_another_way_stay() -> None:
    model = model_of("emu3").model
    assert find_codes(model) is not None
    original = model.vocabulary_mapping.convert_img2bpe
    model.vocabulary_mapping.convert_img2bpe = lambda codes: original(codes).flip(0)
    assert find_codes(model) is None


@pytest.mark.parametrize("name", ["get_vision_frame_index", "get_vision_temporal_merge_index"])
def test_helpers_that_give_something_else_are_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.kimi_k25 import modeling_kimi_k25

    model, original = model_of("kimi_k25"), getattr(modeling_kimi_k25, name)
    found = {n for names in find_towers(model).values() for n in names}
    assert {"frame_index", "temporal_merge_index"} <= found

    def planted(grid: Tensor, *sides: int, kwargs: Any = None) -> Any:
        made = original(grid, *sides, kwargs=kwargs)
        return made.flip(0) if isinstance(made, Tensor) else (made[0].flip(0), *made[1:])

    monkeypatch.setattr(modeling_kimi_k25, name, planted)
    left = {n for names in find_towers(model).values() for n in names}
    assert found - left == {name.removeprefix("get_vision_")}


@pytest.mark.long
def test_a_model_with_such_a_method_is_captured_for_its_example() -> None:
    model, call = model_of("mistral3"), call_with_images("mistral3", [[(2, 3)], [(3, 2)]])
    merger = model.model.multi_modal_projector.patch_merger
    original = merger.forward

    def planted(image_features: Tensor, image_sizes: Tensor) -> Tensor:
        return original(image_features, image_sizes) * 2

    merger.forward = planted
    config = adaptc.LoraConfig(r=2, target_modules="all-linear")
    with (
        pytest.warns(adaptc.AdaptcWarning, match="captured for those of the example inputs alone"),
        pytest.warns(adaptc.AdaptcWarning, match="captured for some sizes alone"),
    ):
        program = adaptc.compile(model, config, example_inputs=call)
    with torch.no_grad():
        torch.testing.assert_close(program.base(**call).logits, model(**call).logits, rtol=1e-4, atol=1e-4)
