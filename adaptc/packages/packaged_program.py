"""Run a packaged program, swap its adapter, and bind others beside it.

After a swap, calls compute the new adapter, padded to the slots of the compiled code. A refused adapter changes
nothing. Calls read their adapter from one attribute, which a swap replaces as a whole.

Private torch use, with the public route that was tried:
- ``loader`` of the loaded package: calling the package itself parses its tree specs anew each time.
- ``load_pt2``: ``torch._inductor.aoti_load_package`` loads all models of a package, and gives one of them.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.directory import AdapterFile
from adaptc.adapter_files.foreign_file import RawFile
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import Recipes
from adaptc.binding.sources.other_formats import translated
from adaptc.binding.sources.read_directory import read_whole
from adaptc.binding.sources.source import as_config, bind_adapter, from_dict
from adaptc.errors import AdaptcError, BackendError, ConfigError, SwapError, shown
from adaptc.locks import free_in_children
from adaptc.packages import manifest as _package_file
from adaptc.packages.compiled_code import Code, checker
from adaptc.packages.constants import Fitted
from adaptc.packages.manifest import WHOLE, Contents, PartOf
from adaptc.packages.package_scale import scaled
from adaptc.packages.pad_adapter import Fit
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.passes.graph.pytree import pytree
from adaptc.patterns import limited
from adaptc.reports.results import SwapReport
from adaptc.runtime.hoisted_values import Held
from adaptc.runtime.options import check_limit
from adaptc.state.adaptation import Adaptation
from adaptc.state.bound import Keeping
from adaptc.state.overrides import SCALE
from adaptc.state.program_parts import ProgramPart
from adaptc.torch_modes import plainly
from adaptc.value_types import checked


class BoundPackage(Keeping):
    """A callable that runs a package with one adapter, whatever is swapped; :meth:`PackagedProgram.bind` makes it."""

    form, why = "apply", "the form that the package was compiled in"
    binding: Fitted

    def __init__(self, package: PackagedProgram, binding: Fitted) -> None:
        self.package, self.binding = package, binding

    @property
    def program(self) -> PackagedProgram:
        """Return the package that the adapter is bound to."""
        return self.package

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run this adapter; inputs and output type are those of the package."""
        return self.package.run(self.binding, args, kwargs)

    def parts(self, scale: Any = None) -> dict[str, ProgramPart]:
        """Return the parts of the package with this adapter, by name. Raises ConfigError for a ``scale``."""
        self._keeps(scale)
        return self.package.parts_with(self.binding)

    @property
    def device(self) -> torch.device:
        return self.package.device

    @property
    def held(self) -> Held:
        """Return the memory of the adapter's values."""
        return Held(len(self.binding.constants), self.binding.nbytes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"what is bound to a package can be neither copied nor pickled: load {self.package.path} where it is "
            "needed, and bind the adapter there"
        )

    def __repr__(self) -> str:
        total = len(self.package.manifest.sites)
        return f"BoundPackage({self.binding.source!r}, {len(self.binding.methods)} of {total} sites)"


