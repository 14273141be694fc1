"""Compile a lifted graph with inductor, once for every batch size, sequence length and rank.

The user inputs of the graph have symbolic sizes, and its slots have the sizes of one adapter. The compiled callable has
the same flat arguments and takes every size of either. Nothing in it could decide to compile again. Code for calls of
single rows is compiled by itself, with these sizes as 1.

Private torch use, with the public route that was tried:
- ``torch._inductor.standalone_compile``: ``torch.compile`` gives equal code, but keeps guards on each of hundreds of
  inputs, evaluates them in every call, and compiles again when a rank equals a batch size (duck shaping).
- ``enable_python_dispatcher``: ops that are made of others need it on symbolic sizes. Public: ``make_fx``, which has it
  on, and makes a graph that nobody needs here.
- ``ShapeEnv.create_symbol`` and ``FakeTensorMode``: ranks get one symbol per site in an environment of their own.
  ``torch.export.Dim`` cannot name dims of parameters, and the environment of a program read from a file is not one that
  inductor can work in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from adaptc.errors import BackendError
from adaptc.passes.graph.ops import Op
from adaptc.passes.lower.complex_numbers import SplitComplex
from adaptc.passes.lower.free_axes import FreeSize, free_axes
from adaptc.passes.lower.linear_layers import with_chosen_layers
from adaptc.passes.protocol.attachment import Attachment
from adaptc.progress import stage
from adaptc.runtime.hoisted_values import SplitGraph
from adaptc.runtime.strides import axis_order, empty_in_order

#: Calls check their inputs and lay them out beforehand. Inductor's own asserts would take as long as a tenth of a call
#: for one token: there is one for each weight and each slot.
#: A cond is cached like other ops: the key of inductor's cache has the code of its branches, which are graph modules.
_COND = torch.ops.higher_order.cond
_OPTIONS = {
    "config_patches": {
        "size_asserts": False,
        "unsafe_marked_cacheable_functions": {f"{_COND.__module__}.{_COND.__name__}": "code of graph modules"},
    }
}
#: the example value of a symbolic size, by which inductor tunes its code
SIZE_HINT = 16


def compile_lifted(
    module: fx.GraphModule,
    split: SplitGraph,
    main: fx.GraphModule,
    targets: Mapping[str, str | None],
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    single_sizes: frozenset[str] = frozenset(),
) -> Callable[..., Any]:
    """Compile ``main``, the part of ``split`` that calls run, and return a callable of the same flat arguments.

    ``split`` was split from ``module``. ``targets`` maps the lifted placeholders of ``module`` to FQNs, None for packed
    buffers. The code is for calls in which the free sizes ``single_sizes`` are 1.
    Raises BackendError with inductor's reason in one line.
    """
    from torch._inductor import standalone_compile

    main = with_chosen_layers(main)
    SplitComplex(main, updates_values=False)(main.graph)
    main.recompile()
    symbols = _ShapeSymbols(single_sizes)
    free = free_axes(attachments, ops)
    slots = {f for a in attachments for f in a.tensor_names}
    lifted, users = [], []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, Tensor):
            name = targets.get(node.name) or ""
            value = symbols.like_example(
                value, free.get(name, {}), range(value.ndim) if name in slots else axis_order(value)
            )
        (lifted if node.name in targets else users).append(value)
    fakes = [*symbols.main_inputs(split, lifted), *users]
    for node, value in zip(main.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = value
    for node in main.graph.nodes:
        if node.op == "call_function":
            node.meta.pop("val", None)  # values of another environment; tracing makes new ones
    for node in main.graph.output_node().args[0]:  # type: ignore[union-attr]
        if isinstance(node, fx.Node):
            # standalone_compile takes the fake mode, and with it the symbols, from this entry.
            node.meta["example_value"] = next(f for f in fakes if isinstance(f, Tensor))
    try:
        with stage(f"compiling a program of {len(attachments)} sites with inductor"), torch.no_grad():
            return standalone_compile(main, fakes, dynamic_shapes="from_graph", options=_OPTIONS)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(f"inductor could not compile the program: {first}. Use backend='eager'.") from error


class _ShapeSymbols:
    """A shape environment with a symbol of its own for each size that was symbolic or is free.

    The sizes called ``single_sizes`` are 1.
    """

    def __init__(self, single_sizes: frozenset[str] = frozenset()) -> None:
        self.single_sizes = single_sizes
        self.shape_env = ShapeEnv(duck_shape=False)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env)
        self.sizes: dict[str, Any] = {}

    def symbolic_size(self, name: str, hint: int = SIZE_HINT) -> Any:
        """Return the symbolic size called ``name``, made on first use."""
        from torch._dynamo.source import ConstantSource

        if name in self.single_sizes:
            return 1
        if name not in self.sizes:
            source = ConstantSource(f"adaptc_{name}")
            symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            self.sizes[name] = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        return self.sizes[name]

    def like_example(self, example: Tensor, free: Mapping[int, FreeSize], order: Sequence[int]) -> Tensor:
        """Return a fake tensor like ``example`` with this environment's symbols.

        It is contiguous where an axis is free, else it has its axes in memory in the given ``order``.
        """
        with self.fake_mode:
            if free:
                sizes = {i: self.symbolic_size(f.name, SIZE_HINT * f.unit) * f.times for i, f in free.items()}
                shape = [sizes[i] if i in sizes else int(s) for i, s in enumerate(example.shape)]
                return torch.empty(shape, dtype=example.dtype, device=example.device)
            return empty_in_order(order, [self._convert_size(s) for s in example.shape], example)

    def main_inputs(self, split: SplitGraph, lifted: Sequence[Any]) -> list[Any]:
        """Return fake inputs of the main graph: the ``lifted`` fakes that it reads, and values hoisted from them."""
        # The prologue runs on real sizes at run time, so guards that it asks for here must not bind the compiled code.
        with self.fake_mode, self.shape_env.suppress_guards(), enable_python_dispatcher(), torch.no_grad():
            values = split.compute_inputs(lifted)
            sizes = [s for v in values if isinstance(v, Tensor) for s in v.shape if not isinstance(s, int)]
            alone = {s.node.expr for s in sizes if s.node.expr.is_Symbol}
            return [self._one_symbol_per_axis(v, alone) if isinstance(v, Tensor) else v for v in values]

    def _one_symbol_per_axis(self, value: Tensor, alone: Collection[Any]) -> Tensor:
        """Return ``value`` with symbols of its own for sizes that inductor could not read off.

        Inductor reads every symbol off an input axis whose size is that symbol alone. ``alone`` are the symbols for
        which there is such an axis. Sums of ranks are replaced, quotients, such as the rank of stacked experts, and
        multiples of a symbol that no axis has alone.
        """
        sizes: dict[int, Any] = {}
        for i, size in enumerate(value.shape):
            if isinstance(size, int):
                continue
            expression: Any = size.node.expr
            factors = [(part, expression / part) for part in sympy.preorder_traversal(expression)]
            quotients = [(p, int(n)) for p, n in factors if type(p).__name__ == "FloorDiv" and n.is_Integer]
            if quotients:
                part, times = quotients[0]
                sizes[i] = self.symbolic_size(f"({part})", size.node.hint // times) * times
            elif len(expression.free_symbols) > 1 or not all(s in alone for s in expression.free_symbols):
                sizes[i] = self.symbolic_size(f"({expression})", size.node.hint)
        shape = [sizes.get(i, size) for i, size in enumerate(value.shape)]
        return empty_in_order(axis_order(value), shape, value) if sizes else value

    def _convert_size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        names = sorted(expression.free_symbols, key=str)
        return (
            sympy.lambdify(names, expression)(*(self.symbolic_size(str(s)) for s in names))
            if names
            else int(expression)
        )
