"""Write quantised weights as plain tensors and the ops that dequantise them, and read such a program back.

:class:`ExpandQuantized` is for whatever knows no tensor of ours: files, other runtimes and compilers. Each quantised
weight becomes the tensors of its scheme, under ``<name of the weight>.<role>``, and a few ATen nodes that make the
weight of them. The last of these nodes keeps what the weight was in ``node.meta["custom"]["adaptc_quantized"]``:

    names        the names of the weight; a tied weight has several
    scheme       the scheme's text
    shape        the weight's shape
    transposed   whether the last two axes were swapped before the weight was stored
    row_axes     how many of the first axes are rows of the stored matrix; 1 where a file has no such entry
    parameter    whether the weight was a parameter

:class:`CollectQuantized` undoes this, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from adaptc.errors import ConfigError, PassError, short_repr
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import operands
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.protocol.trace import inline, trace_function
from adaptc.passes.quantized.all_schemes import scheme_from_text, scheme_text
from adaptc.passes.quantized.compiled_linear import LayerWriter, compiled_linear, linear_beside_adaptc
from adaptc.passes.quantized.planar_scheme import in_planes
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor, matrix_shape
from adaptc.passes.quantized.scheme import Scheme

#: the key of a dequantised weight's record in a node's custom meta
QUANTIZED_META = "adaptc_quantized"
#: the key of the name of the node that a rounded input is made of
ROUNDED_META = "adaptc_rounded"


@dataclass(frozen=True)
class ExpandQuantized(Pass):
    """A pass that writes quantised weights as plain tensors; its count is that of the weights.

    ``fuse`` lets linear layers compute as ``linear_beside_adaptc`` says, or call ``adaptc::qlinear``. It is for code
    that runs beside adaptc and is not written to a file. With ``planar`` such a call reads weights in planes, where
    there is such a form.
    ``compiled`` lets them compute as ``compiled_linear`` says, for code that is compiled and cannot be collected again.
    Without ``with_records`` nothing says what the weights were. Ops that are decomposed later would each keep a record.
    """

    name: ClassVar[str] = "expand_quantized"

    fuse: bool = False
    planar: bool = False
    compiled: bool = False
    with_records: bool = True

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        names_by_node: dict[fx.Node, list[str]] = {}
        for fqn, tensor in lifted.state_dict.items():
            if isinstance(tensor, QuantizedTensor):
                names_by_node.setdefault(lifted.placeholders[fqn], []).append(fqn)
        writer = LayerWriter(lifted) if self.compiled or self.fuse else None
        for node, names in names_by_node.items():
            if self.planar and linear_beside_adaptc(lifted.state_dict[names[0]]) is None:
                _call_planar_op(lifted, node, names[0])
            if node.users:
                _expand(lifted, node, names, self.fuse, writer)
            else:
                lifted.remove_tensor(names[0])
        if not self.with_records:
            for node in lifted.graph.nodes:
                for key in (QUANTIZED_META, ROUNDED_META):
                    node.meta.get("custom", {}).pop(key, None)
        root = None if writer is None or not writer.branches else _with_modules(subject.graph_module, writer.branches)
        return PassResult(lifted.finish(root) if names_by_node else subject, len(names_by_node))


def _with_modules(root: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that has the children of ``root``, and ``modules``."""
    holder = nn.Module()
    for name, child in {**dict(root.named_children()), **modules}.items():
        holder.add_module(name, child)
    return holder


def _expand(lifted: LiftedProgram, node: fx.Node, names: list[str], fuse: bool, writer: LayerWriter | None) -> None:
    weight: QuantizedTensor = lifted.state_dict[names[0]]
    layers = [n for n in node.users if _is_linear_of(n, node)]
    find = linear_beside_adaptc if fuse else compiled_linear
    linear = None if writer is None or not layers else find(weight)
    held = {} if linear is None else dict(linear.tensors)
    if linear is None or len(node.users) > len(layers):
        held |= weight.stored
    added = {role: lifted.add_tensor(f"{names[0]}.{role}", _with_own_memory(t)) for role, t in held.items()}
    if writer is not None and linear is not None:
        for layer in layers:
            writer.replace(layer, linear, {role: added[role] for role in linear.tensors})
    stored = {role: added[role] for role in weight.stored if role in added}
    if fuse:
        for user in [n for n in node.users if _is_linear_of(n, node) and not weight.is_transposed]:
            x, _, bias = operands(user)
            user.target, user.kwargs = torch.ops.adaptc.qlinear.default, {}
            user.args = (x, list(stored.values()), bias, scheme_text(weight.scheme), *weight.matrix_shape)
    elif weight.scheme.rounds_inputs:
        for user in [n for n in node.users if _is_linear_of(n, node)]:
            _round_input(lifted, user, weight.scheme)
    if users := list(node.users):

        def dequantize(*tensors: Tensor) -> Tensor:
            return weight.values_of(dict(zip(stored, tensors, strict=True)))

        region = trace_function(dequantize, [n.meta["val"] for n in stored.values()])
        positions = {n: i for i, n in enumerate(lifted.graph.nodes)}
        first = min(users, key=positions.__getitem__)
        out = inline(lifted.graph, region, list(stored.values()), first, first, lambda role: {})
        record = {
            "names": names,
            "scheme": scheme_text(weight.scheme),
            "shape": list(weight.shape),
            "transposed": weight.is_transposed,
            "row_axes": weight.row_axes,
            "parameter": isinstance(weight, torch.nn.Parameter),
        }
        for made in _region_of(out, set(stored.values())):
            del made.meta["custom"]
            lifted.nodes[made.name] = made
        out.meta["custom"] = {QUANTIZED_META: record}
        node.replace_all_uses_with(out)
    lifted.remove_tensor(names[0])


