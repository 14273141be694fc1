"""The command: lines in, answers out, every command, errors after which it goes on, ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from adaptc.chat import loop, terminal
from adaptc.chat.active_adapter import ChatAdapters
from adaptc.chat.conversation import Conversation, TokenChoice
from adaptc.cli import app
from tests.support.chats import ChatModel, no_output

GREEDY = TokenChoice(max_new_tokens=6, greedy=True)


def call(model: Path, *args: Any, typed: str = "", code: int = 0) -> Result:
    words = ["chat", str(model), *map(str, args)]
    result = CliRunner().invoke(app, words, input=typed, env={"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def chat(chats: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``chat(typed, *options)``: with the adapters one and two, on a program that was captured before."""
    monkeypatch.setattr(loop, "open_model", lambda path, how: chats.opened_model)
    named = [f"--adapter={name}={path}" for name, path in chats.adapters.items()]

    def run(typed: str, *options: Any, greedy: bool = True) -> Result:
        chosen = ["--greedy"] if greedy else []
        return call(chats.folder / "model", *named, *chosen, "--max-new-tokens", 6, *options, typed=typed)

    return run


def answers(chats: ChatModel, said: list[tuple[str | None, str]], system: str | None = None) -> list[str]:
    """Of one conversation: (adapter, line)."""
    voices, conversation = (
        ChatAdapters(chats.opened_model, chats.adapters, no_output),
        Conversation(chats.opened_model.tokenizer, system),
    )
    found = []
    for name, line in said:
        voice = voices.activate_base() if name is None else voices.activate(name)
        found.append(conversation.ask(voice, line, GREEDY).text)
    return found


def test_a_conversation_with_swaps(chats: ChatModel, chat: Any) -> None:
    first, second, third = answers(chats, [("one", "w9 w12"), ("two", "w30"), (None, "w8")])
    result = chat("w9 w12\n/adapter two\nw30\n\n/base\nw8\n/quit\nw9 is not read\n")
    lines = result.stdout.splitlines()
    assert [lines[0], lines[2], lines[4]] == [first, second, third]
    assert re.fullmatch(r"adapter two: swapped in \d+\.\d ms", lines[1])
    assert lines[3] == "the base"
    assert len(lines) == 5
    assert "error" not in result.stderr
    assert len(re.findall("cut here: --max-new-tokens", result.stderr)) == 3


def test_a_system_text_and_the_end_of_the_input(chats: ChatModel, chat: Any) -> None:
    (expected,) = answers(chats, [("one", "w9")], "w20 w21")
    assert chat("w9", "--system", "w20 w21").stdout.splitlines() == [expected]


def test_reset_begins_anew(chats: ChatModel, chat: Any) -> None:
    (expected,) = answers(chats, [("one", "w9")])
    assert chat("w9\n/reset\nw9\n").stdout.splitlines() == [expected, "a new conversation", expected]


def test_adapters_and_help_list_what_there_is(chats: ChatModel, chat: Any) -> None:
    two = str(chats.folder / "two")
    lines = chat(f"/adapters\n/adapter {two}\n/adapters\n/base\n/adapters\n/help\n").stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["(base)"],
        ["*", "one", str(chats.folder / "one")],
        ["two", two],
    ]
    assert [line.split()[:2] for line in lines[4:8] if line.startswith("*")] == [["*", two]]
    assert [line for line in lines[8:] if line.startswith("*")] == ["* (base)"]
    for command in ("/adapter NAME|PATH", "/base", "/adapters", "/reset", "/help", "/quit"):
        assert any(line.startswith(f"{command} ") for line in lines), command


def test_the_chat_goes_on_after_errors(chats: ChatModel, chat: Any) -> None:
    first, last = answers(chats, [("one", "w9"), ("one", "w30")])
    wrong = {
        "/adapter tow": "there is no adapter 'tow'.*nearest are 'two'",
        f"/adapter {chats.folder / 'ia3'}": "no slot in the program",
        "/adapter": "/adapter takes NAME|PATH",
        "/base now": "/base takes nothing, not 'now'",
        "/rest": "there is no command '/rest'; nearest are '/reset'; /help",
        "w13": "chat template does not take this",
        " ".join(["w9"] * 60): "/reset begins a new one",
    }
    result = chat("\n".join(["w9", *wrong, "w30"]))
    assert result.stdout.splitlines() == [first, last]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(wrong)
    for line, message in zip(errors, wrong.values(), strict=True):
        assert re.search(message.replace("|", r"\|"), line), line


def test_sampling_follows_its_seed(chat: Any) -> None:
    def said(seed: int) -> str:
        return chat("w9\nw30\n", "--temperature", 5, "--seed", seed, greedy=False).stdout

    assert said(3) == said(3) != said(4)


