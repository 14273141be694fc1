"""Add one more adapter by name to a program.

Where a deleted adapter of that name left sites that the new one fits, the program itself gets it, as by a swap. Else,
with ``recompile``, the result is another program with sites for all adapters, on the same base tensors; the old one
stays as it was. Without ``recompile`` nothing is compiled, and SwapError is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptc.adapter_files.directory import AdapterFile
from adaptc.binding.bind import bind, file_tensors, first_values, joined
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import binding_of_parts, turned_off
from adaptc.binding.combine_bindings import named, part_of
from adaptc.errors import ConfigError, SwapError, listing, shown
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.train.set_mode import SetMode
from adaptc.state.core import ProgramCore
from adaptc.state.unload_program import unloaded
from adaptc.tables import shortened


@dataclass(frozen=True)
class Compiling:
    """The two halves of ``adaptc.compile``, handed in because the module that has them (``compile``) imports this
    one."""

    planned: Callable[..., Any]
    compiled: Callable[..., Any]


def added(program: ProgramCore, name: str, adapter: Any, recompile: bool, compiling: Compiling) -> Any:
    """Return ``program`` with one more adapter, called ``name``; see ``AdaptedProgram.add_adapter``."""
    named({name: None})  # raises ConfigError for a name that is not allowed
    still = program.snapshot()
    if name in (known := still.binding.named):
        how = f"{{{name!r}: adapter}}" if still.binding.parts else "adapter"
        raise ConfigError(
            f"the program has an adapter called {name!r} already, of {listing(map(repr, known))}: adaptc.swap(program, "
            f"{how}) exchanges it"
        )
    base: Any = unloaded(still)
    if still.adaptation.training:
        base = SetMode(training=True)(base).output
    options: dict[str, Any] = {"training": still.adaptation.training, "autocast": still.adaptation.autocast}
    plan = compiling.planned(base, {name: adapter}, still.options, **options)
    left = {_place(a): a for a in still.adaptation.attachments if a.adapter == name}
    missing = [a for a in plan.spec.attachments if not _takes(left.get(_place(a)), a)]
    if not missing:
        _put(program, name, plan)
        return program
    if not recompile:
        sites = shortened(dict.fromkeys(a.fqn.removesuffix(".weight") for a in missing))
        kinds = ", ".join(dict.fromkeys(a.method.name for a in missing))
        raise SwapError(
            f"the program has no sites of {kinds} for an adapter called {name!r}, which needs them at {sites}: it was "
            f"compiled for {listing(map(repr, known))}. program.add_adapter({shown(name)}, ..., recompile=True) gives "
            "another program that has them, on the same base; adaptc.swap exchanges an adapter for another at its sites"
        )
    old = {n: part.idle or part for n, part in known.items()}
    files = {n: InMemory(as_file(still, n, part)) for n, part in old.items()}
    made = compiling.compiled(base, {**files, name: adapter}, still.options, **options)
    adaptation = replace(
        made.adaptation,
        source=still.adaptation.source,
        fills=still.adaptation.fills,
        takes=still.adaptation.takes,
    )
    binding = _carried_over(still, made, known)
    return type(program)(made, adaptation, binding, made.options, made.originals)


@dataclass(frozen=True)
class InMemory:
    """An adapter of a program in a form that ``compile`` takes."""

    file: AdapterFile

    def as_file(self) -> AdapterFile:
        return self.file


def as_file(program: ProgramCore, name: str, part: Binding) -> AdapterFile:
    """Return what a file of the program's adapter ``name`` would hold."""
    spec = program.spec()
    own = part_of(spec, name) if program.binding.parts else spec
    return AdapterFile(part.config.to_dict(), file_tensors(own, part), Path(part.source or name), origin=part.origin)


def _place(a: Attachment) -> tuple[str, str]:
    return a.fqn, a.method.name


def _takes(there: Attachment | None, wanted: Attachment) -> bool:
    """Return whether the code of the attachment ``there`` can run the method of ``wanted``; False where ``there`` is
    None."""
    return there is not None and there.method.structure() == wanted.method.structure()


def _put(program: ProgramCore, name: str, plan: Any) -> None:
    """Bind the planned adapter at the sites that a deleted adapter of its name left, and make that binding current."""
    adapter = plan.adapters[0]
    while True:
        now, spec = program.binding, program.spec(program.adaptation.training)
        own = part_of(spec, name)
        if adapter.file is not None:
            new = bind(own, adapter.config, adapter.file.tensors, str(adapter.file.path), fit=False)
            new = replace(new, origin=adapter.file.origin)
        else:
            new = first_values(own, adapter.config, only=_methods(own, plan.spec))
        order = dict.fromkeys(a.adapter for a in spec.attachments)
        parts = {**now.parts, name: new}
        made = program.recipes.note(binding_of_parts(spec, {n: parts[n] for n in order if n in parts}))
        if program.exchange(now, made):
            return


def _methods(own: BindingSpec, planned: BindingSpec) -> dict[str, Any]:
    theirs = {_place(a): a.method for a in planned.attachments}
    found = {a.id: theirs[_place(a)] for a in own.attachments if _place(a) in theirs}
    return joined(found, own.ops)


def _carried_over(old: ProgramCore, new: Any, parts: Mapping[str, Binding]) -> Binding:
    """Return the new program's binding, in which the old adapters keep their tensors, factors, and whether they are
    on."""
    spec, binding = new.spec(), new.binding
    made = dict(binding.parts)
    for name, part in parts.items():
        ids = _same_sites(old.adaptation.attachments, spec.attachments, name)
        on, fresh = part.idle or part, made[name]
        own = replace(
            on,
            values={fqn: on.values.get(fqn, t) for fqn, t in fresh.values.items()},
            methods={ids[i]: m for i, m in on.methods.items() if i in ids},
            factors={ids[i]: f for i, f in on.factors.items() if i in ids},
        )
        made[name] = own if part.idle is None else turned_off(part_of(spec, name), own)
    return binding_of_parts(spec, made)


def _same_sites(old: Sequence[Attachment], new: Sequence[Attachment], name: str) -> dict[str, str]:
    """Return id in the old program -> id in the new one, for each attachment of the adapter ``name``.

    Where the old program has a single adapter, its attachments may have another name.
    """
    there = {_place(a): a.id for a in new if a.adapter == name}
    return {a.id: there[_place(a)] for a in old if _place(a) in there and (a.adapter == name or _single(old))}


def _single(attachments: Sequence[Attachment]) -> bool:
    return len({a.adapter for a in attachments}) == 1
