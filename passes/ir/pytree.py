"""Nested inputs and outputs as flat lists, in the way of ``torch.export``.

Private torch use, with the public route that was tried: ``torch.utils._pytree`` knows the classes that torch.export has
registered, and a program's specs of inputs and outputs are its TreeSpecs. No public module reads them.
"""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["named_leaves", "pytree"]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a tree with their paths, as Python writes them: ``['pair'][1]``.

    A container may be registered without names for its parts, as outputs of diffusers are. All leaves are then
    numbered.
    """
    try:
        return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_leaves_with_path(tree)]
    except ValueError:
        return [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]
