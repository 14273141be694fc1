"""Recipes: how a binding is made of an adapter's tensors, remembered from one adapter for all of its structure.

Two adapters have one structure where their configs are equal and their tensors agree in keys, shapes, dtypes and
devices. Before: a binding that :func:`adaptc.binding.bind` made. After: for each of its values the key of the tensor it
is, or the constant; the next binding of that structure is a loop over these, equal in every value, method and name.

That is right only where a value cannot depend on what the adapter's tensors hold, or on the base, so there is a recipe
only where all of this is so, and every other adapter goes the long way:

- the methods leave :meth:`Method.read` and :meth:`Method.derived` as they are, so a slot has the file's tensor itself;
- all keys are those of slots, each slot is one site's own, and the adapter changes nothing of the base;
- constants are scales, which follow from the config, and the identity values of :meth:`Method.identity`, which are
  fills; a method that makes them of the weight (DoRA) has a recipe where it needs none;
- where ranks are read off the tensors, the method reads the same ones off tensors without values.

What depends on values is checked for every adapter: the caller looks for NaN and infinity, and a recipe looks whether
what it casts fits the slot's dtype.
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

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.groups import groups
from adaptc.locks import free_in_children
from adaptc.methods import AdapterConfig
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.method import Method, Slot
from adaptc.passes.ir.ops import Op
from adaptc.peft_files.directory import all_finite

#: recipes, and structures that have none, kept per program; the one not used for longest goes first
MOST = 16
_PLAIN = (Tensor, Parameter)


@dataclass(frozen=True)
class _Taken:
    """A value that is the adapter's own tensor; ``to`` None where it has the slot's device and dtype already."""

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
    """Made of one binding; call it with the tensors of another adapter of the same structure."""

    def __init__(self, binding: Binding, taken: list[_Taken], filled: list[_Filled], fit: bool) -> None:
        self.kind = type(binding.config)
        # With the ranks of its tensors, which the next ones have too.
        self._config = binding.config if fit else None
        self._order, self._methods, self._name = tuple(binding.values), dict(binding.methods), binding.name
        self._parameters = [(t.fqn, t.key) for t in taken if t.to is None and t.parameter]
        self._others = [t for t in taken if t.to is not None or not t.parameter]
        self._filled = filled

    def __call__(
        self, config: AdapterConfig, tensors: Mapping[str, Tensor], source: str, *, copy: bool
    ) -> Binding | None:
        """``copy``: values that would lie in ``tensors`` are copied. None where a cast does not keep values finite."""
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
    """What is remembered for one program, and for those that are made of it with its adaptation and ops; a pass makes
    a program with others, which starts with none."""

    def __init__(self, attachments: Sequence[Attachment], ops: Mapping[str, Op]) -> None:
        self.ops = ops
        #: the names a binding must have values for
        self.needed = frozenset(f for a in attachments for f in a.tensor_names)
        self._lock = free_in_children(threading.Lock())
        self.known: OrderedDict[Hashable, Recipe | None] = OrderedDict()
        self._fitting: weakref.WeakSet[Binding] = weakref.WeakSet()

    def fit(self, binding: Binding) -> bool:
        """Whether the binding is known to fit the program."""
        with self._lock:
            return binding in self._fitting

    def note(self, binding: Binding) -> Binding:
        """Remember that the binding fits, as it was made for the program or has been checked."""
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
        """Remember how ``binding`` was made of ``tensors``, by the keys these have; or that it has no recipe."""
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
    """Equal for two adapters that one recipe is for; None where no recipe may be used or made. ``config`` is the
    config, or the content of its file; ``more`` whatever else the binding depends on."""
    if spec.trainable:
        return None
    out: list[Hashable] = []
    for key, t in tensors.items():
        if type(t) not in _PLAIN or t.layout is not torch.strided or t.is_meta:
            return None
        out.append((key, t.shape, t.dtype, t.device))
    try:
        frozen = _frozen(config if isinstance(config, dict) else vars(config))
    except (_NotPlain, RecursionError):  # who makes the config refuses what is too deep
        return None
    # Parameters that the program shares with its model move and change their dtype with it.
    weights = [(w.dtype, w.device) for w in (spec.weights[a.fqn] for a in spec.attachments)]
    return more, type(config), frozen, tuple(weights), tuple(out)


class _NotPlain(Exception):
    pass


def _frozen(value: Any) -> Hashable:
    """Equal for values that no config can tell apart: of plain types, with the order that dicts have."""
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
    """The recipe of ``binding``, if it is certain that there is one."""
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
    """Whether the method gives slots the tensors of a file as they are, and each site its own."""
    plain = not method.defines("read", "derived", "unwrap")
    return plain and not method.shares() and not method.keys(op) and not method.moves_base()


def _constants(a: Attachment, op: Op, own: Method | None) -> Mapping[str, Slot] | None:
    """The slots whose ``fill`` is the value where an adapter has no tensor; None where the weight may decide."""
    methods = [a.method] if own is None else [a.method, own]
    if any(m.defines("identity", "absent") for m in methods):
        return None
    return {n: s for m in methods for n, s in m.minimal(op).slots(op).items()}


def _sized_by_shapes(a: Attachment, op: Op, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the method finds an adapter's sizes without the values of its tensors."""
    method = a.method.rebind(config, a).at(op)
    try:
        specs = {**a.method.slots(op), **method.slots(op)}
        found = {n: tensors[k] for n, s in specs.items() if (k := a.file_key(n, s)) in tensors}
        blank = {n: t.detach().to("meta") for n, t in found.items()}
        return method.with_sizes_of(op, blank) == method.with_sizes_of(op, found)
    except Exception:  # whatever a method does with a tensor that has no values
        return False


def _is(t: _Taken, tensor: Tensor, value: Tensor) -> bool:
    """Whether ``value`` is what the recipe makes of ``tensor``, or a copy of it."""
    if t.to is not None:
        return _same(tensor.detach().to(*t.to), value)
    return value.stride() == tensor.detach().clone().stride() and _same(tensor.detach(), value)


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