class PackagedProgram:
    """A program in a file written by ``adaptc.package``: call it like the program it was made from, ``swap`` its
    adapter, ``bind`` others beside it.

    Any thread may call, swap and bind at any time, and each result is that of one adapter alone. Calls take turns,
    since the code has one set of constants. A call whose adapter is not the one that ran last first copies it into the
    code. It is padded to the room there is for ranks, so this is one pass over its bytes.

    A package is machine code, which runs as it is loaded: load only packages whose author you trust. The hashes in its
    manifest are checked first; they say only that the file is as it was written.

    Raises CheckpointError when the file is missing, damaged, changed or of another kind. Raises BackendError when it
    was packaged without adaptc, or when its code does not run on this machine.

    ``understand`` reads the contents of the file, such as the files that it carries, before any code is loaded. Its
    result is ``understood``, None without it. What it raises becomes a CheckpointError, unless it is a BackendError.
    """

    def __init__(self, path: Path | str, understand: Callable[[Contents], Any] | None = None) -> None:
        self.path = Path(path)
        contents = _package_file.read(self.path)
        m = contents.manifest
        self.manifest = m
        # The base is known only as the packaged adapter changed it there, so no other adapter may be bound to it.
        residual = [fqn for fqn in m.header.get("residual", ()) if fqn not in m.bases]
        with _package_file.refusing(self.path):  # the whole manifest is understood before any code is loaded
            self.device = torch.device(m.device)
            self.adaptation = Adaptation([s.attachment for s in m.sites], fills=m.header["fills"], residual=residual)
            self.ops = {s.attachment.id: s.op for s in m.sites}
            self.recipes = Recipes(self.adaptation.attachments, self.ops)
            self._fit = Fit(m, contents.tensors, self.device, self.path)
            self.understood = None if understand is None else understand(contents)
            self._owner, self._setting = object(), free_in_children(threading.Lock())
            self._now = self._fit.first(self._owner) if m.sites else None
        loaded = self._load()
        called = m.parts or {WHOLE: PartOf(m.inputs, m.ranges, m.guards)}
        self._codes = {
            name: Code(
                self.path,
                loaded[name].loader,
                part.inputs,
                {"fills": {}} if m.parts else m.header,
                part.ranges,
                part.guards,
                self._fit.shapes,
                self.device,
                self._now,
            )
            for name, part in called.items()
        }
        missing = sorted(self._fit.shapes.keys() - {n for code in self._codes.values() for n in code.names})
        if missing:
            raise BackendError(f"{self.path}: the compiled code has no constant {missing[0]!r}; package it again")
        if m.parts:
            spec = pytree.tree_structure(((), {i.name: 0 for i in m.inputs}))
            self.inputs = checker(spec, m.inputs, m.header, m.ranges, m.guards)
        else:
            self.inputs = self._codes[WHOLE].inputs

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"a package that is loaded can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def _load(self) -> Mapping[str, Any]:
        """Return each compiled model of the file, by its name."""
        from torch._inductor import aoti_load_package
        from torch.export.pt2_archive._package import load_pt2

        try:
            with on_graphs(), tempfile.TemporaryDirectory() as folder:
                # torch takes UTF-8 paths alone, and a folder above the file may have another name.
                link = Path(folder, "package.pt2")
                link.symlink_to(self.path.absolute())
                if self.manifest.parts:
                    return load_pt2(str(link)).aoti_runners
                return {WHOLE: aoti_load_package(str(link))}
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(
                f"{self.path} does not load here: {first}. It was compiled by torch {self.manifest.torch} for "
                f"{self.manifest.device}, and this is torch {torch.__version__}; package the program again on a "
                "machine like this one."
            ) from error

    @property
    def ranks(self) -> dict[str, int]:
        """Return the largest rank that an adapter may have at each site with a rank, by the FQN of its parameter."""
        return self._fit.ranks()

    @property
    def current(self) -> Fitted | None:
        """Return the current adapter; None where there are no sites."""
        return self._now

    @property
    def binding(self) -> Fitted:
        """Return the current adapter, which ``swap`` and ``bind`` of this package take back.

        Its config and methods can be read; its values are in the form that the compiled code takes. Raises AdaptcError
        where there are no sites.
        """
        now = self._now
        if now is None:
            raise AdaptcError(f"{self.path} has no adapter; it was packaged from a merged or unloaded program")
        return now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current adapter; inputs and output type are those of the program that was packaged.

        ``adapter_scale`` is a factor as for :meth:`set_scale`, for this call alone.
        """
        now = self._now
        if SCALE in kwargs and SCALE not in self.inputs.names:
            now = self._scaled(kwargs.pop(SCALE))
        return self.run(now, args, kwargs)

    def pinned(self, scale: Any = None) -> Callable[..., Any]:
        """Return a callable that keeps the adapter that is current now, for calls that belong together.

        ``scale`` is as ``adapter_scale`` of calls.
        """
        now = self._scaled(scale)
        return partial(_run, self, None) if now is None else BoundPackage(self, now)

    def _scaled(self, scale: Any) -> Fitted | None:
        with plainly():
            return self._now if scale is None else scaled(self.spec(), self._adapted(), scale)

    def set_scale(self, scale: float, adapter: str | None = None, modules: str | Iterable[str] | None = None) -> None:
        """Multiply the scale that the current adapter was made with by ``scale``.

        Options and errors are those of :meth:`AdaptedProgram.set_scale`.
        """
        with self._setting, plainly():
            self._now = scaled(self.spec(), self._adapted(), scale, adapter, modules)

    def run(self, adapter: Fitted | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs with ``adapter``, which was fitted to this package; None for a package without sites."""
        if not self.manifest.parts:
            return self._codes[WHOLE].run(adapter, args, kwargs)
        given = {i.name: v for i, v in zip(self.manifest.inputs, self.inputs(args, kwargs), strict=True)}
        out: dict[str, Tensor] = {}
        for code in self._codes.values():
            out |= code.run(adapter, (), {name: given[name] for name in code.inputs.names})
        return out

    def parts(self, scale: Any = None) -> dict[str, ProgramPart]:
        """Return the parts of the program by name, each with the adapter that is current now.

        Each part is called by itself. A package that is called as a whole has none. ``scale`` is as ``adapter_scale``
        of calls.
        """
        return self.parts_with(self._scaled(scale))

    def parts_with(self, adapter: Fitted | None) -> dict[str, ProgramPart]:
        """Return the parts of the program by name, each with ``adapter``, which was fitted to this package."""
        if not self.manifest.parts:
            return {}
        return {
            n: ProgramPart(partial(_called, c, adapter), frozenset(c.inputs.names), adapter)
            for n, c in self._codes.items()
        }

    @checked("adapter_name", "key_mapping", "component")
    def swap(
        self,
        adapter: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        component: str | None = None,
        scale: float | Mapping[str, float] | None = None,
    ) -> SwapReport:
        """Make ``adapter`` the current one; arguments and report are those of ``adaptc.swap``.

        A package knows the names of its sites' modules only. Sites for which the adapter has no tensors become the
        base. No call waits for a swap, and calls that have begun finish with the adapter they began with.

        Raises SwapError for an adapter of too large a rank, for one that needs other sites, and for one that changes
        base weights (PiSSA, OLoRA). Raises CheckpointError for damaged files, wrong shapes and values that are not
        finite. The current adapter stays where an error is raised.
        """
        start = time.perf_counter()
        new = self._fitted(adapter, config, adapter_name, key_mapping, component, scale)
        with self._setting:
            self._now = new
        return SwapReport.of(self.adaptation.attachments, new, time.perf_counter() - start)

    @checked("adapter_name", "key_mapping", "component")
    def bind(
        self,
        adapter: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        component: str | None = None,
        scale: float | Mapping[str, float] | None = None,
        form: str = "apply",
        memory_limit: int | None = None,
    ) -> BoundPackage:
        """Return a callable that keeps this adapter, whatever the package is swapped to; any thread may use it.

        Arguments and errors are those of :meth:`swap`; None gives the base, as :attr:`base` has it. The callable holds
        the adapter's values, padded to the room there is, and shares the code and the base. ``form`` and
        ``memory_limit`` exist for programs. Compiled code has the one form that it was packaged in, which "apply" and
        "auto" give; "weight" raises ConfigError.
        """
        check_limit(memory_limit, "memory_limit")
        if form not in ("apply", "auto"):
            raise ConfigError(
                f"form={shown(form)}: a package computes in the form it was compiled in, and takes 'apply' and 'auto' "
                "alone; for weights of its own package the merged program"
            )
        if adapter is None:
            if scale is not None:
                raise ConfigError("the base has no scale: bind(None) takes no options of adapters")
            return self.base
        return BoundPackage(self, self._fitted(adapter, config, adapter_name, key_mapping, component, scale))

    @property
    def base(self) -> BoundPackage:
        """Return a callable with no adapter at any site, which leaves the current adapter as it is.

        Raises SwapError where the package holds the base only as its own adapter changed it, and where it has no sites.
        """
        now = self._adapted()
        if lost := list(self.adaptation.residual):
            raise SwapError(
                f"{self.path} holds only its own adapter's version of {lost[:3]} (its initialisation changed the "
                "base); package the original model for one without an adapter"
            )
        return BoundPackage(self, self._fit.fitted(self._fit.nothing(now), self._owner))

    @checked("adapter_name", "key_mapping", "component")
    def fitted(
        self,
        adapter: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        component: str | None = None,
        scale: Any = None,
    ) -> Fitted:
        """Return ``adapter`` as the code takes it; arguments and errors are those of :meth:`swap`."""
        return self._fitted(adapter, config, adapter_name, key_mapping, component, scale)

    def member(self, place: int) -> Fitted:
        """Return an adapter that the package of a bank was made with; the code has its values at this place."""
        return replace(self.binding, values=self._fit.member(place), constants={}, source=str(self.path))

    def write(self, place: int, values: Mapping[str, Tensor]) -> None:
        """Write the values of one adapter at its place in the package of a bank, in the code of every part."""
        for code in self._codes.values():
            code.constants.write(place, values)

    @limited()
    @plainly()
    def _fitted(
        self,
        adapter: Any,
        config: Any,
        adapter_name: str | None,
        key_mapping: Mapping[str, str] | None,
        component: str | None,
        scale: Any = None,
    ) -> Fitted:
        now = self._adapted()
        held = getattr(adapter, "binding", None)
        if isinstance(held, Fitted):
            adapter = held  # a package, or a callable bound to one, stands for its adapter
        if isinstance(adapter, Fitted):
            if adapter.owner is not self._owner:
                raise SwapError(
                    f"the binding of {adapter.source!r} belongs to another package; bind the adapter's own files here"
                )
            return adapter if scale is None else scaled(self.spec(), adapter, scale)
        if isinstance(adapter, (str, PathLike)):  # read once, so that the files that are checked are those bound
            adapter = read_whole(adapter, adapter_name=adapter_name, key_mapping=key_mapping)
            adapter_name = key_mapping = None
        if isinstance(adapter, RawFile):
            theirs = None if config is None else as_config(config)
            adapter = translated(adapter, self.spec().weights, component=component, config=theirs)
            component = config = None
        if not isinstance(adapter, Binding):
            self._check_base(adapter, config, now)
        options: dict[str, Any] = {"config": config, "adapter_name": adapter_name, "key_mapping": key_mapping}
        options |= {"component": component, "scale": scale}
        binding = bind_adapter(self, adapter, own=False, **options)  # not a copy: fitting copies
        return self._fit.fitted(binding, self._owner)

    def _adapted(self) -> Fitted:
        now = self._now
        if now is None:
            raise SwapError(
                f"{self.path} has no adapter sites; it was packaged from a merged or unloaded program. Package the "
                "adapted program itself to swap."
            )
        return now

    def _check_base(self, adapter: Any, config: Any, now: Fitted) -> None:
        if config is not None:
            self._fit.check_base(as_config(config))
        elif isinstance(adapter, Mapping):
            self._fit.check_base(now.config)
        elif isinstance(adapter, AdapterFile):
            self._fit.check_base(from_dict(adapter.config))
        # Anything else is no adapter, and ``bind_adapter`` raises for it.

    def spec(self, trainable: bool = False) -> BindingSpec:
        """Return what a binding must fill. Base weights that are not in the file are NaN (0 where not floating)."""
        weights: dict[str, Tensor] = {}
        for s in self.manifest.sites:
            fqn = s.attachment.fqn
            nothing = torch.tensor(float("nan") if s.dtype.is_floating_point else 0, device=self.device).to(s.dtype)
            weights[fqn] = self._fit.stored.get(f"base.{fqn}", nothing.expand(s.shape))
        a = self.adaptation
        autocast = self.manifest.header["autocast"]
        return BindingSpec(a.attachments, self.ops, weights, autocast, trainable, residual=a.residual)

    def __repr__(self) -> str:
        adapter = "no adapter sites" if self.current is None else f"adapter {self.current.source!r}"
        return f"PackagedProgram({str(self.path)!r}, {len(self.manifest.sites)} sites, {adapter})"


def _run(package: PackagedProgram, adapter: Fitted | None, *args: Any, **kwargs: Any) -> Any:
    return package.run(adapter, args, kwargs)


def _called(code: Code, adapter: Fitted | None, **kwargs: Any) -> Any:
    return code.run(adapter, (), kwargs)
