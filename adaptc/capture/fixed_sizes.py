"""Find input sizes that a program has fixed although its user may want to vary them.

These are sizes such as the height of an image or the length of a sequence, which were to be free where the model
allows. Sizes that a layer's weights demand are left out, since they can have no other value. Examples are the features
of a linear layer and the channels of a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.passes.graph.higher_order import HigherOrderCall
from adaptc.passes.graph.lifted import fqns_by_placeholder, guards_of, user_inputs
from adaptc.passes.graph.ops import LAYER_OPS, TRANSPOSED_CONVS, argument, operands
from adaptc.passes.graph.pytree import pytree

aten = torch.ops.aten
_MATMULS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
_RECURRENT = (
    *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
    *(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
)
_ONE_SIZE = re.compile(r"L(?:\[[^\[\]]+\])+\.size\(\)\[\d+\]")
_CHANNEL_OPS = (aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.prelu.default)
_LAST_AXES_OPS = (aten.layer_norm.default, aten.rms_norm.default)
_BINARY = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
)
#: ops that change sizes and keep the order of axes
_KEEPS_AXES = (aten.constant_pad_nd.default, aten.pad.default, aten.slice.Tensor, aten.cat.default)

#: for each axis of a value, the axis of the input that it comes from, None where it comes from none
InputAxes = tuple[int | None, ...]


def describe_fixed_sizes(
    program: ExportedProgram, names: Sequence[str], free_axes: Callable[[int], dict[int, Any]]
) -> list[str]:
    """Return one line of text for each fixed size.

    ``names`` are the names of the flat inputs. ``free_axes`` gives for an input's position the axes that were to be
    free, with None where the model decides. Sizes of 1 are left out, since they may broadcast to any size.
    """
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    lines: list[str] = []
    for i, (node, value) in enumerate(user_inputs(program).items()):
        if not isinstance(value, Tensor):
            continue
        axes = [a for a, wanted in free_axes(i).items() if wanted is None and _is_fixed(value.shape[a])]
        widths = _axes_bound_to_weights(program, nodes[node]) if axes else set()
        lines += [f"dimension {a} of input {names[i]!r} is fixed at {value.shape[a]}" for a in axes if a not in widths]
    return lines + [f"{text} in every call" for text in _jointly_fixed_sizes(program)]


def _jointly_fixed_sizes(program: ExportedProgram) -> Iterator[str]:
    """Yield each guard by which several sizes together must give one number, such as the number of an image's
    patches."""
    for guard in guards_of(program):
        left, equal, number = guard.rpartition(" == ")
        several = _ONE_SIZE.search(left) and not _ONE_SIZE.fullmatch(left.strip("() "))
        # Batches of two inputs that are as large as each other: the sizes are free together.
        several = several and any(not size.endswith(".size()[0]") for size in _ONE_SIZE.findall(left))
        whole = number.isdecimal() and int(number) > 1 and " or " not in left and " and " not in left
        if equal and whole and several and "%" not in left and "Mod" not in left:
            yield re.sub(r"L\['([^']*)'\]((?:\[[^\[\]]+\])*)\.size\(\)", r"\1\2.shape", guard)


def _is_fixed(size: Any) -> bool:
    return (isinstance(size, int) or not size.node.expr.free_symbols) and int(size) != 1


def _axes_bound_to_weights(program: ExportedProgram, source: fx.Node) -> set[int]:
    """Return the axes of an input whose sizes must equal a weight's, as far as the input's values can be followed."""
    computed = _input_dependent_nodes(program)
    found: set[int] = set()
    todo: list[tuple[fx.Node, InputAxes, fx.GraphModule]] = [
        (source, tuple(range(source.meta["val"].ndim)), program.graph_module)
    ]
    seen: set[tuple[fx.Node, InputAxes]] = set()
    while todo:
        node, axes, module = todo.pop()
        if (node, axes) in seen:
            continue
        seen.add((node, axes))
        for user in node.users:
            found |= {axes[a] for a in _axes_bound_by(user, node, computed) if axes[a] is not None}  # type: ignore[misc]
            if (moved := _axes_after_op(user, node, axes)) is not None:
                todo.append((user, moved, module))
            if (call := HigherOrderCall.from_node(user, module)) is not None:
                for at, handed, _ in call.operands():
                    bodies = call.bodies() if handed is node else ()
                    for body in bodies:
                        inner = body.graph.find_nodes(op="placeholder")[at]
                        # A body of map takes one entry of the first axis.
                        todo.append((inner, axes[len(axes) - inner.meta["val"].ndim :], body))
    return found


def _input_dependent_nodes(program: ExportedProgram) -> set[fx.Node]:
    """Return the nodes that depend on the user's inputs, in inner graphs too."""
    held = fqns_by_placeholder(program.graph_signature)
    found = {n for n in program.graph.find_nodes(op="placeholder") if n.name not in held}
    _add_dependents(program.graph_module, found)
    return found


