"""Let transformers make attention masks by broadcasting while a model is traced.

A model may give a mask function of its own, such as one that lets the tokens of an image see each other. transformers
maps that over all positions with ``torch.vmap``, since the function may be of any kind. In a graph that is traced
before dispatch, the map stays as calls that only make sense in their order. No pass and no runtime understands them.

Most mask functions only index and compare. For them broadcast positions give the same mask. Whether they do is not
known beforehand, so a program that used this must be compared with its model.

transformers' functions are replaced for the tracing thread alone. Other threads, which may run models meanwhile, get
the mapped function as before.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class MasksUsed:
    """The record of a block: whether a mask was made by broadcasting."""

    any: bool = False


@contextlib.contextmanager
def broadcast_masks() -> Iterator[MasksUsed]:
    """Run the block with masks by broadcasting, in this thread, where transformers would map a function.

    The block is given a record of whether that came up. Releases of transformers without such a function are left as
    they are.
    """
    used, masking = MasksUsed(), sys.modules.get("transformers.masking_utils")
    names = ("_vmap_expansion_sdpa", "TransformGetItemToIndex")
    if masking is None or not all(hasattr(masking, n) for n in names):
        yield used
        return
    thread = threading.get_ident()
    expand, index_mode = (getattr(masking, n) for n in names)

    def expand_by_broadcasting(mask_function: Callable[..., Any]) -> Callable[..., Any]:
        if threading.get_ident() != thread:
            return expand(mask_function)

        def mask(batch: Any, heads: Any, queries: Any, keys: Any) -> Any:
            used.any = True
            made = mask_function(
                batch[:, None, None, None], heads[None, :, None, None], queries[None, None, :, None],
                keys[None, None, None, :],
            )  # fmt: skip
            return made.expand(batch.shape[0], heads.shape[0], queries.shape[0], keys.shape[0])

        return mask

    def index_mode_of_others() -> Any:
        return contextlib.nullcontext() if threading.get_ident() == thread else index_mode()

    try:
        vars(masking).update({names[0]: expand_by_broadcasting, names[1]: index_mode_of_others})
        yield used
    finally:
        vars(masking).update({names[0]: expand, names[1]: index_mode})
