"""Report on a package: its file, its adapter, the room for other adapters, and the inputs it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from adaptc.binding.binding import Binding
from adaptc.binding.stored_adapters import StoredAdapters, read_stored_adapters
from adaptc.packages import manifest as _package_file
from adaptc.packages.manifest import Contents, Manifest
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.packages.pad_adapter import AdapterPadder
from adaptc.passes.protocol.method import Method
from adaptc.reports.stored_table import stored_adapters_data, stored_adapters_table
from adaptc.tables import Column, Report, Table, collapse_paths, dtype_name, format_bytes, with_count


@dataclass(frozen=True)
class PackageSite:
    """A parameter whose adapter can be swapped.

    ``present`` is False where the current adapter leaves the site at the base. ``rank`` is that of the current adapter,
    None where its method has no rank or where ``present`` is False. ``room`` is the largest rank that another adapter
    may have, None for a method without a rank.
    """

    fqn: str
    kind: str
    form: str
    method: str
    rank: int | None
    room: int | None
    present: bool


@dataclass(frozen=True)
class PackageInput:
    """A flat input of a package.

    A size that may differ from call to call is given by its name. ``dtype`` is None for an input that was captured as
    the Python value ``constant``; calls must give that value.
    """

    name: str
    dtype: torch.dtype | None
    sizes: tuple[int | str, ...] = ()
    constant: Any = None


@dataclass(frozen=True, repr=False)
class PackageReport(Report):
    """A report on a package, as text, tables and data.

    ``nbytes`` is the size of the file, ``torch`` the version that compiled it. ``adapter`` says where the current
    adapter came from, '' where there are no sites. ``ranges`` maps the name of a size to the least and the greatest
    it may be. ``products`` says what computes the base's linear layers, and why, as chosen where the package was made.
    """

    ROWS = ("sites",)

    path: Path
    device: str
    torch: str
    nbytes: int
    adapter: str
    peft_type: str
    sites: tuple[PackageSite, ...]
    inputs: tuple[PackageInput, ...]
    ranges: Mapping[str, tuple[float, float]]
    products: tuple[Mapping[str, Any], ...] = ()
    #: lines on the files that the package carries, as those for generation
    notes: tuple[str, ...] = ()
    #: the scaling of the adapter, in words; '' for none
    strength: str = ""
    #: the adapters by name in the file
    stored: StoredAdapters = field(default_factory=StoredAdapters, repr=False)

    @classmethod
    def from_package(cls, package: PackagedProgram) -> PackageReport:
        """Return the report of a package as it is now."""
        found = cls._from_manifest(package.path, package.manifest, package.current, package.ranks)
        return replace(found, stored=package.adapters)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], notes: Callable[[Contents], Sequence[str]] | None = None
    ) -> PackageReport:
        """Return the report of a file, with the adapter it was packaged with; none of its code is loaded.

        ``notes`` gives lines on what the file carries. Errors are those of ``adaptc.load_package``.
        """
        file = Path(path)
        contents = _package_file.read(file)
        manifest = contents.manifest
        with _package_file.as_checkpoint_errors(file):
            fit = AdapterPadder(manifest, contents.tensors, torch.device("cpu"), file)
            found = cls._from_manifest(
                file, manifest, fit.packaged_binding(None) if manifest.sites else None, fit.rank_capacities()
            )
            lines = () if notes is None else tuple(notes(contents))
            return replace(found, notes=lines, stored=read_stored_adapters(contents.added.files, file))

    @classmethod
    def _from_manifest(
        cls, path: Path, m: Manifest, binding: Binding | None, rank_capacities: Mapping[str, int]
    ) -> PackageReport:
        methods: Mapping[str, Method] = {} if binding is None else binding.methods
        sites: list[PackageSite] = []
        for s in m.sites:
            a, method = s.attachment, methods.get(s.attachment.id)
            rank = None if method is None else method.sizes.rank()
            sites.append(
                PackageSite(a.fqn, a.kind, a.form, a.method.name, rank, rank_capacities.get(a.fqn), method is not None)
            )
        inputs = tuple(
            PackageInput(i.name, None, (), i.constant)
            if i.tensor is None
            else PackageInput(i.name, i.tensor.dtype, i.tensor.shape)
            for i in m.inputs
        )
        used_sizes = {n for i in inputs for n in i.sizes if isinstance(n, str)}
        return cls(
            path=path,
            device=m.device,
            torch=m.torch,
            nbytes=path.stat().st_size,
            adapter="" if binding is None else binding.source,
            peft_type="" if binding is None else binding.config.peft_type,
            sites=tuple(sites),
            inputs=inputs,
            ranges={n: bounds for n, bounds in m.ranges.items() if n in used_sizes},
            products=tuple(m.products),
            strength="" if binding is None else binding.describe_scales(),
        )

    def sections(self) -> list[str | Table]:
        """Return the lines and tables of the report; layers that differ in their number alone share a row."""
        head = f"package {self.path}: {format_bytes(self.nbytes)}, compiled by torch {self.torch} for {self.device}"
        if not self.sites:
            adapter = "no adapter: it was packaged from a merged or unloaded program"
        else:
            absent = sum(not s.present for s in self.sites)
            adapter = f"{self.peft_type} adapter ({self.adapter}): {len(self.sites)} sites"
            adapter += f", {absent} of them left at the base" if absent else ""
            adapter += f"; {self.strength}" if self.strength else ""
        chosen = [f"matmuls: {p['count']} by {p['kind']} at any rows ({p['why']})" for p in self.products]
        return [
            "\n".join([head, adapter, *chosen, *self.notes]),
            stored_adapters_table(self.stored),
            self._sites_table(),
            self._inputs_table(),
            self._ranges_table(),
        ]

    def values(self) -> dict[str, Any]:
        """Return the report as plain values.

        The keys are ``path``, ``device``, ``torch``, ``bytes``, ``adapter``, ``peft_type``, ``strength``, ``sites``,
        ``inputs``, ``ranges``, ``products`` and ``notes``. ``sites``, ``inputs`` and ``products`` are lists of dicts.
        ``ranges`` maps a size to its least and greatest value, None for any. ``notes`` has lines, and ``stored`` the
        adapters in the file by name.
        """
        return {
            "path": str(self.path),
            "device": self.device,
            "torch": self.torch,
            "bytes": self.nbytes,
            "adapter": self.adapter,
            "peft_type": self.peft_type,
            "strength": self.strength,
            "sites": [vars(s) for s in self.sites],
            "inputs": [
                {
                    "name": i.name,
                    "dtype": None if i.dtype is None else dtype_name(i.dtype),
                    "sizes": i.sizes,
                }
                | ({"constant": i.constant} if i.dtype is None else {})
                for i in self.inputs
            ],
            "ranges": self.ranges,
            "products": self.products,
            "notes": self.notes,
            "stored": stored_adapters_data(self.stored),
        }

    def _sites_table(self) -> Table:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for s in self.sites:
            rank = (s.rank or "-") if s.present else "base"
            groups.setdefault((s.kind, s.form, s.method, rank, s.room or "-"), []).append(s.fqn.removesuffix(".weight"))
        rows = [(with_count(text, n), *how) for how, names in groups.items() for text, n in collapse_paths(names)]
        kept = [Column(name, no_wrap=True) for name in ("kind", "form", "method")]
        ranks = [Column(name, right=True, no_wrap=True) for name in ("rank", "room for")]
        return Table(["site", *kept, *ranks], rows)

    def _inputs_table(self) -> Table:
        rows = [
            (i.name, "constant", i.constant)
            if i.dtype is None
            else (i.name, dtype_name(i.dtype), " x ".join(map(str, i.sizes)) or "one element")
            for i in self.inputs
        ]
        return Table(["input", Column("dtype", no_wrap=True), "sizes"], rows)

    def _ranges_table(self) -> Table:
        rows = [(n, f"{low:g}", "any" if up == inf else f"{up:g}") for n, (low, up) in self.ranges.items()]
        return Table(["size", *(Column(n, right=True, no_wrap=True) for n in ("least", "greatest"))], rows)