def _add_dependents(module: fx.GraphModule, found: set[fx.Node]) -> None:
    """Add to ``found`` the nodes of ``module`` and of its inner graphs that depend on nodes in it."""
    for node in module.graph.nodes:
        # A table of weights that is sliced to an input's length has a size among its inputs, but is still made of
        # weights alone.
        if _has_tensors(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
        if (call := HigherOrderCall.from_node(node, module)) is not None:
            for body in call.bodies():
                inner = body.graph.find_nodes(op="placeholder")
                found |= {inner[at] for at, handed, _ in call.operands() if handed in found}
                _add_dependents(body, found)


def _axes_bound_by(user: fx.Node, node: fx.Node, computed: set[fx.Node]) -> Iterator[int]:
    """Yield the axes of ``node`` whose sizes must equal sizes of the weights that ``user`` reads."""
    ndim = node.meta["val"].ndim
    if user.target in LAYER_OPS and operands(user)[0] is node and LAYER_OPS[user.target][0] != "embedding":
        kind = LAYER_OPS[user.target][0]
        yield ndim - 1 - (int(kind[4]) if kind.startswith("conv") else 0)
    elif user.target in TRANSPOSED_CONVS and argument(user, 0) is node:
        yield ndim - 1 - (argument(user, 1).meta["val"].ndim - 2)
    elif user.target in _MATMULS:
        left, right = user.args[:2]
        other = right if left is node else left
        if other not in computed:
            yield ndim - 1 if left is node else max(ndim - 2, 0)
    elif user.target is aten.einsum.default:
        yield from _einsum_bound_axes(user, node, computed)
    elif user.target in _RECURRENT and user.args[0] is node:
        yield ndim - 1
    elif user.target in _CHANNEL_OPS and user.args[0] is node and ndim > 1:
        yield 1
    elif user.target in _LAST_AXES_OPS and user.args[0] is node:
        yield from range(ndim - len(argument(user, 1)), ndim)
    elif user.target is aten.bilinear.default and node in user.args[:2]:
        yield ndim - 1
    elif user.target in _BINARY:
        others = [n for n in user.args[:2] if n is not node and isinstance(n, fx.Node) and _is_tensor(n)]
        from_end = [
            i - n.meta["val"].ndim for n in others for i in (_output_width_axis(n) if n in computed else _sole_axis(n))
        ]
        yield from (i + ndim for i in from_end if i + ndim >= 0)


def _einsum_bound_axes(einsum: fx.Node, node: fx.Node, computed: set[fx.Node]) -> Iterator[int]:
    """Yield the axes of ``node`` whose letter in the einsum equation also stands in an operand made of weights
    alone."""
    equation, operands_ = str(argument(einsum, 0)), argument(einsum, 1)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, operand in zip(terms, operands_, strict=True):
        if operand is not node:
            continue
        ndim, letters = node.meta["val"].ndim, term.replace("...", "")
        held = {c for t, o in zip(terms, operands_, strict=True) if o not in computed for c in t}
        first, dots, _ = term.partition("...")
        wide = ndim - len(letters) if dots else 0
        yield from (i if i < len(first) else i + wide for i, c in enumerate(letters) if c in held)


def _has_tensors(node: fx.Node) -> bool:
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(node.meta.get("val")))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _sole_axis(weight: fx.Node) -> Iterator[int]:
    """Yield the one axis of a tensor of weights whose size is not 1, as of a scale per channel; nothing unless there is
    one."""
    sizes = [i for i, size in enumerate(weight.meta["val"].shape) if isinstance(size, int) and size != 1]
    if len(sizes) == 1:
        yield sizes[0]


