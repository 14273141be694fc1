"""Define the command ``adaptc chat``: a server in this process, and transformers' chat that talks to it."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from adaptc.cli.app import Device, Dtype, Quantize, ServedModel, Tokenizer, app, parse_named_paths, prints_errors


@app.command()
@prints_errors
def chat(
    model: ServedModel,
    flags: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FLAGS",
            help="Settings of the answers, such as do_sample=False max_new_tokens=100. !set changes them in the chat.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An adapter to talk to, any number of times; the first one answers first.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What comes before the conversation.")] = None,
    backend: Annotated[str, typer.Option(help="eager or inductor.")] = "eager",
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Talk to a model and to its adapters, by transformers' chat. Works on local files, without a network.

    !exit ends a conversation; the next may be with another adapter. !help lists the commands of a conversation.
    """
    # With it set, huggingface_hub's client reaches no server, not even this process; files are read as local ones.
    os.environ["HF_HUB_OFFLINE"] = "0"
    from adaptc.server import ServerOptions, open_server
    from adaptc.server.run import server_in_thread

    adapters, base = parse_named_paths(adapter or []), model.resolve().stem
    options = ServerOptions(base, adapters=adapters)
    model_options = {"backend": backend, "device": device, "dtype": dtype, "tokenizer": tokenizer, "quantize": quantize}
    for name in ("ContinuousBatchingLogger", "transformers.cli.serving"):  # they tell of each request
        logging.getLogger(name).setLevel(logging.ERROR)
    with server_in_thread(open_server(model, options, **model_options)) as address:
        names = [*adapters, base]
        talk_to: str | None = names[0]
        while talk_to is not None:
            _talk(talk_to, f"{address}/v1", flags, system)
            talk_to = _ask_for_next(names) if len(names) > 1 else None


def _talk(name: str, address: str, flags: list[str] | None, system: str | None) -> None:
    """Run one conversation. Raises AdaptcError where the server refuses a request of it."""
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.cli.chat import Chat

    from adaptc.errors import AdaptcError

    try:
        Chat(name, address, flags, system_prompt=system)
    except HfHubHTTPError as error:
        raise AdaptcError(f"the conversation ends here: {error.server_message or error}") from error
    except (EOFError, KeyboardInterrupt):
        pass


def _ask_for_next(names: list[str]) -> str | None:
    """Return which of ``names`` the next conversation is with; None for no more."""
    from adaptc.errors import did_you_mean

    while True:
        try:
            chosen = input(f"Next conversation with one of {', '.join(names)} (an empty line ends the chat): ").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if chosen in names:
            return chosen
        if not chosen:
            return None
        typer.echo(f"there is no {chosen!r}{did_you_mean(chosen, names)}")
