"""Compute what a fresh cache begins with: the virtual tokens of a prompt or prefix adapter.

A KV prefix is taken from the adapter's slots. Prompt embeddings are run through the step as the first tokens of a text,
and their keys and values are kept. Both are computed once per binding. Where they depend on inputs that a caller gives,
such as ``task_ids``, they are computed once per cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adaptc.bank.row_adapters import RowSelection
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.arguments import validate
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.modes.prefill_part import run_step_part
from adaptc.generation.prefix.batched_prefix import batched_prefix
from adaptc.generation.spec import GenerationSpec, StepRunner, cache_argument_name
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import PREFIX_FUNCTIONS, ProgramMethod
from adaptc.state.core import ProgramCore
from adaptc.state.runner import ProgramPart, program_of
from adaptc.torch_modes import outside_modes

#: binding -> how often each tensor that was read had been written to, and the :class:`CachePrefix` computed from them
_PREFIXES: WeakKeyDictionary[Any, tuple[Any, CachePrefix]] = WeakKeyDictionary()


def prefix_attachments(runner: StepRunner, openings: Sequence[str] = PREFIX_FUNCTIONS) -> list[Attachment]:
    """Return the attachments that say what a cache begins with, by one of the methods ``openings``.

    ``runner`` is a program, or what is bound to one. :data:`PREFIX_FUNCTIONS` says which methods there are.
    """
    adaptation = getattr(program_of(runner), "adaptation", None)
    attachments: Sequence[Attachment] = () if adaptation is None else adaptation.attachments
    return [a for a in attachments if isinstance(a.method, ProgramMethod) and a.method.opening() in openings]


def prefix_input_names(runner: StepRunner, openings: Sequence[str] = PREFIX_FUNCTIONS) -> list[str]:
    """Return the names of the inputs that the attachments of :func:`prefix_attachments` ask of a caller, such as
    ``task_ids``."""
    methods = [a.method for a in prefix_attachments(runner, openings)]
    return [
        n
        for m in methods
        if isinstance(m, ProgramMethod)
        for n, e in m.extra_inputs.extras().items()
        if e.place is None
    ]


def pop_prefix_inputs(
    runner: StepRunner, kwargs: dict[str, Any], openings: Sequence[str] = PREFIX_FUNCTIONS
) -> dict[str, Any]:
    """Remove the inputs of :func:`prefix_input_names` from ``kwargs`` and return those that are given, by name."""
    values = {name: kwargs.pop(name, None) for name in prefix_input_names(runner, openings)}
    return {name: value for name, value in values.items() if value is not None}


def check_step_takes_prefix(runner: StepRunner, spec: GenerationSpec, model_name: str) -> None:
    """Raise ConfigError where an adapter has virtual tokens and the step has no cache, or takes no embeddings for a
    prompt."""
    for a in prefix_attachments(runner):
        if not spec.cache_mode.has_cache:
            raise ConfigError(
                f"{a.method.name} is what a cache begins with, and {model_name} generates without one: "
                f"{spec.mode_reason}. adaptc.compile(model, config) gives a program that computes logits with it"
            )
        if a.method.opening() == "prompt" and not spec.takes_inputs_embeds:  # type: ignore[union-attr]
            raise ConfigError(
                f"{a.method.name} puts embeddings in front, and the forward of {model_name} takes no inputs_embeds. "
                "adaptc.compile(model, config) gives a program that computes logits with it"
            )


@torch.no_grad()
def prefix_for(
    runner: StepRunner,
    step: Callable[..., Any] | ProgramPart,
    spec: GenerationSpec,
    device: torch.device,
    adapter_inputs: Mapping[str, Any],
    openings: Sequence[str] = PREFIX_FUNCTIONS,
) -> CachePrefix | None:
    """Return what a cache begins with for the adapter that ``step`` keeps; None where it has no virtual tokens.

    ``adapter_inputs`` has the values of the inputs that :func:`prefix_input_names` names. ``openings`` is as for
    :func:`prefix_attachments`. Raises AdaptcError for values that the adapter cannot take, and where the virtual tokens
    leave no room for a text.
    """
    prefix_of = partial(_prefix_of_adapter, runner, spec, device, openings)
    selection = getattr(runner, "selection", None)
    if isinstance(selection, RowSelection):
        made = batched_prefix(
            selection.mixes,
            lambda name, own: prefix_of(selection.adapters[name], _step_of_row(runner, spec, name), own),
            spec,
            adapter_inputs,
        )
        if made is None:
            _refuse_unknown_inputs(adapter_inputs)
        return made
    call = partial(run_step_part, step) if isinstance(step, ProgramPart) else step
    return prefix_of(getattr(step, "binding", None), call, adapter_inputs)


def _step_of_row(runner: Any, spec: GenerationSpec, name: str) -> Callable[..., Any]:
    """Return what runs steps with the one adapter ``name`` of a bank's selection."""
    alone = runner.for_one_row(name)
    if spec.part_outputs is None:
        return alone
    return partial(run_step_part, alone.parts(spec.part_outputs)["step"])


