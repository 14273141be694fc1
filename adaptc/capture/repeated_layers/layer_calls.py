"""Describe one call of a layer during tracing: its tensors by role, and the nodes that it adds to the graph.

A :class:`LayerCall` gives each tensor of the call a role: an input, a parameter or buffer, or a tensor of the KV cache
for this layer. A :class:`Segment` holds the nodes that the call traced. Each tensor that it reads from outside has such
a role, or is the same in all calls. Equal segments of two layers differ in their tensors only. A copy of one for a
third layer is then what tracing that layer would give.

Private torch use, with the public route that was tried: ``get_proxy_slot``, ``track_tensor``, ``get_proxy_mode`` and
``disable_proxy_modes_tracing`` of ``torch.fx.experimental.proxy_tensor``. They find the node of a tensor, and assign a
node to a tensor, while a trace is under way. Public: a custom op in place of each layer, replaced afterwards. Caches
and their writes in place would have to be inputs and outputs of that op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DisableTorchFunction
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor,
)

from adaptc.capture.repeated_layers.equal_modules import IMMUTABLE_TYPES, are_equal_values, tensor_signature

Role = tuple[str, str]


def current_tracer() -> Any:
    """Return the tracer of this thread's ``torch.export``, or None outside of one.

    Also returns None where one module object is in the model twice. torch then replaces each by a stand-in that this
    file cannot handle.
    """
    mode = get_proxy_mode()
    tracer: Any = None if mode is None else mode.tracer
    return tracer if hasattr(tracer, "scope_root") and not getattr(tracer, "enable_attr_proxy", True) else None


class NotComparable(Exception):
    """An exception for a call with a value that cannot be compared with that of other layers' calls."""