def _output_width_axis(value: fx.Node) -> Iterator[int]:
    """Yield the axis of a computed value whose size is the output width of the layer that computed it."""
    while value.op == "call_function" and isinstance(value.meta.get("val"), Tensor):
        if value.target in LAYER_OPS:
            kind, ndim = LAYER_OPS[value.target][0], value.meta["val"].ndim
            yield ndim - 1 - (int(kind[4]) if kind.startswith("conv") else 0)
            return
        shape = value.meta["val"].shape
        above = [
            n
            for n in value.all_input_nodes
            if isinstance(v := n.meta.get("val"), Tensor) and _have_equal_sizes(v.shape, shape)
        ]
        if not above:
            return
        value = above[0]


def _axes_after_op(user: fx.Node, node: fx.Node, axes: InputAxes) -> InputAxes | None:
    """Return the input axis of each axis of ``user``'s value, or None where ``user``'s axes cannot be followed."""
    old, new = node.meta["val"], user.meta.get("val")
    if not isinstance(new, Tensor) or user.op != "call_function":
        return None
    is_first_argument = bool(user.args) and user.args[0] is node
    if user.target is aten.embedding.default and argument(user, 1) is node:
        return (*axes, None)
    if is_first_argument and user.target is aten.linear.default:
        return (*axes[:-1], None)
    if is_first_argument and user.target is aten.permute.default:
        order: Any = user.args[1]
        return tuple(axes[i] for i in order)
    if is_first_argument and user.target is aten.transpose.int:
        swapped = list(axes)
        a, b = (int(argument(user, i)) for i in (1, 2))
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)
    if is_first_argument and user.target is aten.select.int:
        at = int(argument(user, 1)) % old.ndim
        return (*axes[:at], *axes[at + 1 :])
    if is_first_argument and user.target is aten.unsqueeze.default:
        at = int(argument(user, 1)) % new.ndim
        return (*axes[:at], None, *axes[at:])
    if is_first_argument and user.target in (
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    ):
        return _axes_after_reshape(list(map(str, old.shape)), list(map(str, new.shape)), axes)
    if new.ndim != old.ndim or user.target in (*_MATMULS, *LAYER_OPS):
        return None
    return axes if user.target in _KEEPS_AXES or _have_equal_sizes(old.shape, new.shape) else None


def _have_equal_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return list(map(str, a)) == list(map(str, b))


def _axes_after_reshape(old: list[str], new: list[str], axes: InputAxes) -> InputAxes:
    """Return the input axis of each axis after a reshape, for the leading and trailing axes that keep their size."""
    out: list[int | None] = [None] * len(new)
    for step in (1, -1):
        for i in range(min(len(old), len(new))):
            at = i if step == 1 else -1 - i
            if old[at] != new[at]:
                break
            out[at] = axes[at]
    return tuple(out)


def flat_input_names(args: tuple, kwargs: Any, parameters: Sequence[str]) -> list[str]:
    """Return the names of the flat inputs: the parameter's name in ``forward``, followed by the path within that
    input."""
    out: list[str] = []
    for path, _ in pytree.tree_leaves_with_path((args, dict(kwargs))):
        step: Any = path[1]
        first = parameters[min(step.idx, len(parameters) - 1)] if isinstance(step, pytree.SequenceKey) else step.key
        out.append(f"{first}{pytree.keystr(path[2:])}")
    return out