def test_wrong_usage(chats: ChatModel, chat: Any, tmp_path: Path) -> None:
    model = chats.folder / "model"
    for pair in ("one", "=x", "a="):
        assert "expected NAME=PATH" in call(model, "--adapter", pair, code=2).stderr
    assert "each name once" in call(model, "--adapter", "a=x", "--adapter", "a=y", code=2).stderr
    assert "error: greedy and temperature" in call(model, "--greedy", "--temperature", 1, code=1).stderr
    result = call(model, "--adapter", f"a={tmp_path / 'none'}", code=1)
    assert re.search(r"error: adapter a: there is no directory or file .*none", result.stderr)
    assert "eagre" in call(model, "--backend", "eagre", code=1).stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = call(tmp_path / "none", code=1)
    assert result.stderr.splitlines()[-1].startswith("error: there is no model at")
    assert result.stdout == ""


def test_every_option_says_what_it_is_for() -> None:
    click = typer.main.get_command(app)
    found = click.commands["chat"]  # type: ignore[attr-defined]
    assert found.help
    assert all(p.help for p in found.params)


# -- ctrl-C ------------------------------------------------------------------------------------------------------------


def pressed(monkeypatch: pytest.MonkeyPatch, at: list[int]) -> None:
    """Ctrl-C while these words of all answers are written, counted from 0."""
    usual, count = terminal.Screen.write, iter(range(1000))

    def write(self: Any, text: str) -> None:
        usual(self, text)
        if text.strip() and next(count) in at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal.Screen, "write", write)


def test_ctrl_c_stops_the_answer_and_not_the_chat(chats: ChatModel, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = answers(chats, [("one", "w9")])
    pressed(monkeypatch, [1])
    before = signal.getsignal(signal.SIGINT)
    result = chat("w9\n/adapters\n/reset\nw9\n")
    lines = result.stdout.splitlines()
    assert 1 < len(lines[0].split()) < 6
    assert whole.startswith(lines[0].strip())
    assert lines[-1] == whole
    assert "stopped" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(chats: ChatModel, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = answers(chats, [("one", "w9")])
    usual, count = terminal.Screen.write, iter(range(1000))

    def write(self: Any, text: str) -> None:
        usual(self, text)
        if text.strip() and next(count) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal.Screen, "write", write)
    result = chat("w9\nw9\n")
    # Nothing of the first answer is kept: the second is that of a new conversation.
    assert result.stdout.endswith(whole + "\n")
    assert "stopped" in result.stderr


def test_keys_at_the_prompt(chats: ChatModel, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal: ctrl-C forgets the line, ctrl-D ends the chat."""
    (expected,) = answers(chats, [("one", "w9")])
    keys = iter([KeyboardInterrupt, "w9", EOFError])

    def typed(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    usual = terminal.Screen.__init__

    def at_a_terminal(self: Any) -> None:
        usual(self)
        self._is_terminal = True

    monkeypatch.setattr(terminal.Screen, "__init__", at_a_terminal)
    monkeypatch.setattr("builtins.input", typed)
    result = chat("")
    assert result.stdout.split("\n") == [expected, "", ""]
    assert "/quit or the end of input" in result.stderr


def test_what_a_model_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.Screen().write("a\x1b[31mb\x07\tc\n\x9b5md\udc80é")
    assert capsys.readouterr().out == "a[31mb\tc\n5md\\udc80é"


# -- a process of its own ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_process_of_its_own(chats: ChatModel) -> None:
    """From files alone: capturing, piped lines, a swap, an adapter that needs a program of its own."""
    model = chats.folder / "model"
    command = [sys.executable, "-m", "adaptc.cli", "chat", model, "--adapter", f"one={chats.folder / 'one'}"]
    options = ["--greedy", "--max-new-tokens", 6, "--max-length", 60]
    typed = f"w9 w12\n/adapter {chats.folder / 'ia3'}\nw30\n/adapter one\n/reset\nw9 w12\n"
    done = subprocess.run(
        [str(w) for w in [*command, *options]],
        input=typed.encode() + b"\xff\xfe\n",
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    (expected,) = answers(chats, [("one", "w9 w12")])
    lines = out.splitlines()
    assert (lines[0], lines[5]) == (expected, expected)
    assert lines[1] == f"adapter {chats.folder / 'ia3'}"
    assert lines[3].startswith("adapter one: swapped in ")
    assert lines[4] == "a new conversation"
    assert err.count("capturing the model for ") == 4
    assert "Traceback" not in err
    assert "%|" not in err
