"""Run the commands of a chat: lines that begin with a slash.

A wrong command raises an AdaptcError that says what to type, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaptc.chat.active_adapter import Voice, Voices
from adaptc.chat.conversation import Conversation
from adaptc.chat.terminal import Screen
from adaptc.errors import AdaptcError, did_you_mean


class Leave(Exception):
    """The exception that ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command of a chat. ``takes`` names its argument, for messages; '' for none."""

    run: Callable[[str], None]
    takes: str
    help: str


class Commands:
    """The commands of a chat, with the adapters, the conversation and the screen that they act on."""

    def __init__(self, voices: Voices, conversation: Conversation, screen: Screen) -> None:
        self.voices, self.conversation, self.screen = voices, conversation, screen
        self.table = {
            "/adapter": Command(self._adapter, "NAME|PATH", "answer with this adapter"),
            "/base": Command(self._base, "", "answer without an adapter"),
            "/adapters": Command(self._adapters, "", "list the adapters"),
            "/reset": Command(self._reset, "", "begin a new conversation"),
            "/help": Command(self._help, "", "list the commands"),
            "/quit": Command(self._quit, "", "end the chat"),
        }

    def __call__(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        found, rest = self.table.get(name), rest.strip()
        if found is None:
            raise AdaptcError(f"there is no command {name!r}{did_you_mean(name, self.table)}; /help lists them")
        if bool(rest) != bool(found.takes):
            raise AdaptcError(f"{name} takes {found.takes or 'nothing'}" + (f", not {rest!r}" if rest else ""))
        found.run(rest)

    def _adapter(self, name: str) -> None:
        self.screen.line(told(self.voices.use(name)))

    def _base(self, _: str) -> None:
        self.screen.line(told(self.voices.base()))

    def _adapters(self, _: str) -> None:
        now = self.voices.current.name
        rows = [(None, "(base)", ""), *((name, name, str(at)) for name, at in self.voices.adapters.items())]
        width = max(len(shown) for _, shown, _ in rows)
        for name, shown, at in rows:
            self.screen.line(f"{'*' if name == now else ' '} {shown:{width}}  {at}".rstrip())

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.screen.line("a new conversation")

    def _help(self, _: str) -> None:
        words = {f"{name} {c.takes}".strip(): c.help for name, c in self.table.items()}
        width = max(map(len, words))
        for word, text in words.items():
            self.screen.line(f"{word:{width}}  {text}")

    def _quit(self, _: str) -> None:
        raise Leave


def told(voice: Voice) -> str:
    """Return a line that says which adapter answers now, and how long the swap took."""
    who = "the base" if voice.name is None else f"adapter {voice.name}"
    return f"{who}" if voice.seconds is None else f"{who}: swapped in {1000 * voice.seconds:.1f} ms"
