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
from adaptc.chat.active_adapter import Voice, Voices
from adaptc.chat.models import OpenedModel
from tests.support.chats import SIZES, Chats, silent

IDS = torch.tensor([[9, 12, 41, 30]])


def said(voice: Voice) -> list[int]:
    return voice.generator.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 4:].tolist()


def test_names_directories_and_the_base(chats: Chats) -> None:
    voices = Voices(chats.opened, {"one": chats.folder / "one"}, silent)
    assert voices.current.name == "one"
    expected: dict[str | None, Any] = {n: chats.recomputed(n, IDS[0].tolist()) for n in ("one", "two", None)}
    assert len({tuple(e) for e in expected.values()}) == 3
    assert said(voices.current) == expected["one"]
    path = str(chats.folder / "two")
    voice = voices.use(path)
    assert (voice.name, said(voice)) == (path, expected["two"])
    assert voice.seconds is not None
    assert voice.seconds > 0
    assert said(voices.base()) == expected[None]
    assert voices.current.name is None
    assert said(voices.use("one")) == expected["one"]
    assert list(voices.adapters) == ["one", path]


def test_without_adapters_the_base_answers(chats: Chats) -> None:
    voices = Voices(chats.opened, {}, silent)
    assert voices.current.name is None
    assert said(voices.current) == chats.recomputed(None, IDS[0].tolist())


def test_failures_change_nothing(chats: Chats, tmp_path: Path) -> None:
    voices = Voices(chats.opened, chats.adapters, silent)
    before, expected = voices.current, said(voices.current)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "tow": r"there is no adapter 'tow', and no directory or file of this name; nearest are 'two'; /adapters",
        str(tmp_path / "empty"): "holds no adapter",
        str(chats.folder / "ia3"): "no slot in the program",
        str(chats.folder / "head"): "lm_head",
    }.items():
        with pytest.raises(adaptc.AdaptcError, match=message):
            voices.use(name)
        assert voices.current is before
        assert list(voices.adapters) == ["one", "two"]
        assert said(voices.current) == expected


class Captures:
    """An opened model whose captures are counted."""

    def __init__(self, chats: Chats, own: dict[str, Any] | None = None) -> None:
        self.chats, self.asked, self.told = chats, [], []
        self.refused: list[Path] = []
        self.opened = OpenedModel(chats.opened.tokenizer, self.capture, (), own or {})

    def capture(self, adapter: Any) -> adaptc.Generator:
        self.asked.append(adapter)
        if adapter is None or isinstance(adapter, list):
            if adapter == self.refused:
                raise adaptc.ConfigError("these do not go together")
            return self.chats.opened.made[0]
        return adaptc.compile_for_generation(self.chats.model, adapter, **SIZES)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        self.told.append(what)
        yield


def test_a_program_more_for_an_adapter_that_does_not_fit(chats: Chats) -> None:
    captures = Captures(chats)
    voices = Voices(captures.opened, {}, captures.working)
    assert captures.asked == [None]
    ia3 = voices.use(str(chats.folder / "ia3"))
    assert captures.asked == [None, chats.folder / "ia3"]
    assert captures.told == ["capturing the model", "preparing", f"capturing the model for {ia3.name}", "preparing"]
    assert ia3.seconds is None
    plain = chats.recomputed(None, IDS[0].tolist())
    own = adaptc.compile(chats.model, str(chats.folder / "ia3"))
    tokens = IDS
    for _ in range(6):
        tokens = torch.cat([tokens, own(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert said(ia3) == tokens[0, 4:].tolist() != plain
    # Both programs stay: to and fro, none is captured again.
    one = voices.use(str(chats.folder / "one"))
    assert said(one) == chats.recomputed("one", IDS[0].tolist())
    assert said(voices.use(str(chats.folder / "ia3"))) == tokens[0, 4:].tolist()
    assert said(voices.base()) == plain
    assert len(captures.asked) == 2


def test_one_program_for_all_adapters_that_are_named(chats: Chats) -> None:
    captures, paths = Captures(chats), list(chats.adapters.values())
    voices = Voices(captures.opened, chats.adapters, captures.working)
    assert captures.asked == [paths]
    assert captures.told == [f"capturing the model for {paths[0]}, {paths[1]}", "preparing"]
    for name in ("one", "two", "one"):
        assert said(voices.use(name)) == chats.recomputed(name, IDS[0].tolist())
    assert len(captures.asked) == 1


def test_adapters_that_no_program_takes_together(chats: Chats) -> None:
    """The first gets one of its own, and so do the others when they are asked for."""
    adapters = {"ia3": chats.folder / "ia3", "none": chats.folder / "empty"}
    captures, notes = Captures(chats), []
    captures.refused = list(adapters.values())
    voices = Voices(captures.opened, adapters, captures.working, notes.append)
    assert captures.asked == [captures.refused, adapters["ia3"]]
    assert voices.current.name == "ia3"
    (note,) = notes
    assert note.endswith("these do not go together")
    before = said(voices.current)
    with pytest.raises(adaptc.AdaptcError, match="empty"):
        voices.use("none")
    assert said(voices.current) == before


def test_a_capture_that_fails_leaves_the_voice(chats: Chats) -> None:
    voices = Voices(chats.opened, {}, silent)

    def capture(adapter: Any) -> adaptc.Generator:
        raise adaptc.TargetError("nothing of this name")

    failing = Voices(OpenedModel(chats.opened.tokenizer, capture, chats.opened.made), {}, silent)
    with pytest.raises(adaptc.TargetError):
        failing.use(str(chats.folder / "ia3"))
    assert failing.current.name is None
    assert said(failing.current) == said(voices.current)


def test_what_came_with_a_program_answers_first_and_can_be_come_back_to(chats: Chats) -> None:
    generator = chats.opened.made[0]
    adaptc.swap(generator, chats.folder / "two")
    opened = OpenedModel(chats.opened.tokenizer, None, (generator,), {"own": generator.program.binding})
    voices = Voices(opened, {}, silent)
    assert voices.current.name == "own"
    expected = chats.recomputed("two", IDS[0].tolist())
    assert said(voices.current) == expected
    voices.use(str(chats.folder / "one"))
    assert said(voices.use("own")) == expected
    assert Voices(opened, {"one": chats.folder / "one"}, silent).current.name == "one"
