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

from adaptc.bank.selection import Assignment
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation import validate
from adaptc.generation.cache.cache_prefix import CachePrefix
from adaptc.generation.modes.cache_modes import cache_for, run_as
from adaptc.generation.prefix.batched_prefix import front_of_rows
from adaptc.generation.spec import NOTHING, GenerationSpec
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.program_method import OPENINGS, ProgramMethod
from adaptc.state.bound import program_of
from adaptc.state.core import ProgramCore
from adaptc.torch_modes import plainly

#: binding -> how often each tensor that was read had been written to, and the :class:`CachePrefix` computed from them
_KNOWN: WeakKeyDictionary[Any, tuple[Any, CachePrefix]] = WeakKeyDictionary()


def begins(runs: Any, openings: Sequence[str] = OPENINGS) -> list[Attachment]:
    """Return the attachments that say what a cache begins with, by one of the methods ``openings``.

    ``runs`` is a program, or what is bound to one. :data:`OPENINGS` says which methods there are.
    """
    adaptation = getattr(program_of(runs), "adaptation", None)
    attachments: Sequence[Attachment] = () if adaptation is None else adaptation.attachments
    return [a for a in attachments if isinstance(a.method, ProgramMethod) and a.method.opening() in openings]


def taken(runs: Any) -> list[str]:
    """Return the names of the inputs that the attachments of :func:`begins` ask of a caller, such as ``task_ids``."""
    methods = [a.method for a in begins(runs)]
    return [n for m in methods if isinstance(m, ProgramMethod) for n, e in m.extras().items() if e.place is None]


def refuse_without_cache(runs: Any, facts: GenerationSpec, name: str) -> None:
    """Raise ConfigError where an adapter has virtual tokens and the step has no cache, or takes no embeddings for a
    prompt."""
    for a in begins(runs):
        if facts.keeps == NOTHING:
            raise ConfigError(
                f"{a.method.name} is what a cache begins with, and {name} generates without one: {facts.why}. "
                "adaptc.compile(model, config) gives a program that computes logits with it"
            )
        if a.method.opening() == "prompt" and not facts.embeds:  # type: ignore[union-attr]
            raise ConfigError(
                f"{a.method.name} puts embeddings in front, and the forward of {name} takes no inputs_embeds. "
                "adaptc.compile(model, config) gives a program that computes logits with it"
            )


@torch.no_grad()
def prefix_for(
    runs: Any,
    step: Any,
    facts: GenerationSpec,
    device: torch.device,
    given: Mapping[str, Any],
    openings: Sequence[str] = OPENINGS,
) -> CachePrefix | None:
    """Return what a cache begins with for the adapter that ``step`` keeps; None where it has no virtual tokens.

    ``step`` None means the adapter that is current now. ``given`` has the values of the inputs that :func:`taken`
    names. ``openings`` is as for :func:`begins`. Raises AdaptcError for values that the adapter cannot take, and where
    the virtual tokens leave no room for a text.
    """
    one = partial(_of_one, runs, facts, device, openings)
    if isinstance(runs, Assignment):
        made = front_of_rows(
            runs.mixes, lambda name, own: one(runs.adapters[name], runs.alone(name), own), facts, given
        )
        if made is None:
            _refuse_given(given)
        return made
    step = runs.pinned() if step is None and begins(runs) else step
    return one(getattr(step, "binding", None), step, given)


def _of_one(
    runs: Any,
    facts: GenerationSpec,
    device: torch.device,
    openings: Sequence[str],
    binding: Any,
    step: Callable[..., Any] | None,
    given: Mapping[str, Any],
) -> CachePrefix | None:
    """Return what a cache begins with for the one adapter in ``binding``, which ``step`` runs with; None for
    nothing."""
    found = [] if binding is None else _with_slots(runs, binding, openings)
    fronts = [f for a in found if (f := _Front.of(a, binding)).count]
    fronts.sort(key=lambda f: f.method.opening() != "cached")  # a KV prefix stands before all prompt embeddings
    _refuse_given({n: v for n, v in given.items() if not any(n in f.wanted for f in fronts)})
    if not fronts:
        return None
    assert step is not None
    check_room(count := sum(f.count for f in fronts), facts)
    own = [f.given(given, device) for f in fronts]
    if rows := [t.shape[0] for values in own for t in values.values()]:
        validate.fits(facts, rows[0], count)
        return _opened(fronts, step, facts, device, own)
    known, program = _KNOWN.get(binding), program_of(runs)
    if known is None or known[0] != _writes(program, binding):
        with plainly():
            made = _opened(fronts, step, facts, device, own)
        # Read after the run: a first run may lay weights out anew, which changes their addresses and is no write.
        known = _KNOWN[binding] = _writes(program, binding), made
    return known[1]


def count_in_front(runs: Any, binding: Any, openings: Sequence[str] = OPENINGS) -> int:
    """Return the number of virtual tokens of the adapter in ``binding``."""
    return sum(_Front.of(a, binding).count for a in _with_slots(runs, binding, openings))


