"""Check what is exported, and make the program that a converter takes: with the adapter as inputs, or merged.

Names of inputs and outputs are as callers know them, whatever a converter makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from adaptc.bank.bank import Bank
from adaptc.bank.stack_placement import make_bank
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.exporters.input_description import describe, describe_merged
from adaptc.exporters.plain_program import plain_program
from adaptc.exporters.row_program import make_row_program, stack_identity
from adaptc.exporters.slot_program import SlotInput, SlotProgram, make_slot_program
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import ProgramWrapper
from adaptc.progress import stage
from adaptc.runtime.mutated_buffers import written_placeholders
from adaptc.state.core import ProgramCore
from adaptc.state.merge_program import merge_program
from adaptc.state.overrides import check_no_override
from adaptc.training.module_files import check_not_stale

ADAPTERS = ("inputs", "merged", "rows")
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True, eq=False)
class PreparedExport:
    """A program for a converter.

    Attributes:
        program: the exported program. Its first inputs are the model's, and ``inputs`` are its last.
        input_names: the names of the model's own inputs that are tensors or numbers, in their order.
        output_names: the names of the outputs that are tensors, in their order.
        inputs: the inputs that have the adapter; none where it is merged.
        size_names: symbol in the program's shapes -> the name of the free size in the shapes of ``inputs``.
        description: the description of the inputs as JSON, which may say that there are none.
        current: name -> the value of each input for the adapter that the program has.
        rows: how adapters are stacked where each row has its own (see ``row_program``); None where all rows have one.
    """

    program: ExportedProgram
    input_names: Sequence[str]
    output_names: Sequence[str]
    inputs: Sequence[SlotInput] = ()
    size_names: Mapping[str, str] = field(default_factory=dict[str, str])
    description: str = ""
    current: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    rows: Mapping[str, Any] | None = None

    @property
    def base_values(self) -> dict[str, Tensor]:
        """Return name -> the value with which each input of the adapter computes the base, as the program takes it."""
        if self.rows is None:
            return {i.name: i.identity for i in self.inputs}
        return {i.name: stack_identity(i, self.rows) for i in self.inputs}


def prepare_export(
    program: Any,
    path: Path,
    adapters: Any,
    *,
    suffix: str,
    kind: str,
    max_rank: int | None = None,
    identity: Literal["empty", "minimal"] = "empty",
    takes_rows: bool = False,
) -> PreparedExport:
    """Return what a converter takes of ``program``, to be written to ``path``.

    ``suffix`` is the end that the name of such a file has, and ``kind`` names it in messages, such as "an ONNX file".
    ``max_rank`` and ``identity`` are those of ``make_slot_program``. ``takes_rows`` says that such a file may have an
    adapter for each row, of a program or of a bank.

    Raises ConfigError for what such a file cannot hold, and CheckpointError for a path where none can be written. With
    "merged" it raises what merging raises.
    """
    if isinstance(program, ProgramWrapper):
        raise ConfigError(
            f"a {type(program).__name__} keeps a cache between calls, which {kind} of it would not: export a program "
            "of adaptc.compile"
        )
    if adapters not in ADAPTERS:
        raise ConfigError(f"adapters={short_repr(adapters)} is not one of {', '.join(ADAPTERS)}")
    if adapters == "rows" and not takes_rows:
        raise ConfigError(
            f"adapters='rows' is not supported: {kind} takes one adapter for all rows of a call. Make a call for the "
            "rows of each adapter, or export the bank to ONNX"
        )
    if not isinstance(program, (AdaptedProgram, Bank) if adapters == "rows" else AdaptedProgram):
        hint = ": a bank is exported with adapters='rows'" if isinstance(program, Bank) else ""
        raise ConfigError(
            f"an export takes what adaptc.compile or adaptc.load gives, not a {type(program).__name__}{hint}"
        )
    if path.suffix != suffix or not path.parent.is_dir() or path.is_dir():
        raise CheckpointError(f"cannot export to {path}: the name must end in {suffix} and its directory must exist")
    if isinstance(program, Bank):
        return _prepare(make_row_program(program, identity), kind)
    check_no_override(program, "export")
    check_not_stale(program)
    if adapters == "rows":
        return _prepare(make_row_program(make_bank(program), identity), kind)
    if adapters == "merged":
        merged = (
            program if program.current is None else merge_program(program, safe=True, keep_base=True, progress=False)[0]
        )
        plain = plain_program(merged)
        _check_pure(plain, kind)
        return PreparedExport(
            plain, _input_names(plain), _output_names(plain), description=json.dumps(describe_merged())
        )
    return prepare_inputs(program, kind, max_rank, identity)


def prepare_inputs(
    program: ProgramCore, kind: str, max_rank: int | None = None, identity: Literal["empty", "minimal"] = "empty"
) -> PreparedExport:
    """Return what a converter takes of ``program``, with its adapter as inputs; see :func:`prepare_export`."""
    with stage("making the adapter an input"):
        made = make_slot_program(program, max_rank=max_rank, identity=identity)
    return _prepare(made, kind)


def _prepare(made: SlotProgram, kind: str) -> PreparedExport:
    _check_pure(made.program, kind)
    names = _input_names(made.program)
    own = names[: len(names) - len(made.inputs)]
    if taken := {i.name for i in made.inputs} & set(own):
        raise ConfigError(f"the model has an input called {min(taken)!r}, and the adapter has another of that name")
    return PreparedExport(
        made.program,
        own,
        _output_names(made.program),
        made.inputs,
        made.size_names,
        json.dumps(describe(made)),
        {i.name: made.current[i.fqn] for i in made.inputs},
        made.rows,
    )


def _input_names(program: ExportedProgram) -> list[str]:
    return [n for n, value in user_inputs(program).items() if hasattr(value, "shape")]


def _output_names(program: ExportedProgram) -> list[str]:
    """Return names for the outputs that are tensors: the fields of the model's output, or "output" and numbers."""
    spec: Any = program.call_spec.out_spec
    leaves = named_leaves(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    found: list[str] = []
    kinds = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for (path, _), output in zip(leaves, kinds, strict=True):
        if type(output.arg).__name__ != "TensorArgument":
            continue
        parts = re.findall(r"\w+", path)
        name = "_".join(parts)
        found.append(f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name)
    return ["output"] if found in (["output_0"], ["output"]) else found


def _check_pure(program: ExportedProgram, kind: str) -> None:
    signature = program.graph_signature
    written = [s.target for s in signature.output_specs if s.kind in _MUTATIONS]
    targets = {s.arg.name: s.target or s.arg.name for s in signature.input_specs}
    written += [targets[n] for n in written_placeholders(program.graph)]
    if written:
        raise ConfigError(
            f"the program writes to {written[0]!r} in each call, and {kind} keeps nothing between calls: capture the "
            "model with that state as an input and an output"
        )
