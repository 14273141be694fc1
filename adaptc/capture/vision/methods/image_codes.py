"""Replace what Emu3 does with the codes of each image, where the replacement is found to be equal.

A quantiser gives codes (images, height, width) of padded images. The model cuts the codes of each image to its size. It
maps them to tokens, with one for a new line after each row. Here all codes are mapped at once, and those that are no
padding are found by index.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from adaptc.capture.model_functions import gives_the_same
from adaptc.capture.vision.packed_patches import true_indices

_TRIALS = 8


def find_codes(module: Any) -> CutCodes | None:
    """Return what replaces methods of ``module``'s quantiser and of its mapping, or None where that is not known."""
    quantizer, mapping = getattr(module, "vqmodel", None), getattr(module, "vocabulary_mapping", None)
    encode = getattr(quantizer, "encode", None)
    if encode is None or not hasattr(quantizer, "vision_spatial_factor") or not hasattr(mapping, "convert_img2bpe"):
        return None
    if list(inspect.signature(encode).parameters)[:2] != ["pixel_values", "image_sizes"]:
        return None
    codes = CutCodes(quantizer, mapping)
    return codes if codes.gives_the_same() else None


class CutCodes:
    """The two methods that replace those of ``quantizer`` and of ``mapping``, where the first has been called before.

    ``encode`` gives the codes of all images in one tensor (images * height, width). ``to_tokens`` maps them.
    """

    def __init__(self, quantizer: Any, mapping: Any) -> None:
        self.quantizer, self.mapping = quantizer, mapping
        self._factor: int = quantizer.vision_spatial_factor
        self._original, self._mapped = quantizer.encode, mapping.convert_img2bpe
        self._sizes: Tensor | None = None
        self._images = 0
        self._signature = inspect.signature(self._original)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        self._sizes, self._images = given["image_sizes"] // self._factor, given["pixel_values"].shape[0]
        # Of one size, since all codes are one tensor; no side of it is cut.
        return self._original(**given | {"image_sizes": [(sys.maxsize, sys.maxsize)]})

    def to_tokens(self, codes: Tensor) -> Tensor:
        assert self._sizes is not None
        return self._select(self._mapped(codes), self._sizes.to(codes.device), codes.shape[0] // self._images)

    @staticmethod
    def _select(tokens: Tensor, sizes: Tensor, height: int) -> Tensor:
        """Return the tokens (found,) that belong to images of these ``sizes`` (images, 2), with their new lines.

        ``tokens`` (images * height, width + 1) have the new line of each padded row at its end.
        """
        width, per_image = tokens.shape[1], height * tokens.shape[1]
        number = torch.arange(per_image, device=tokens.device)
        row, column = number // width, number % width
        kept = true_indices((row < sizes[:, :1]) & (column <= sizes[:, 1:]))
        column = kept % width
        is_end = column == sizes[kept // per_image, 1]
        return tokens.flatten()[torch.where(is_end, kept - column + width - 1, kept)]

    def gives_the_same(self) -> bool:
        """Return whether tokens are those that the model makes of each image."""

        def joined(codes: Tensor, sizes: Tensor) -> Tensor:
            pairs = zip(codes, sizes.tolist(), strict=True)
            return torch.cat([self._mapped(one[:height, :width]).flatten() for one, (height, width) in pairs])

        def selected(codes: Tensor, sizes: Tensor) -> Tensor:
            return self._select(self._mapped(codes.flatten(0, 1)), sizes, codes.shape[1])

        return gives_the_same(joined, selected, self._calls())

    @staticmethod
    def _calls() -> Iterator[dict[str, Any]]:
        for draw in map(Random, range(_TRIALS)):
            sizes = torch.tensor([[draw.randint(1, 4) for _ in range(2)] for _ in range(draw.randint(1, 3))])
            height, width = sizes.amax(0).tolist()
            seed = torch.Generator().manual_seed(draw.randint(0, 99))
            yield {"codes": torch.randint(0, 2, (len(sizes), height, width), generator=seed), "sizes": sizes}
