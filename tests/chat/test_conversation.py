"""A conversation: its answers are those of the whole text, and its cache is used as far as it goes."""

from __future__ import annotations

from typing import Any

import pytest

import adaptc
from adaptc.chat.active_adapter import Voices
from adaptc.chat.conversation import Conversation, Reply, TokenChoice
from tests.support.chats import Chats, silent, tokenizer

GREEDY = TokenChoice(max_new_tokens=6, greedy=True)
LINES = ("w9 w12 w41", "w30", "w17 w8")


@pytest.fixture
def voices(chats: Chats) -> Voices:
    return Voices(chats.opened, chats.adapters, silent)


def written(template: bool, messages: list[tuple[str, str]]) -> str:
    if not template:
        return "".join(f"{text}\n" for _, text in messages)
    parts = [f"<{who}> {text} " + ("<eos> " if who == "assistant" else "") for who, text in messages]
    return "<bos>" + "".join(parts) + "<assistant>"


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("system", [None, "w20 w21"])
def test_answers_are_those_of_the_whole_text(chats: Chats, voices: Voices, template: bool, system: str | None) -> None:
    said = tokenizer() if template else tokenizer(None)
    conversation = Conversation(said, system)
    messages = [("system", system)] if system else []
    for line in LINES:
        messages.append(("user", line))
        ids = said(written(template, messages), add_special_tokens=not template)["input_ids"]
        answer = conversation.ask(voices.current, line, GREEDY)
        assert answer.text == said.decode(chats.recomputed("one", ids), skip_special_tokens=True)
        messages.append(("assistant", answer.text))
    assert [(m["role"], m["content"]) for m in conversation.messages] == messages


def counted(conversation: Conversation, voices: Voices, line: str) -> Reply:
    return conversation.ask(voices.current, line, GREEDY)


def test_only_new_tokens_are_computed_until_the_adapter_changes(chats: Chats, voices: Voices) -> None:
    conversation = Conversation(chats.opened.tokenizer)
    first = counted(conversation, voices, LINES[0])
    # <bos> <user> 3 words <assistant>, and each new token but the last
    assert first.computed == 6 + 5
    second = counted(conversation, voices, LINES[1])
    # the last one, <eos>, <user>, 1 word, <assistant>
    assert second.computed == 5 + 5
    voices.use("two")
    third = counted(conversation, voices, LINES[2])
    whole = chats.opened.tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert third.computed == len(chats.opened.tokenizer(whole)["input_ids"]) - 2 > first.computed + second.computed
    conversation.reset()
    assert counted(conversation, voices, LINES[0]).computed == 11


def test_what_an_adapter_computed_is_not_anothers(chats: Chats, voices: Voices) -> None:
    """After swaps an answer is what it is in a conversation that never had another voice."""
    conversation, messages = Conversation(chats.opened.tokenizer), []
    for line, name in zip(LINES, ("one", None, "two"), strict=True):
        voice = voices.base() if name is None else voices.use(name)
        answer = conversation.ask(voice, line, GREEDY)
        messages.append(("user", line))
        ids = chats.opened.tokenizer(written(True, messages), add_special_tokens=False)["input_ids"]
        expected = chats.recomputed(name, ids)
        assert answer.text == chats.opened.tokenizer.decode(expected, skip_special_tokens=True), name
        messages.append(("assistant", answer.text))


def test_a_template_that_writes_earlier_answers_in_another_way(chats: Chats, voices: Voices) -> None:
    """As those do that leave out thoughts: what differs is computed again."""
    template = (
        "{% for m in messages %}{% if not loop.last and m['role'] == 'assistant' %}w50 {% else %}"
        "{{ m['content'] }} {% endif %}{% endfor %}<assistant>"
    )
    said = tokenizer(template)
    conversation = Conversation(said)
    first = conversation.ask(voices.current, LINES[0], GREEDY)
    second = conversation.ask(voices.current, LINES[1], GREEDY)
    ids = said(f"{LINES[0]} w50 {LINES[1]} <assistant>", add_special_tokens=False)["input_ids"]
    assert second.text == said.decode(chats.recomputed("one", ids), skip_special_tokens=True)
    assert (first.computed, second.computed) == (4 + 5, 3 + 5)


