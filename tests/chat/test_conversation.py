"""A conversation: its answers are those of the whole text, and its cache is used as far as it goes."""

from __future__ import annotations

from typing import Any

import pytest

import adaptc
from adaptc.chat.active_adapter import ChatAdapters
from adaptc.chat.conversation import Conversation, Reply, TokenChoice
from tests.support.chats import ChatModel, no_output, tokenizer

GREEDY = TokenChoice(max_new_tokens=6, greedy=True)
LINES = ("w9 w12 w41", "w30", "w17 w8")


@pytest.fixture
def voices(chats: ChatModel) -> ChatAdapters:
    return ChatAdapters(chats.opened_model, chats.adapters, no_output)


def written(template: bool, messages: list[tuple[str, str]]) -> str:
    if not template:
        return "".join(f"{text}\n" for _, text in messages)
    parts = [f"<{who}> {text} " + ("<eos> " if who == "assistant" else "") for who, text in messages]
    return "<bos>" + "".join(parts) + "<assistant>"


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("system", [None, "w20 w21"])
def test_answers_are_those_of_the_whole_text(
    chats: ChatModel, voices: ChatAdapters, template: bool, system: str | None
) -> None:
    said = tokenizer() if template else tokenizer(None)
    conversation = Conversation(said, system)
    messages = [("system", system)] if system else []
    for line in LINES:
        messages.append(("user", line))
        ids = said(written(template, messages), add_special_tokens=not template)["input_ids"]
        answer = conversation.ask(voices.current, line, GREEDY)
        assert answer.text == said.decode(chats.uncached_answer("one", ids), skip_special_tokens=True)
        messages.append(("assistant", answer.text))
    assert [(m["role"], m["content"]) for m in conversation.messages] == messages


def counted(conversation: Conversation, voices: ChatAdapters, line: str) -> Reply:
    return conversation.ask(voices.current, line, GREEDY)


def test_only_new_tokens_are_computed_until_the_adapter_changes(chats: ChatModel, voices: ChatAdapters) -> None:
    conversation = Conversation(chats.opened_model.tokenizer)
    first = counted(conversation, voices, LINES[0])
    # <bos> <user> 3 words <assistant>, and each new token but the last
    assert first.computed_tokens == 6 + 5
    second = counted(conversation, voices, LINES[1])
    # the last one, <eos>, <user>, 1 word, <assistant>
    assert second.computed_tokens == 5 + 5
    voices.activate("two")
    third = counted(conversation, voices, LINES[2])
    whole = chats.opened_model.tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert (
        third.computed_tokens
        == len(chats.opened_model.tokenizer(whole)["input_ids"]) - 2
        > first.computed_tokens + second.computed_tokens
    )
    conversation.reset()
    assert counted(conversation, voices, LINES[0]).computed_tokens == 11


def test_what_an_adapter_computed_is_not_anothers(chats: ChatModel, voices: ChatAdapters) -> None:
    """After swaps an answer is what it is in a conversation that never had another voice."""
    conversation, messages = Conversation(chats.opened_model.tokenizer), []
    for line, name in zip(LINES, ("one", None, "two"), strict=True):
        voice = voices.activate_base() if name is None else voices.activate(name)
        answer = conversation.ask(voice, line, GREEDY)
        messages.append(("user", line))
        ids = chats.opened_model.tokenizer(written(True, messages), add_special_tokens=False)["input_ids"]
        expected = chats.uncached_answer(name, ids)
        assert answer.text == chats.opened_model.tokenizer.decode(expected, skip_special_tokens=True), name
        messages.append(("assistant", answer.text))


def test_a_template_that_writes_earlier_answers_in_another_way(chats: ChatModel, voices: ChatAdapters) -> None:
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
    assert second.text == said.decode(chats.uncached_answer("one", ids), skip_special_tokens=True)
    assert (first.computed_tokens, second.computed_tokens) == (4 + 5, 3 + 5)


def test_a_conversation_that_is_too_long_says_so_and_nothing_was_said(chats: ChatModel, voices: ChatAdapters) -> None:
    conversation = Conversation(chats.opened_model.tokenizer)
    conversation.ask(voices.current, "w9", GREEDY)
    before = list(conversation.messages)
    with pytest.raises(adaptc.AdaptcError, match=r"the program takes 60: /reset .* --max-length"):
        conversation.ask(voices.current, " ".join(["w9"] * 60), GREEDY)
    assert conversation.messages == before
    assert conversation.ask(voices.current, "w30", GREEDY).computed_tokens == 5 + 5
    # An answer ends where there is no more room.
    room = Conversation(chats.opened_model.tokenizer).ask(voices.current, " ".join(["w9"] * 54), GREEDY)
    assert len(room.text.split()) == 60 - 57
    assert room.is_cut


def test_what_cannot_be_written_is_refused(chats: ChatModel, voices: ChatAdapters) -> None:
    conversation = Conversation(chats.opened_model.tokenizer)
    with pytest.raises(adaptc.AdaptcError, match=r"chat template does not take this.*thirteen is not said"):
        conversation.ask(voices.current, "w13", GREEDY)
    assert conversation.messages == []
    with pytest.raises(adaptc.AdaptcError, match="no tokens"):
        Conversation(tokenizer("{{ '' }}")).ask(voices.current, "w9", GREEDY)


def test_an_answer_that_was_stopped_is_gone_on_from(chats: ChatModel, voices: ChatAdapters) -> None:
    conversation, calls = Conversation(chats.opened_model.tokenizer), iter([False, False, True])
    whole = Conversation(chats.opened_model.tokenizer).ask(voices.current, "w9", GREEDY)
    answer = conversation.ask(voices.current, "w9", GREEDY, is_stopped=lambda: next(calls))
    assert answer.text.split() == whole.text.split()[:3]
    assert not answer.is_cut
    assert whole.is_cut
    assert conversation.ask(voices.current, "w30", GREEDY).computed_tokens == 5 + 5


def test_an_answer_ends_at_the_tokenizers_end(chats: ChatModel, voices: ChatAdapters) -> None:
    whole = Conversation(chats.opened_model.tokenizer).ask(voices.current, "w9", GREEDY).text.split()
    answer = Conversation(tokenizer(end=whole[3])).ask(voices.current, "w9", GREEDY)
    assert answer.text.split() == whole[: whole.index(whole[3])]
    assert not answer.is_cut


def test_an_answer_that_failed_was_not_said(
    chats: ChatModel, voices: ChatAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(chats.opened_model.tokenizer)
    expected = Conversation(chats.opened_model.tokenizer).ask(voices.current, "w9", GREEDY)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(voices.current, "w9", GREEDY, is_stopped=interrupted)
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
def test_how_tokens_are_chosen(chats: ChatModel, choice: TokenChoice, expected: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    own = GenerationConfig(do_sample=True, temperature=0.9, top_k=7, max_length=20, eos_token_id=5)
    before = own.to_dict()
    found = choice.generation_config(own, chats.opened_model.tokenizer, 11)
    assert {name: getattr(found, name) for name in expected} == expected
    # The ends of both, and padding without a message.
    assert (found.eos_token_id, found.pad_token_id) == ([5, 2], 5)
    assert own.to_dict() == before
    if choice.greedy:
        found.validate(strict=True)


def test_a_choice_that_contradicts_itself() -> None:
    with pytest.raises(adaptc.ConfigError, match="exclude each other"):
        TokenChoice(greedy=True, temperature=0.5)
