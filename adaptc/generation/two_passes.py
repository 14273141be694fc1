"""Find how many passes a step has, and so how many caches its caller's cache holds one after another.

An adapter such as X-LoRA reads the model's last hidden state first (``passes.ir.coefficients.FirstPass``). A step with
such an adapter computes each token twice: in the duplicated base pass, and in its own. Each pass keeps its own keys and
values. The same step without adapters has its own pass alone.

A cache of another number of passes belongs to other facts, so it is refused like one of another program: part of it was
never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptc.binding.source import as_config
from adaptc.errors import AdaptcError
from adaptc.generation.spec import NOTHING, GenerationSpec
from adaptc.passes.analysis.cache_inputs import passes_of
from adaptc.passes.ir.lifted import user_inputs
from adaptc.program.assigned import Assigned
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.rows.assignment import used


def facts_for(facts: GenerationSpec, runs: Any) -> GenerationSpec:
    """Return the facts with the cache layout that ``runs`` needs: a program, a package, or what is bound to either."""
    if facts.keeps == NOTHING:
        return facts
    if isinstance(runs, Assigned) and not used(runs.mixes):
        return facts.of_passes(1)  # a bank runs rows without any adapter on the base
    program = runs.program if isinstance(runs, Bound) else runs
    return facts.of_passes(passes_of(user_inputs(program))) if isinstance(program, ProgramCore) else facts


def first_pass_of(adapters: Sequence[Any]) -> str:
    """Return the name of a method among ``adapters`` that reads a duplicated base pass; '' where there is none.

    An adapter whose config cannot be read here is passed over.
    """
    for one in adapters:
        try:
            method = as_config(one).method("", "linear")
        except AdaptcError:  # the compilation raises this error
            continue
        if any(c.first is not None for c in method.coefficients().values()):
            return method.name
    return ""