def _with_slots(runs: Any, binding: Any, openings: Sequence[str]) -> list[Attachment]:
    """Return the attachments of :func:`begins` whose slots are all in ``binding``."""
    return [a for a in begins(runs, openings) if all(f in binding.values for f in a.slots.values())]


def _opened(
    fronts: Sequence[_Front],
    step: Callable[..., Any],
    facts: GenerationSpec,
    device: torch.device,
    given: Sequence[Mapping[str, Tensor]],
) -> CachePrefix:
    """Return the :class:`CachePrefix` of several attachments, whose virtual tokens follow one another."""
    made: CachePrefix | None = None
    for front, own in zip(fronts, given, strict=True):
        made = front.opening(step, facts, device, own, made)
    assert made is not None
    return made


def check_room(count: int, facts: GenerationSpec) -> None:
    """Raise AdaptcError where ``count`` virtual tokens leave no room for a text."""
    if count >= facts.max_length:
        raise AdaptcError(
            f"the adapter puts {count} tokens in front, which leaves no room for those of a text: "
            f"max_length={facts.max_length}. Compile with more, or choose an adapter of fewer"
        )


class _Front:
    """The ``count`` virtual tokens of one attachment."""

    def __init__(self, method: ProgramMethod, slots: Mapping[str, Tensor]) -> None:
        self.method, self.slots = method, slots
        self.count = int(method.lengthens(slots))

    @classmethod
    def of(cls, a: Attachment, binding: Any) -> _Front:
        method = binding.methods.get(a.id, a.method).evaluated()
        return cls(method, {n: binding.values[f].detach() for n, f in a.slots.items()})

    @property
    def wanted(self) -> Mapping[str, Any]:
        return {n: e for n, e in self.method.extras().items() if e.place is None}

    def given(self, given: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """Return the inputs that the method takes from a caller, by name, on ``device``.

        Raises AdaptcError for a missing value, another shape or dtype, and values that the method refuses.
        """
        out: dict[str, Tensor] = {}
        for name, extra in self.wanted.items():
            value = given.get(name)
            if not isinstance(value, Tensor) or value.ndim != len(extra.axes) or value.dtype != extra.dtype:
                is_ = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"{value!r}"
                raise AdaptcError(
                    f"{self.method.name} needs {name}, a tensor ({', '.join(extra.axes)}) of {extra.dtype}; got {is_}"
                )
            out[name] = value.to(device)
        if why := self.method.why_wrong(self.slots, out) if out else "":
            raise AdaptcError(why)
        return out

    def opening(
        self,
        step: Callable[..., Any],
        facts: GenerationSpec,
        device: torch.device,
        given: Mapping[str, Tensor],
        before: CachePrefix | None,
    ) -> CachePrefix:
        """Return what a cache begins with: these virtual tokens behind ``before``, or alone where that is None."""
        if self.method.opening() == "cached":
            assert before is None
            rows = self.method.cached(self.slots, given)
            own = [t.unsqueeze(0).to(device, facts.layout.dtype) for t in rows]
            return CachePrefix(own * facts.layout.passes, self.count)
        rows = self.method.prompt(self.slots, given).to(device, facts.embeds_dtype)
        return _read(rows if rows.ndim == 3 else rows.unsqueeze(0), step, facts, device, before)


def _read(
    rows: Tensor, step: Callable[..., Any], facts: GenerationSpec, device: torch.device, before: CachePrefix | None
) -> CachePrefix:
    """Return what the cache holds after ``before`` and a text of the embeddings ``rows`` (batch, count, width)."""
    batch, count = rows.shape[:2]
    begun = 0 if before is None else before.count
    past = cache_for(facts, device, before)
    past.expected = begun + count
    past.activate_past_recording()  # sliding-window layers keep all positions, too
    past.reserve(batch, begun + count)
    inputs = {
        "input_ids": torch.zeros(batch, count, dtype=torch.int64, device=device),
        "inputs_embeds": rows.contiguous(),
        "embedded": torch.tensor(True, device=device),
    }
    if facts.positions:
        inputs["position_ids"] = torch.arange(begun, begun + count, device=device).expand(batch, -1).contiguous()
    run_as(facts, step, past, inputs, count, 1)
    return CachePrefix(past.held(), begun + count, in_places=True)


def _refuse_given(given: Mapping[str, Any]) -> None:
    if strange := [n for n, v in given.items() if v is not None]:
        raise AdaptcError(f"{strange[0]} is not taken by the current adapter: leave it out")


def _writes(program: Any, binding: Any) -> list[tuple[int, int]]:
    """Return (number of writes, address) of each tensor that a step may read."""
    base = program.base_tensors if isinstance(program, ProgramCore) else {}  # the weights of a package are constant
    tensors = [t for t in (*base.values(), *binding.values.values()) if isinstance(t, Tensor)]
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]
