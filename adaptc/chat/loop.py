"""Run a chat from its first line to its last.

Each line is answered or run as a command, in order. Errors are shown, and the chat goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from adaptc.chat.active_adapter import Voices
from adaptc.chat.commands import Commands, Leave, told
from adaptc.chat.conversation import Conversation, TokenChoice
from adaptc.chat.models import How, opened
from adaptc.chat.terminal import Screen, interrupts, quiet
from adaptc.errors import AdaptcError, CheckpointError


def talk(model: Path, adapters: Mapping[str, Path], *, system: str | None, choice: TokenChoice, how: How) -> None:
    """Read lines from stdin and answer them on stdout.

    Raises AdaptcError where ``model`` or an adapter cannot be read or compiled.
    """
    for name, path in adapters.items():
        if not path.exists():
            raise CheckpointError(f"adapter {name}: there is no directory or file {path}")
    screen = Screen()
    with quiet():
        with screen.working(f"reading {model}"):
            found = opened(model, how)
        voices = Voices(found, adapters, screen.working, screen.note)
        conversation = Conversation(found.tokenizer, system)
        commands = Commands(voices, conversation, screen)
        if choice.seed is not None:
            torch.manual_seed(choice.seed)
        screen.note(f"{told(voices.current)}; /help lists the commands")
        try:
            for line in screen.lines():
                _take(line, commands, choice)
        except Leave:
            pass


def _take(line: str, commands: Commands, choice: TokenChoice) -> None:
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
    with interrupts() as stopped:
        answer = conversation.ask(
            commands.voices.current, line, choice, streamer=screen.streamer(conversation.tokenizer), stopped=stopped
        )
        screen.write("\n")
        if stopped():
            screen.note("stopped")
        elif answer.cut:
            screen.note("cut here: --max-new-tokens says how long an answer may be")
