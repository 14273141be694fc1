"""Draw random inputs for a package from its manifest, since a package has no graph to read.

The inputs are complete, and the package accepts them. Sizes are near the smallest allowed ones. Token ids are below the
number of rows of every known embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.capture.inputs.random_inputs import CallInputs, random_input
from adaptc.errors import AdaptcError, nearest
from adaptc.packages.manifest import Manifest
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.passes.graph.pytree import pytree
from adaptc.runtime.calls.call_inputs import TensorInput

#: the most by which a drawn size exceeds the smallest allowed one
_MAX_EXTRA_SIZE = 7


def draw(
    package: PackagedProgram, shapes: int | Sequence[Mapping[str, Sequence[int]]], seed: int, model: Any
) -> list[CallInputs]:
    """Return a :class:`CallInputs` per shape in ``shapes``.

    ``shapes``: how many to draw, or for each run a dict of input name -> shape; other sizes are drawn. ``model``: the
    model that the package came from, or None. Raises AdaptcError for shapes that the package cannot take, and for sizes
    that are expressions of other sizes.
    """
    requested_shapes: Sequence[Mapping[str, Sequence[int]]] = [{}] * shapes if isinstance(shapes, int) else list(shapes)
    if not requested_shapes:
        raise AdaptcError("shapes: at least one is needed")
    generator = torch.Generator().manual_seed(seed)
    embedding_rows = _embedding_rows(package.manifest, model)
    runs = []
    for requested in requested_shapes:
        sizes = _choose_sizes(package.manifest, requested, generator)
        flat = [
            random_input(
                i.name,
                i.tensor.dtype,
                package.device,
                _resolve_shape(i.tensor, sizes),
                lambda: min(embedding_rows, default=2),
                generator,
            )
            if i.tensor is not None
            else i.constant
            for i in package.manifest.inputs
        ]
        args, kwargs = pytree.tree_unflatten(flat, package.inputs.spec)
        runs.append(CallInputs.from_arguments(args, kwargs))
    return runs


def _embedding_rows(m: Manifest, model: Any) -> list[int]:
    """Return the number of rows of every embedding among the package's sites and in ``model``."""
    found = [s.op.in_features for s in m.sites if s.op.kind == "embedding"]
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return found + [e.num_embeddings for e in modules if isinstance(e, (nn.Embedding, nn.EmbeddingBag))]


def _choose_sizes(m: Manifest, requested: Mapping[str, Sequence[int]], generator: torch.Generator) -> dict[str, int]:
    tensor_inputs = {i.name: i.tensor for i in m.inputs if i.tensor is not None}
    sizes: dict[str, int] = {}
    for name, shape in requested.items():
        if name not in tensor_inputs:
            near = nearest(name, tensor_inputs) or list(tensor_inputs)
            raise AdaptcError(f"shapes: the package has no tensor input {name!r}; did you mean one of {near}?")
        if len(shape) != len(tensor_inputs[name].shape):
            raise AdaptcError(f"shapes: input {name!r} has {len(tensor_inputs[name].shape)} axes, got {tuple(shape)}")
        for size, value in zip(tensor_inputs[name].shape, shape, strict=True):
            if size != value and (not isinstance(size, str) or sizes.setdefault(size, int(value)) != value):
                raise AdaptcError(f"shapes: input {name!r} cannot have shape {tuple(shape)}: {size} is not {value}")
    for want in tensor_inputs.values():
        for size in want.shape:
            if isinstance(size, str) and size not in sizes:
                sizes[size] = _draw_size(size, m, generator)
    return sizes


def _draw_size(size: str, m: Manifest, generator: torch.Generator) -> int:
    if not size.isidentifier():
        raise AdaptcError(
            f"the package takes a size {size}, which depends on others; give complete inputs with inputs=, or verify "
            "against the program it was made from"
        )
    low, high = m.ranges.get(size, (0, float("inf")))
    lowest = max(int(low), 1)
    highest = int(min(high, lowest + _MAX_EXTRA_SIZE))
    return int(torch.randint(lowest, max(lowest, highest) + 1, (), generator=generator))


def _resolve_shape(spec: TensorInput, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else sizes[n] for n in spec.shape)
