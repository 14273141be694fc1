"""Remember how a binding is made from an adapter's tensors, for all adapters of the same structure.

Two adapters have one structure where their configs are equal and their tensors agree in keys, shapes, dtypes and
devices. A recipe is learned from a binding that :func:`adaptc.binding.bind` made. It has for each value the key of its
tensor, or the constant. The next binding of that structure is a loop over these, equal in every value, method and name.

That is right only where no value depends on the contents of the adapter's tensors, or on the base. So there is a recipe
only where all of the following holds, and every other adapter is bound in full:

- the methods leave :meth:`Method.read` and :meth:`Method.derived` as they are, so a slot has the file's tensor itself;
- all keys are those of slots, each slot is one site's own, and the adapter changes nothing of the base;
- constants are scales, which follow from the config, and the identity values of :meth:`Method.identity`, which are
  fills; a method that makes them of the weight (DoRA) has a recipe where it needs none;
- where ranks are read off the tensors, the method reads the same ones off tensors without values.

Checks of values are made for every adapter. The caller looks for NaN and infinity. A recipe checks that the values it
casts fit the slot's dtype.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptc.adapter_files.directory import all_finite
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.grouped_slots import groups
from adaptc.locks import free_in_children
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method, Slot

#: the number of structures kept per program, with or without a recipe; the least recently used is dropped first
MOST = 16
_PLAIN = (Tensor, Parameter)


@dataclass(frozen=True)
class _Taken:
    """A value that is the adapter's own tensor. ``to`` is None where it already has the slot's device and dtype."""

    fqn: str
    key: str
    parameter: bool
    to: tuple[torch.device, torch.dtype] | None


@dataclass(frozen=True)
class _Filled:
    fqn: str
    shape: tuple[int, ...]
    fill: float
    parameter: bool
    device: torch.device
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        value = torch.full(self.shape, self.fill, dtype=self.dtype, device=self.device)
        return Parameter(value, requires_grad=False) if self.parameter else value


class Recipe:
    """A recipe learned from one binding, to be called with the tensors of another adapter of the same structure."""

    def __init__(self, binding: Binding, taken: list[_Taken], filled: list[_Filled], fit: bool) -> None:
        self.kind = type(binding.config)
        # A config with the ranks of the tensors, which are those of the next adapter's tensors, too.
        self._config = binding.config if fit else None
        self._order, self._methods, self._name = tuple(binding.values), dict(binding.methods), binding.name
        self._parameters = [(t.fqn, t.key) for t in taken if t.to is None and t.parameter]
        self._others = [t for t in taken if t.to is not None or not t.parameter]
        self._filled = filled

    def __call__(
        self, config: AdapterConfig, tensors: Mapping[str, Tensor], source: str, *, copy: bool
    ) -> Binding | None:
        """Return the binding of these tensors, or None where a cast makes a value infinite.

        ``copy`` copies the values that would share memory with ``tensors``.
        """
        values: dict[str, Any] = dict.fromkeys(self._order)
        for fqn, key in self._parameters:
            values[fqn] = Parameter(tensors[key].detach().clone() if copy else tensors[key], requires_grad=False)
        cast: list[Tensor] = []
        for t in self._others:
            value = tensors[t.key].detach()
            if t.to is not None:
                value = value.to(*t.to)
                cast.append(value)
            elif copy:
                value = value.clone()
            values[t.fqn] = Parameter(value, requires_grad=False) if t.parameter else value
        if not all_finite(cast):
            return None
        for f in self._filled:
            values[f.fqn] = f()
        return Binding(values, dict(self._methods), self._config or config, name=self._name, source=source)


class Recipes:
    """The recipes of one program, and of the programs made from it that share its adaptation and ops.

    A pass makes a program with other ops, which starts without recipes.
    """

    def __init__(self, attachments: Sequence[Attachment], ops: Mapping[str, Op]) -> None:
        self.ops = ops
        #: the names a binding must have values for
        self.needed = frozenset(f for a in attachments for f in a.tensor_names)
        self._lock = free_in_children(threading.Lock())
        self.known: OrderedDict[Hashable, Recipe | None] = OrderedDict()
        self._fitting: weakref.WeakSet[Binding] = weakref.WeakSet()

    def fit(self, binding: Binding) -> bool:
        """Return whether the binding is known to fit the program."""
        with self._lock:
            return binding in self._fitting

    def note(self, binding: Binding) -> Binding:
        """Remember that the binding fits, since it was made for the program or has been checked; return it."""
        with self._lock:
            self._fitting.add(binding)
        return binding

    def find(self, structure: Hashable) -> Recipe | None:
        with self._lock:
            if structure in self.known:
                self.known.move_to_end(structure)
            return self.known.get(structure)

    def learn(
        self, structure: Hashable, spec: BindingSpec, binding: Binding, tensors: Mapping[str, Tensor], *, fit: bool
    ) -> None:
        """Remember how ``binding`` was made from ``tensors``, by their keys, or that its structure has no recipe."""
        if structure is None or spec.ops is not self.ops or spec.trainable:
            return
        with self._lock:
            if structure in self.known:
                return
        recipe = _recipe(spec, binding, tensors, fit=fit)
        with self._lock:
            self.known[structure] = recipe
            while len(self.known) > MOST:
                self.known.popitem(last=False)


def structure(spec: BindingSpec, config: Any, tensors: Mapping[str, Tensor], *more: Hashable) -> Hashable | None:
    """Return a key that is equal for two adapters with one recipe, or None where no recipe may be used or made.

    ``config`` is a config, or the content of its file. ``more`` is whatever else the binding depends on.
    """
    if spec.trainable:
        return None
    out: list[Hashable] = []
    for key, t in tensors.items():
        if type(t) not in _PLAIN or t.layout is not torch.strided or t.is_meta:
            return None
        out.append((key, t.shape, t.dtype, t.device))
    try:
        frozen = _frozen(config if isinstance(config, dict) else vars(config))
    except (_NotPlain, RecursionError):  # making the config refuses one that is nested too deep
        return None
    # Weights shared with the model change their dtype and device when the user moves the model, and slots follow them.
    weights = [(w.dtype, w.device) for w in (spec.weights[a.fqn] for a in spec.attachments)]
    return more, type(config), frozen, tuple(weights), tuple(out)


class _NotPlain(Exception):
    pass


def _frozen(value: Any) -> Hashable:
    """Return a hashable key, equal for plain values that no config can tell apart. The order of dicts counts.

    Raises _NotPlain for a value of any other type.
    """
    kind = type(value)
    if kind is str or value is None:
        return value
    if kind in (bool, int, float):
        return kind, repr(value)
    if kind in (list, tuple):
        return kind, tuple(map(_frozen, value))
    if kind is dict:
        return kind, tuple([(_frozen(k), _frozen(v)) for k, v in value.items()])
    if kind in (set, frozenset):
        return kind, frozenset(map(_frozen, value))
    raise _NotPlain


def _recipe(spec: BindingSpec, binding: Binding, tensors: Mapping[str, Tensor], *, fit: bool) -> Recipe | None:
    """Return the recipe of ``binding``, or None where it is not certain that one is right."""
    if binding.base or binding.carried or binding.parts:
        return None
    if groups(spec.attachments, spec.ops, binding.methods, spec.weights):
        return None
    taken: list[_Taken] = []
    filled: list[_Filled] = []
    for a in spec.attachments:
        op, own = spec.ops[a.id], binding.methods.get(a.id)
        if not passes_through(a.method, op) or not (own is None or passes_through(own, op)):
            return None
        if fit and own is not None and not _sized_by_shapes(a, op, binding.config, tensors):
            return None
        dtype, device = spec.dtype(a), spec.weights[a.fqn].device
        slots = a.method.slots(op)
        constants = _constants(a, op, own)
        for name, slot in slots.items():
            fqn = a.slots.get(name) or a.slot_fqn(name, slot)
            mine = slot if own is None else own.slots(op).get(name, slot)
            key = a.file_key(name, mine)
            wanted = (device, slot.dtype or dtype)
            if slot.shared or slot.shared_axes_cut or mine.shared or mine.shared_axes_cut:
                return None
            if own is not None and mine.saved and key in tensors:
                same = (tensors[key].device, tensors[key].dtype) == wanted
                taken.append(_Taken(fqn, key, slot.trainable, None if same else wanted))
            elif constants is not None and name in constants and constants[name].dtype == slot.dtype:
                filled.append(_Filled(fqn, constants[name].shape, constants[name].fill, slot.trainable, *wanted))
            else:
                return None
        scale = (a.method if own is None else own).scale(op)
        if scale is not None:
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            filled.append(_Filled(a.scale_slot or a.scale_fqn, (), scale, False, device, kind))
    names = [t.fqn for t in taken] + [f.fqn for f in filled]
    if len(names) != len(set(names)) or set(names) != binding.values.keys() or {t.key for t in taken} != tensors.keys():
        return None
    values = binding.values
    if any(isinstance(values[t.fqn], Parameter) is not t.parameter for t in (*taken, *filled)):
        return None
    known = all(_is(t, tensors[t.key], values[t.fqn]) for t in taken)
    return Recipe(binding, taken, filled, fit) if known and all(_same(f(), values[f.fqn]) for f in filled) else None


def passes_through(method: Method, op: Op) -> bool:
    """Return whether the method gives each site's slots the file's tensors unchanged, and shares none between sites."""
    plain = not method.defines("read", "derived", "unwrap")
    return plain and not method.shares() and not method.keys(op) and not method.moves_base()


def _constants(a: Attachment, op: Op, own: Method | None) -> Mapping[str, Slot] | None:
    """Return the slots whose ``fill`` is the value where an adapter has no tensor, or None where the weight may
    decide."""
    methods = [a.method] if own is None else [a.method, own]
    if any(m.defines("identity", "absent") for m in methods):
        return None
    return {n: s for m in methods for n, s in m.minimal(op).slots(op).items()}


def _sized_by_shapes(a: Attachment, op: Op, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the method finds an adapter's sizes without the values of its tensors."""
    method = a.method.rebind(config, a).at(op)
    try:
        specs = {**a.method.slots(op), **method.slots(op)}
        found = {n: tensors[k] for n, s in specs.items() if (k := a.file_key(n, s)) in tensors}
        blank = {n: t.detach().to("meta") for n, t in found.items()}
        return method.with_sizes_of(op, blank) == method.with_sizes_of(op, found)
    except Exception:  # a method may fail in any way on a meta tensor
        return False


def _is(t: _Taken, tensor: Tensor, value: Tensor) -> bool:
    """Return whether ``value`` is what the recipe makes of ``tensor``, or a copy of it."""
    if t.to is not None:
        return _same(tensor.detach().to(*t.to), value)
    return value.stride() == tensor.detach().clone().stride() and _same(tensor.detach(), value)


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
