"""Draw random inputs for an exported program from the dtypes, fixed sizes and ranges of free sizes that it states.

Token ids are below the number of rows of the embedding that looks them up. Masks pad some rows on the left or right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.capture.inputs.random_sizes import SizeSampler, SizeValues, evaluate_shape
from adaptc.errors import AdaptcError
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.pytree import pytree

aten = torch.ops.aten

#: ops that move integers without changing their values, by name
_VALUE_PRESERVING_OPS = {
    *("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t"),
    *("slice", "select", "slice_scatter", "copy", "pad", "constant_pad_nd", "masked_fill"),
    *("to", "_to_copy", "clone", "alias", "contiguous", "detach"),
}


@dataclass(frozen=True)
class CallInputs:
    """The inputs of one call, and a text of their shapes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes_text: str

    @classmethod
    def from_arguments(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallInputs:
        leaves = pytree.tree_leaves_with_path((tuple(args), dict(kwargs)))
        shapes: dict[str, list[str]] = {}
        for path, value in leaves:
            if isinstance(value, Tensor):
                name = pytree.keystr(path[1:]).replace("'", "").strip("[]")
                shapes.setdefault("x".join(map(str, value.shape)) or "scalar", []).append(name)
        text = ", ".join(f"{'/'.join(names)} {shape}" for shape, names in shapes.items())
        return cls(tuple(args), dict(kwargs), text)


def calls_from_inputs(inputs: Any) -> list[CallInputs]:
    """Return one :class:`CallInputs` for each of the caller's own inputs.

    ``inputs`` is a dict of keyword inputs, a tuple of positional inputs, a tensor, or a list of these. Raises
    AdaptcError for anything else and for an empty list.
    """
    calls = []
    for one in inputs if isinstance(inputs, list) else [inputs]:
        if isinstance(one, Mapping):
            calls.append(CallInputs.from_arguments((), one))
        elif isinstance(one, (tuple, Tensor)):
            calls.append(CallInputs.from_arguments(one if isinstance(one, tuple) else (one,), {}))
        else:
            raise AdaptcError(f"inputs: give dicts of keyword inputs or tuples, in a list; got {type(one).__name__}")
    if not calls:
        raise AdaptcError("inputs is an empty list: give at least one dict or tuple, or leave it out")
    return calls


@with_graph_lock  # fake tensors give "meta" as their device while another thread computes with them
def draw_inputs(
    program: ExportedProgram,
    *,
    shapes: int | Sequence[Mapping[str, Sequence[int]]] = 3,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[CallInputs]:
    """Draw random inputs, one :class:`CallInputs` per shape.

    An int for ``shapes`` is the number of runs: the first has the sizes of the capture, the others have random sizes.
    Otherwise ``shapes`` has for each run a dict of input name -> shape, and the sizes that it does not fix are drawn.
    ``vocab_size`` bounds token ids that no embedding in the graph bounds. Equal arguments give equal inputs, and
    torch's own random state is not touched. Raises AdaptcError for shapes that the program cannot take.
    """
    wanted: Sequence[Mapping[str, Sequence[int]]] = [{}] * shapes if isinstance(shapes, int) else list(shapes)
    if not wanted:
        raise AdaptcError("shapes: at least one is needed")
    sampler = _InputSampler(program, torch.Generator().manual_seed(seed), vocab_size)
    return [sampler.sample_call(one, as_captured=isinstance(shapes, int) and i == 0) for i, one in enumerate(wanted)]


def random_input(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    bound: Callable[[], int],
    generator: torch.Generator,
) -> Tensor:
    """Return a random tensor for an input, by its name and dtype. Integers are below ``bound()``.

    An input whose name ends with "mask" is filled like an attention_mask. One whose name has "position" counts up from
    0.
    """
    if name.endswith("mask") and shape:
        value = _random_mask(shape, generator)
    elif dtype.is_complex:
        value = torch.randn(shape, generator=generator, dtype=torch.complex64)
    elif dtype.is_floating_point:
        value = torch.randn(shape, generator=generator)
    elif dtype == torch.bool:
        value = torch.randint(0, 2, shape, generator=generator)
    elif "position" in name and shape:
        value = torch.arange(shape[-1]).expand(shape).contiguous()
    else:
        value = torch.randint(0, bound(), shape, generator=generator)
    return value.to(dtype=dtype, device=device)


class _InputSampler:
    def __init__(self, program: ExportedProgram, generator: torch.Generator, vocab_size: int | None) -> None:
        self.generator, self.vocab_size = generator, vocab_size
        self.nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
        self.inputs = user_inputs(program)
        self.sizes = SizeSampler(program, self.inputs, generator)
        spec = program.call_spec.in_spec
        if spec is None:
            raise AdaptcError("the program has no input spec; export it with torch.export.export")
        self.spec = spec

    def sample_call(self, fixed_shapes: Mapping[str, Sequence[int]], as_captured: bool) -> CallInputs:
        sizes = self.sizes.sample(fixed_shapes, as_captured=as_captured)
        flat = [self._sample_input(name, want, sizes) for name, want in self.inputs.items()]
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return CallInputs.from_arguments(args, kwargs)

    def _sample_input(self, name: str, traced: Any, sizes: SizeValues) -> Any:
        if isinstance(traced, torch.SymInt):
            return evaluate_shape(traced, sizes)[0]
        if not isinstance(traced, Tensor):
            return traced
        shape = evaluate_shape(traced, sizes)
        return random_input(name, traced.dtype, traced.device, shape, lambda: self._index_bound(name), self.generator)

    def _index_bound(self, name: str) -> int:
        found = [b for b in _table_lengths(self.nodes[name]) if b > 0]
        if not found and self.vocab_size and name.endswith("ids"):
            return self.vocab_size
        # An integer that nothing looks up has no bound to break, and two values suit flags and token_type_ids.
        return min(found, default=2)


def _random_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a mask of ones, int64, in which up to a third of each row's last axis is zero, at its left or right
    end."""
    rows, length = torch.Size(shape[:-1]).numel(), shape[-1]
    cut = torch.randint(0, length // 3 + 1, (rows, 1), generator=generator)
    left = torch.randint(0, 2, (rows, 1), generator=generator).bool()
    at = torch.arange(length).expand(rows, length)
    return torch.where(left, at >= cut, at < length - cut).to(torch.int64).reshape(shape)


def _table_lengths(start: fx.Node) -> Iterator[int]:
    """Yield the number of rows of every table in which an integer input's values are looked up."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user in node.users:
            packet = str(user.target).split(".")[1:2]
            if (bound := _table_length(user, node)) is not None:
                yield bound
            elif packet and packet[0] in _VALUE_PRESERVING_OPS and user not in seen:
                seen.add(user)
                stack.append(user)


def _table_length(user: fx.Node, index: fx.Node) -> int | None:
    """Return the number of rows of the table in which ``user`` looks ``index`` up, or None where it does not or has no
    fixed number."""
    args, table, axis = user.args, None, 0
    if user.target in (aten.embedding.default, aten.embedding_bag.padding_idx) and args[1] is index:
        table = args[0]
    elif user.target is aten.index_select.default and args[2] is index:
        table, axis = args[0], args[1]
    elif user.target is aten.index.Tensor and index in (places := list(args[1])):  # type: ignore[arg-type]
        table, axis = args[0], places.index(index)
    elif user.target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default) and args[1] is index:
        table, axis = args[0], 1
    elif user.target is aten.one_hot.default:
        return args[1] if len(args) > 1 and isinstance(args[1], int) else None
    if not isinstance(table, fx.Node):
        return None
    rows = table.meta["val"].shape[axis]
    return rows if isinstance(rows, int) else None
