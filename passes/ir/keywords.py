"""How a program is called that takes more keywords than the one it was made of.

Before: the calls of a program as it was exported, with its example inputs, and new inputs by name. After: the same with
these keywords behind all others, which in the examples are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import TensorArgument

from adaptc.passes.ir.trees import pytree


def with_keywords(
    values: Mapping[str, Any], calls: Sequence[Any], examples: Any, inputs: Sequence[Any]
) -> tuple[list[Any], Any]:
    """(module call graph, example inputs). ``values``: the fakes of the new inputs; ``inputs``: of all others."""
    first, *others = calls
    old = first.signature
    args, kwargs = pytree.tree_unflatten(list(range(old.in_spec.num_leaves)), old.in_spec)
    names = old.forward_arg_names
    signature = replace(
        old,
        inputs=[*old.inputs, *(TensorArgument(n) for n in values)],
        in_spec=pytree.tree_structure((args, {**kwargs, **dict.fromkeys(values, 0)})),
        forward_arg_names=None if names is None else [*names, *values],
    )
    if examples is not None:
        sizes = _sizes(inputs, pytree.tree_leaves(examples))
        new = {n: torch.zeros([_number(s, sizes) for s in v.shape], dtype=v.dtype) for n, v in values.items()}
        examples = (examples[0], {**examples[1], **new})
    return [replace(first, signature=signature), *others], examples


def _sizes(fakes: Sequence[Any], values: Sequence[Any]) -> dict[str, int]:
    """Symbol -> its value in example inputs."""
    both = [(f, t) for f, t in zip(fakes, values, strict=False) if isinstance(f, Tensor) and isinstance(t, Tensor)]
    return {str(s): n for f, t in both for s, n in zip(f.shape, t.shape, strict=True)}


def _number(size: Any, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[str(size)]
