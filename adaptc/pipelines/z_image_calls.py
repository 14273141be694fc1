"""Turn calls of Z-Image's transformer, which take lists of images and of texts of different lengths, into tensors.

Its program takes a batch of image patches and a batch of padded texts, with masks. It takes their rotary positions as
pairs of real numbers. The model's own functions split images into patches, pad texts, and put images together again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adaptc.capture.model_state import patch_forward
from adaptc.errors import ConfigError
from adaptc.pipelines.tensor_calls import ProgramCall, TensorCalls


class ZImageCalls(TensorCalls):
    """The calls of a ``ZImageTransformer2DModel`` with one image and one text for each row."""

    needs = ("x", "cap_feats")

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Run the block with a model that computes padded batches."""
        forward = _batched_forward(self.module)
        with patch_forward(self.module, forward, list(inspect.signature(forward).parameters.values())):
            yield

    def encode(self, given: Mapping[str, Any]) -> ProgramCall:
        """Return the patches and texts of a call as padded tensors, and what makes images of patches.

        Raises ConfigError for images of several sizes, and for several images in a row, which programs do not take.
        """
        found = dict(given)
        images, texts = found.pop("x"), found.pop("cap_feats")
        patch = {"patch_size": found.pop("patch_size", 2), "f_patch_size": found.pop("f_patch_size", 1)}
        if any(not isinstance(i, Tensor) for i in images) or len({i.shape for i in images}) != 1:
            raise ConfigError(
                "the program of a Z-Image transformer takes one image for each row, all of one size: call the pipeline "
                "once for each size"
            )
        patches, padded, sizes, places, text_places, fills, text_fills = self.module.patchify_and_embed(
            list(images), list(texts), *patch.values()
        )
        # The model gives a text positions of more tokens than it pads it to, and drops the rest, too.
        text_places = [p[: len(t)] for p, t in zip(text_places, padded, strict=True)]
        found |= {
            "x": torch.stack(patches),
            "x_rotary": torch.stack([self._rotary(p) for p in places]),
            "x_fill": torch.stack(fills),
            "cap_feats": pad_sequence(padded, batch_first=True),
            "cap_rotary": pad_sequence([self._rotary(p) for p in text_places], batch_first=True),
            "cap_fill": pad_sequence(text_fills, batch_first=True),
            "cap_mask": pad_sequence([torch.ones_like(f) for f in text_fills], batch_first=True),
        }

        def restore(output: Any) -> Any:
            rows = self.module.unpatchify(list(output.sample.unbind(0)), sizes, *patch.values())
            return type(output)(sample=rows)

        return found, restore

    def _rotary(self, positions: Tensor) -> Tensor:
        return torch.view_as_real(self.module.rope_embedder(positions))


def _batched_forward(model: Any) -> Callable[..., Any]:
    (patch,) = model.all_x_embedder

    def forward(
        x: Tensor,
        t: Tensor,
        cap_feats: Tensor,
        x_rotary: Tensor,
        x_fill: Tensor,
        cap_rotary: Tensor,
        cap_fill: Tensor,
        cap_mask: Tensor,
    ) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        x_rotary, cap_rotary = torch.view_as_complex(x_rotary), torch.view_as_complex(cap_rotary)
        times = model.t_embedder(t * model.t_scale).type_as(x)
        image = torch.where(x_fill[..., None], model.x_pad_token, model.all_x_embedder[patch](x))
        for layer in model.noise_refiner:
            image = layer(image, None, x_rotary, times)
        text = torch.where(cap_fill[..., None], model.cap_pad_token, model.cap_embedder(cap_feats))
        for layer in model.context_refiner:
            text = layer(text, cap_mask, cap_rotary)
        joined = torch.cat([image, text], 1)
        rotary, mask = torch.cat([x_rotary, cap_rotary], 1), torch.cat([torch.ones_like(x_fill), cap_mask], 1)
        for layer in model.layers:
            joined = layer(joined, mask, rotary, times)
        image = joined[:, : x.shape[1]]
        return Transformer2DModelOutput(sample=model.all_final_layer[patch](image, c=times))

    return forward
