"""Describe a program in a few words: for ``repr``, and as a table for notebooks.

Other threads may swap, merge or rewrite the program meanwhile. Nothing is computed, nothing is waited for, and nothing
of the program changes. What is not known (a binding that was let go) is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import count
from string import ascii_lowercase
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_symbols

from adaptc.binding.binding import Binding
from adaptc.errors import ConfigError, did_you_mean, short_repr
from adaptc.passes.graph.lifted import user_inputs_of_graph
from adaptc.passes.graph.storage import storage_key
from adaptc.state.core import ProgramCore
from adaptc.tables import Table, dtype_name, shorten_paths

#: number of inputs that are shown by name; the others are counted
MAX_SHOWN_INPUTS = 6


def describe_program(program: ProgramCore) -> str:
    """Return three lines: the adapter, the inputs, and the size, place and options."""
    found = describe_facts(program)
    lines = [
        f"{type(program).__name__}: {found['adapter']}",
        f"takes {found['inputs']}",
        f"{found['parameters']}; {found['runs']}",
    ]
    return "\n  ".join(lines)


def describe_module(module: nn.Module, program: ProgramCore) -> str:
    """Return three lines about the module of a program: the adapter, the inputs, and what trains and in which mode it
    is."""
    found, own = describe_facts(program), _unique_tensors(module.parameters())
    trained = _count_elements(p for p in own if p.requires_grad)
    kinds = dict.fromkeys(f"{dtype_name(p.dtype)} on {p.device}" for p in own)
    mode = "training" if module.training else "eval"
    lines = [
        f"{type(module).__name__} of a program: {found['adapter']}",
        f"takes {found['inputs']}",
        f"{trained} of {_count_elements(own)} parameters train, in {', '.join(kinds)}; {mode} mode",
    ]
    return "\n  ".join(lines)


def describe_as_table(program: ProgramCore) -> Table:
    """Return a table of the adapter, sites, inputs, size and options."""
    rows = list(describe_facts(program).items())
    if sites := program.adaptation.attachments:
        rows.insert(1, ("sites", shorten_paths((a.fqn.removesuffix(".weight") for a in sites), limit=8, sep="\n")))
    return Table(["program", type(program).__name__], rows)


def attachment_ids_at(program: ProgramCore, site: str | None) -> list[str] | None:
    """Return the ids of the attachments at a parameter or module; None where ``site`` is None.

    Raises ConfigError, with the nearest names, where nothing is attached there.
    """
    if site is None:
        return None
    attachments = program.adaptation.attachments
    found = [a.id for a in attachments if site in (a.fqn, a.module, a.key)]
    if not found:
        names = [a.fqn for a in attachments] + [a.module for a in attachments]
        raise ConfigError(f"the program has no adapter at {short_repr(site)}{did_you_mean(str(site), names)}")
    return found


def describe_facts(program: ProgramCore) -> dict[str, str]:
    """Return four lines of text by name: "adapter", "inputs", "parameters", and "runs", which says how the program
    runs."""
    now = program.call_state
    base = program.base_tensors_or_empty()
    slots: Mapping[str, Tensor] = {} if now.binding is None else now.binding.values
    options = [now.options.backend]
    if program.adaptation.training:
        options.append("captured for training")
    if program.base_released:
        options.append("its base was given up to a merge")
    return {
        "adapter": _describe_adapter(program, now.binding),
        "inputs": _describe_inputs(program),
        "parameters": _describe_parameters(base, slots),
        "runs": ", ".join(options),
    }


def _describe_adapter(program: ProgramCore, binding: Binding | None) -> str:
    if binding is not None:
        return binding.summary(len(program.adaptation.attachments))
    report = program.merge_report
    return "no adapter" + (f", merged from {report.source!r}" if report is not None else "")


def _describe_inputs(program: ProgramCore) -> str:
    """Return the names, dtypes and sizes of the inputs as text. A free size is a letter; equal sizes have the same
    letter."""
    found = user_inputs_of_graph(program.run_state.exported.module.graph, program.graph_signature)
    letters: dict[Any, str] = {}
    names = (f"{c}{n or ''}" for n in count() for c in ascii_lowercase)
    shown: list[str] = []
    for name, value in found.items():
        if isinstance(value, Tensor):
            sizes = ", ".join(_describe_size(n, letters, names) for n in value.shape)
            shown.append(f"{name} {dtype_name(value.dtype)}[{sizes}]")
        elif isinstance(value, (torch.SymInt, torch.SymFloat)):
            shown.append(f"{name} {_describe_size(value, letters, names)}")
        elif value is not None:
            shown.append(f"{name}={value!r}")
    rest = len(shown) - MAX_SHOWN_INPUTS
    return (", ".join(shown[:MAX_SHOWN_INPUTS]) + (f" and {rest} more" if rest > 0 else "")) or "no inputs"


def _describe_size(size: Any, letters: dict[Any, str], names: Iterator[str]) -> str:
    symbols = free_symbols(size)
    for s in sorted(symbols, key=str):
        if s not in letters:
            letters[s] = next(names)
    return str(size.node.expr.xreplace({s: sympy.Symbol(letters[s]) for s in symbols})) if symbols else str(size)


def _describe_parameters(base: Mapping[str, Any], slots: Mapping[str, Any]) -> str:
    """Return how many elements the adapter and the base have, and where the base is; a tensor with two names counts
    once."""
    own, below = (_unique_tensors(t for t in of.values() if isinstance(t, nn.Parameter)) for of in (slots, base))
    kinds = dict.fromkeys(f"{dtype_name(t.dtype)} on {t.device}" for t in below)
    where = f" in {', '.join(kinds)}" if kinds else ""
    if not slots:
        return f"{_count_elements(below)} parameters{where}"
    return f"{_count_elements(own)} parameters over {_count_elements(below)} of the base{where}"


def _count_elements(tensors: Iterable[Tensor]) -> str:
    return f"{sum(t.numel() for t in tensors):,d}"


def _unique_tensors(tensors: Iterable[Tensor]) -> Collection[Tensor]:
    return {storage_key(t): t for t in tensors}.values()
