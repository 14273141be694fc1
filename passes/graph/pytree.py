"""Read nested inputs and outputs as flat lists, in the way of ``torch.export``.

``update_call_inputs`` updates how a program is called after keyword inputs were added or removed: its call signature
and its example inputs. Positional inputs stay. Removed keyword inputs are left out, and new ones come last.

Private torch use, with the public route that was tried: ``torch.utils._pytree`` knows the classes that torch.export has
registered, and a program's specs of inputs and outputs are its TreeSpecs. No public module reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree


def update_call_inputs(
    module_calls: Sequence[Any],
    examples: Any,
    inputs: Sequence[Any],
    added_inputs: Mapping[str, torch.Tensor | tuple[int, Sequence[int], Sequence[int], torch.dtype]],
) -> tuple[list[Any], Any]:
    """Return the module calls of a program, the first of which is its own, and its examples, for the inputs it has now.

    ``inputs`` are the arguments of the graph, in order. ``added_inputs`` has the added keyword inputs, each with its
    example. In place of a tensor it may have the index of a flat input, axes of it, further sizes, and a dtype. The
    example is then zeros, whose shape is the axes' sizes and the further ones.
    """
    first, *rest = module_calls
    spec, arg_names = first.signature.in_spec, first.signature.forward_arg_names
    # transformers' caches take tensors alone for their leaves, and anything else for a constant.
    leaf = torch.empty(0)
    args, kwargs = pytree.tree_unflatten([leaf] * spec.num_leaves, spec)
    input_names = {a.name for a in inputs}
    removed_names = [k for k, v in kwargs.items() if v is leaf and k not in input_names]
    leaves = {**{k: v for k, v in kwargs.items() if k not in removed_names}, **dict.fromkeys(added_inputs, leaf)}
    names = None if arg_names is None else [*(n for n in arg_names if n not in removed_names), *added_inputs]
    tree = pytree.tree_structure((args, leaves))
    signature = replace(first.signature, inputs=list(inputs), in_spec=tree, forward_arg_names=names)
    if examples is not None:
        flat = pytree.tree_leaves(examples)
        keyword_examples = {k: v for k, v in examples[1].items() if k not in removed_names}
        for name, example in added_inputs.items():
            if isinstance(example, torch.Tensor):
                keyword_examples[name] = example
                continue
            at, axes, more, dtype = example
            keyword_examples[name] = torch.zeros(
                [*(flat[at].shape[i] for i in axes), *more], dtype=dtype, device=flat[at].device
            )
        examples = (examples[0], keyword_examples)
    return [replace(first, signature=signature), *rest], examples


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
