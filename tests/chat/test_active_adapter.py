"""Who answers: swaps on the programs there are, one more program where none takes an adapter, and failures that change
nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.chat.active_adapter import ActiveAdapter, ChatAdapters
from adaptc.chat.models import OpenedModel
from tests.support.chats import SIZES, ChatModel, no_output

IDS = torch.tensor([[9, 12, 41, 30]])


def said(voice: ActiveAdapter) -> list[int]:
    return voice.generator.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 4:].tolist()


@pytest.mark.long
def test_names_directories_and_the_base(chats: ChatModel) -> None:
    voices = ChatAdapters(chats.opened_model, {"one": chats.folder / "one"}, no_output)
    assert voices.current.name == "one"
    expected: dict[str | None, Any] = {n: chats.uncached_answer(n, IDS[0].tolist()) for n in ("one", "two", None)}
    assert len({tuple(e) for e in expected.values()}) == 3
    assert said(voices.current) == expected["one"]
    path = str(chats.folder / "two")
    voice = voices.activate(path)
    assert (voice.name, said(voice)) == (path, expected["two"])
    assert voice.swap_seconds is not None
    assert voice.swap_seconds > 0
    assert said(voices.activate_base()) == expected[None]
    assert voices.current.name is None
    assert said(voices.activate("one")) == expected["one"]
    assert list(voices.adapters) == ["one", path]


def test_without_adapters_the_base_answers(chats: ChatModel) -> None:
    voices = ChatAdapters(chats.opened_model, {}, no_output)
    assert voices.current.name is None
    assert said(voices.current) == chats.uncached_answer(None, IDS[0].tolist())


def test_failures_change_nothing(chats: ChatModel, tmp_path: Path) -> None:
    voices = ChatAdapters(chats.opened_model, chats.adapters, no_output)
    before, expected = voices.current, said(voices.current)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "tow": r"there is no adapter 'tow', and no directory or file of this name; nearest are 'two'; /adapters",
        str(tmp_path / "empty"): "holds no adapter",
        str(chats.folder / "ia3"): "no slot in the program",
        str(chats.folder / "head"): "lm_head",
    }.items():
        with pytest.raises(adaptc.AdaptcError, match=message):
            voices.activate(name)
        assert voices.current is before
        assert list(voices.adapters) == ["one", "two"]
        assert said(voices.current) == expected


class Captures:
    """An opened model whose captures are counted."""

    def __init__(self, chats: ChatModel, own: dict[str, Any] | None = None) -> None:
        self.chats, self.asked, self.told = chats, [], []
        self.refused: list[Path] = []
        self.opened = OpenedModel(chats.opened_model.tokenizer, self.capture, (), own or {})

    def capture(self, adapter: Any) -> adaptc.Generator:
        self.asked.append(adapter)
        if adapter is None or isinstance(adapter, list):
            if adapter == self.refused:
                raise adaptc.ConfigError("these do not go together")
            return self.chats.opened_model.generators[0]
        return adaptc.compile_for_generation(self.chats.model, adapter, **SIZES)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        self.told.append(what)
        yield


@pytest.mark.long
def test_a_program_more_for_an_adapter_that_does_not_fit(chats: ChatModel) -> None:
    captures = Captures(chats)
    voices = ChatAdapters(captures.opened, {}, captures.working)
    assert captures.asked == [None]
    ia3 = voices.activate(str(chats.folder / "ia3"))
    assert captures.asked == [None, chats.folder / "ia3"]
    assert captures.told == ["capturing the model", "preparing", f"capturing the model for {ia3.name}", "preparing"]
    assert ia3.swap_seconds is None
    plain = chats.uncached_answer(None, IDS[0].tolist())
    own = adaptc.compile(chats.model, str(chats.folder / "ia3"))
    tokens = IDS
    for _ in range(6):
        tokens = torch.cat([tokens, own(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert said(ia3) == tokens[0, 4:].tolist() != plain
    # Both programs stay: to and fro, none is captured again.
    one = voices.activate(str(chats.folder / "one"))
    assert said(one) == chats.uncached_answer("one", IDS[0].tolist())
    assert said(voices.activate(str(chats.folder / "ia3"))) == tokens[0, 4:].tolist()
    assert said(voices.activate_base()) == plain
    assert len(captures.asked) == 2


def test_one_program_for_all_adapters_that_are_named(chats: ChatModel) -> None:
    captures, paths = Captures(chats), list(chats.adapters.values())
    voices = ChatAdapters(captures.opened, chats.adapters, captures.working)
    assert captures.asked == [paths]
    assert captures.told == [f"capturing the model for {paths[0]}, {paths[1]}", "preparing"]
    for name in ("one", "two", "one"):
        assert said(voices.activate(name)) == chats.uncached_answer(name, IDS[0].tolist())
    assert len(captures.asked) == 1


@pytest.mark.long
def test_adapters_that_no_program_takes_together(chats: ChatModel) -> None:
    """The first gets one of its own, and so do the others when they are asked for."""
    adapters = {"ia3": chats.folder / "ia3", "none": chats.folder / "empty"}
    captures, notes = Captures(chats), []
    captures.refused = list(adapters.values())
    voices = ChatAdapters(captures.opened, adapters, captures.working, notes.append)
    assert captures.asked == [captures.refused, adapters["ia3"]]
    assert voices.current.name == "ia3"
    (note,) = notes
    assert note.endswith("these do not go together")
    before = said(voices.current)
    with pytest.raises(adaptc.AdaptcError, match="empty"):
        voices.activate("none")
    assert said(voices.current) == before


def test_a_capture_that_fails_leaves_the_voice(chats: ChatModel) -> None:
    voices = ChatAdapters(chats.opened_model, {}, no_output)

    def capture(adapter: Any) -> adaptc.Generator:
        raise adaptc.TargetError("nothing of this name")

    failing = ChatAdapters(
        OpenedModel(chats.opened_model.tokenizer, capture, chats.opened_model.generators), {}, no_output
    )
    with pytest.raises(adaptc.TargetError):
        failing.activate(str(chats.folder / "ia3"))
    assert failing.current.name is None
    assert said(failing.current) == said(voices.current)


def test_what_came_with_a_program_answers_first_and_can_be_come_back_to(chats: ChatModel) -> None:
    generator = chats.opened_model.generators[0]
    adaptc.swap(generator, chats.folder / "two")
    opened = OpenedModel(chats.opened_model.tokenizer, None, (generator,), {"own": generator.program.binding})
    voices = ChatAdapters(opened, {}, no_output)
    assert voices.current.name == "own"
    expected = chats.uncached_answer("two", IDS[0].tolist())
    assert said(voices.current) == expected
    voices.activate(str(chats.folder / "one"))
    assert said(voices.activate("own")) == expected
    assert ChatAdapters(opened, {"one": chats.folder / "one"}, no_output).current.name == "one"
