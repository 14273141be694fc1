"""Let a vision tower attend within segments of patches by one call.

transformers calls attention for each image, masks it, or gives the boundaries of all images to a flash kernel. Only the
kernel's call has no loop over images. So a tower gets an attention of such a name. The kernel's boundaries are replaced
by a number for each patch, which patches of one segment share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.capture.model_state import own_attribute

#: transformers takes any name with "flash" in it for a kernel that gets boundaries
_NAME = "adaptc_flash_segments"


@contextlib.contextmanager
def attends_in_segments(tower: Any) -> Iterator[None]:
    """Run the block with the attention of ``tower``, a vision tower of transformers, as the module says."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend_in_segments)
    with own_attribute(tower.config, "_attn_implementation_internal", _NAME):
        yield


def _attend_in_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output (1, patches, heads, width), and None for its weights.

    ``query``, ``key`` and ``value`` are (1, heads, patches, width), and ``cu_seq_lens_q`` (patches,) are the segments.
    ``others`` are what transformers passes to kernels.
    """
    mask = cu_seq_lens_q.unsqueeze(1) == cu_seq_lens_q
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None