def _prefix_of_adapter(
    runner: StepRunner,
    spec: GenerationSpec,
    device: torch.device,
    openings: Sequence[str],
    binding: Any,
    step: Callable[..., Any],
    adapter_inputs: Mapping[str, Any],
) -> CachePrefix | None:
    """Return what a cache begins with for the one adapter in ``binding``, which ``step`` runs with; None for
    nothing."""
    found = [] if binding is None else _bound_attachments(runner, binding, openings)
    prefixes = [f for a in found if (f := _AttachmentPrefix.from_attachment(a, binding)).count]
    prefixes.sort(
        key=lambda f: f.method.opening() != "past_key_values"
    )  # a KV prefix stands before all prompt embeddings
    _refuse_unknown_inputs({n: v for n, v in adapter_inputs.items() if not any(n in f.caller_inputs for f in prefixes)})
    if not prefixes:
        return None
    check_virtual_tokens_fit(count := sum(f.count for f in prefixes), spec)
    own = [f.select_inputs(adapter_inputs, device) for f in prefixes]
    if rows := [t.shape[0] for values in own for t in values.values()]:
        validate.check_cache_size(spec, rows[0], count)
        return _chain_prefixes(prefixes, step, spec, device, own)
    known, program = _PREFIXES.get(binding), program_of(runner)
    if known is None or known[0] != _tensor_versions(program, binding):
        with outside_modes():
            made = _chain_prefixes(prefixes, step, spec, device, own)
        # Read after the run: a first run may lay weights out anew, which changes their addresses and is no write.
        known = _PREFIXES[binding] = _tensor_versions(program, binding), made
    return known[1]


def count_virtual_tokens(runner: StepRunner, binding: Any, openings: Sequence[str] = PREFIX_FUNCTIONS) -> int:
    """Return the number of virtual tokens of the adapter in ``binding``."""
    return sum(
        _AttachmentPrefix.from_attachment(a, binding).count for a in _bound_attachments(runner, binding, openings)
    )


def _bound_attachments(runner: StepRunner, binding: Any, openings: Sequence[str]) -> list[Attachment]:
    """Return the attachments of :func:`prefix_attachments` whose slots are all in ``binding``."""
    return [a for a in prefix_attachments(runner, openings) if all(f in binding.values for f in a.slots.values())]


def _chain_prefixes(
    prefixes: Sequence[_AttachmentPrefix],
    step: Callable[..., Any],
    spec: GenerationSpec,
    device: torch.device,
    method_inputs: Sequence[Mapping[str, Tensor]],
) -> CachePrefix:
    """Return the :class:`CachePrefix` of several attachments, whose virtual tokens follow one another."""
    made: CachePrefix | None = None
    for front, own in zip(prefixes, method_inputs, strict=True):
        made = front.compute(step, spec, device, own, made)
    assert made is not None
    return made


def check_virtual_tokens_fit(count: int, spec: GenerationSpec) -> None:
    """Raise AdaptcError where ``count`` virtual tokens leave no room for a text."""
    if count >= spec.max_length:
        raise AdaptcError(
            f"the adapter puts {count} tokens in front, which leaves no room for those of a text: "
            f"max_length={spec.max_length}. Compile with more, or choose an adapter of fewer"
        )