def _call_planar_op(lifted: LiftedProgram, node: fx.Node, name: str) -> None:
    """Let the linear layers of the weight called ``name`` call ``adaptc::qlinear`` with its planes, if it has any."""
    weight: QuantizedTensor = lifted.state_dict[name]
    layers = [n for n in node.users if _is_linear_of(n, node)]
    found = in_planes(weight.scheme, weight.stored, weight.matrix_shape)
    if not layers or found is None or weight.is_transposed or weight.ndim != 2:
        return
    planar, stored = found
    # Something else may read the weight as it is stored, whose roles have the same names.
    held = [lifted.add_tensor(f"{name}.plane_{role}", t) for role, t in stored.items()]
    for layer in layers:
        x, _, bias = operands(layer)
        layer.target, layer.kwargs = torch.ops.adaptc.qlinear.default, {}
        layer.args = (x, held, bias, scheme_text(planar), *weight.matrix_shape)


def _with_own_memory(t: Tensor) -> Tensor:
    """Return ``t``, or a copy where it is a part of other memory, which torch writes to files as a whole."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def _round_input(lifted: LiftedProgram, user: fx.Node, scheme: Scheme) -> None:
    """Let a linear layer read a rounded input."""
    x = operands(user)[0]

    def round_input(value: Tensor) -> Tensor:
        return scheme.round_input(value)

    region = trace_function(round_input, [x.meta["val"]])
    out = inline(lifted.graph, region, [x], user, user, lambda role: {})
    for made in _region_of(out, {x}):
        del made.meta["custom"]
        lifted.nodes[made.name] = made
    out.meta["custom"] = {ROUNDED_META: x.name}
    user.update_arg(0, out)


def _is_linear_of(node: fx.Node, weight: fx.Node) -> bool:
    if node.target is not torch.ops.aten.linear.default:
        return False
    x, w, bias = operands(node)
    return w is weight and x is not weight and bias is not weight


@dataclass(frozen=True)
class CollectQuantized(Pass):
    """A pass that turns dequantised weights back into quantised ones; its count is that of the weights.

    Raises PassError where a record does not fit the tensors that the program has.
    """

    name: ClassVar[str] = "collect_quantized"

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        found = [(n, r) for n in lifted.graph.nodes if (r := _record_of(n)) is not None]
        for node, record in found:
            _collect(lifted, node, record)
        for node in [n for n in lifted.graph.nodes if ROUNDED_META in (n.meta.get("custom") or {})]:
            x = lifted.nodes[node.meta["custom"][ROUNDED_META]]
            node.replace_all_uses_with(x)
            _erase(lifted, _region_of(node, {x}))
        return PassResult(lifted.finish() if found else subject, len(found))


def _record_of(node: fx.Node) -> Mapping[str, Any] | None:
    custom: Mapping[str, Any] = node.meta.get("custom") or {}
    return custom.get(QUANTIZED_META)


def _collect(lifted: LiftedProgram, out: fx.Node, record: Mapping[str, Any]) -> None:
    names, weight, fqns = _read_weight(lifted, out, record)
    region = _region_of(out, {lifted.placeholders[f] for f in fqns.values()})
    placeholder = lifted.add_tensor(names[0], weight)
    for name in names[1:]:
        lifted.state_dict[name], lifted.placeholders[name] = weight, placeholder
    out.replace_all_uses_with(placeholder)
    _erase(lifted, region)
    for fqn in fqns.values():
        if not lifted.placeholders[fqn].users:
            lifted.remove_tensor(fqn)


def _read_weight(
    lifted: LiftedProgram, out: fx.Node, record: Mapping[str, Any]
) -> tuple[list[str], Tensor, dict[str, str]]:
    """Return the names of a weight, the weight, and the names of its stored tensors by role.

    Raises PassError, which names the weight, where the record and the tensors do not belong together.
    """
    name = repr(out.name)  # until the record says another
    try:
        names = [str(n) for n in record["names"]]
        name = repr(names[0])
        scheme, is_transposed = scheme_from_text(record["scheme"]), bool(record["transposed"])
        shape = tuple(int(s) for s in record["shape"])
        dtype: torch.dtype = out.meta["val"].dtype
        if shape != tuple(out.meta["val"].shape):
            raise ConfigError(f"its record says {shape}, and the program computes {tuple(out.meta['val'].shape)}")
        row_axes = int(record.get("row_axes", 1))
        rows, columns = matrix_shape(shape, is_transposed, row_axes)
        fqns = {role: f"{names[0]}.{role}" for role in scheme.layout(rows, columns)}
        if missing := [f for f in fqns.values() if f not in lifted.state_dict]:
            raise ConfigError(f"it lacks its tensor {missing[0]!r}")
        stored = {role: lifted.tensor(f) for role, f in fqns.items()}
        scheme.check(stored, rows, columns)
        weight: Tensor = QuantizedTensor(scheme, stored, shape, dtype, is_transposed, row_axes)
        return names, nn.Parameter(weight, requires_grad=False) if record["parameter"] else weight, fqns
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"its record is {short_repr(dict(record))}"
        raise PassError(f"the quantised weight {name} is damaged: {reason}") from error


def _erase(lifted: LiftedProgram, region: list[fx.Node]) -> None:
    for node in region:
        lifted.graph.erase_node(node)
        lifted.nodes.pop(node.name, None)


def _region_of(out: fx.Node, inputs: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes that ``out`` is made of, from ``inputs``, each before all nodes that it reads."""
    found: dict[fx.Node, None] = {}
    stack = [out]
    while stack:
        node = stack.pop()
        if node not in inputs and node.op == "call_function":
            found.pop(node, None)
            found[node] = None
            stack.extend(node.all_input_nodes)
    return list(found)
