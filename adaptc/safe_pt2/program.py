"""Read a ``.pt2`` file as an exported program, without running anything in it.

:func:`read_program` gives a :class:`SavedProgram`, all of which was checked. Otherwise a CheckpointError names the
file, the record, the place in it, what was expected and what was found. Nothing is imported, and no operator is looked
up, before :meth:`SavedProgram.to_exported_program` makes the program.

Private torch use, with the public route that was tried: ``ExportedProgramDeserializer`` is what ``torch.export.load``
calls in the end. Before that, ``torch.export.load`` unpickles, loads compiled code and opens the file a second time,
and has no option to leave that out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._export.serde.serialize import ExportedProgramDeserializer
from torch.export import ExportedProgram

from adaptc.archives import archive as records
from adaptc.archives.archive import open_archive
from adaptc.archives.checksum import verify_checksum
from adaptc.archives.containers import check_registered
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, raises_checkpoint_error
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.safe_pt2 import operators
from adaptc.safe_pt2.check_references import check_references
from adaptc.safe_pt2.example_values import read_example_inputs
from adaptc.safe_pt2.schema import SchemaBuilder, schema
from adaptc.safe_pt2.tensors import read_tensors

_MAX_JSON_BYTES = 128 << 20  # SmolLM2's is 5 MB
_MAX_INPUT_BYTES = 4 << 30


@dataclass(frozen=True)
class SavedProgram:
    """The content of a program's file, checked except for its example inputs, whose types may have to be imported.

    ``targets`` maps the operators of its nodes to the names of their arguments. ``container_types`` are those of inputs
    and outputs.
    """

    path: Path
    serialized: schema.ExportedProgram
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]
    example_inputs: bytes
    targets: Mapping[str, AbstractSet[str]]
    container_types: AbstractSet[str]

    def uses_namespace(self, namespace: str, /, besides: str = "") -> bool:
        """Return whether it calls operators of this namespace of ``torch.ops`` other than the one named ``besides``."""
        prefix = f"torch.ops.{namespace}."
        return any(t.startswith(prefix) and not t.startswith(f"{prefix}{besides or '.'}.") for t in self.targets)

    def to_exported_program(self) -> ExportedProgram:
        """Return the exported program.

        Raises CheckpointError for operators and types that are not known here, and where the graph is no valid one.
        """
        with raises_checkpoint_error(self.path):
            check_registered(set(self.container_types))
            for target, names in sorted(self.targets.items()):
                operators.check_operator_exists(target, names)
            with hold_graph_lock():
                with _in_record(records.EXAMPLE_INPUTS_RECORD):
                    samples = read_example_inputs(self.example_inputs)
                return ExportedProgramDeserializer().deserialize(
                    self.serialized,
                    self.weights,
                    self.constants,  # type: ignore[arg-type]
                    samples,
                )


def read_program(path: Path) -> SavedProgram:
    """Read and check everything in a file that ``adaptc.save`` or ``torch.export.save`` wrote.

    Raises CheckpointError for a file that is missing, damaged, could run code, or is not a program.
    """
    with raises_checkpoint_error(path), open_archive(path) as archive:
        records.check_records(archive)
        verify_checksum(archive)
        with _in_record(records.MODEL_RECORD):
            data = parse_json(archive.read_record(records.MODEL_RECORD, _MAX_JSON_BYTES))
            serialized = SchemaBuilder(ignore_new_fields=_is_from_newer_torch(data)).build(schema.ExportedProgram, data)
        tables = {}
        for name in (records.WEIGHTS_TABLE, records.CONSTANTS_TABLE):
            with _in_record(name):
                build = SchemaBuilder(ignore_new_fields=_is_from_newer_torch(data))
                tables[name] = build.build(schema.PayloadConfig, parse_json(archive.read_record(name, _MAX_JSON_BYTES)))
        with _in_record(records.MODEL_RECORD):
            uses = check_references(serialized, tables[records.WEIGHTS_TABLE], tables[records.CONSTANTS_TABLE])
        with _in_record(records.EXAMPLE_INPUTS_RECORD):
            samples = archive.read_record(records.EXAMPLE_INPUTS_RECORD, _MAX_INPUT_BYTES)
        with _in_record(records.WEIGHTS_TABLE):
            weights = read_tensors(archive, records.WEIGHTS_FOLDER, tables[records.WEIGHTS_TABLE])
        with _in_record(records.CONSTANTS_TABLE):
            constants = read_tensors(archive, records.CONSTANTS_FOLDER, tables[records.CONSTANTS_TABLE])
        return SavedProgram(path, serialized, weights, constants, samples, uses.targets, uses.container_types)


def _is_from_newer_torch(data: Any) -> bool:
    """Return whether a newer torch wrote the file; its new fields are meant to be ignored by older versions."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    minor = version.get("minor") if isinstance(version, dict) else None
    return type(minor) is int and minor > schema.SCHEMA_VERSION[1]


@contextmanager
def _in_record(record: str) -> Iterator[None]:
    """Run the block with the name of ``record`` added to the location of an UnsafeFile that it raises."""
    try:
        yield
    except UnsafeFile as error:
        raise (
            error if error.location.startswith("record ") else error.prepend_location(f"record {record!r}, ")
        ) from None
