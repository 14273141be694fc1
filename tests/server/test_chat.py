"""``adaptc chat``: transformers' chat with a server in the same process, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adaptc.cli import app, chat
from tests.server.conftest import Running

FLAGS = ["do_sample=False", "max_new_tokens=4"]


def talk(model: Path, typed: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adaptc.cli", "chat", str(model), *words],
        input=typed,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.long
def test_conversations_with_adapters_and_the_base(running: Running) -> None:
    folder, line = running.chat.folder, "w11 w12 w30"
    named = [f"--adapter={name}={path}" for name, path in running.chat.adapters.items()]
    spoken = f"{line}\nn\n!exit\n"  # an answer that was cut is not to go on
    typed = f"{spoken}tow\ntwo\n{spoken}model\n{spoken}\n"
    done = talk(folder / "model", typed, *FLAGS, *named)
    assert done.returncode == 0, done.stderr
    ids = running.ids([{"role": "user", "content": line}])
    answers = [running.expected_text(name, ids, 4) for name in ("one", "two", None)]
    assert len({*answers}) == 3
    places = [done.stdout.index(answer) for answer in answers]
    assert places == sorted(places)
    assert "there is no 'tow'; nearest are 'two'" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Request received" not in done.stderr


@pytest.mark.long
def test_what_the_server_refuses_ends_the_conversation_in_a_line(running: Running) -> None:
    done = talk(running.chat.folder / "model", " ".join(["w9"] * 200) + "\n", *FLAGS)
    assert done.returncode == 1
    assert "error: the conversation ends here: " in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_and_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command changes it, and this process goes on

    def said(*words: str, code: int) -> str:
        result = CliRunner().invoke(app, ["chat", *words])
        assert result.exit_code == code, result.output
        return result.output.replace("\n", "")

    assert "expected NAME=PATH" in said(str(tmp_path), "--adapter", "one", code=2)
    assert "there is no model at" in said(str(tmp_path / "none"), code=1)


def test_the_next_conversation_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*typed: Any) -> Any:
        left = iter(typed)

        def read(prompt: str) -> str:
            given = next(left)
            if isinstance(given, str):
                return given
            raise given

        monkeypatch.setattr("builtins.input", read)
        return chat._ask_for_next(["fr", "base"])

    assert answers("rf", " fr ") == "fr"
    assert answers("") is None
    assert answers(EOFError()) is None
    assert answers(KeyboardInterrupt()) is None
