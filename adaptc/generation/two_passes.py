"""How many passes a step has in it, and so how many caches stand behind one another in that of its caller.

A program whose adapter reads the model's last hidden state first (``passes.ir.coefficients.FirstPass``) computes each
token twice in a step: in the first pass, and in its own, each with what it keeps of all tokens before. The same step
without adapters has its own pass alone.

Before: what runs a step program. After: the facts with a cache for it. A cache of other passes is refused by whatever
refuses those of other programs, since part of it was never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptc.binding.source import as_config
from adaptc.errors import AdaptcError
from adaptc.generation.facts import NOTHING, Facts
from adaptc.passes.analysis.cache_inputs import passes_of
from adaptc.passes.ir.lifted import user_inputs
from adaptc.program.assigned import Assigned
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.rows.assignment import used


def facts_for(facts: Facts, runs: Any) -> Facts:
    """``runs``: a program, a package, or what is bound to either."""
    if facts.keeps == NOTHING:
        return facts
    if isinstance(runs, Assigned) and not used(runs.mixes):
        return facts.of_passes(1)  # a bank computes them with the base
    program = runs.program if isinstance(runs, Bound) else runs
    return facts.of_passes(passes_of(user_inputs(program))) if isinstance(program, ProgramCore) else facts


def first_pass_of(adapters: Sequence[Any]) -> str:
    """The name of a method among those of these adapters that reads a first pass, as far as their configs say what they
    are; '' where none does."""
    for one in adapters:
        try:
            method = as_config(one).method("", "linear")
        except AdaptcError:  # whoever compiles it says what it is
            continue
        if any(c.first is not None for c in method.coefficients().values()):
            return method.name
    return ""
