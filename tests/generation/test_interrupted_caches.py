"""A caller's cache after a call that was interrupted at any line: as it was, or refused with what to do.

Lines are those of adaptc and of the graphs that it runs, so also those between two writes of one step. What a cache
says is compared with what a copy of it says that nothing was interrupted with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.generation.cache.state_cache import StateCache
from adaptc.generation.cache.step_cache import StepCache
from tests.generation import test_alora as alora
from tests.generation import test_virtual_tokens as prompted
from tests.generation.models import case, generated, generator, prompt
from tests.generation.test_recurrent_models import both
from tests.generation.test_uncached_models import whole
from tests.support.families import FAMILIES
from tests.support.interrupts import LineInterrupt

TEXT = prompt(2, 9, (3, 0))
NEW = torch.tensor([[5, 7], [9, 4]])
WHOLE = {
    "input_ids": torch.cat([TEXT["input_ids"], NEW], 1),
    "attention_mask": torch.cat([TEXT["attention_mask"], torch.ones_like(NEW)], 1),
}
REFUSED = "compute the text again with gen.prefill"


@cache
def made(kind: str) -> tuple[Any, StepCache]:
    """What generates, and a cache of :data:`TEXT`."""
    if kind == "rows":
        gen = generator().bank(case("llama").adapters).select(["second", {"first": 0.6, "second": -0.4}])
    elif kind == "state":
        gen = both()[1]
    elif kind == "text":
        gen = whole()
    elif kind == "prefix":
        config = adaptc.PrefixTuningConfig(num_virtual_tokens=5)
        gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), config, max_batch=12, max_length=48)
    elif kind == "prompt":
        gen = prompted.generator("gemma3_text")
    elif kind == "alora":
        gen = alora.generator("llama")
    else:
        gen = generator(kind)
    return gen, gen.prefill(*TEXT.values())


KINDS = ["llama", "gemma2", "mistral", "gpt_neo", "state", "text", "t5", "rows", "prefix", "prompt", "alora"]
#: lines around the blocks of a call, where nothing is wrong yet and nobody is told
AT_THE_END = 5
#: those of which a step writes over what came before, so that not all can be put back
WRITTEN_OVER = {"gemma2", "mistral", "state", "prompt"}


def stepping(gen: Any, past: StepCache, new: Tensor = NEW[:, :1]) -> Tensor:
    """The logits of a step."""
    name = "decoder_input_ids" if hasattr(past, "states") else "input_ids"
    return gen.forward(**{name: new}, past_key_values=past).logits


def piece(gen: Any, past: StepCache) -> Any:
    return stepping(gen, past, torch.cat([NEW, NEW, NEW.flip(0)], 1))


def going_on(gen: Any, past: StepCache) -> Any:
    if hasattr(past, "states"):
        how = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 1}
        return gen.generate(past_key_values=past, decoder_input_ids=NEW[:, :1], **how)
    return generated(gen, WHOLE, past_key_values=past, new=4)


def again(gen: Any, past: StepCache) -> Any:
    """The last token of the prompt is computed once more, of another adapter too."""
    return generated(gen.base if gen.__class__.__name__ == "Generator" else gen, TEXT, past_key_values=past, new=3)


class GraphLines(LineInterrupt):
    """Those of the code of graphs, too."""

    def _counts(self, name: str) -> bool:
        return name.startswith("<eval_with_key>") or super()._counts(name)


def answered(gen: Any, past: StepCache) -> Tensor | None:
    """The logits of a step; None where the cache is refused."""
    try:
        return stepping(gen, past)
    except adaptc.AdaptcError as error:
        if REFUSED not in str(error):
            raise
        return None


def interrupted(kind: str, deed: Callable[..., Any], points: int) -> tuple[int, int]:
    """Interrupt at ``points`` lines, spread over all: how many interrupts came, and after how many it was refused."""
    gen, start = made(kind)
    deed(gen, start.copy())
    with GraphLines() as lines:
        deed(gen, start.copy())
    expected, came, refused = stepping(gen, start.copy()), 0, 0
    for n in range(1 + points % 3, lines.count + 1, max(1, lines.count // points)):
        past = start.copy()
        try:
            with GraphLines(n):
                deed(gen, past)
        except KeyboardInterrupt:
            came += 1
        else:
            continue  # what is remembered, no run does again
        found = answered(gen, past)
        if found is None:
            assert answered(gen, past) is None
            past.reset()
            assert past.length == past.prefix_length
            refused += 1
        else:
            assert found.shape == expected.shape, f"line {n} of {lines.count}"
            assert torch.equal(found, expected), f"line {n} of {lines.count}"
    return came, refused


def deeds_of(kind: str) -> list[Callable[..., Any]]:
    """What can be done with such a cache."""
    return [stepping, piece, going_on] if kind in ("t5", "state", "rows") else [stepping, piece, going_on, again]


#: one of each way to change a cache; the others are run with all tests
QUICK = {"llama", "gemma2", "state", "t5", "alora"}
SOME = [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", SOME)
def test_an_interrupt_leaves_a_cache_or_a_refusal(kind: str) -> None:
    found = [interrupted(kind, deed, 10) for deed in deeds_of(kind)]
    assert all(came > 3 for came, _ in found)
    refused = sum(n for _, n in found)
    assert (refused > 0) if kind == "state" else (refused <= AT_THE_END or kind in WRITTEN_OVER)


@pytest.mark.slow
@pytest.mark.parametrize("deed", [stepping, piece, going_on, again], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_anywhere_leaves_a_cache_or_a_refusal(kind: str, deed: Callable[..., Any]) -> None:
    if deed not in deeds_of(kind):
        deed = going_on
    came, refused = interrupted(kind, deed, 10**6)
    assert came > 40
    assert refused <= AT_THE_END or kind in WRITTEN_OVER


ROWS = torch.tensor([1, 1, 0])
CHANGES: dict[str, Callable[[StepCache], Any]] = {
    "reordered": lambda past: past.reorder_cache(ROWS[1:]),
    "chosen": lambda past: past.batch_select_indices(ROWS),
    "repeated": lambda past: past.batch_repeat_interleave(2),
    "cut": lambda past: past.crop(-1),
    "emptied": lambda past: past.reset(),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "state", "t5", pytest.param("prompt", marks=pytest.mark.slow), "alora"]
)
def test_rows_are_changed_or_as_they_were(kind: str) -> None:
    """At every line, of what a caller does with a cache itself."""
    gen, start = made(kind)
    if kind == "t5":
        stepping(gen, start := start.copy(), torch.cat([NEW, NEW], 1))
    for what, change in CHANGES.items():
        if kind == "state" and what == "cut":
            continue  # is refused
        before, after = start.copy(), start.copy()
        change(after)
        other = start.copy()
        with LineInterrupt() as lines:
            change(other)
        for n in range(1, lines.count + 1):
            past = start.copy()
            with pytest.raises(KeyboardInterrupt), LineInterrupt(n):
                change(past)
            expected = before if state_of(past) == state_of(before) else after
            assert state_of(past) == state_of(expected), (what, n)
        assert state_of(before) != state_of(after)


def state_of(past: StepCache) -> Any:
    """All that answers follow from."""
    sides = [past.active_from, {"ahead": past.left_padding, "states": getattr(past, "states", None)}]
    values = [[t if t is None else t.tolist() for t in side.values()] for side in sides]
    cross = [t.tolist() for t in getattr(past, "cross_tensors", ())]
    mask = past.mask[:, : past.length].tolist()
    tensors: list[Tensor] = []
    if past.length and past.tensors:  # a cache that was reset has no memory, also where virtual tokens count
        tensors = past.tensors if isinstance(past, StateCache) else past.view_up_to(past.length)
    return past.length, past.rows, values, cross, mask, [t.tolist() for t in tensors]


def test_what_raises_inside_of_a_step_is_an_interrupt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a generation that is begun inside of another, with the same cache, is refused before it writes."""
    gen, start = made("llama")
    past = start.copy()

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            for call in (lambda: generated(gen, WHOLE, past_key_values=past), lambda: stepping(gen, past)):
                with pytest.raises(adaptc.AdaptcError, match="was interrupted, or goes on"):
                    call()

        def end(self) -> None:
            raise RuntimeError("the connection is lost")

    with pytest.raises(RuntimeError, match="the connection is lost"):
        generated(gen, WHOLE, past_key_values=past, streamer=Streamer())
    assert torch.equal(generated(gen, TEXT, past_key_values=past), generated(gen, TEXT))


@pytest.mark.parametrize(
    "indices", [[0], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([2]), torch.tensor([-1, 0])], ids=str
)
def test_rows_that_are_not_there_are_refused(indices: Any) -> None:
    for kind in ("llama", "t5"):
        past = made(kind)[1].copy()
        for change in (past.reorder_cache, past.batch_select_indices):
            with pytest.raises(adaptc.AdaptcError, match="rows"):
                change(indices)
        repeats: Any
        for repeats in (0, -1, 1.5, True):
            with pytest.raises(adaptc.AdaptcError, match="must be a number of one or more"):
                past.batch_repeat_interleave(repeats)
        assert state_of(past) == state_of(made(kind)[1])
