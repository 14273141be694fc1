"""Trace some of a model's equal layers during ``torch.export``, and copy their nodes for the others.

The graph is the one that full tracing would give, but only about three layers of a group are run. Copying starts once
two consecutive layers have traced the same nodes. Neither may write to an attribute, return an unknown value, or read
its layer number. Reading it is allowed where a cache tells what it holds for each layer. A layer that is given anything
else is traced as usual.

Tracing takes most of the time of a capture, and the same time for each layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as torch_module

from adaptc.capture.repeated_layers.equal_modules import equal_layers, index_attributes
from adaptc.capture.repeated_layers.layer_calls import LayerCall, NotComparable, Segment, current_tracer


class CopiedLayers:
    """The result of tracing equal layers once: how many calls were copied, and from which segments."""

    def __init__(self) -> None:
        self.copy_count = 0
        self.copied_segments: list[Segment] = []

    def is_sound(self) -> bool:
        """Return whether later nodes used only what the copied calls returned or wrote, which copies have, too."""
        return not any(segment.has_leaks() for segment in self.copied_segments)


@contextlib.contextmanager
def copy_equal_layers(model: nn.Module) -> Iterator[CopiedLayers]:
    """Run the block, in which exports of ``model`` copy equal layers, and restore the model afterwards.

    Where :meth:`Once.is_sound` is false afterwards, the model must be exported again outside of this block.
    """
    once = CopiedLayers()
    with contextlib.ExitStack() as stack:
        if not _has_global_hooks(model):
            for layers in equal_layers(model):
                _LayerGroup(once, layers).enter(stack)
        yield once


def _has_global_hooks(model: nn.Module) -> bool:
    """Return whether global forward hooks, which see all modules, are registered."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(torch_module, name, None) for name in names)


class _LayerGroup:
    """A group of equal layers of one list, with the last traced segment and the one that is proven fit for copying."""

    def __init__(self, copied_layers: CopiedLayers, layers: list[tuple[str, nn.Module]]) -> None:
        self.copied_layers, self.layers = copied_layers, layers
        self.indices = index_attributes([layer for _, layer in layers])
        self.tracer: Any = None
        self.last_segment: Segment | None = None
        self.proven_segment: Segment | None = None
        self.called_layers: set[int] = set()
        self.index_was_read = False

    def enter(self, stack: contextlib.ExitStack) -> None:
        for _, layer in self.layers:
            modules = dict(layer.named_modules())
            for name in dict.fromkeys(name for name, _ in self.indices):
                attributes = [a for n, a in self.indices if n == name]
                stack.callback(setattr, modules[name], "__class__", type(modules[name]))
                modules[name].__class__ = _watch_attributes(type(modules[name]), attributes, self._note_index_read)
            stack.callback(vars(layer).pop, "forward", None)
            vars(layer)["forward"] = self._wrap_forward(layer)

    def _note_index_read(self) -> None:
        self.index_was_read = True

    def _wrap_forward(self, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            tracer = current_tracer()
            if tracer is None:
                return forward(*args, **kwargs)
            if tracer is not self.tracer:
                self.tracer, self.last_segment, self.proven_segment = tracer, None, None
                self.called_layers.clear()
            try:
                if id(layer) in self.called_layers:
                    raise NotComparable
                self.called_layers.add(id(layer))
                layer_call = LayerCall(layer, _traced_path(layer, tracer), args, kwargs, self._layer_index(layer))
            except NotComparable:
                self.last_segment = None
                return forward(*args, **kwargs)
            if self.proven_segment is not None:
                with contextlib.suppress(NotComparable):
                    out = self.proven_segment.copy_for(layer_call, tracer)
                    self.copied_layers.copy_count += 1
                    return out
            return self._trace(forward, layer_call, tracer)

        return call

    def _layer_index(self, layer: nn.Module) -> int | None:
        modules = dict(layer.named_modules())
        found = {vars(modules[name])[attribute] for name, attribute in self.indices}
        return found.pop() if len(found) == 1 else None

    def _trace(self, forward: Callable[..., Any], call: LayerCall, tracer: Any) -> Any:
        role_nodes, attributes = call.nodes_by_role(tracer), _snapshot_attributes(call.layer)
        end = next(reversed(tracer.graph.nodes), None)
        outer, self.index_was_read = self.index_was_read, False
        out = forward(*call.args, **call.kwargs)
        read, self.index_was_read = self.index_was_read, outer or self.index_was_read
        segment = None
        with contextlib.suppress(NotComparable):
            if not (read and not call.cache_count) and _is_unchanged(attributes) and end is not None:
                segment = Segment(call, role_nodes, _nodes_after(end), out, tracer)
        if segment is not None and self.last_segment is not None and self.last_segment.matches(segment):
            self.proven_segment = segment
            self.copied_layers.copied_segments.append(segment)
        self.last_segment = segment
        return out


def _traced_path(layer: nn.Module, tracer: Any) -> str:
    """Return the path of a layer as the tracer writes it into nodes. Raises Unknown where the tracer has none."""
    try:
        return tracer.path_of_module(layer)
    except (NameError, AttributeError):
        raise NotComparable from None


def _watch_attributes(kind: type, attributes: list[str], note: Callable[[], None]) -> type:
    """Return a subclass of ``kind`` that calls ``note`` when one of these attributes is read."""

    def watched_property(name: str) -> property:
        def read(self: Any) -> Any:
            note()
            try:
                return vars(self)[name]
            except KeyError:
                raise AttributeError(name) from None

        def write(self: Any, value: Any) -> None:
            vars(self)[name] = value

        return property(read, write)

    names = {name: watched_property(name) for name in attributes}
    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (kind,), {**names, **same})


def _nodes_after(node: fx.Node) -> list[fx.Node]:
    nodes = []
    while (node := node.next).op != "root":
        nodes.append(node)
    return nodes


def _snapshot_attributes(layer: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the attribute dicts of a layer's modules, each with a snapshot of its contents."""
    held = [d for m in layer.modules() for d in (vars(m), vars(m)["_buffers"], vars(m)["_parameters"])]
    return [(now, {k: _snapshot(v) for k, v in now.items()}) for now in held]


def _snapshot(value: Any) -> Any:
    """Return a snapshot of a value that changes where the value is replaced, or a container in it is written to."""
    if type(value) in (list, tuple):
        return id(value), [_snapshot(v) for v in value]
    if type(value) is dict:
        return id(value), [(k, _snapshot(v)) for k, v in value.items()]
    if type(value) is set:
        return id(value), set(value)
    return id(value)


def _is_unchanged(attributes: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    return all({k: _snapshot(v) for k, v in now.items()} == before for now, before in attributes)