def test_a_conversation_that_is_too_long_says_so_and_nothing_was_said(chats: Chats, voices: Voices) -> None:
    conversation = Conversation(chats.opened.tokenizer)
    conversation.ask(voices.current, "w9", GREEDY)
    before = list(conversation.messages)
    with pytest.raises(adaptc.AdaptcError, match=r"the program takes 60: /reset .* --max-length"):
        conversation.ask(voices.current, " ".join(["w9"] * 60), GREEDY)
    assert conversation.messages == before
    assert conversation.ask(voices.current, "w30", GREEDY).computed == 5 + 5
    # An answer ends where there is no more room.
    room = Conversation(chats.opened.tokenizer).ask(voices.current, " ".join(["w9"] * 54), GREEDY)
    assert len(room.text.split()) == 60 - 57
    assert room.cut


def test_what_cannot_be_written_is_refused(chats: Chats, voices: Voices) -> None:
    conversation = Conversation(chats.opened.tokenizer)
    with pytest.raises(adaptc.AdaptcError, match=r"chat template does not take this.*thirteen is not said"):
        conversation.ask(voices.current, "w13", GREEDY)
    assert conversation.messages == []
    with pytest.raises(adaptc.AdaptcError, match="no tokens"):
        Conversation(tokenizer("{{ '' }}")).ask(voices.current, "w9", GREEDY)


def test_an_answer_that_was_stopped_is_gone_on_from(chats: Chats, voices: Voices) -> None:
    conversation, calls = Conversation(chats.opened.tokenizer), iter([False, False, True])
    whole = Conversation(chats.opened.tokenizer).ask(voices.current, "w9", GREEDY)
    answer = conversation.ask(voices.current, "w9", GREEDY, stopped=lambda: next(calls))
    assert answer.text.split() == whole.text.split()[:3]
    assert not answer.cut
    assert whole.cut
    assert conversation.ask(voices.current, "w30", GREEDY).computed == 5 + 5


def test_an_answer_ends_at_the_tokenizers_end(chats: Chats, voices: Voices) -> None:
    whole = Conversation(chats.opened.tokenizer).ask(voices.current, "w9", GREEDY).text.split()
    answer = Conversation(tokenizer(end=whole[3])).ask(voices.current, "w9", GREEDY)
    assert answer.text.split() == whole[: whole.index(whole[3])]
    assert not answer.cut


def test_an_answer_that_failed_was_not_said(chats: Chats, voices: Voices, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(chats.opened.tokenizer)
    expected = Conversation(chats.opened.tokenizer).ask(voices.current, "w9", GREEDY)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(voices.current, "w9", GREEDY, stopped=interrupted)
    assert conversation.messages == []
    assert conversation.ask(voices.current, "w9", GREEDY) == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (TokenChoice(greedy=True), {"do_sample": False, "temperature": None, "top_k": None}),
        (TokenChoice(temperature=0.3), {"do_sample": True, "temperature": 0.3, "top_k": 7}),
        (TokenChoice(), {"do_sample": True, "temperature": 0.9, "top_k": 7}),
        (TokenChoice(max_new_tokens=3), {"max_new_tokens": 3, "max_length": None}),
        (TokenChoice(max_new_tokens=300), {"max_new_tokens": 11}),
    ],
)
def test_how_tokens_are_chosen(chats: Chats, choice: TokenChoice, expected: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    own = GenerationConfig(do_sample=True, temperature=0.9, top_k=7, max_length=20, eos_token_id=5)
    before = own.to_dict()
    found = choice.config(own, chats.opened.tokenizer, 11)
    assert {name: getattr(found, name) for name in expected} == expected
    # The ends of both, and padding without a message.
    assert (found.eos_token_id, found.pad_token_id) == ([5, 2], 5)
    assert own.to_dict() == before
    if choice.greedy:
        found.validate(strict=True)


def test_a_choice_that_contradicts_itself() -> None:
    with pytest.raises(adaptc.ConfigError, match="exclude each other"):
        TokenChoice(greedy=True, temperature=0.5)
