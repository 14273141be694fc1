"""Let a program stand in a pipeline for the module that it was captured from.

A pipeline calls the module, and reads its config, dtype, device and some of its parts. It may move it. All of that is
here; what changes how the original module computes is refused by name, since the program would not follow.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.capture.inputs.example_inputs import BATCH, ExampleInputs
from adaptc.errors import AdaptcError, ConfigError, listing, short_repr
from adaptc.passes.adapt.move import usable_device
from adaptc.pipelines.component_program import tensor_calls, unread_layers
from adaptc.pipelines.component_state import ComponentState
from adaptc.pipelines.image_adapters import CallAdapters, RowBank, adapters_of_call, scale_of_text
from adaptc.pipelines.read_adapter import without_layers
from adaptc.pipelines.state_copies import StateCopies
from adaptc.program.adapted_program import AdaptedProgram

#: inputs that hold options of attention, of which programs take the scale of the adapters alone
_ATTENTION_OPTIONS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
#: the option that a text encoder's outputs depend on
_HIDDEN = "output_hidden_states"


class ComponentModule(nn.Module):
    """A module of a pipeline that runs a program. ``state`` is replaced as a whole by the pipeline's verbs."""

    def __init__(self, name: str, original: nn.Module, example: ExampleInputs, state: ComponentState) -> None:
        super().__init__()
        # Not registered: the original is the caller's, whose device, dtype and mode must not follow this module's.
        vars(self).update(_original=original, _parts={}, _example=example, _calls=tensor_calls(original))
        self.component_name = name
        self.state = state
        self.rows = RowBank()
        self._copies = StateCopies(state.program.device)
        self.training = False

    def twin(self) -> ComponentModule:
        """Return another module on the same program, whose adapters are its own."""
        return ComponentModule(self.component_name, self.original, vars(self)["_example"], self.state)

    def readable(self, adapter: Any) -> Any:
        """Return what the program can read of an adapter: what is for layers that no output depends on is left out."""
        return without_layers(adapter, unread_layers(self.original, self.state.program))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the adapters that act, and return what the original module would.

        Raises ConfigError for an input that the program was not captured with.
        """
        given = self._by_name(args, kwargs)
        return_dict, hidden = given.pop("return_dict", True), given.pop(_HIDDEN, False)
        scale = self._call_scale(given)
        for name in self._calls.needs:
            self._require(name, given)
        encoded, restore = self._calls.encode(given)
        inputs = self._program_inputs(encoded)
        call = adapters_of_call()
        out = restore(self._run(inputs, scale) if call is None else self._run_rows(inputs, call, scale))
        if _HIDDEN in self._example.kwargs and not hidden:
            out = type(out)(**{k: v for k, v in out.items() if k != "hidden_states"})
        return out if return_dict or return_dict is None else out.to_tuple()

    def _run(self, inputs: Mapping[str, Any], scale: float) -> Any:
        return self.state.scaled_runner(scale)(**inputs)

    def _run_rows(self, inputs: Mapping[str, Any], call: CallAdapters, scale: float) -> Any:
        rows = next(t.shape[0] for n, t in inputs.items() if self._example.free_dims.get(n, {}).get(0) == BATCH)
        mixes = call.for_rows(rows, scale, set(self.state.adapters), self.component_name)
        return self.rows.call(self.state, inputs, mixes)

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        signature = inspect.signature(self._original.forward)
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(f"{self.component_name}: {error}") from error
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        found = {**bound, **bound.get(rest, {})}
        found.pop(rest, None)
        return {name: value for name, value in found.items() if value is not None}

    def _call_scale(self, given: dict[str, Any]) -> float:
        """Return the factor on the adapters' scales that a call asks for, and take it out of ``given``."""
        if _HIDDEN in self._example.kwargs:
            return scale_of_text()
        scale = 1.0
        for name in _ATTENTION_OPTIONS:
            options = dict(given.pop(name, {}))
            scale = options.pop("scale", scale)
            if options:
                raise ConfigError(
                    f"{name} has {listing(map(repr, options))}, and the program of {self.component_name} takes 'scale' "
                    "there alone: leave it out, or call the pipeline that was adapted"
                )
        return float(scale)

    def _program_inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        rows = next(
            (t.shape[0] for n, t in given.items() if isinstance(t, Tensor) and t.ndim > 1 and n in self._batched), 1
        )
        for name, example in self._example.kwargs.items():
            if not isinstance(example, (Tensor, Mapping, tuple)):
                found[name] = example
                continue
            self._require(name, given)
            found[name] = self._fit(name, given.pop(name), example, rows)
        given = {n: v for n, v in given.items() if not (isinstance(v, (Mapping, tuple, list)) and not v)}
        if given.pop("use_cache", False):
            given["use_cache"] = True
        if given:
            raise ConfigError(
                f"the program of {self.component_name} was captured without {listing(given)}, so it cannot take it: "
                "call the pipeline that was adapted for this"
            )
        return found

    def _require(self, name: str, given: Mapping[str, Any]) -> None:
        if name not in given:
            raise ConfigError(f"the program of {self.component_name} needs {name}, and the call has none")

    @property
    def _batched(self) -> list[str]:
        return [n for n, dims in self._example.free_dims.items() if dims.get(0) == BATCH]

    def _fit(self, name: str, value: Any, example: Any, rows: int) -> Any:
        """Return an input as the program takes it: in its dtype, and with a row for each of the batch."""
        if isinstance(example, Mapping):
            lost = [k for k in example if k not in value] or [k for k in value if k not in example]
            if lost:
                raise ConfigError(
                    f"{name} of a call has {listing(value)}, and the program of {self.component_name} takes "
                    f"{listing(example)}: {lost[0]!r} is too much or missing"
                )
            return {k: self._fit(f"{name}.{k}", value[k], t, rows) for k, t in example.items()}
        if isinstance(example, tuple):
            if len(value) != len(example):
                raise ConfigError(f"{name} has {len(value)} tensors, and the program takes {len(example)}")
            return tuple(
                self._fit(f"{name}.{i}", v, t, rows) for i, (v, t) in enumerate(zip(value, example, strict=True))
            )
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)
        tensor = tensor.to(self.device) if tensor.ndim == 0 else tensor
        if name in self._batched and example.ndim == 1 and tensor.shape in ((), (1,)):
            tensor = tensor.reshape(1).expand(rows)
        if tensor.ndim != example.ndim:
            raise ConfigError(
                f"{name} has {tensor.ndim} dimensions, and the program of {self.component_name} takes {example.ndim}: "
                "adapt this pipeline itself, adaptc.compile(pipe, ...), made of modules that are not adapted"
            )
        return tensor if tensor.dtype == example.dtype else tensor.to(example.dtype)

    # -- what pipelines read -------------------------------------------------------------------------------------------

    @property
    def original(self) -> nn.Module:
        """Return the module that was captured, which is the caller's."""
        return vars(self)["_original"]

    @property
    def config(self) -> Any:
        """Return the config of the original module."""
        return self._original.config

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the base weights."""
        return self._original.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Return the device that the program runs on."""
        return self.state.program.device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the base weights where the program has them now; none for a package. accelerate reads their device."""
        program = self.state.program
        tensors = program.base_tensors_or_empty().values() if isinstance(program, AdaptedProgram) else ()
        return (t for t in tensors if isinstance(t, nn.Parameter))

    @contextlib.contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """Run the block. Programs have no caches between steps, which diffusers keeps apart by such names."""
        yield

    def __getattr__(self, name: str) -> Any:
        """Return a part or a value of the original module. Raises AdaptcError for its other methods by name."""
        if name.startswith("_") or "_original" not in vars(self):
            return super().__getattr__(name)
        original = vars(self)["_original"]
        value = getattr(original, name)
        if isinstance(value, nn.Module):
            return self._part(name, value)
        if (inspect.ismethod(value) and value.__self__ is original) or name in (
            "attn_processors",
            "set_attn_processor",
        ):
            raise AdaptcError(
                f"{self.component_name}.{name} would change or ask the module, and the pipeline runs a program of it: "
                f"use the pipeline that was adapted, before you adapt it"
            )
        return value

    def _part(self, name: str, part: nn.Module) -> nn.Module:
        """Return a part of the original on the program's device, as a copy where the original is elsewhere."""
        held = next(iter(part.parameters()), None)
        if held is None or held.device == self.device:
            return part
        if name not in self._parts:
            self._parts[name] = copy.deepcopy(part).to(self.device)
        return self._parts[name]

    # -- what pipelines do ---------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the program to a device. Raises ConfigError like :meth:`check_to`."""
        device = self.check_to(*args, **kwargs)
        if device is not None:
            self._parts.clear()
            before = self.state
            # accelerate's hook moves modules in turn. It is gone when diffusers moves them home after a call.
            if "_hf_hook" in vars(self) or self._copies.has(before.program):
                self.state = before.moved(lambda it: self._copies.on(it, device))
                self._copies.leave(before.programs)
            else:
                self.state = before.moved(lambda it: it.to(device))
        return self

    def check_to(self, *args: Any, **kwargs: Any) -> torch.device | None:
        """Return the device that ``to`` moves the program to, or None where it stays.

        Raises ConfigError for another dtype, which needs another capture, and for the package of a program.
        """
        wanted = [*args, *kwargs.values()]
        dtype = next((w for w in wanted if isinstance(w, torch.dtype)), None)
        if dtype not in (None, self.dtype):
            raise ConfigError(
                f"the program of {self.component_name} was captured in {self.dtype}: give the pipeline another dtype "
                f"before you adapt it, adaptc.compile(pipe.to({dtype}), ...)"
            )
        given = next((w for w in wanted if isinstance(w, (str, int, torch.device))), None)
        device = None if given is None else usable_device(torch.device(given))
        if device is None or device == self.device:
            return None
        self.state.require_program("it runs on the device that it was compiled for")
        return device

    def train(self, mode: bool = True) -> Self:
        """Raise AdaptcError for True: programs of pipelines are captured for inference."""
        if mode:
            raise AdaptcError(
                f"the program of {self.component_name} is for inference: train a denoiser that "
                "adaptc.compile(module, config, training=True) gives"
            )
        return self

    def extra_repr(self) -> str:
        """Return the class of the original and its adapters."""
        return f"{type(self._original).__name__}, adapters: {short_repr(list(self.state.adapters))}"
