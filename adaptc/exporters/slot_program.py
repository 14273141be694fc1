"""Make a plain exported program of an adapted one, whose adapter is an input that each call gives.

Every slot and every scale becomes a named keyword input, in ATen operators alone. A runtime that converts the program
then takes adapters of any rank, and needs to know nothing of adaptc. :class:`SlotInput` says of each input where it
belongs, and has the value with which its site computes the base.

The program is as converters take it (``plain_program``). Slots that no operator reads are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.errors import ConfigError
from adaptc.exporters.identity_inputs import identity_binding, ranks_that_may_be_zero
from adaptc.exporters.plain_program import plain_program
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.lower.free_axes import FreeSize, free_axes
from adaptc.passes.lower.slots_to_inputs import SlotsToInputs
from adaptc.passes.lower.unused_slots import find_unused_slots
from adaptc.passes.optimize.early_scales import EarlyScales
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.program.files.stored_sites import StoredSite
from adaptc.state.core import ProgramCore

#: the prefix of keys in PEFT's files
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class SlotInput:
    """An input of a program that has a tensor of an adapter. A tensor without axes, such as a scale, has one element.

    Attributes:
        name: the name of the input, which is the slot's key in PEFT's files without their prefix.
        argument: the name of the keyword argument of the exported program, in which there are no dots.
        fqn: the name of the tensor in bindings of the program.
        site: the FQN of the adapted parameter.
        slot: the name of the slot; "scale" for a scale, and "base" for a base weight that the adapter replaces.
        shape: the sizes. A free size is a text: a name such as "rank_0", or a multiple of one such as "4*rank_0".
        dtype: the dtype, such as "torch.float32".
        key: the key in PEFT's files; None for what they do not hold.
        identity: the value with which the site computes the base, of the smallest sizes there are.
    """

    name: str
    argument: str
    fqn: str
    site: str
    slot: str
    shape: tuple[int | str, ...]
    dtype: str
    key: str | None
    identity: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class SlotProgram:
    """A program whose adapter is an input.

    Attributes:
        program: the exported program. Its first inputs are the model's, and ``inputs`` are its last.
        inputs: the inputs that have the adapter, in the order of the program.
        size_names: symbol in the program's shapes -> the name of the free size in the shapes of ``inputs``.
        current: FQN -> the value of each input for the adapter that the program had.
        sites: the sites, for whoever binds other adapters.
        header: the record of the program and of its current adapter (``Adaptation.header``).
        base_weights: FQN -> the base weights of the sites.
        rows: how the adapters of rows are stacked, as JSON (see ``row_stacks``); None where all rows have one.
    """

    program: ExportedProgram
    inputs: Sequence[SlotInput]
    size_names: Mapping[str, str]
    current: Mapping[str, Tensor] = field(repr=False)
    sites: Sequence[StoredSite] = field(repr=False)
    header: Mapping[str, Any] = field(repr=False)
    base_weights: Mapping[str, Tensor] = field(repr=False)
    rows: Mapping[str, Any] | None = None


@with_graph_lock
def make_slot_program(
    program: ProgramCore, *, max_rank: int | None = None, identity: Literal["empty", "minimal"] = "empty"
) -> SlotProgram:
    """Return ``program`` with its adapter as inputs. ``program`` is not changed.

    ``max_rank`` is the largest rank that inputs may have, for runtimes that plan memory for it; None for any. With
    ``identity="empty"`` a site's identity has rank 0 where its method and its operators allow that. "minimal" has no
    empty tensors.

    Raises ConfigError for a program without an adapter, with several, or with one that is off, and for an adapter that
    replaces quantised weights.
    """
    program = program.snapshot()
    binding = _single_adapter(program)
    attachments, ops = program.adaptation.attachments, program.ops
    unused = find_unused_slots(program, [f for a in attachments for f in a.tensor_names])
    current: dict[str, Tensor] = {}
    for fqn in dict.fromkeys(f for a in attachments for f in a.tensor_names if f not in unused):
        current[fqn] = as_input(binding.values[fqn])
    for fqn, value in binding.changed_base.items():
        if isinstance(value, QuantizedTensor) or isinstance(program.base_tensors[fqn], QuantizedTensor):
            raise ConfigError(
                f"the adapter replaces the quantised weight {fqn!r}, which cannot be an input: merge the program, or "
                "convert the adapter with adaptc.convert_to_lora"
            )
        current[fqn] = value.detach()
    plain = plain_program(program, unused)
    free = free_axes(attachments, ops)
    spec = program.spec()
    described = describe_inputs(attachments, program.ops, current, unused)
    arguments = argument_names(described, plain)
    made = SlotsToInputs({d.fqn: arguments[d.name] for d in described}, free, max_rank)(plain)
    lifted = LiftedProgram(made.output)
    EarlyScales()(lifted.graph)
    converted = lifted.finish()
    empty = ranks_that_may_be_zero(converted.graph, made.data) if identity == "empty" else ()
    values = identity_binding(spec, binding.config, empty=empty).values
    inputs = [
        replace(
            d,
            argument=arguments[d.name],
            shape=shape_text(current[d.fqn], free.get(d.fqn, {})),
            identity=as_input(program.base_tensors[d.fqn] if d.slot == "base" else values[d.fqn]),
        )
        for d in described
    ]
    return SlotProgram(
        converted, inputs, made.data, current, stored_sites(spec), program.adaptation.header(binding), base_of(spec)
    )


def stored_sites(spec: BindingSpec) -> list[StoredSite]:
    """Return the sites of a program, for whoever binds adapters without it."""
    sites = [(a, spec.weights[a.fqn]) for a in spec.attachments]
    return [StoredSite(a, spec.ops[a.id], tuple(w.shape), w.dtype) for a, w in sites]


def base_of(spec: BindingSpec) -> dict[str, Tensor]:
    """Return FQN -> the base weights of the sites."""
    return {a.fqn: spec.weights[a.fqn] for a in spec.attachments}


def as_input(value: Tensor) -> Tensor:
    """Return a tensor of an adapter as an input has it: one without axes as one element."""
    return value.detach() if value.ndim else value.detach().reshape(1)


def _single_adapter(program: ProgramCore) -> Binding:
    binding = program.current
    if binding is None:
        raise ConfigError(
            "the program has no adapter that could be an input; it was merged or unloaded. Export it with "
            "adapters='merged'"
        )
    if binding.joint_adapters:
        raise ConfigError(
            f"one adapter can be an input, and here {list(binding.joint_adapters)} act together: merge the program, "
            "or compile it for one of them"
        )
    if binding.inactive_names:
        name = binding.inactive_names[0]
        raise ConfigError(f"the adapter {name!r} is off: program.set_active({name!r}) first")
    return binding


def describe_inputs(
    attachments: Sequence[Attachment],
    ops: Mapping[str, Op],
    current: Mapping[str, Tensor],
    unused: Collection[str] = (),
) -> list[SlotInput]:
    """Return the inputs of a program, without what the graph tells of them."""
    found: dict[str, SlotInput] = {}
    for a in attachments:
        for slot, spec in a.method.slots(ops[a.id]).items():
            fqn = a.slots[slot]
            if fqn in unused or fqn in found:
                continue
            name = a.file_key(slot, spec)
            key = PEFT_PREFIX + name if spec.saved else None
            found[fqn] = _one_input(name, fqn, a.fqn, slot, current[fqn], key)
        if a.scale_slot is not None and a.scale_slot not in unused:
            name = ".".join(p for p in (a.slot_path, "scaling", a.method.name) if p)
            found[a.scale_slot] = _one_input(name, a.scale_slot, a.fqn, "scale", current[a.scale_slot], None)
    for fqn in current.keys() - found.keys():
        found[fqn] = _one_input(f"{fqn}.changed", fqn, fqn, "base", current[fqn], None)
    names = [i.name for i in found.values()]
    # Two methods at one parameter may use one name; the names of their tensors in a binding differ.
    return [i if names.count(i.name) == 1 else replace(i, name=i.fqn) for i in found.values()]


def _one_input(name: str, fqn: str, site: str, slot: str, value: Tensor, key: str | None) -> SlotInput:
    return SlotInput(name, "", fqn, site, slot, tuple(value.shape), str(value.dtype), key, value)


def argument_names(inputs: Sequence[SlotInput], program: ExportedProgram) -> dict[str, str]:
    """Return an identifier for the name of each input that is no node's in ``program``, and no other input's.

    It has no capitals, which decompositions of torch would change.
    """
    taken = {n.name for n in program.graph.nodes}
    out: dict[str, str] = {}
    for name in (i.name for i in inputs):
        plain = "adapter_" + re.sub(r"\W", "_", name, flags=re.ASCII).lower()
        argument, n = plain, 1
        while argument in taken:
            argument, n = f"{plain}_{n}", n + 1
        taken.add(argument)
        out[name] = argument
    return out


def shape_text(value: Tensor, free: Mapping[int, FreeSize]) -> tuple[int | str, ...]:
    """Return the shape of ``value``, in which the sizes along the axes ``free`` are texts."""
    return tuple(free[i].text if i in free else n for i, n in enumerate(value.shape))
