"""Make a plain exported program of a bank, with stacked adapters and the coefficients of rows as inputs.

Each row of a batch then has adapters of its own in runtimes that know nothing of banks. Every slot has an axis of
adapters in front. What a runtime's session needs to stack adapters lies in the description of the inputs
(``row_stacks`` reads it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from adaptc.bank.bank import Bank
from adaptc.bank.compile_bank import COEFFICIENTS_INPUT, RowProgram
from adaptc.bank.stack_adapters import stack_adapters
from adaptc.bank.stack_placement import StackPlacement
from adaptc.errors import ConfigError
from adaptc.exporters.identity_inputs import identity_binding, ranks_that_may_be_zero
from adaptc.exporters.plain_program import with_plain_values
from adaptc.exporters.slot_program import (
    SlotInput,
    SlotProgram,
    argument_names,
    as_input,
    base_of,
    describe_inputs,
    shape_text,
    stored_sites,
)
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.lower.free_axes import FreeSize, free_axes
from adaptc.passes.lower.slots_to_inputs import SlotsToInputs
from adaptc.passes.lower.unused_slots import find_unused_slots, remove_slots
from adaptc.progress import stage
from adaptc.runtime.rank_padding import Padding, find_paddings
from adaptc.state.runner import FORWARD

#: the number of adapters of a call, where it is free
_ADAPTERS = FreeSize("adapters", 1)


@with_graph_lock
def make_row_program(bank: Bank, identity: Literal["empty", "minimal"] = "empty") -> SlotProgram:
    """Return the program of ``bank`` with stacked adapters and coefficients as inputs. ``bank`` is not changed.

    ``identity`` is that of ``make_slot_program``. The coefficients (rows, adapters) are the last of the model's own
    inputs. The adapters in the bank are not part of the program.

    Raises ConfigError for the bank of a package, of a program that is called part by part, or of one that trains; for
    one without a capacity whose methods need one; and for adapters in bfloat16.
    """
    placement = _placement_of(bank)
    program, rows = placement.program, placement.row_programs[FORWARD]
    attachments, ops, binding = rows.attachments, rows.ops, program.binding
    is_free = rows.serves_any_count()
    capacity = bank.capacity
    if not is_free and capacity is None:
        names = sorted({a.method.name for a in attachments if not a.method.bank.is_defined()})
        raise ConfigError(
            f"the adapters of a call are computed one after the other here ({', '.join(names)}), so the file needs "
            "their largest number: program.bank(capacity=4)"
        )
    count = 2 if is_free or capacity is None else capacity
    with stage("making the adapters of rows inputs"):
        stack = stack_adapters([binding], attachments, ops, count).values
        exported = placement.export_stack(replace(binding, values=stack), count)
        unused = find_unused_slots(exported, stack)
        lifted = LiftedProgram(exported)
        remove_slots(lifted, unused)
        plain = with_plain_values(lifted.finish())
        current = {f: as_input(binding.values[f]) for f in stack if f not in unused}
        described = describe_inputs(attachments, ops, current, unused)
        if wide := [d.name for d in described if d.dtype == "torch.bfloat16"]:
            raise ConfigError(
                f"{wide[0]!r} is bfloat16, which numpy lacks, and the adapters of rows are stacked as arrays: compile "
                "the program with autocast_adapter_dtype=True"
            )
        arguments = argument_names(described, plain)
        free = free_axes(attachments, ops)
        front = {0: _ADAPTERS} if is_free else {}
        stacked = {f: front | {i + 1: size for i, size in free.get(f, {}).items()} for f in current}
        coefficients = {COEFFICIENTS_INPUT: {1: _ADAPTERS}} if is_free else {}
        made = SlotsToInputs({d.fqn: arguments[d.name] for d in described}, stacked, free_inputs=coefficients)(plain)
    empty = ranks_that_may_be_zero(made.output.graph, made.data) if identity == "empty" else ()
    spec = replace(program.spec(), attachments=attachments)
    values = identity_binding(spec, binding.config, empty=empty).values
    inputs = [
        replace(
            d,
            argument=arguments[d.name],
            shape=shape_text(current[d.fqn], free.get(d.fqn, {})),
            identity=as_input(values[d.fqn]),
        )
        for d in described
    ]
    header = program.adaptation.header(binding)
    data = _row_data(rows, inputs, current, None if is_free else count, bank.max_rank)
    data["scalars"] = [i.name for i in inputs if not binding.values[i.fqn].ndim]
    return SlotProgram(made.output, inputs, made.data, current, stored_sites(spec), header, base_of(spec), data)


def stack_identity(i: SlotInput, rows: Mapping[str, Any]) -> Tensor:
    """Return the value of an input with which rows whose coefficients are zero compute the base.

    ``rows`` is :attr:`SlotProgram.rows`.
    """
    count = rows["capacity"] or 1
    shape = [count] if i.name in rows["scalars"] else [count, *i.identity.shape]
    return i.identity.expand(shape).contiguous()


def _placement_of(bank: Bank) -> StackPlacement:
    placement = bank.placement
    if not isinstance(placement, StackPlacement):
        raise ConfigError("this bank is of a package, whose code is compiled: export the bank of its program")
    if placement.part_outputs is not None:
        raise ConfigError(
            "this bank is of a program that is called part by part, such as one that generates: export the bank of a "
            "program of adaptc.compile"
        )
    if placement.base_program.training:
        raise ConfigError("the program is captured for training: compile it without training=True")
    return placement


def _row_data(
    rows: RowProgram,
    inputs: Sequence[SlotInput],
    current: Mapping[str, Tensor],
    capacity: int | None,
    max_rank: int | None,
) -> dict[str, Any]:
    """Return how a session stacks adapters, as JSON: see :class:`~adaptc.exporters.row_stacks.RowStacks`."""
    paddings: dict[str, Padding | None] = {}
    for a in rows.attachments:
        op = rows.ops[a.id]
        found = find_paddings(a.method, op, a.form) or {}
        for slot, spec in a.method.slots(op).items():
            is_fixed = a.method.sizes.exact or (bool(spec.apart) and not spec.fills_up)
            paddings.setdefault(a.slots[slot], None if is_fixed else found.get(slot, Padding()))
    each = {i.name: paddings.get(i.fqn) for i in inputs}
    name, axis = rows.batch.first_input
    return {
        "coefficients": COEFFICIENTS_INPUT,
        "batch": {"input": name, "axis": axis},
        "capacity": capacity,
        "max_rank": max_rank,
        "paddings": {n: None if p is None else {"blocks": p.blocks, "fill": float(p.fill)} for n, p in each.items()},
    }
