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

from adaptc.capture.repeated_layers.equal_modules import SIMPLE, equal_values, kind_of

Role = tuple[str, str]


def current_tracer() -> Any:
    """Return the tracer of this thread's ``torch.export``, or None outside of one.

    Also returns None where one module object is in the model twice. torch then replaces each by a stand-in that this
    file cannot handle.
    """
    mode = get_proxy_mode()
    tracer: Any = None if mode is None else mode.tracer
    return tracer if hasattr(tracer, "scope_root") and not getattr(tracer, "enable_attr_proxy", True) else None


class Unknown(Exception):
    """An exception for a call with a value that cannot be compared with that of other layers' calls."""


@dataclass
class LayerCall:
    """The tensors of one call of a layer, by role, and all other values that the call is given.

    Making one raises :class:`Unknown` where a value cannot be compared.
    """

    layer: nn.Module
    path: str
    args: tuple
    kwargs: Mapping[str, Any]
    #: the layer's number, which a cache needs to find its tensors; None where no attribute says it
    index: int | None
    tensors: dict[Role, Tensor] = field(default_factory=dict)
    rest: list[Any] = field(default_factory=list)
    caches: int = 0

    def __post_init__(self) -> None:
        self._add("args", self.args)
        self._add("kwargs", dict(self.kwargs))
        for name, t in self.layer.named_parameters(remove_duplicate=False):
            self.tensors["weight", name] = t
        for name, t in self.layer.named_buffers(remove_duplicate=False):
            self.tensors["weight", name] = t
        cpu, gpu = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        self.rest += [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cpu, gpu]
        self.kinds = {role: kind_of(t) for role, t in self.tensors.items()}

    def _add(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors["input", path] = value
        elif type(value) in (tuple, list, dict):
            items = list(value.items()) if type(value) is dict else list(enumerate(value))
            self.rest.append((type(value).__name__, [str(k) for k, _ in items]))
            for key, inner in items:
                self._add(f"{path}.{key}", inner)
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.rest.append(str(value.node.expr))
        elif callable(of_layer := getattr(value, "traced_layer", None)):
            if self.index is None:
                raise Unknown
            found: Any = of_layer(self.index)
            tensors, facts = found
            for i, t in enumerate(tensors):
                self.tensors["cache", f"{path}.{i}"] = t
            self.rest.append(facts)
            self.caches += 1
        elif isinstance(value, SIMPLE):
            self.rest.append(value)
        else:
            raise Unknown

    def like(self, other: LayerCall) -> bool:
        """Return whether two calls are given equal values, apart from the values of tensors."""
        return self.kinds == other.kinds and equal_values(self.rest, other.rest)

    def nodes(self, tracer: Any) -> dict[Role, fx.Node | None]:
        return {role: node_of(t, tracer) for role, t in self.tensors.items()}


def node_of(t: Tensor, tracer: Any) -> fx.Node | None:
    """Return the graph node of tensor ``t``, or None where it has no node or is a known constant."""
    slot: Any = get_proxy_slot(t, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


class Segment:
    """The nodes that one call of a layer traced. Making one raises :class:`Unknown` where the nodes cannot be
    copied."""

    def __init__(
        self, call: LayerCall, before: Mapping[Role, fx.Node | None], nodes: list[fx.Node], out: Any, tracer: Any
    ) -> None:
        self.call, self.nodes, self.out = call, [n for n in nodes if not _is_size(n)], out
        self.inside = inside = dict.fromkeys(nodes)
        self.roles: dict[fx.Node, Role] = {}
        for role, node in before.items():
            if node is not None:
                self.roles.setdefault(node, role)
        self.before = before
        for node in nodes:
            if node.op != "call_function" or "unbacked_bindings" in node.meta or _reads_graphs(node):
                raise Unknown
        after = call.nodes(tracer)
        #: roles whose tensors the call wrote to in place -> the tensor's node after the call
        self.written = {role: node for role, node in after.items() if node is not before[role] and node in inside}
        if any(after[role] is not before[role] and role not in self.written for role in after):
            raise Unknown
        #: (tensor, node) of each returned tensor that the call computed
        self.made: list[tuple[Tensor, fx.Node]] = []
        own = {id(t) for t in call.tensors.values()}
        for t in _tensors_in(out):
            node = node_of(t, tracer)
            if node is None or (id(t) in own and node not in inside and node not in self.roles):
                raise Unknown
            if id(t) not in own and node in inside:
                self.made.append((t, node))
            elif id(t) not in own:
                raise Unknown

    def like(self, other: Segment) -> bool:
        """Return whether two segments are equal, apart from which tensors have the roles."""
        if len(self.nodes) != len(other.nodes) or not self.call.like(other.call):
            return False
        same: dict[fx.Node, fx.Node] = {}
        for a, b in zip(self.nodes, other.nodes, strict=True):
            if a.target is not b.target:
                return False
            if not self._like(a.args, b.args, same, other) or not self._like(a.kwargs, b.kwargs, same, other):
                return False
            same[a] = b
        mapped = {role: same[node] for role, node in self.written.items()}
        made = [(same[node], kind_of(t)) for t, node in self.made]
        return mapped == other.written and made == [(node, kind_of(t)) for t, node in other.made]

    def _like(self, a: Any, b: Any, same: Mapping[fx.Node, fx.Node], other: Segment) -> bool:
        if isinstance(a, fx.Node):
            if _is_size(a):
                return isinstance(b, fx.Node) and _is_size(b) and str(a.meta["val"]) == str(b.meta["val"])
            if a in same or not isinstance(b, fx.Node):
                return same.get(a) is b
            role = self.roles.get(a)
            return role == other.roles.get(b) and (role is not None or a is b)
        if isinstance(a, (tuple, list)):
            return (
                type(a) is type(b)
                and len(a) == len(b)
                and all(self._like(x, y, same, other) for x, y in zip(a, b, strict=True))
            )
        if isinstance(a, dict):
            return type(a) is type(b) and a.keys() == b.keys() and all(self._like(a[k], b[k], same, other) for k in a)
        if isinstance(a, slice):
            return isinstance(b, slice) and self._like(
                (a.start, a.stop, a.step), (b.start, b.stop, b.step), same, other
            )
        return equal_values(a, b)

    def leaks(self) -> bool:
        """Return whether later nodes use a tensor that the call neither returned nor wrote to. Uses of a size do not
        count."""
        known = {node for _, node in self.made} | set(self.written.values())
        values = [n for n in self.nodes if n not in known and isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        # torch.export adds asserts of sizes and dtypes at the end of tracing, which use inner nodes of every segment.
        return any(user not in self.inside and not _asks_size(user) for node in values for user in node.users)

    def copied(self, call: LayerCall, tracer: Any) -> Any:
        """Copy this segment's nodes into the graph for ``call``, and return what ``call`` would return.

        Raises :class:`Unknown` where ``call`` is given something else than this segment's call was.
        """
        if not self.call.like(call) or self.leaks():
            raise Unknown
        new = self._mapping(call.nodes(tracer))
        made: dict[int, Tensor] = {}
        with disable_proxy_modes_tracing(), DisableTorchFunction():
            made |= {id(t): _another(t) for t, _ in self.made}
        prefix, path = self.call.path, call.path
        for node in self.nodes:
            copy = tracer.graph.node_copy(node, lambda n: new.get(n, n))
            stack = copy.meta.get("nn_module_stack")
            if stack:
                pairs = stack.items()
                copy.meta["nn_module_stack"] = {
                    _moved(k, prefix, path): (_moved(where, prefix, path), kind) for k, (where, kind) in pairs
                }
            new[node] = copy
        for t, node in self.made:
            track_tensor(made[id(t)], fx.Proxy(new[node], tracer), constant=None, tracer=tracer)
        for role, node in self.written.items():
            track_tensor(call.tensors[role], fx.Proxy(new[node], tracer), constant=None, tracer=tracer)
        theirs = {id(t): call.tensors[role] for role, t in self.call.tensors.items()}
        return _with_tensors(self.out, {**theirs, **made})

    def _mapping(self, nodes: Mapping[Role, fx.Node | None]) -> dict[fx.Node, fx.Node]:
        new: dict[fx.Node, fx.Node] = {}
        for role, node in self.before.items():
            other = nodes[role]
            if node is None and other is None:
                continue
            if node is None or other is None or new.setdefault(node, other) is not other:
                raise Unknown
        written = [nodes[role] for role in self.written]
        if len(dict.fromkeys(written)) < len({self.before[role] for role in self.written}):
            raise Unknown
        return new


def _is_size(node: fx.Node) -> bool:
    """Return whether a node's value is a number.

    Equal layers have equal sizes, but torch reads each from whichever tensor it finds, so their nodes may differ.
    """
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float))


def _asks_size(node: fx.Node) -> bool:
    """Return whether a node gives a size of its input, which is equal for all layers, or returns nothing."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (not schema.returns or schema.name.startswith("aten::sym_"))


def _reads_graphs(node: fx.Node) -> bool:
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith((f"{old}.", f"{old}@")) else path


def _another(t: Tensor) -> Tensor:
    """Return a new fake tensor like ``t``, which is not a leaf where it needs gradients."""
    with t.fake_mode, torch.no_grad():  # type: ignore[attr-defined]  # of fake tensors
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    if not t.requires_grad:
        return new
    with t.fake_mode, torch.enable_grad():  # type: ignore[attr-defined]
        return new.requires_grad_().clone()


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list):
        return [t for v in value for t in _tensors_in(v)]
    if type(value) is dict:
        return [t for v in value.values() for t in _tensors_in(v)]
    if not isinstance(value, SIMPLE):
        raise Unknown
    return []


def _with_tensors(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_with_tensors(v, tensors) for v in value)
    if type(value) is dict:
        return {k: _with_tensors(v, tensors) for k, v in value.items()}
    return value
