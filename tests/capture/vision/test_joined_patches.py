"""Patches that UDOP joins to texts are sorted for all rows at once, where that gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.udop.modeling_udop as udop
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptc.capture.vision.methods.joined_patches import joins_patches_at_once


class Joins(nn.Module):
    """A module of UDOP's file, for the search of functions."""

    __module__ = udop.__name__

    def forward(self, **call: Any) -> Any:
        return udop.combine_image_text_embeddings(**call)


def call(rows: int, length: int, side: int, seed: int, most: int, has_mask: bool) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    # A grid of boxes, so that tokens share patches, and boxes of zeros and ones.
    boxes = torch.randint(0, 5, (rows, length, 4), generator=draw) / 4
    boxes[0, 0] = float(seed % 2)
    mask = torch.randint(0, 2, (rows, length), generator=draw)
    return {
        "image_embeddings": torch.randn(rows, side * side, 7, generator=draw),
        "inputs_embeds": torch.randn(rows, length, 7, generator=draw),
        "bbox": boxes,
        "visual_bbox": torch.rand(rows, side * side, 4, generator=draw),
        "attention_mask": mask if has_mask else None,
        "num_patches": side,
        "max_len": most and length + most,
    }


def run(inputs: dict[str, Any]) -> Any:
    return Joins()(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    side=st.integers(1, 4),
    seed=st.integers(0, 99),
    most=st.integers(0, 20),
    has_mask=st.booleans(),
)
def test_all_rows_at_once(rows: int, length: int, side: int, seed: int, most: int, has_mask: bool) -> None:
    inputs = call(rows, length, side, seed, most, has_mask)
    expected, own = run(inputs), udop.combine_image_text_embeddings
    with joins_patches_at_once(Joins()):
        assert udop.combine_image_text_embeddings is not own
        found = run(inputs)
    assert udop.combine_image_text_embeddings is own
    assert (found[2] is None) == (not has_mask)
    for got, want in zip(found, expected, strict=True):
        assert want is None or (got.dtype == want.dtype and torch.equal(got, want))


def test_another_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = udop.combine_image_text_embeddings

    def combine_image_text_embeddings(
        image_embeddings: Any, inputs_embeds: Any, bbox: Any, visual_bbox: Any, attention_mask: Any = None,
        num_patches: int = 14, max_len: int = 0, image_size: int = 224, patch_size: int = 16,
    ) -> Any:  # fmt: skip
        embeds, *others = own(
            image_embeddings, inputs_embeds, bbox, visual_bbox, attention_mask, num_patches, max_len, image_size,
            patch_size,
        )  # fmt: skip
        return embeds * 1.01, *others

    combine_image_text_embeddings.__module__ = udop.__name__
    monkeypatch.setattr(udop, "combine_image_text_embeddings", combine_image_text_embeddings)
    with joins_patches_at_once(Joins()):
        assert udop.combine_image_text_embeddings is combine_image_text_embeddings
