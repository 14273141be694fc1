"""What a fresh cache begins with: that of an adapter which puts tokens in front of a text.

Before: what runs a step program, and its adapter. After: an :class:`Opening`, or None where the adapter has nothing in
front. Keys and values are the adapter's own; embeddings become what the step itself makes of them, as if they were the
first tokens of a text. Both are computed once for each binding, or, where they follow from what a caller gives (the
task of each row), once for each cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation import checks
from adaptc.generation.facts import NOTHING, Facts
from adaptc.generation.opening import Opening
from adaptc.generation.row_fronts import front_of_rows
from adaptc.generation.ways import cache_for, run_as
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.program_method import OPENINGS, ProgramMethod
from adaptc.program.assigned import Assignment
from adaptc.program.bound import program_of
from adaptc.program.core import ProgramCore
from adaptc.torch_modes import plainly

#: binding -> the writes to all that was read, and what followed from it
_KNOWN: WeakKeyDictionary[Any, tuple[Any, Opening]] = WeakKeyDictionary()


def begins(runs: Any, openings: Sequence[str] = OPENINGS) -> list[Attachment]:
    """The attachments of a program, or of what is bound to one, that say what a cache begins with, by one of these
    functions."""
    adaptation = getattr(program_of(runs), "adaptation", None)
    attachments: Sequence[Attachment] = () if adaptation is None else adaptation.attachments
    return [a for a in attachments if isinstance(a.method, ProgramMethod) and a.method.opening() in openings]


def taken(runs: Any) -> list[str]:
    """The inputs that these ask of a caller."""
    methods = [a.method for a in begins(runs)]
    return [n for m in methods if isinstance(m, ProgramMethod) for n, e in m.extras().items() if e.place is None]


def refuse_without_cache(runs: Any, facts: Facts, name: str) -> None:
    """Raises ConfigError where there is no cache, or no embeddings, to begin with."""
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
def front_of(
    runs: Any,
    step: Any,
    facts: Facts,
    device: torch.device,
    given: Mapping[str, Any],
    openings: Sequence[str] = OPENINGS,
) -> Opening | None:
    """What a cache begins with for the adapter that ``step`` keeps, by default the current one. ``given``: by name,
    what :func:`taken` names; ``openings``: as for :func:`begins`. Raises AdaptcError for values that the adapter cannot
    have, and where it leaves no room for a text."""
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
    facts: Facts,
    device: torch.device,
    openings: Sequence[str],
    binding: Any,
    step: Callable[..., Any] | None,
    given: Mapping[str, Any],
) -> Opening | None:
    """Of one adapter, which ``step`` keeps."""
    found = [] if binding is None else _with_slots(runs, binding, openings)
    fronts = [f for a in found if (f := _Front.of(a, binding)).count]
    fronts.sort(key=lambda f: f.method.opening() != "cached")  # keys and values come before all tokens
    _refuse_given({n: v for n, v in given.items() if not any(n in f.wanted for f in fronts)})
    if not fronts:
        return None
    assert step is not None
    check_room(count := sum(f.count for f in fronts), facts)
    own = [f.given(given, device) for f in fronts]
    if rows := [t.shape[0] for values in own for t in values.values()]:
        checks.fits(facts, rows[0], count)
        return _opened(fronts, step, facts, device, own)
    known, program = _KNOWN.get(binding), program_of(runs)
    if known is None or known[0] != _writes(program, binding):
        with plainly():
            made = _opened(fronts, step, facts, device, own)
        # What runs for the first time may lay weights out in another way, which is no write to them.
        known = _KNOWN[binding] = _writes(program, binding), made
    return known[1]


def count_in_front(runs: Any, binding: Any, openings: Sequence[str] = OPENINGS) -> int:
    """How many tokens an adapter of ``runs`` puts in front of those of a text."""
    return sum(_Front.of(a, binding).count for a in _with_slots(runs, binding, openings))


def _with_slots(runs: Any, binding: Any, openings: Sequence[str]) -> list[Attachment]:
    """Of these attachments those that a binding has."""
    return [a for a in begins(runs, openings) if all(f in binding.values for f in a.slots.values())]


def _opened(
    fronts: Sequence[_Front],
    step: Callable[..., Any],
    facts: Facts,
    device: torch.device,
    given: Sequence[Mapping[str, Tensor]],
) -> Opening:
    """What several have in front, one behind the other."""
    made: Opening | None = None
    for front, own in zip(fronts, given, strict=True):
        made = front.opening(step, facts, device, own, made)
    assert made is not None
    return made


def check_room(count: int, facts: Facts) -> None:
    """Raises AdaptcError where so many tokens in front leave no room for a text."""
    if count >= facts.max_length:
        raise AdaptcError(
            f"the adapter puts {count} tokens in front, which leaves no room for those of a text: "
            f"max_length={facts.max_length}. Compile with more, or choose an adapter of fewer"
        )


class _Front:
    """The tokens in front of one adapter's: ``count`` of them."""

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
        """What the method asks of a caller. Raises AdaptcError for what is not there, or cannot be."""
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
        facts: Facts,
        device: torch.device,
        given: Mapping[str, Tensor],
        before: Opening | None,
    ) -> Opening:
        """``before``: what comes before it."""
        if self.method.opening() == "cached":
            assert before is None
            rows = self.method.cached(self.slots, given)
            own = [t.unsqueeze(0).to(device, facts.layout.dtype) for t in rows]
            return Opening(own * facts.layout.passes, self.count)
        rows = self.method.prompt(self.slots, given).to(device, facts.embeds_dtype)
        return _read(rows if rows.ndim == 3 else rows.unsqueeze(0), step, facts, device, before)


def _read(
    rows: Tensor, step: Callable[..., Any], facts: Facts, device: torch.device, before: Opening | None
) -> Opening:
    """What the cache holds after a text of these embeddings (batch, count, width)."""
    batch, count = rows.shape[:2]
    begun = 0 if before is None else before.count
    past = cache_for(facts, device, before)
    past.expected = begun + count
    past.activate_past_recording()  # all positions, in layers that look back on a window too
    past.reserve(batch, begun + count)
    inputs = {
        "input_ids": torch.zeros(batch, count, dtype=torch.int64, device=device),
        "inputs_embeds": rows.contiguous(),
        "embedded": torch.tensor(True, device=device),
    }
    if facts.positions:
        inputs["position_ids"] = torch.arange(begun, begun + count, device=device).expand(batch, -1).contiguous()
    run_as(facts, step, past, inputs, count, 1)
    return Opening(past.held(), begun + count, in_places=True)


def _refuse_given(given: Mapping[str, Any]) -> None:
    if strange := [n for n, v in given.items() if v is not None]:
        raise AdaptcError(f"{strange[0]} is not taken by the current adapter: leave it out")


def _writes(program: Any, binding: Any) -> list[tuple[int, int]]:
    """How often each tensor that a step may read was written to, and where it lies."""
    base = program.base_tensors if isinstance(program, ProgramCore) else {}  # nobody writes to a package
    tensors = [t for t in (*base.values(), *binding.values.values()) if isinstance(t, Tensor)]
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]
