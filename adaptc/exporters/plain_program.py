"""Make a plain exported program of an adapted or merged one, as converters to other runtimes take it.

Dropout is off. Quantised weights are plain tensors, with the operators that dequantise them. Complex values are pairs
of real ones, where they are computed within the program.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.export import ExportedProgram

from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.lower.complex_numbers import SplitComplex
from adaptc.passes.lower.unused_slots import remove_slots
from adaptc.passes.quantized.expand_quantized import ExpandQuantized
from adaptc.passes.train.set_mode import SetMode
from adaptc.state.core import ProgramCore


@with_graph_lock
def plain_program(program: ProgramCore, unused_slots: Collection[str] = ()) -> ExportedProgram:
    """Return ``program`` for converters, without the slots ``unused_slots``. It shares the tensors of ``program``."""
    still = program.snapshot()
    lifted = LiftedProgram(SetMode(training=False)(still).program if still.adaptation.training else still)
    remove_slots(lifted, unused_slots)
    return with_plain_values(lifted.finish())


def with_plain_values(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with quantised weights as plain tensors, and complex values as pairs of real ones."""
    plain = ExpandQuantized(with_records=False)(program).output
    lifted = LiftedProgram(plain)
    return lifted.finish() if SplitComplex(plain.graph_module)(lifted.graph).count else plain