@dataclass
class LayerCall:
    """The tensors of one call of a layer, by role, and all other values that the call is given.

    Making one raises :class:`NotComparable` where a value cannot be compared.
    """

    layer: nn.Module
    path: str
    args: tuple
    kwargs: Mapping[str, Any]
    #: the layer's number, which a cache needs to find its tensors; None where no attribute says it
    index: int | None
    tensors: dict[Role, Tensor] = field(default_factory=dict)
    other_values: list[Any] = field(default_factory=list)
    cache_count: int = 0

    def __post_init__(self) -> None:
        self._add("args", self.args)
        self._add("kwargs", dict(self.kwargs))
        for name, t in self.layer.named_parameters(remove_duplicate=False):
            self.tensors["weight", name] = t
        for name, t in self.layer.named_buffers(remove_duplicate=False):
            self.tensors["weight", name] = t
        cpu, gpu = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        self.other_values += [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cpu, gpu]
        self.signatures = {role: tensor_signature(t) for role, t in self.tensors.items()}

    def _add(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors["input", path] = value
        elif type(value) in (tuple, list, dict):
            items = list(value.items()) if type(value) is dict else list(enumerate(value))
            self.other_values.append((type(value).__name__, [str(k) for k, _ in items]))
            for key, inner in items:
                self._add(f"{path}.{key}", inner)
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.other_values.append(str(value.node.expr))
        elif callable(of_layer := getattr(value, "traced_layer", None)):
            if self.index is None:
                raise NotComparable
            found: Any = of_layer(self.index)
            tensors, facts = found
            for i, t in enumerate(tensors):
                self.tensors["cache", f"{path}.{i}"] = t
            self.other_values.append(facts)
            self.cache_count += 1
        elif isinstance(value, IMMUTABLE_TYPES):
            self.other_values.append(value)
        else:
            raise NotComparable

    def matches(self, other: LayerCall) -> bool:
        """Return whether two calls are given equal values, apart from the values of tensors."""
        return self.signatures == other.signatures and are_equal_values(self.other_values, other.other_values)

    def nodes_by_role(self, tracer: Any) -> dict[Role, fx.Node | None]:
        return {role: find_node(t, tracer) for role, t in self.tensors.items()}


def find_node(t: Tensor, tracer: Any) -> fx.Node | None:
    """Return the graph node of tensor ``t``, or None where it has no node or is a known constant."""
    slot: Any = get_proxy_slot(t, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


class Segment:
    """The nodes that one call of a layer traced. Making one raises :class:`NotComparable` where the nodes cannot be
    copied."""

    def __init__(
        self, call: LayerCall, role_nodes: Mapping[Role, fx.Node | None], nodes: list[fx.Node], out: Any, tracer: Any
    ) -> None:
        self.call, self.nodes, self.out = call, [n for n in nodes if not _is_size(n)], out
        self.node_set = inside = dict.fromkeys(nodes)
        self.roles: dict[fx.Node, Role] = {}
        for role, node in role_nodes.items():
            if node is not None:
                self.roles.setdefault(node, role)
        self.role_nodes = role_nodes
        for node in nodes:
            if node.op != "call_function" or "unbacked_bindings" in node.meta or _reads_graphs(node):
                raise NotComparable
        after = call.nodes_by_role(tracer)
        #: roles whose tensors the call wrote to in place -> the tensor's node after the call
        self.written_roles = {
            role: node for role, node in after.items() if node is not role_nodes[role] and node in inside
        }
        if any(after[role] is not role_nodes[role] and role not in self.written_roles for role in after):
            raise NotComparable
        #: (tensor, node) of each returned tensor that the call computed
        self.computed_outputs: list[tuple[Tensor, fx.Node]] = []
        own = {id(t) for t in call.tensors.values()}
        for t in _collect_tensors(out):
            node = find_node(t, tracer)
            if node is None or (id(t) in own and node not in inside and node not in self.roles):
                raise NotComparable
            if id(t) not in own and node in inside:
                self.computed_outputs.append((t, node))
            elif id(t) not in own:
                raise NotComparable

    def matches(self, other: Segment) -> bool:
        """Return whether two segments are equal, apart from which tensors have the roles."""
        if len(self.nodes) != len(other.nodes) or not self.call.matches(other.call):
            return False
        node_map: dict[fx.Node, fx.Node] = {}
        for a, b in zip(self.nodes, other.nodes, strict=True):
            if a.target is not b.target:
                return False
            if not self._matches(a.args, b.args, node_map, other) or not self._matches(
                a.kwargs, b.kwargs, node_map, other
            ):
                return False
            node_map[a] = b
        mapped = {role: node_map[node] for role, node in self.written_roles.items()}
        made = [(node_map[node], tensor_signature(t)) for t, node in self.computed_outputs]
        return mapped == other.written_roles and made == [
            (node, tensor_signature(t)) for t, node in other.computed_outputs
        ]

    def _matches(self, a: Any, b: Any, node_map: Mapping[fx.Node, fx.Node], other: Segment) -> bool:
        if isinstance(a, fx.Node):
            if _is_size(a):
                return isinstance(b, fx.Node) and _is_size(b) and str(a.meta["val"]) == str(b.meta["val"])
            if a in node_map or not isinstance(b, fx.Node):
                return node_map.get(a) is b
            role = self.roles.get(a)
            return role == other.roles.get(b) and (role is not None or a is b)
        if isinstance(a, (tuple, list)):
            return (
                type(a) is type(b)
                and len(a) == len(b)
                and all(self._matches(x, y, node_map, other) for x, y in zip(a, b, strict=True))
            )
        if isinstance(a, dict):
            return (
                type(a) is type(b)
                and a.keys() == b.keys()
                and all(self._matches(a[k], b[k], node_map, other) for k in a)
            )
        if isinstance(a, slice):
            return isinstance(b, slice) and self._matches(
                (a.start, a.stop, a.step), (b.start, b.stop, b.step), node_map, other
            )
        return are_equal_values(a, b)

    def has_leaks(self) -> bool:
        """Return whether later nodes use a tensor that the call neither returned nor wrote to. Uses of a size do not
        count."""
        known = {node for _, node in self.computed_outputs} | set(self.written_roles.values())
        values = [n for n in self.nodes if n not in known and isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        # torch.export adds asserts of sizes and dtypes at the end of tracing, which use inner nodes of every segment.
        return any(user not in self.node_set and not _reads_size(user) for node in values for user in node.users)

    def copy_for(self, call: LayerCall, tracer: Any) -> Any:
        """Copy this segment's nodes into the graph for ``call``, and return what ``call`` would return.

        Raises :class:`NotComparable` where ``call`` is given something else than this segment's call was.
        """
        if not self.call.matches(call) or self.has_leaks():
            raise NotComparable
        node_map = self._map_role_nodes(call.nodes_by_role(tracer))
        new_tensors: dict[int, Tensor] = {}
        with disable_proxy_modes_tracing(), DisableTorchFunction():
            new_tensors |= {id(t): _fake_like(t) for t, _ in self.computed_outputs}
        prefix, path = self.call.path, call.path
        for node in self.nodes:
            copy = tracer.graph.node_copy(node, lambda n: node_map.get(n, n))
            stack = copy.meta.get("nn_module_stack")
            if stack:
                pairs = stack.items()
                copy.meta["nn_module_stack"] = {
                    _replace_path_prefix(k, prefix, path): (_replace_path_prefix(where, prefix, path), kind)
                    for k, (where, kind) in pairs
                }
            node_map[node] = copy
        for t, node in self.computed_outputs:
            track_tensor(new_tensors[id(t)], fx.Proxy(node_map[node], tracer), constant=None, tracer=tracer)
        for role, node in self.written_roles.items():
            track_tensor(call.tensors[role], fx.Proxy(node_map[node], tracer), constant=None, tracer=tracer)
        theirs = {id(t): call.tensors[role] for role, t in self.call.tensors.items()}
        return _replace_tensors(self.out, {**theirs, **new_tensors})

    def _map_role_nodes(self, nodes: Mapping[Role, fx.Node | None]) -> dict[fx.Node, fx.Node]:
        new: dict[fx.Node, fx.Node] = {}
        for role, node in self.role_nodes.items():
            other = nodes[role]
            if node is None and other is None:
                continue
            if node is None or other is None or new.setdefault(node, other) is not other:
                raise NotComparable
        written = [nodes[role] for role in self.written_roles]
        if len(dict.fromkeys(written)) < len({self.role_nodes[role] for role in self.written_roles}):
            raise NotComparable
        return new


def _is_size(node: fx.Node) -> bool:
    """Return whether a node's value is a number.

    Equal layers have equal sizes, but torch reads each from whichever tensor it finds, so their nodes may differ.
    """
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def _reads_size(node: fx.Node) -> bool:
    """Return whether a node gives a size of its input, which is equal for all layers, or returns nothing."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (not schema.returns or schema.name.startswith("aten::sym_"))


def _reads_graphs(node: fx.Node) -> bool:
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _replace_path_prefix(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith((f"{old}.", f"{old}@")) else path


def _fake_like(t: Tensor) -> Tensor:
    """Return a new fake tensor like ``t``, which is not a leaf where it needs gradients."""
    with t.fake_mode, torch.no_grad():  # type: ignore[attr-defined]  # of fake tensors
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    if not t.requires_grad:
        return new
    with t.fake_mode, torch.enable_grad():  # type: ignore[attr-defined]
        return new.requires_grad_().clone()


def _collect_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [t for v in value for t in _collect_tensors(v)]
    if type(value) is dict:
        return [t for v in value.values() for t in _collect_tensors(v)]
    if not isinstance(value, IMMUTABLE_TYPES):
        raise NotComparable
    return []


def _replace_tensors(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_replace_tensors(v, tensors) for v in value)
    if type(value) is dict:
        return {k: _replace_tensors(v, tensors) for k, v in value.items()}
    return value
