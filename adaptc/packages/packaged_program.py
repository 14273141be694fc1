"""Run a packaged program, swap its adapter, and bind others beside it.

After a swap, calls compute the new adapter, padded to the slots of the compiled code. A refused adapter changes
nothing. Calls read their adapter from one attribute, which a swap replaces as a whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import BindingPlanCache
from adaptc.binding.binding_scale import with_scale
from adaptc.binding.stored_adapters import StoredAdapters, read_stored_adapters
from adaptc.errors import AdaptcError, ConfigError, SwapError, short_repr
from adaptc.locks import reset_after_fork
from adaptc.packages import manifest as _package_file
from adaptc.packages.compiled_code import CompiledCode, checker_of_whole, divide_code, load_models
from adaptc.packages.constants import PackagedBinding
from adaptc.packages.manifest import SINGLE_MODEL, Contents
from adaptc.packages.package_engine import PackageEngine
from adaptc.packages.pad_adapter import AdapterPadder
from adaptc.patterns import limit_pattern_time
from adaptc.program.program_scale import AdapterScales
from adaptc.program.swap_report import SwapReport
from adaptc.runtime.options import check_byte_limit
from adaptc.state.adaptation import Adaptation
from adaptc.state.overrides import (
    NO_OVERRIDE,
    SCALE_KEYWORD,
    Override,
    apply_override,
    override_of,
    scaling_of_call,
)
from adaptc.state.runner import AdapterSelection, Runner
from adaptc.torch_modes import outside_modes
from adaptc.value_types import validates_options


class PackagedProgram(AdapterScales):
    """A program in a file written by ``adaptc.package``: call it like the program it was made from, ``swap`` its
    adapter, ``bind`` others beside it.

    Any thread may call, swap and bind at any time, and each result is that of one adapter alone. Calls take turns,
    since the code has one set of constants. A call whose adapter is not the one that ran last first copies it into the
    code. It is padded to the room there is for ranks, so this is one pass over its bytes.

    A package is machine code, which runs as it is loaded: load only packages whose author you trust. The hashes in its
    manifest are checked first; they say only that the file is as it was written.

    ``parse_contents`` reads the contents of the file, such as the files that it carries, before any code is loaded. Its
    result is ``parsed_contents``, None without it. What it raises becomes a CheckpointError, unless it is a
    BackendError. ``is_strict`` refuses adapters that were stored for another base.

    Raises:
        CheckpointError: the file is missing, damaged, changed or of another kind.
        BackendError: it was packaged without adaptc, or its code does not run on this machine.

    Example:
        >>> runner = adaptc.load_package(adaptc.package(prog, "packaged.pt2"))
        >>> report = runner.swap(lora_weights(seed=1)[1])
        >>> runner(x).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, path: Path | str, parse_contents: Callable[[Contents], Any] | None = None, is_strict: bool = False
    ) -> None:
        self.path = Path(path)
        contents = _package_file.read(self.path)
        m = contents.manifest
        self.manifest = m
        # The base is known only as the packaged adapter changed it there, so no other adapter may be bound to it.
        residual = [fqn for fqn in m.header.get("residual", ()) if fqn not in m.bases]
        # The whole manifest is understood before any code is loaded.
        with _package_file.as_checkpoint_errors(self.path):
            self.device = torch.device(m.device)
            self.adaptation = Adaptation(
                [s.attachment for s in m.sites],
                fills=m.header["fills"],
                residual=residual,
                stored=read_stored_adapters(contents.added.files, self.path, is_strict),
            )
            self.ops = {s.attachment.id: s.op for s in m.sites}
            self.binding_plans = BindingPlanCache(self.adaptation.attachments, self.ops)
            self._padder = AdapterPadder(m, contents.tensors, self.device, self.path)
            self.parsed_contents = None if parse_contents is None else parse_contents(contents)
            self._owner_token, self._swap_lock = object(), reset_after_fork(threading.Lock())
            self._current = self._padder.packaged_binding(self._owner_token) if m.sites else None
            #: the adapter, the view and the adapter's scaled form of the last call with a view
            self._last_scaled: tuple[PackagedBinding, Override, PackagedBinding] | None = None
        self.code_by_part: Mapping[str, CompiledCode] = divide_code(
            self._load(), self.path, m, self._padder.shapes, self._current
        )
        self.inputs = checker_of_whole(m, self.code_by_part)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptcError(
            f"a package that is loaded can be neither copied nor pickled: load {self.path} once more, with "
            "adaptc.load_package"
        )

    def _load(self) -> Mapping[str, Any]:
        """Return each compiled model of the file, by its name."""
        return load_models(self.path, self.manifest)

    @property
    def ranks(self) -> dict[str, int]:
        """Return the largest rank that an adapter may have at each site with a rank, by the FQN of its parameter."""
        return self._padder.rank_capacities()

    @property
    def adapters(self) -> StoredAdapters:
        """Return the adapters by name in the package's file, which ``swap`` and ``bind`` take by these names."""
        return self.adaptation.stored

    @property
    def current(self) -> PackagedBinding | None:
        """Return the current adapter; None where there are no sites."""
        return self._current

    @property
    def binding(self) -> PackagedBinding:
        """Return the current adapter, which ``swap`` and ``bind`` of this package take back.

        Its config and methods can be read; its values are in the form that the compiled code takes.

        Raises:
            AdaptcError: there are no sites.
        """
        now = self._current
        if now is None:
            raise AdaptcError(f"{self.path} has no adapter; it was packaged from a merged or unloaded program")
        return now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the current adapter; inputs and output type are those of the program that was packaged."""
        if SCALE_KEYWORD in kwargs and SCALE_KEYWORD not in self.inputs.names:
            with scaling_of_call(self, kwargs.pop(SCALE_KEYWORD), "package"):
                return self.run(self._adapter_of_call(), args, kwargs)
        return self.run(self._adapter_of_call(), args, kwargs)

    def snapshot_call(self) -> Runner:
        """Return a callable that keeps the adapter that is current now, for calls that belong together."""
        return Runner(PackageEngine(self), AdapterSelection(self._adapter_of_call()))

    def _adapter_of_call(self) -> PackagedBinding | None:
        """Return the current adapter, with the scales that calls of this thread see."""
        now, override, known = self._current, override_of(self), self._last_scaled
        if now is None or override == NO_OVERRIDE:
            return now
        if known is None or known[0] is not now or known[1] != override:
            with outside_modes():
                made = apply_override(self.spec(), now, override, self.turn_off_adapter)
            assert isinstance(made, PackagedBinding)
            # Remembered, so that calls in one block do not each copy the adapter into the code.
            known = self._last_scaled = now, override, made
        return known[2]

    def update_binding(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        with self._swap_lock, outside_modes():
            self._install(change(self.spec(), self._require_adapter()))

    def _install(self, adapter: Binding) -> None:
        assert isinstance(adapter, PackagedBinding)
        self._current, self._last_scaled = adapter, None

    def turn_off_adapter(self, spec: BindingSpec, adapter: Binding) -> Binding:
        """Return ``adapter`` turned off, padded as the code takes it."""
        if adapter.active_form is not None:
            return adapter
        named = {n: getattr(adapter, n) for n in ("name", "source", "origin")}
        return replace(self.base.binding, **named, active_form=adapter)

    def run(self, adapter: PackagedBinding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs with ``adapter``, which was padded for this package; None for a package without sites."""
        if not self.manifest.parts:
            return self.code_by_part[SINGLE_MODEL].run(adapter, args, kwargs)
        inputs_by_name = {i.name: v for i, v in zip(self.manifest.inputs, self.inputs(args, kwargs), strict=True)}
        out: dict[str, Tensor] = {}
        for code in self.code_by_part.values():
            out |= code.run(adapter, (), {name: inputs_by_name[name] for name in code.inputs.names})
        return out

    @validates_options("adapter_name", "key_mapping", "component")
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
        """Make ``adapter`` the current one. It stays as it was where an error is raised.

        A package knows the names of its sites' modules only. Sites for which the adapter has no tensors become the
        base. No call waits for a swap, and calls that have begun finish with the adapter they began with.

        Args:
            adapter: an adapter as for ``adaptc.swap``, whose options these are.
            config: the config in place of the file's.
            adapter_name: which of several adapters to take.
            key_mapping: regular expression -> replacement, applied to the keys.
            component: the part to take of a file that has several.
            scale: a factor on the scale that the adapter was made with.

        Returns:
            the report of ``adaptc.swap``.

        Raises:
            SwapError: the adapter has too large a rank, needs other sites, or changes base weights (PiSSA, OLoRA).
            CheckpointError: the file is damaged, a shape is wrong, or a value is not finite.
        """
        start = time.perf_counter()
        new = self._pad_adapter(adapter, config, adapter_name, key_mapping, component, scale)
        with self._swap_lock:
            self._install(new)
        return SwapReport.from_binding(self.adaptation.attachments, new, time.perf_counter() - start)

    @validates_options("adapter_name", "key_mapping", "component")
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
    ) -> Runner:
        """Return a callable that keeps this adapter, whatever the package is swapped to; any thread may use it.

        The callable holds the adapter's values, padded to the room there is, and shares the code and the base.

        Args:
            adapter: an adapter as for :meth:`swap`; None gives the base, as :attr:`base` has it.
            config: the config in place of the file's.
            adapter_name: which of several adapters to take.
            key_mapping: regular expression -> replacement, applied to the keys.
            component: the part to take of a file that has several.
            scale: a factor on the scale that the adapter was made with.
            form: "apply" or "auto": compiled code has the one form that it was packaged in.
            memory_limit: an option of programs, without a meaning here.

        Returns:
            the callable.

        Raises:
            ConfigError: ``form`` is "weight", or None is given with options.
            AdaptcError: what :meth:`swap` raises.
        """
        check_byte_limit(memory_limit, "memory_limit")
        if form not in ("apply", "auto"):
            raise ConfigError(
                f"form={short_repr(form)}: a package computes in the form it was compiled in, and takes 'apply' and "
                "'auto' alone; for weights of its own package the merged program"
            )
        if adapter is None:
            if scale is not None:
                raise ConfigError("the base has no scale: bind(None) takes no options of adapters")
            return self.base
        new = self._pad_adapter(adapter, config, adapter_name, key_mapping, component, scale)
        return Runner(PackageEngine(self), AdapterSelection(new))

    @property
    def base(self) -> Runner:
        """Return a callable with no adapter at any site, which leaves the current adapter as it is.

        Raises:
            SwapError: the package holds the base only as its own adapter changed it, or has no sites.
        """
        now = self._require_adapter()
        if lost_weights := list(self.adaptation.residual):
            raise SwapError(
                f"{self.path} holds only its own adapter's version of {lost_weights[:3]} (its initialisation changed "
                "the base); package the original model for one without an adapter"
            )
        return Runner(
            PackageEngine(self), AdapterSelection(self._padder.pad(self._padder.base_binding(now), self._owner_token))
        )

    @validates_options("adapter_name", "key_mapping", "component")
    def pad_adapter(
        self,
        adapter: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        component: str | None = None,
        scale: Any = None,
    ) -> PackagedBinding:
        """Return ``adapter`` as the code takes it; arguments and errors are those of :meth:`swap`."""
        return self._pad_adapter(adapter, config, adapter_name, key_mapping, component, scale)

    def bank_member(self, index: int) -> PackagedBinding:
        """Return an adapter that the package of a bank was made with; the code has its values at this index."""
        return replace(self.binding, values=self._padder.unused_slots_of(index), constants={}, source=str(self.path))

    def write_member(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Write the values of one adapter at its index in the package of a bank, in the code of every part."""
        for code in self.code_by_part.values():
            code.constants.write_member(index, values)

    @limit_pattern_time()
    @outside_modes()
    def _pad_adapter(
        self,
        adapter: Any,
        config: Any,
        adapter_name: str | None,
        key_mapping: Mapping[str, str] | None,
        component: str | None,
        scale: Any = None,
    ) -> PackagedBinding:
        self._require_adapter()
        bound_adapter = getattr(adapter, "binding", None)
        if isinstance(bound_adapter, PackagedBinding):
            adapter = bound_adapter  # a package, or a callable bound to one, stands for its adapter
        if isinstance(adapter, PackagedBinding):
            if adapter.owner_token is not self._owner_token:
                raise SwapError(
                    f"the binding of {adapter.source!r} belongs to another package; bind the adapter's own files here"
                )
            return adapter if scale is None else with_scale(self.spec(), adapter, scale)  # type: ignore[return-value]
        binding = bind_adapter(
            self,
            adapter,
            config=config,
            adapter_name=adapter_name,
            key_mapping=key_mapping,
            component=component,
            copy_tensors=False,  # padding copies
            scale=scale,
            check_config=self._padder.check_base,
        )
        return self._padder.pad(binding, self._owner_token)

    def _require_adapter(self) -> PackagedBinding:
        now = self._current
        if now is None:
            raise SwapError(
                f"{self.path} has no adapter sites; it was packaged from a merged or unloaded program. Package the "
                "adapted program itself to swap."
            )
        return now

    def spec(self, trainable: bool = False) -> BindingSpec:
        """Return what a binding must fill. Base weights that are not in the file are NaN (0 where not floating)."""
        a, weights = self.adaptation, self._padder.site_weights()
        autocast = self.manifest.header["autocast"]
        return BindingSpec(a.attachments, self.ops, weights, autocast, trainable, residual=a.residual)

    def __repr__(self) -> str:
        adapter = "no adapter sites" if self.current is None else f"adapter {self.current.source!r}"
        return f"PackagedProgram({str(self.path)!r}, {len(self.manifest.sites)} sites, {adapter})"