class _AttachmentPrefix:
    """The ``count`` virtual tokens of one attachment."""

    def __init__(self, method: ProgramMethod, slots: Mapping[str, Tensor]) -> None:
        self.method, self.slots = method, slots
        self.count = int(method.virtual_token_count(slots))

    @classmethod
    def from_attachment(cls, attachment: Attachment, binding: Any) -> _AttachmentPrefix:
        method = binding.methods.get(attachment.id, attachment.method).evaluated()
        return cls(method, {n: binding.values[f].detach() for n, f in attachment.slots.items()})

    @property
    def caller_inputs(self) -> Mapping[str, Any]:
        return {n: e for n, e in self.method.extra_inputs.extras().items() if e.place is None}

    def select_inputs(self, adapter_inputs: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """Return the inputs that the method takes from a caller, by name, on ``device``.

        Raises AdaptcError for a missing value, another shape or dtype, and values that the method refuses.
        """
        checked: dict[str, Tensor] = {}
        for name, extra in self.caller_inputs.items():
            value = adapter_inputs.get(name)
            if not isinstance(value, Tensor) or value.ndim != len(extra.axes) or value.dtype != extra.dtype:
                is_ = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{value!r}"
                raise AdaptcError(
                    f"{self.method.name} needs {name}, a tensor ({', '.join(extra.axes)}) of {extra.dtype}; got {is_}"
                )
            checked[name] = value.to(device)
        if why := self.method.extra_inputs.check_inputs(self.slots, checked) if checked else "":
            raise AdaptcError(why)
        return checked

    def compute(
        self,
        step: Callable[..., Any],
        spec: GenerationSpec,
        device: torch.device,
        method_inputs: Mapping[str, Tensor],
        previous: CachePrefix | None,
    ) -> CachePrefix:
        """Return what a cache begins with: these virtual tokens behind ``previous``, or alone where that is None."""
        if self.method.opening() == "past_key_values":
            assert previous is None
            rows = self.method.past_key_values(self.slots, method_inputs)
            own = [t.unsqueeze(0).to(device, spec.layout.dtype) for t in rows]
            return CachePrefix(own * spec.layout.passes, self.count)
        rows = self.method.prompt(self.slots, method_inputs).to(device, spec.embeds_dtype)
        return _read_prompt(rows if rows.ndim == 3 else rows.unsqueeze(0), step, spec, device, previous)


def _read_prompt(
    rows: Tensor, step: Callable[..., Any], spec: GenerationSpec, device: torch.device, previous: CachePrefix | None
) -> CachePrefix:
    """Return what the cache holds after ``previous`` and a text of the embeddings ``rows`` (batch, count, width)."""
    batch, count = rows.shape[:2]
    previous_length = 0 if previous is None else previous.count
    past = spec.new_cache(device, previous)
    past.expected_length = previous_length + count
    past.activate_past_recording()  # sliding-window layers keep all positions, too
    past.reserve(batch, previous_length + count)
    inputs = {
        "input_ids": torch.zeros(batch, count, dtype=torch.int64, device=device),
        "inputs_embeds": rows.contiguous(),
        "embedded": torch.tensor(True, device=device),
    }
    if spec.takes_position_ids:
        positions = torch.arange(previous_length, previous_length + count, device=device)
        inputs["position_ids"] = spec.step_positions(positions.expand(batch, -1))
    spec.cache_mode.run(step, past, inputs, count, 1)
    return CachePrefix(past.filled_tensors(), previous_length + count, counts_padding=True)


def _refuse_unknown_inputs(adapter_inputs: Mapping[str, Any]) -> None:
    if strange := [n for n, v in adapter_inputs.items() if v is not None]:
        raise AdaptcError(f"{strange[0]} is not taken by the current adapter: leave it out")


def _tensor_versions(program: Any, binding: Any) -> list[tuple[int, int]]:
    """Return (number of writes, address) of each tensor that a step may read."""
    base: Mapping[str, Any] = {}  # the weights of a package are constant
    if isinstance(program, ProgramCore):
        base = program.base_tensors
    tensors = [t for t in (*base.values(), *binding.values.values()) if isinstance(t, Tensor)]
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]


def with_prefix_arguments(generator: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate``, with a cache that begins with the adapter's virtual tokens.

    ``generator`` is a generator that keeps its adapter. The arguments stay as they are where the adapter has no virtual
    tokens. Raises AdaptcError for arguments that the adapter does not take.
    """
    adapter_inputs = pop_prefix_inputs(generator.runner, kwargs)
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    past = next((v for name in ("past_key_values", "cache") if (v := kwargs.get(name)) is not None), None)
    if past is not None and adapter_inputs:
        raise AdaptcError(
            f"{next(iter(adapter_inputs))} says what a new cache begins with, and this one has begun: leave out one of "
            "the two"
        )
    if past is None:
        past = generator.new_cache(**adapter_inputs)
        if past.prefix is None:
            return kwargs
        rows = {v.shape[0] for v in adapter_inputs.values()}
        if isinstance(input_ids, Tensor) and rows and rows != {input_ids.shape[0]}:
            raise AdaptcError(
                f"{next(iter(adapter_inputs))} has {rows.pop()} entries, and there are {input_ids.shape[0]} rows of "
                "text"
            )
        kwargs[cache_argument_name()] = past
    if getattr(past, "counts_padding", False) and kwargs.get("position_ids") is not None:
        raise AdaptcError(
            "position_ids is not taken behind tokens of a prompt: positions are places, those in front and padding "
            "counted. Leave it out"
        )
    return kwargs
