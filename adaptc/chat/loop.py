"""Run a chat from its first line to its last.

Each line is answered or run as a command, in order. Errors are shown, and the chat goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from adaptc.chat.active_adapter import ChatAdapters
from adaptc.chat.commands import Commands, EndOfChat, describe_adapter
from adaptc.chat.conversation import Conversation, TokenChoice
from adaptc.chat.models import ModelOptions, open_model
from adaptc.chat.terminal import Screen, catch_interrupts, quiet_transformers
from adaptc.errors import AdaptcError, CheckpointError


def run_chat(
    model: Path, adapters: Mapping[str, Path], *, system: str | None, choice: TokenChoice, options: ModelOptions
) -> None:
    """Read lines from stdin and answer them on stdout.

    Raises AdaptcError where ``model`` or an adapter cannot be read or compiled.
    """
    for name, path in adapters.items():
        if not path.exists():
            raise CheckpointError(f"adapter {name}: there is no directory or file {path}")
    screen = Screen()
    with quiet_transformers():
        with screen.progress(f"reading {model}"):
            found = open_model(model, options)
        voices = ChatAdapters(found, adapters, screen.progress, screen.note)
        conversation = Conversation(found.tokenizer, system)
        commands = Commands(voices, conversation, screen)
        if choice.seed is not None:
            torch.manual_seed(choice.seed)
        screen.note(f"{describe_adapter(voices.current)}; /help lists the commands")
        try:
            for line in screen.lines():
                _handle_line(line, commands, choice)
        except EndOfChat:
            pass


def _handle_line(line: str, commands: Commands, choice: TokenChoice) -> None:
    screen = commands.screen
    try:
        if line.startswith("/"):
            commands(line)
        elif line.strip():
            _answer(line, commands, choice)
    except AdaptcError as error:
        screen.error(str(error))
    except KeyboardInterrupt:
        screen.note("\nstopped")


def _answer(line: str, commands: Commands, choice: TokenChoice) -> None:
    screen, conversation = commands.screen, commands.conversation
    with catch_interrupts() as stopped:
        answer = conversation.ask(
            commands.chat_adapters.current,
            line,
            choice,
            streamer=screen.streamer(conversation.tokenizer),
            is_stopped=stopped,
        )
        screen.write("\n")
        if stopped():
            screen.note("stopped")
        elif answer.is_cut:
            screen.note("cut here: --max-new-tokens says how long an answer may be")
