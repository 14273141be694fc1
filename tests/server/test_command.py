"""``adaptc serve`` in a process of its own, as a user starts it."""

from __future__ import annotations

import os
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
import torch
from typer.testing import CliRunner

from adaptc.cli import app
from adaptc.server import ServerOptions, open_server
from adaptc.server.run import server_in_thread
from adaptc.server.served import Served
from tests.server.conftest import Running
from tests.support.chats import ChatModel

MESSAGES = [{"role": "user", "content": "w11 w12"}]
TINY = {"max_batch_tokens": 16, "num_blocks": 48, "page_size": 4}
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


@pytest.mark.long
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


@pytest.mark.long
def test_transformers_chat_talks_to_it(running: Running) -> None:
    """transformers' own chat, in a process of its own: it loads a model by name, and streams its answers."""
    options = ServerOptions("base", **TINY, adapters=running.chat.adapters)
    with server_in_thread(open_server(running.chat.folder / "model", options)) as address:
        program = Path(sys.executable).with_name("transformers")
        flags = ["do_sample=False", "max_new_tokens=4"]
        words = "w11 w12 w30"
        done = subprocess.run(
            [str(program), "chat", "two", f"{address}/v1", *flags],
            input=f"{words}\n!exit\n",
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "0"},
        )
        expected = running.expected_text("two", running.ids([{"role": "user", "content": words}]), 4)
        assert expected in done.stdout, done.stdout + done.stderr
        unknown = subprocess.run(
            [str(program), "chat", "three", f"{address}/v1"], input="", capture_output=True, text=True, timeout=240
        )
        assert unknown.returncode != 0
        assert "404" in unknown.stdout + unknown.stderr


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(("flag", "dtype"), [([], torch.float32), (["--no-autocast-adapter-dtype"], torch.bfloat16)])
def test_the_dtype_of_adapters(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch, flag: list[str], dtype: torch.dtype
) -> None:
    opened: list[Served] = []
    monkeypatch.setattr("adaptc.server.run.run_server", lambda open_served, *_: opened.append(open_served()))
    folder = chat_model.folder
    words = [str(folder / "model"), "--dtype", "bfloat16", "--adapter", f"one={folder / 'one'}", *SIZES, *flag]
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 0, result.output
    factors = {n: t for n, t in opened[0].serving.bank["one"].values.items() if "lora_" in n}
    assert {t.dtype for t in factors.values()} == {dtype}


@pytest.mark.parametrize("help_text", ["--adapter", "--adapter-root", "--api-key", "--max-rank"])
def test_the_help_names_the_options(help_text: str) -> None:
    assert help_text in CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
