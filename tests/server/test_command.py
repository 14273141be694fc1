"""``adaptc serve`` in a process of its own, as a user starts it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from adaptc.cli import app
from tests.support.chats import ChatModel

MESSAGES = [{"role": "user", "content": "w11 w12"}]
SIZES = ("--num-blocks", "48", "--page-size", "4", "--max-batch-tokens", "16")


@contextmanager
def command(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server that was started by a command, and its process."""
    program = [sys.executable, "-m", "adaptc.cli", "serve", *words, "--port", "0", *SIZES]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            process.kill()
            raise AssertionError(line + "".join(process.communicate()))
        yield found.group(), process
    finally:
        process.kill()
        process.communicate()


def test_a_command_serves_adapters_and_stops(chat_model: ChatModel) -> None:
    folder = chat_model.folder
    with command(str(folder / "model"), "--adapter", f"one={folder / 'one'}", "--name", "tiny") as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        assert [m.id for m in client.models.list()] == ["tiny", "one"]
        answers = [
            client.chat.completions.create(model=n, messages=MESSAGES, max_tokens=4, temperature=0)  # type: ignore[arg-type]
            for n in ("tiny", "one")
        ]
        assert len({a.choices[0].message.content for a in answers}) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, -signal.SIGINT, 130)


def test_what_cannot_be_served_is_one_line(chat_model: ChatModel, tmp_path: Path) -> None:
    model = str(chat_model.folder / "model")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with taken:
        for words, message in (
            ([str(tmp_path / "absent")], "there is no model at"),
            ([model, "--adapter", f"one={tmp_path / 'absent'}"], "absent"),
            ([model, "--name", "one", "--adapter", f"one={chat_model.folder / 'one'}"], "a name that no adapter has"),
            ([model, "--adapter-root", str(tmp_path / "absent")], "is no directory"),
            ([model, "--port", str(taken.getsockname()[1])], "no server can listen"),
        ):
            result = CliRunner().invoke(app, ["serve", *words])
            assert result.exit_code == 1, result.output
            assert message in result.output.replace("\n", ""), result.output


def test_options_that_are_no_pairs_are_wrong_usage(chat_model: ChatModel) -> None:
    result = CliRunner().invoke(app, ["serve", str(chat_model.folder / "model"), "--adapter", "one"])
    assert result.exit_code == 2
    assert "expected NAME=PATH" in result.output


@pytest.mark.parametrize("help_text", ["--adapter", "--adapter-root", "--api-key", "--max-rank"])
def test_the_help_names_the_options(help_text: str) -> None:
    assert help_text in CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
