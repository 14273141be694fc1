"""Remember how a binding is made from an adapter's tensors, for all adapters of the same structure.

Two adapters have one structure where their configs are equal and their tensors agree in keys, shapes, dtypes and
devices. A plan is learned from a binding that :func:`adaptc.binding.bind` made. It has for each value the key of its
tensor, or the constant. The next binding of that structure is a loop over these, equal in every value, method and name.

That is right only where no value depends on the contents of the adapter's tensors, or on the base. So there is a plan
only where all of the following holds, and every other adapter is bound in full:

- the methods leave :meth:`FileFormat.read` and :meth:`FileFormat.derived` as they are, so a slot has the file's tensor
  itself;
- all keys are those of slots, each slot is one site's own, and the adapter changes nothing of the base;
- constants are scales, which follow from the config, and the identity values of :meth:`Method.identity`, which are
  fills; a method that makes them of the weight (DoRA) has a plan where it needs none;
- where ranks are read off the tensors, the method reads the same ones off tensors without values.

Checks of values are made for every adapter. The caller looks for NaN and infinity. A plan checks that the values it
casts fit the slot's dtype.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from adaptc.adapter_files.directory import all_finite
from adaptc.binding.binding import Binding, BindingSpec, ResolvedAdapter
from adaptc.binding.grouped_slots import find_slot_groups
from adaptc.locks import reset_after_fork
from adaptc.methods import AdapterConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method, Slot

#: the number of structures kept per program, with or without a plan; the least recently used is dropped first
MAX_STRUCTURES = 16
_PLAIN_TYPES = (Tensor, Parameter)


@dataclass(frozen=True)
class _TensorValue:
    """A value that is the adapter's own tensor. ``to`` is None where it already has the slot's device and dtype."""

    fqn: str
    key: str
    is_parameter: bool
    conversion: tuple[torch.device, torch.dtype] | None


@dataclass(frozen=True)
class _FillValue:
    fqn: str
    shape: tuple[int, ...]
    fill: float
    is_parameter: bool
    device: torch.device
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        value = torch.full(self.shape, self.fill, dtype=self.dtype, device=self.device)
        return Parameter(value, requires_grad=False) if self.is_parameter else value


class BindingPlan:
    """A plan learned from one binding, to be called with the tensors of another adapter of the same structure."""

    def __init__(
        self, binding: Binding, tensor_values: list[_TensorValue], fill_values: list[_FillValue], infer_ranks: bool
    ) -> None:
        # A config with the ranks of the tensors, which are those of the next adapter's tensors, too.
        self._config = binding.config if infer_ranks else None
        self._slot_names, self._methods, self._name = tuple(binding.values), dict(binding.methods), binding.name
        self._unchanged = [(t.fqn, t.key) for t in tensor_values if t.conversion is None and t.is_parameter]
        self._converted = [t for t in tensor_values if t.conversion is not None or not t.is_parameter]
        self._fill_values = fill_values

    def __call__(self, data: ResolvedAdapter, *, copy: bool) -> Binding | None:
        """Return the binding of these tensors, or None where values are not known to be finite.

        ``copy`` copies the values that would share memory with the tensors of ``data``.
        """
        tensors = data.tensors
        if not copy and not all_finite(data.flat_tensors or tensors.values()):
            return None
        values: dict[str, Any] = dict.fromkeys(self._slot_names)
        for fqn, key in self._unchanged:
            values[fqn] = Parameter(tensors[key].detach().clone() if copy else tensors[key], requires_grad=False)
        cast: list[Tensor] = []
        for t in self._converted:
            value = tensors[t.key].detach()
            if t.conversion is not None:
                value = value.to(*t.conversion)
                cast.append(value)
            elif copy:
                value = value.clone()
            values[t.fqn] = Parameter(value, requires_grad=False) if t.is_parameter else value
        # The caller may write to its tensors meanwhile, so copies are checked, not originals. Scales, which have no
        # axes, come from the config.
        for f in self._fill_values:
            values[f.fqn] = f()
        if not all_finite([v for v in values.values() if v.ndim] if copy else cast):
            return None
        config = self._config or data.config
        return Binding(values, dict(self._methods), config, name=self._name, source=data.source, origin=data.origin)


class BindingPlanCache:
    """The plans of one program, and of the programs made from it that share its adaptation and ops.

    A pass makes a program with other ops, which starts without plans.
    """

    def __init__(self, attachments: Sequence[Attachment], ops: Mapping[str, Op]) -> None:
        self.ops = ops
        #: the names a binding must have values for
        self.tensor_names = frozenset(f for a in attachments for f in a.tensor_names)
        self._lock = reset_after_fork(threading.Lock())
        self.plans: OrderedDict[Hashable, BindingPlan | None] = OrderedDict()
        self._fitting_bindings: weakref.WeakSet[Binding] = weakref.WeakSet()

    def is_known_to_fit(self, binding: Binding) -> bool:
        """Return whether the binding is known to fit the program."""
        with self._lock:
            return binding in self._fitting_bindings

    def remember_fitting(self, binding: Binding) -> Binding:
        """Remember that the binding fits, since it was made for the program or has been checked; return it."""
        with self._lock:
            self._fitting_bindings.add(binding)
        return binding

    def find_plan(self, structure: Hashable | None) -> BindingPlan | None:
        """Return the plan for adapters of this ``structure``, as :func:`structure_key` gives it, or None."""
        with self._lock:
            if structure in self.plans:
                self.plans.move_to_end(structure)
            return self.plans.get(structure)

    def learn_plan(
        self, structure: Hashable | None, spec: BindingSpec, binding: Binding, data: ResolvedAdapter
    ) -> None:
        """Remember how ``binding`` was made from the tensors of ``data``, or that its structure has no plan."""
        if structure is None or spec.ops is not self.ops or spec.trainable:
            return
        with self._lock:
            if structure in self.plans:
                return
        plan = _make_plan(spec, binding, data.tensors, infer_ranks=data.infer_ranks)
        with self._lock:
            self.plans[structure] = plan
            while len(self.plans) > MAX_STRUCTURES:
                self.plans.popitem(last=False)


def structure_key(spec: BindingSpec, data: ResolvedAdapter) -> Hashable | None:
    """Return a key that is equal for two adapters with one plan, or None where no plan may be used or made."""
    if spec.trainable:
        return None
    out: list[Hashable] = []
    for key, t in data.tensors.items():
        if type(t) not in _PLAIN_TYPES or t.layout is not torch.strided or t.is_meta:
            return None
        out.append((key, t.shape, t.dtype, t.device))
    try:
        frozen = _hashable(vars(data.config))
    except (_UnhashableValue, RecursionError):  # making the config refuses one that is nested too deep
        return None
    # Weights shared with the model change their dtype and device when the user moves the model, and slots follow them.
    weights = [(w.dtype, w.device) for w in (spec.weights[a.fqn] for a in spec.attachments)]
    return data.infer_ranks, type(data.config), frozen, tuple(weights), tuple(out)


class _UnhashableValue(Exception):
    pass


def _hashable(value: Any) -> Hashable:
    """Return a hashable key, equal for plain values that no config can tell apart. The order of dicts counts.

    Raises _UnhashableValue for a value of any other type.
    """
    value_type = cast(type[Any], type(value))
    if value_type is str or value is None:
        return value
    if value_type in (bool, int, float):
        return value_type, repr(value)
    if value_type in (list, tuple):
        return value_type, tuple(map(_hashable, value))
    if value_type is dict:
        return value_type, tuple([(_hashable(k), _hashable(v)) for k, v in value.items()])
    if value_type in (set, frozenset):
        return value_type, frozenset(map(_hashable, value))
    raise _UnhashableValue


def _make_plan(
    spec: BindingSpec, binding: Binding, tensors: Mapping[str, Tensor], *, infer_ranks: bool
) -> BindingPlan | None:
    """Return the plan of ``binding``, or None where it is not certain that one is right."""
    if binding.changed_base or binding.extra_tensors or binding.joint_adapters:
        return None
    if find_slot_groups(spec.attachments, spec.ops, binding.methods, spec.weights):
        return None
    tensor_values: list[_TensorValue] = []
    fill_values: list[_FillValue] = []
    for a in spec.attachments:
        op, method = spec.ops[a.id], binding.methods.get(a.id)
        if not takes_file_tensors(a.method, op) or not (method is None or takes_file_tensors(method, op)):
            return None
        if infer_ranks and method is not None and not _are_sizes_in_shapes(a, op, binding.config, tensors):
            return None
        dtype, device = spec.adapter_dtype(a), spec.weights[a.fqn].device
        slots = a.method.slots(op)
        constants = _constant_slots(a, op, method)
        for name, slot in slots.items():
            fqn = a.slots.get(name) or a.slot_fqn(name, slot)
            mine = slot if method is None else method.slots(op).get(name, slot)
            key = a.file_key(name, mine)
            wanted = (device, slot.dtype or dtype)
            if slot.shared or slot.shared_axes_cut or mine.shared or mine.shared_axes_cut:
                return None
            if method is not None and mine.saved and key in tensors:
                same = (tensors[key].device, tensors[key].dtype) == wanted
                tensor_values.append(_TensorValue(fqn, key, slot.trainable, None if same else wanted))
            elif constants is not None and name in constants and constants[name].dtype == slot.dtype:
                fill_values.append(
                    _FillValue(fqn, constants[name].shape, constants[name].fill, slot.trainable, *wanted)
                )
            else:
                return None
        scale = (a.method if method is None else method).scale(op)
        if scale is not None:
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            fill_values.append(_FillValue(a.scale_slot or a.scale_fqn, (), scale, False, device, kind))
    names = [t.fqn for t in tensor_values] + [f.fqn for f in fill_values]
    if (
        len(names) != len(set(names))
        or set(names) != set(binding.values)
        or {t.key for t in tensor_values} != set(tensors)
    ):
        return None
    values = binding.values
    if any(isinstance(values[t.fqn], Parameter) is not t.is_parameter for t in (*tensor_values, *fill_values)):
        return None
    known = all(_gives_value(t, tensors[t.key], values[t.fqn]) for t in tensor_values)
    return (
        BindingPlan(binding, tensor_values, fill_values, infer_ranks)
        if known and all(_are_equal(f(), values[f.fqn]) for f in fill_values)
        else None
    )


def takes_file_tensors(method: Method, op: Op) -> bool:
    """Return whether the method gives each site's slots the file's tensors unchanged, and shares none between sites."""
    plain = not (method.defines("unwrap") or method.files.defines("read", "derived"))
    return plain and not method.sharing.shares() and not method.files.keys(op) and not method.changes_base_at_init()


def _constant_slots(a: Attachment, op: Op, adapter_method: Method | None) -> Mapping[str, Slot] | None:
    """Return the slots whose ``fill`` is the value where an adapter has no tensor, or None where the weight may
    decide."""
    methods = [a.method] if adapter_method is None else [a.method, adapter_method]
    if any(m.defines("identity", "absent") for m in methods):
        return None
    return {n: s for m in methods for n, s in m.sizes.minimal(op).slots(op).items()}


def _are_sizes_in_shapes(a: Attachment, op: Op, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the method finds an adapter's sizes without the values of its tensors."""
    method = a.method.rebind(config, a).sizes.specialized_for(op)
    try:
        specs = {**a.method.slots(op), **method.slots(op)}
        found = {n: tensors[k] for n, s in specs.items() if (k := a.file_key(n, s)) in tensors}
        blank = {n: t.detach().to("meta") for n, t in found.items()}
        return method.sizes.with_sizes_of(op, blank) == method.sizes.with_sizes_of(op, found)
    except Exception:  # a method may fail in any way on a meta tensor
        return False


def _gives_value(source: _TensorValue, tensor: Tensor, value: Tensor) -> bool:
    """Return whether ``value`` is what the plan makes of ``tensor``, or a copy of it."""
    if source.conversion is not None:
        return _are_equal(tensor.detach().to(*source.conversion), value)
    return value.stride() == tensor.detach().clone().stride() and _are_equal(tensor.detach(), value)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
