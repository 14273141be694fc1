"""Images are cut into tiles, and tiles packed as tokens, as LLaVA-NeXT and models after it do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaNextConfig
from transformers.models.llava_next import modeling_llava_next as llava_next
from transformers.models.llava_onevision import modeling_llava_onevision as onevision

from adaptc.capture.vision.image_tiles import Tiling, unpadded_areas

SIZE, SIDE, WIDTH = 14, 2, 3
RESOLUTIONS = ((28, 28), (14, 28), (28, 14), (14, 42), (42, 14), (70, 42), (42, 84))
SIZES = st.lists(st.tuples(st.integers(1, 160), st.integers(1, 160)), min_size=1, max_size=4).map(torch.tensor)


class Holder:
    """What the method that packs reads of its module."""

    config: Any = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": SIZE // SIDE},
        image_grid_pinpoints=[list(r) for r in RESOLUTIONS],
    )


def packed(tiles: list[Tensor], sizes: Tensor, newline: Tensor | None, most: int | None) -> Tensor:
    """Return what transformers makes of each image's features, in one tensor."""
    if most is None:
        method: Any = llava_next.LlavaNextModel.pack_image_features
        return torch.cat(method(Holder(), tiles, sizes, "default", image_newline=newline)[0])
    method = onevision.LlavaOnevisionModel.pack_image_features
    return torch.cat(method(Holder(), tiles, sizes, newline, f"anyres_max_{most}")[0])


@given(SIZES)
def test_numbers_of_tiles(sizes: Tensor) -> None:
    wanted = [llava_next.image_size_to_num_patches(s, [list(r) for r in RESOLUTIONS], SIZE) for s in sizes]
    assert Tiling(RESOLUTIONS, SIZE, SIDE).count_tiles(sizes).tolist() == wanted


def test_padding_of_all_small_images() -> None:
    """A product of sizes may come out a bit below the whole number that it stands for."""
    sizes = torch.cartesian_prod(torch.arange(1, 70), torch.arange(1, 70))
    fields = torch.tensor([70, 42]).expand(len(sizes), 2)
    areas, field = unpadded_areas(sizes, fields), torch.arange(70 * 42).view(1, 70, 42)
    for i, size in enumerate(sizes.tolist()):
        left = llava_next.unpad_image(field, size)
        assert left.shape[1:] == (areas.height[i], areas.width[i])
        if left.numel():
            assert left[0, 0, 0] == 42 * areas.top[i] + areas.left[i]


@pytest.mark.parametrize("most", [None, 1, 4, 9])
@pytest.mark.parametrize("has_newline", [True, False])
@given(SIZES, st.data())
def test_tokens(most: int | None, has_newline: bool, sizes: Tensor, data: st.DataObject) -> None:
    tiling, draw = Tiling(RESOLUTIONS, SIZE, SIDE, most), torch.Generator().manual_seed(len(sizes))
    counts = [n if data.draw(st.booleans()) else 1 for n in tiling.count_tiles(sizes).tolist()]
    tiles = [torch.randn(n, SIDE**2, WIDTH, generator=draw) for n in counts]
    newline = torch.randn(WIDTH, generator=draw) if has_newline else None
    try:
        wanted = packed(tiles, sizes, newline, most)
    except RuntimeError:  # torch scales no field down to nothing
        return
    found = tiling.pack(torch.cat(tiles), sizes, torch.tensor(counts), newline)
    if most is None:
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


@given(SIZES)
def test_gradients_reach_features_and_the_new_line(sizes: Tensor) -> None:
    tiling, draw = Tiling(RESOLUTIONS, SIZE, SIDE, 4), torch.Generator().manual_seed(1)
    counts = tiling.count_tiles(sizes)
    features = torch.randn(int(counts.sum()), SIDE**2, WIDTH, generator=draw)
    newline = torch.randn(WIDTH, generator=draw)
    grads = []
    for joined in (False, True):
        inputs = [features.clone().requires_grad_(), newline.clone().requires_grad_()]
        try:
            if joined:
                tokens = tiling.pack(inputs[0], sizes, counts, inputs[1])
            else:
                tokens = packed([*inputs[0].split(counts.tolist())], sizes, inputs[1], 4)
        except RuntimeError:
            return
        weights = torch.arange(1.0, tokens.numel() + 1).view_as(tokens).sin()
        grads.append(torch.autograd.grad((tokens * weights).sum(), inputs))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
