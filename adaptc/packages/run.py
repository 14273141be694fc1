"""Run a packaged program, swap its adapter, and bind others beside it.

Before: a file that ``adaptc.package`` wrote. After a swap: calls compute the new adapter, padded to the slots of the
compiled code, or, when the adapter was refused, nothing has changed. What calls read is one value, replaced as a whole.

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

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.directories import read_whole
from adaptc.binding.foreign import translated
from adaptc.binding.recipes import Recipes
from adaptc.binding.source import as_binding, as_config, from_dict
from adaptc.errors import AdaptcError, BackendError, ConfigError, SwapError, shown
from adaptc.locks import free_in_children
from adaptc.packages import manifest as _package_file
from adaptc.packages.code import Code, checker
from adaptc.packages.constants import Fitted
from adaptc.packages.fit import Fit
from adaptc.packages.manifest import WHOLE, Contents, PartOf
from adaptc.packages.scale import scaled
from adaptc.passes.ir.exclusive import on_graphs
from adaptc.passes.ir.trees import pytree
from adaptc.patterns import limited
from adaptc.peft_files.directory import AdapterFile
from adaptc.peft_files.raw import RawFile
from adaptc.program.adaptation import Adaptation
from adaptc.program.bound import Keeping
from adaptc.program.parts import Part
from adaptc.program.views import SCALE
from adaptc.reports.results import SwapReport
from adaptc.runtime.held_values import Held
from adaptc.runtime.options import check_limit
from adaptc.torch_modes import plainly
from adaptc.value_types import checked


class BoundPackage(Keeping):
    """One adapter bound to a package, made by :meth:`PackagedProgram.bind`: it keeps it, whatever is swapped."""

    form, why = "apply", "the form that the package was compiled in"
    binding: Fitted

    def __init__(self, package: PackagedProgram, binding: Fitted) -> None:
        self.package, self.binding = package, binding

    @property
    def program(self) -> PackagedProgram:
        """What it is bound to."""
        return self.package

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run this adapter; inputs and output type are those of the package."""
        return self.package.run(self.binding, args, kwargs)

    def parts(self, scale: Any = None) -> dict[str, Part]:
        """Those of the package, with this adapter. ``scale`` as for :meth:`pinned`."""
        self._keeps(scale)
        return self.package.parts_with(self.binding)

    @property
    def device(self) -> torch.device:
        return self.package.device

    @property
    def held(self) -> Held:
        """The memory of its values."""
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
    """A file written by ``adaptc.package``: call it like the program it was made from, ``swap`` its adapter, ``bind``
    others beside it.

    Any thread may call, swap and bind at any time, and each result is all of one adapter. Calls take turns, since the
    code has one set of constants. A call whose adapter is not the one that ran last first copies it into the code:
    padded to the room there is for ranks, one pass over its bytes.

    A package is machine code, which runs as it is loaded: load only those whose author you trust. What is checked
    first, by the hashes in its manifest, is that the file is as it was written.

    Raises CheckpointError when the file is missing, damaged, changed or of another kind, BackendError when it was
    packaged without adaptc or its code does not run on this machine.

    ``understood``: what the files that it carries mean, made before any code is loaded; whatever it raises says that
    the package is damaged. None where it gives None.
    """

    def __init__(self, path: Path | str, understand: Callable[[Contents], Any] | None = None) -> None:
        self.path = Path(path)
        contents = _package_file.read(self.path)
        m = contents.manifest
        self.manifest = m
        # Where only an adapter's own version of the base was known, no other adapter may be bound to it.
        residual = [fqn for fqn in m.header.get("residual", ()) if fqn not in m.bases]
        with _package_file.refusing(self.path):  # all that the manifest says, before any code is loaded
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
        """Each model that was compiled, by its name."""
        from torch._inductor import aoti_load_package
        from torch.export.pt2_archive._package import load_pt2

        try:
            with on_graphs(), tempfile.TemporaryDirectory() as folder:
                # torch takes a name of UTF-8 alone, which a folder above the file may not have.
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
        """The largest rank an adapter may have at each site that has one, by the FQN of the site's parameter."""
        return self._fit.ranks()

    @property
    def current(self) -> Fitted | None:
        """The current adapter; None where there are no sites."""
        return self._now

    @property
    def binding(self) -> Fitted:
        """The current adapter, which ``swap`` and ``bind`` of this package take back. Its config and methods can be
        read; its values are in the form that the compiled code takes."""
        now = self._now
        if now is None:
            raise AdaptcError(f"{self.path} has no adapter; it was packaged from a merged or unloaded program")
        return now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current adapter; inputs and output type are those of the program that was packaged.
        ``adapter_scale``: a factor as for :meth:`set_scale`, for this call alone."""
        now = self._now
        if SCALE in kwargs and SCALE not in self.inputs.names:
            now = self._scaled(kwargs.pop(SCALE))
        return self.run(now, args, kwargs)

    def pinned(self, scale: Any = None) -> Callable[..., Any]:
        """A callable that keeps the adapter that is current now, for calls that belong together. ``scale``: as
        ``adapter_scale`` of calls."""
        now = self._scaled(scale)
        return partial(_run, self, None) if now is None else BoundPackage(self, now)

    def _scaled(self, scale: Any) -> Fitted | None:
        with plainly():
            return self._now if scale is None else scaled(self.spec(), self._adapted(), scale)

    def set_scale(self, scale: float, adapter: str | None = None, modules: str | Iterable[str] | None = None) -> None:
        """Multiply the scale that the current adapter was made with, as :meth:`AdaptedProgram.set_scale` does, whose
        options and errors it has."""
        with self._setting, plainly():
            self._now = scaled(self.spec(), self._adapted(), scale, adapter, modules)

    def run(self, adapter: Fitted | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same with an adapter of this package."""
        if not self.manifest.parts:
            return self._codes[WHOLE].run(adapter, args, kwargs)
        given = {i.name: v for i, v in zip(self.manifest.inputs, self.inputs(args, kwargs), strict=True)}
        out: dict[str, Tensor] = {}
        for code in self._codes.values():
            out |= code.run(adapter, (), {name: given[name] for name in code.inputs.names})
        return out

    def parts(self, scale: Any = None) -> dict[str, Part]:
        """Its parts, each with the adapter that is current now, for calls of one at a time. Nothing for a package that
        is called as a whole. ``scale``: as ``adapter_scale`` of calls."""
        return self.parts_with(self._scaled(scale))

    def parts_with(self, adapter: Fitted | None) -> dict[str, Part]:
        """The same with an adapter of this package."""
        if not self.manifest.parts:
            return {}
        return {
            n: Part(partial(_called, c, adapter), frozenset(c.inputs.names), adapter) for n, c in self._codes.items()
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
        """Make ``adapter`` the current one; arguments and report are those of ``adaptc.swap``. The names of modules
        that a package knows are those of its sites.

        Sites of which the adapter has no tensors become the base. Nothing waits for it, and calls that have begun
        finish with the adapter they began with. Raises SwapError for an adapter of too large a rank, for one that needs
        other sites, and for one that changes the base weights (PiSSA, OLoRA), and CheckpointError for damaged files,
        wrong shapes and values that are not finite; the current adapter then stays.
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
        """A callable that keeps this adapter, whatever the package is swapped to, and can be used from any thread.

        Arguments and errors are those of :meth:`swap`; None gives the base, as :attr:`base` has it. It holds the
        adapter's values, padded to the room there is, and shares the code and the base. ``form`` and ``memory_limit``
        are for programs: compiled code has the one form that it was packaged in, which "apply" and "auto" give;
        ConfigError for "weight".
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
        """The package with no adapter at any site, beside the current one. Raises SwapError where it holds the base as
        its own adapter changed it alone, and where it has no sites."""
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
        """Of the package of a bank: an adapter that it was made with, whose values are in the code at this place."""
        return replace(self.binding, values=self._fit.member(place), constants={}, source=str(self.path))

    def write(self, place: int, values: Mapping[str, Tensor]) -> None:
        """Of the package of a bank: put the values of one adapter at its place, in all code."""
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
            adapter = held  # for which the package stands, or what is bound to it
        if isinstance(adapter, Fitted):
            if adapter.owner is not self._owner:
                raise SwapError(
                    f"the binding of {adapter.source!r} belongs to another package; bind the adapter's own files here"
                )
            return adapter if scale is None else scaled(self.spec(), adapter, scale)
        if isinstance(adapter, (str, PathLike)):  # once, so that what is checked is what is bound
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
        binding = as_binding(self, adapter, own=False, **options)  # what is fitted is copied
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
        # else it is no adapter, which binding it says

    def spec(self, trainable: bool = False) -> BindingSpec:
        """What ``adaptc.binding`` fills. Base weights that are not in the file are NaN, and so is all made of them."""
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
