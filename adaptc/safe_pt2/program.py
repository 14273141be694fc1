"""Read a ``.pt2`` file as an exported program, without running anything in it.

:func:`read` gives a :class:`SavedProgram`, all of which was checked. Otherwise a CheckpointError names the file, the
record, the place in it, what was expected and what was found. Nothing is imported, and no operator is looked up, before
:meth:`SavedProgram.program` makes the program.

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

from adaptc.errors import CheckpointError
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.safe_pt2 import archive as records
from adaptc.safe_pt2 import operators
from adaptc.safe_pt2.archive import opened
from adaptc.safe_pt2.check_references import check_consistent
from adaptc.safe_pt2.checksum import check_seal
from adaptc.safe_pt2.containers import check_registered
from adaptc.safe_pt2.example_values import read_samples
from adaptc.safe_pt2.names import loads
from adaptc.safe_pt2.refusal import UnsafeFile, reason, shown_path
from adaptc.safe_pt2.schema import SchemaBuilder, schema
from adaptc.safe_pt2.tensors import read_tensors

_WAY_OUT = "Save or download it again"
_MOST_JSON = 128 << 20  # SmolLM2's is 5 MB
_MOST_SAMPLES = 4 << 30


@dataclass(frozen=True)
class SavedProgram:
    """The content of a program's file, checked except for its example inputs, whose types may have to be imported.

    ``targets`` maps the operators of its nodes to the names of their arguments. ``types`` are those of inputs and
    outputs.
    """

    path: Path
    parts: schema.ExportedProgram
    weights: dict[str, Tensor]
    constants: dict[str, Tensor]
    samples: bytes
    targets: Mapping[str, AbstractSet[str]]
    types: AbstractSet[str]

    def uses(self, space: str) -> bool:
        """Return whether it calls operators of this namespace of ``torch.ops``."""
        return any(t.startswith(f"torch.ops.{space}.") for t in self.targets)

    def program(self) -> ExportedProgram:
        """Return the exported program.

        Raises CheckpointError for operators and types that are not known here, and where the graph is no valid one.
        """
        with _refusals(self.path):
            check_registered(set(self.types))
            for target, names in sorted(self.targets.items()):
                operators.check_exists(target, names)
            with on_graphs():
                with _at(records.SAMPLES):
                    samples = read_samples(self.samples)
                return ExportedProgramDeserializer().deserialize(
                    self.parts,
                    self.weights,
                    self.constants,  # type: ignore[arg-type]
                    samples,
                )


def read(path: Path) -> SavedProgram:
    """Read and check everything in a file that ``adaptc.save`` or ``torch.export.save`` wrote.

    Raises CheckpointError for a file that is missing, damaged, could run code, or is not a program.
    """
    with _refusals(path), opened(path) as archive:
        records.check_program(archive)
        check_seal(archive)
        with _at(records.MODEL):
            data = loads(archive.read(records.MODEL, _MOST_JSON))
            parts = SchemaBuilder(lenient=_is_later(data)).build(schema.ExportedProgram, data)
        tables = {}
        for name in (records.WEIGHTS, records.CONSTANTS):
            with _at(name):
                build = SchemaBuilder(lenient=_is_later(data))
                tables[name] = build.build(schema.PayloadConfig, loads(archive.read(name, _MOST_JSON)))
        with _at(records.MODEL):
            uses = check_consistent(parts, tables[records.WEIGHTS], tables[records.CONSTANTS])
        with _at(records.SAMPLES):
            samples = archive.read(records.SAMPLES, _MOST_SAMPLES)
        with _at(records.WEIGHTS):
            weights = read_tensors(archive, records.WEIGHTS_FOLDER, tables[records.WEIGHTS])
        with _at(records.CONSTANTS):
            constants = read_tensors(archive, records.CONSTANTS_FOLDER, tables[records.CONSTANTS])
        return SavedProgram(path, parts, weights, constants, samples, uses.targets, uses.types)


def _is_later(data: Any) -> bool:
    """Return whether a newer torch wrote the file; its new fields are meant to be ignored by older versions."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    minor = version.get("minor") if isinstance(version, dict) else None
    return type(minor) is int and minor > schema.SCHEMA_VERSION[1]


@contextmanager
def _at(record: str) -> Iterator[None]:
    """Run the block with the name of ``record`` added to the place of a Refused that it raises."""
    try:
        yield
    except UnsafeFile as error:
        raise (error if error.place.startswith("record ") else error.inside(f"record {record!r}, ")) from None


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Run the block, and turn any error of it into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"there is no file {shown_path(path)}") from error
    except Exception as error:  # what torch raises on a forged graph can be anything
        why = str(error) if isinstance(error, UnsafeFile) else reason(error)
        raise CheckpointError(f"{shown_path(path)} cannot be read as an exported program: {why}. {_WAY_OUT}") from error
