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
from adaptc.errors import ConfigError, did_you_mean, shown
from adaptc.passes.graph.lifted import inputs_of
from adaptc.passes.graph.storage import storage_key
from adaptc.state.core import ProgramCore
from adaptc.tables import Table, dtype_name, shortened

#: number of inputs that are shown by name; the others are counted
MOST = 6


def described(program: ProgramCore) -> str:
    """Return three lines: the adapter, the inputs, and the size, place and options."""
    found = facts(program)
    lines = [
        f"{type(program).__name__}: {found['adapter']}",
        f"takes {found['inputs']}",
        f"{found['parameters']}; {found['runs']}",
    ]
    return "\n  ".join(lines)


def described_module(module: nn.Module, program: ProgramCore) -> str:
    """Return three lines about the module of a program: the adapter, the inputs, and what trains and in which mode it
    is."""
    found, own = facts(program), _once(module.parameters())
    trained = _elements(p for p in own if p.requires_grad)
    kinds = dict.fromkeys(f"{dtype_name(p.dtype)} on {p.device}" for p in own)
    mode = "training" if module.training else "eval"
    lines = [
        f"{type(module).__name__} of a program: {found['adapter']}",
        f"takes {found['inputs']}",
        f"{trained} of {_elements(own)} parameters train, in {', '.join(kinds)}; {mode} mode",
    ]
    return "\n  ".join(lines)


def table_of(program: ProgramCore) -> Table:
    """Return a table of the adapter, sites, inputs, size and options."""
    rows = list(facts(program).items())
    if sites := program.adaptation.attachments:
        rows.insert(1, ("sites", shortened((a.fqn.removesuffix(".weight") for a in sites), most=8, sep="\n")))
    return Table(["program", type(program).__name__], rows)


def sites_at(program: ProgramCore, site: str | None) -> list[str] | None:
    """Return the ids of the attachments at a parameter or module; None where ``site`` is None.

    Raises ConfigError, with the nearest names, where nothing is attached there.
    """
    if site is None:
        return None
    attachments = program.adaptation.attachments
    found = [a.id for a in attachments if site in (a.fqn, a.module, a.key)]
    if not found:
        names = [a.fqn for a in attachments] + [a.module for a in attachments]
        raise ConfigError(f"the program has no adapter at {shown(site)}{did_you_mean(str(site), names)}")
    return found


def facts(program: ProgramCore) -> dict[str, str]:
    """Return four lines of text by name: "adapter", "inputs", "parameters", and "runs", which says how the program
    runs."""
    now = program.running
    base, slots = program.bare_state(), {} if now.binding is None else now.binding.values
    options = [now.options.backend]
    if program.adaptation.training:
        options.append("captured for training")
    if program.given_up:
        options.append("its base was given up to a merge")
    return {
        "adapter": _adapter(program, now.binding),
        "inputs": _inputs(program),
        "parameters": _parameters(base, slots),
        "runs": ", ".join(options),
    }


def _adapter(program: ProgramCore, binding: Binding | None) -> str:
    if binding is not None:
        return binding.summary(len(program.adaptation.attachments))
    report = program.merge_report
    return "no adapter" + (f", merged from {report.source!r}" if report is not None else "")


def _inputs(program: ProgramCore) -> str:
    """Return the names, dtypes and sizes of the inputs as text. A free size is a letter; equal sizes have the same
    letter."""
    found = inputs_of(program.memory.exported.module.graph, program.graph_signature)
    letters: dict[Any, str] = {}
    names = (f"{c}{n or ''}" for n in count() for c in ascii_lowercase)
    shown = []
    for name, value in found.items():
        if isinstance(value, Tensor):
            sizes = ", ".join(_size(n, letters, names) for n in value.shape)
            shown.append(f"{name} {dtype_name(value.dtype)}[{sizes}]")
        elif isinstance(value, (torch.SymInt, torch.SymFloat)):
            shown.append(f"{name} {_size(value, letters, names)}")
        elif value is not None:
            shown.append(f"{name}={value!r}")
    rest = len(shown) - MOST
    return (", ".join(shown[:MOST]) + (f" and {rest} more" if rest > 0 else "")) or "no inputs"


def _size(size: Any, letters: dict[Any, str], names: Iterator[str]) -> str:
    symbols = free_symbols(size)
    for s in sorted(symbols, key=str):
        if s not in letters:
            letters[s] = next(names)
    return str(size.node.expr.xreplace({s: sympy.Symbol(letters[s]) for s in symbols})) if symbols else str(size)


def _parameters(base: Mapping[str, Any], slots: Mapping[str, Any]) -> str:
    """Return how many elements the adapter and the base have, and where the base is; a tensor with two names counts
    once."""
    own, below = (_once(t for t in of.values() if isinstance(t, nn.Parameter)) for of in (slots, base))
    kinds = dict.fromkeys(f"{dtype_name(t.dtype)} on {t.device}" for t in below)
    where = f" in {', '.join(kinds)}" if kinds else ""
    if not slots:
        return f"{_elements(below)} parameters{where}"
    return f"{_elements(own)} parameters over {_elements(below)} of the base{where}"


def _elements(tensors: Iterable[Tensor]) -> str:
    return f"{sum(t.numel() for t in tensors):,d}"


def _once(tensors: Iterable[Tensor]) -> Collection[Tensor]:
    return {storage_key(t): t for t in tensors}.values()
