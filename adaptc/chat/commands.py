"""Run the commands of a chat: lines that begin with a slash.

A wrong command raises an AdaptcError that says what to type, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaptc.chat.active_adapter import ActiveAdapter, ChatAdapters
from adaptc.chat.conversation import Conversation
from adaptc.chat.terminal import Screen
from adaptc.errors import AdaptcError, did_you_mean


class EndOfChat(Exception):
    """The exception that ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command of a chat. ``argument`` names its argument, for messages; '' for none."""

    run: Callable[[str], None]
    argument: str
    help: str


class Commands:
    """The commands of a chat, with the adapters, the conversation and the screen that they act on."""

    def __init__(self, chat_adapters: ChatAdapters, conversation: Conversation, screen: Screen) -> None:
        self.chat_adapters, self.conversation, self.screen = chat_adapters, conversation, screen
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
        if bool(rest) != bool(found.argument):
            raise AdaptcError(f"{name} takes {found.argument or 'nothing'}" + (f", not {rest!r}" if rest else ""))
        found.run(rest)

    def _adapter(self, name: str) -> None:
        self.screen.line(describe_adapter(self.chat_adapters.activate(name)))

    def _base(self, _: str) -> None:
        self.screen.line(describe_adapter(self.chat_adapters.activate_base()))

    def _adapters(self, _: str) -> None:
        now = self.chat_adapters.current.name
        rows = [(None, "(base)", ""), *((name, name, str(at)) for name, at in self.chat_adapters.adapters.items())]
        width = max(len(shown) for _, shown, _ in rows)
        for name, shown, at in rows:
            self.screen.line(f"{'*' if name == now else ' '} {shown:{width}}  {at}".rstrip())

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.screen.line("a new conversation")

    def _help(self, _: str) -> None:
        words = {f"{name} {c.argument}".strip(): c.help for name, c in self.table.items()}
        width = max(map(len, words))
        for word, text in words.items():
            self.screen.line(f"{word:{width}}  {text}")

    def _quit(self, _: str) -> None:
        raise EndOfChat


def describe_adapter(adapter: ActiveAdapter) -> str:
    """Return a line that says which adapter answers now, and how long the swap took."""
    who = "the base" if adapter.name is None else f"adapter {adapter.name}"
    return f"{who}" if adapter.swap_seconds is None else f"{who}: swapped in {1000 * adapter.swap_seconds:.1f} ms"
