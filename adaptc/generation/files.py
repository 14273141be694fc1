"""Read a saved generator from the facts that stand beside its program in the file.

The program is stored like any other. A JSON text beside it holds the model's config, its generation config, and the
layout of its cache.
"""

from __future__ import annotations

from pathlib import Path

from adaptc.errors import CheckpointError
from adaptc.generation.description import NAME, facts_of
from adaptc.generation.generator import Generator
from adaptc.generation.kinds import generator_of
from adaptc.passes.ir.subprogram import outputs_of
from adaptc.program.adapted import AdaptedProgram
from adaptc.pt2_files.refusal import UnsafeFile, reason, shown_path
from adaptc.pt2_files.sidecar import read_beside


def generator_in(path: Path, program: AdaptedProgram) -> Generator | None:
    """Return the generator that was saved to ``path``, whose ``program`` was read; None for a program alone.

    Raises CheckpointError where the facts beside the program cannot be read.
    """
    stored = read_beside(path, NAME)
    if stored is None:
        return None
    try:
        facts = facts_of(stored, program.adaptation.inputs(program).names, outputs=outputs_of(program))
        return generator_of(program, facts)
    except Exception as error:  # transformers raises many types for a broken config
        why = str(error) if isinstance(error, UnsafeFile) else reason(error)
        raise CheckpointError(
            f"{shown_path(path)}: what it says of generation cannot be read: {why}. Save it again from the model"
        ) from error
