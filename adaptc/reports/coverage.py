"""Report coverage: what of a program is adapted, by which entry, with which tensors, and what was left out and why.

Parameter counts follow PEFT's ``get_nb_trainable_parameters`` on the same model and config. A weight with two names
counts once. A module in ``modules_to_save`` counts twice, since the frozen original stays. A trained bias counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapter_files.adapter_data import PEFT_ORIGIN, FileOrigin
from adaptc.binding.binding import Binding
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.matmul_tuning import PackedWeights
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.pass_infra import PassTrail
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.lower.choose_products import MatmulChoices
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.reports.norms import Norms
from adaptc.reports.stored_table import stored_adapters_data, stored_adapters_table
from adaptc.runtime.calls.recorded_calls import CudaGraphs
from adaptc.runtime.hoisted_values import HoistedMemory
from adaptc.runtime.variants.graph_variants import Fusion
from adaptc.tables import (
    Column,
    Report,
    Table,
    collapse_paths,
    dtype_name,
    path_pattern,
    shape_text,
    shorten_paths,
    with_count,
)

#: the most target entries that are full module names and have a row each; more of them share one row
MAX_ENTRY_ROWS = 12


@dataclass(frozen=True)
class SiteCoverage:
    """The coverage of one adapted parameter.

    ``slots``: name in PEFT's files -> (shape, dtype), as the current adapter has them. ``params``: the number of
    elements in trainable slots; a slot that several sites share counts at the first. ``present``: False where the
    current adapter, or this one of several, has nothing at this site. ``rank``: None where the method has none.
    ``why``: the reason for the ``form``. ``adapter``: its name, which tells apart adapters that act together.
    ``factor``: the factor on the scale that the adapter was made with.
    """

    fqn: str
    kind: str
    form: str
    method: str
    rank: int | None
    slots: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    params: int
    present: bool = True
    why: str = ""
    adapter: str = "default"
    factor: float = 1.0


@dataclass(frozen=True, repr=False)
class CoverageReport(Report):
    """A report of what of a program is adapted, and how calls compute it.

    ``matches``: target entry -> the modules it selected. ``left_out``: (module, why). ``trainable`` and ``total``:
    numbers of parameters, as PEFT counts them. A program without an adapter has no sites, and ``adapter`` is ''.

    ``held``: the hoisted values of calls. ``fusion``: which layers share a matmul. ``products``: the kernels chosen for
    matmuls with base weights. ``packed``: the base weights that have a packed copy. ``recorded``: the
    calls that are CUDA graphs. These are empty before the first call.

    ``training``: the kernels chosen for matmuls of the first module of the program that has any. ``passes``: the passes
    that the program and the code of its calls went through, with the number of changes of each. ``norms``: norms of the
    adapter's tensors at each site when the report was made.
    """

    ROWS = ("sites",)

    sites: tuple[SiteCoverage, ...]
    matches: Mapping[str, Sequence[str]]
    left_out: Sequence[Sequence[str]]
    trainable: int
    total: int
    adapter: str = ""
    peft_type: str = ""
    source: str = ""
    merged: str = field(default="", repr=False)
    held: HoistedMemory = field(default=HoistedMemory(), repr=False)
    fusion: Fusion = field(default=Fusion(), repr=False)
    products: MatmulChoices = field(default=MatmulChoices(), repr=False)
    training: tuple[MatmulChoices, ...] = field(default=(), repr=False)
    packed: PackedWeights = field(default=PackedWeights(), repr=False)
    recorded: CudaGraphs = field(default=CudaGraphs(), repr=False)
    passes: Mapping[str, PassTrail] = field(default_factory=dict, repr=False)
    norms: Norms = field(default=Norms(), repr=False)
    #: adapter -> the format and component of the file that it was read from
    origins: Mapping[str, FileOrigin] = field(default_factory=dict)
    #: parameters of the base that nothing adapts, and their shapes
    unadapted: Sequence[tuple[str, tuple[int, ...]]] = ()
    #: which adapters are off or scaled, in words
    strength: str = ""
    #: lines about the object that holds the program and generates with it
    notes: tuple[str, ...] = ()
    #: the adapters by name in the program's own file
    stored: StoredAdapters = field(default_factory=StoredAdapters, repr=False)

    @classmethod
    @with_graph_lock
    def from_program(cls, program: AdaptedProgram, changes: bool = False) -> CoverageReport:
        training = next((m.products for m in list(program.run_state.modules) if m.products), ())
        # Before the snapshot, which knows nothing of the code of the program's parts.
        code: dict[str, Any] = {"packed": program.packed, "recorded": program.recorded}
        program = program.snapshot()
        a = program.adaptation
        if not a.attachments:
            report = program.merge_report
            source = report.source if report else ""
            fields: dict[str, Any] = {k: getattr(program, k) for k in ("passes", "products")}
            return cls((), {}, (), 0, count_base_parameters(program, ()), merged=source, **code, **fields)
        binding = program.binding
        counted_ids: set[int] = set()
        sites = tuple(_site_coverage(program, binding, x, counted_ids) for x in a.attachments)
        adapted_modules = {x.module for x in a.attachments}
        left_out = tuple((name, why) for name, why in a.left_out if name not in adapted_modules)
        trainable, total = count_parameters(program)
        bindings = binding.adapters_by_name
        kinds = " + ".join(dict.fromkeys(p.config.peft_type for p in bindings.values()))
        names = ", ".join(bindings)
        fields = {k: getattr(program, k) for k in ("held", "fusion", "passes", "products")}
        fields |= code
        fields["training"] = training
        fields["norms"] = Norms.from_program(program, changes)
        fields["origins"] = {n: p.origin for n, p in bindings.items()}
        fields["strength"], fields["stored"] = binding.describe_scales(), program.adapters
        fields["unadapted"] = unadapted_parameters(program)
        return cls(sites, a.matches, left_out, trainable, total, names, kinds, binding.source, **fields)

    @property
    def percentage(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def parameters_line(self) -> str:
        """Return the line that PEFT's ``print_trainable_parameters`` prints."""
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {self.percentage:.4f}"
        )

    def _code_texts(self) -> list[str]:
        return [str(self.packed), str(self.recorded)]

    def sections(self) -> list[str | Table]:
        """Return the sections and tables of the report. In tables, layers that differ in their number alone share a
        row."""
        if not self.sites:
            origin = f"it is plain, merged from {self.merged}" if self.merged else "it is a plain program"
            products = "".join(f"{text}\n" for text in (str(self.products), *self._code_texts()) if text)
            return [
                f"The program has no adapter: {origin}.\n{products}{self.parameters_line()}{self._passes_text()}",
                *self.notes,
            ]
        changed = {s.fqn for s in self.sites if s.present}
        absent = sum(s.fqn not in changed for s in self.sites)
        head = f"{self.peft_type} adapter {self.adapter!r} ({self.source}): {len(self.sites)} sites"
        head += f", {absent} of them left at the base" if absent else ""
        head += f"\n{self.strength}" if self.strength else ""
        for o in self.origins.values():
            head += "" if o == PEFT_ORIGIN else f"\nfrom a file in the format {o}"
            head += f"; not of this program: {o.describe_others}" if o.other_components else ""
        tables = [
            stored_adapters_table(self.stored),
            self._sites_table(),
            self._forms_table(),
            self._targets_table(),
            self._left_out_table(),
            self._unadapted_table(),
            *self.norms.sections(),
        ]
        line = self.parameters_line() + self._passes_text()
        products = [str(p) for p in (self.products, *self.training)]
        return [head, *self.notes, *tables, str(self.held), str(self.fusion), *products, *self._code_texts(), line]

    def values(self) -> dict[str, Any]:
        """Return the report as a dict of plain values.

        - ``adapter``, ``peft_type``, ``source``, ``strength``: strings.
        - ``formats``: adapter -> the format of its file.
        - ``merged``: the source of the adapter that was merged, '' for none.
        - ``sites``: one dict for each site.
        - ``matches``: target entry -> modules.
        - ``left_out``: dicts with ``module`` and ``why``.
        - ``unadapted``: dicts with ``parameter`` and ``shape``.
        - ``trainable``, ``total``: numbers of parameters.
        - ``products``: one dict for each line; ``training``: which products -> the same.
        - ``packed``: ``count`` and ``bytes``.
        - ``recorded``: ``count`` of the kinds of calls that are CUDA graphs, and ``reasons`` of others -> their number.
        - ``passes``: where -> [pass, number of changes].
        - ``norms``: the data of :class:`~adaptc.reports.norms.Norms`.
        - ``notes``: lines.
        - ``stored``: name -> ``peft_type``, ``tensors``, ``parameters`` and ``bytes`` of the adapters in the file.
        """
        return {
            "adapter": self.adapter,
            "stored": stored_adapters_data(self.stored),
            "peft_type": self.peft_type,
            "source": self.source,
            "strength": self.strength,
            "formats": {name: str(o) for name, o in self.origins.items()},
            "merged": self.merged,
            "sites": [_site_data(s) for s in self.sites],
            "matches": self.matches,
            "left_out": [{"module": name, "why": why} for name, why in self.left_out],
            "unadapted": [{"parameter": name, "shape": list(shape)} for name, shape in self.unadapted],
            "trainable": self.trainable,
            "total": self.total,
            "products": self.products.table_rows(),
            "training": {p.caption: p.table_rows() for p in self.training},
            "packed": {"count": self.packed.count, "bytes": self.packed.nbytes},
            "recorded": {"count": self.recorded.count, "reasons": dict(self.recorded.reasons)},
            "passes": {where: [[name, count] for name, count in trail] for where, trail in self.passes.items()},
            "norms": self.norms.values(),
            "notes": list(self.notes),
        }

    def _passes_text(self) -> str:
        steps = {where: [f"{name} ({count})" for name, count in trail] for where, trail in self.passes.items()}
        return "".join(f"\npasses, {where}: {', '.join(names)}" for where, names in steps.items() if names)

    def _sites_table(self) -> Table:
        has_several_adapters = len({s.adapter for s in self.sites}) > 1
        changed = {s.fqn for s in self.sites if s.present}
        groups: dict[Any, list[SiteCoverage]] = {}
        for s in self.sites:
            slots = "\n".join(f"{n} {shape_text(*v)}" for n, v in s.slots.items())
            if not s.present:
                slots = "(left to the others)" if s.fqn in changed else "(left at the base)"
            method = f"{s.method} ({s.adapter})" if has_several_adapters else s.method
            method += f" x {s.factor:g}" if s.factor != 1 else ""
            row = (s.kind, s.form, method, s.rank or "-", slots)
            groups.setdefault((row, s.params), []).append(s)
        rows = [
            (with_count(text, n), *how, f"{params * n:,d}")
            for (how, params), members in groups.items()
            for text, n in collapse_paths(s.fqn.removesuffix(".weight") for s in members)
        ]
        number_columns = [Column(name, right=True, no_wrap=True) for name in ("rank", "params")]
        text_columns = [Column(name, no_wrap=True) for name in ("kind", "form", "method", "tensors")]
        return Table(["site", *text_columns[:3], number_columns[0], text_columns[3], number_columns[1]], rows)

    def _forms_table(self) -> Table:
        """Return a table of the reasons for the sites' forms, with a row for each reason that was weighed."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for s in self.sites:
            if s.why:
                groups.setdefault((s.form, s.method, s.why), []).append(s.fqn.removesuffix(".weight"))
        rows = [
            (form, method, why, shorten_paths([t for t, _ in collapse_paths(names)], sep="\n"))
            for (form, method, why), names in groups.items()
        ]
        return Table([Column("form", no_wrap=True), Column("method", no_wrap=True), "why", "sites"], rows)

    def _targets_table(self) -> Table:
        """Return a table of the modules that each target entry selected, out of all modules that are the same layer of
        some block."""
        rows = []
        full_names = [entry for entry, modules in self.matches.items() if list(modules) == [entry]]
        if len(full_names) > MAX_ENTRY_ROWS:  # files of other formats name every module
            rows.append(
                (
                    f"({len(full_names)} full names)",
                    f"{len(full_names)} of {len(full_names)}",
                    shorten_paths(full_names, sep="\n"),
                    "-",
                )
            )
        for entry, modules in self.matches.items():
            if len(full_names) > MAX_ENTRY_ROWS and list(modules) == [entry]:
                continue
            forms = {path_pattern(m) for m in modules}
            missed = [name for name, _ in self.left_out if path_pattern(name) in forms]
            of = f"{len(modules)} of {len(modules) + len(missed)}"
            rows.append((entry, of, shorten_paths(modules, sep="\n"), shorten_paths(missed, sep="\n") or "-"))
        return Table(["target entry", Column("matches", right=True, no_wrap=True), "modules", "not in"], rows)

    def _left_out_table(self) -> Table:
        """Return a table of the modules that were left out, with a row for each reason and last path component."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, why in self.left_out:
            groups.setdefault((name.rpartition(".")[2], why), []).append(name)
        rows = [
            (with_count(tail, len(names)), why, shorten_paths(names, sep="\n")) for (tail, why), names in groups.items()
        ]
        return Table(["left out", "why", "modules"], rows)

    def _unadapted_table(self) -> Table:
        """Return a table of the parameters that no adapter changes, the largest first. Those of one shape that differ
        in a layer's number alone share a row."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, shape in self.unadapted:
            groups.setdefault(shape, []).append(name)
        rows = [
            (with_count(text, n), " x ".join(map(str, shape)), prod(shape) * n)
            for shape, names in groups.items()
            for text, n in collapse_paths(names)
        ]
        rows.sort(key=lambda row: -row[2])
        columns = ["unadapted parameter", Column("shape", no_wrap=True), Column("params", right=True, no_wrap=True)]
        return Table(columns, [(*row[:2], f"{row[2]:,d}") for row in rows])


def _site_data(s: SiteCoverage) -> dict[str, Any]:
    slots = {n: {"shape": list(shape), "dtype": dtype_name(dtype)} for n, (shape, dtype) in s.slots.items()}
    return {**vars(s), "slots": slots}


def _site_coverage(program: AdaptedProgram, binding: Binding, a: Attachment, counted_ids: set[int]) -> SiteCoverage:
    method = binding.methods.get(a.id)
    specs = (method or a.method).slots(program.ops[a.id])
    slots = {n: binding.values[f] for n, f in a.slots.items() if n in specs}
    uncounted = {id(t): t for n, t in slots.items() if method and specs[n].trainable and id(t) not in counted_ids}
    counted_ids.update(uncounted)
    return SiteCoverage(
        fqn=a.fqn,
        kind=a.kind,
        form=a.form,
        method=a.method.name,
        rank=None if method is None else method.sizes.rank(),
        slots={n: (tuple(t.shape), t.dtype) for n, t in slots.items()},
        params=sum(t.numel() for t in uncounted.values()),
        present=method is not None,
        why=a.why,
        adapter=a.adapter,
        factor=binding.scale_factors.get(a.id, 1.0),
    )


def count_parameters(program: AdaptedProgram) -> tuple[int, int]:
    """Return (trainable, all) parameters of the program with its current adapter. Sites the adapter lacks do not
    count."""
    binding = program.binding
    trained_slots: dict[int, Tensor] = {}  # several slots may be one tensor
    in_place_ids: set[int] = set()
    for a in program.adaptation.attachments:
        method = binding.methods.get(a.id)
        if method is None:
            continue
        for name, slot in method.slots(program.ops[a.id]).items():
            if slot.trainable:
                value = binding.values[a.slots[name]]
                trained_slots[id(value)] = value
                if method.files.in_place():
                    in_place_ids.add(id(value))
    trainable = sum(t.numel() for t in trained_slots.values() if t.requires_grad)
    added_count = sum(t.numel() for f, t in trained_slots.items() if f not in in_place_ids)
    return trainable, added_count + count_base_parameters(program, binding.values)


def unadapted_parameters(program: AdaptedProgram) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return (name, shape) of each parameter of the base that no adapter changes; a weight with several names counts
    once."""
    slots, state = program.binding.values, program.state_dict
    adapted_storages = {storage_key(state[a.fqn]) for a in program.adaptation.attachments if a.fqn in state}
    found: dict[Any, tuple[str, tuple[int, ...]]] = {}
    for fqn, t in state.items():
        if fqn not in slots and isinstance(t, nn.Parameter) and storage_key(t) not in adapted_storages:
            found.setdefault(storage_key(t), (fqn, tuple(t.shape)))
    return tuple(found.values())


def count_base_parameters(program: AdaptedProgram, slots: Iterable[str]) -> int:
    """Return the number of elements in the base's parameters, without those named in ``slots``. A weight with several
    names counts once."""
    skip = set(slots)
    found = {
        storage_key(t): t.numel()
        for fqn, t in program.state_dict.items()
        if fqn not in skip and isinstance(t, nn.Parameter)
    }
    return sum(found.values())
