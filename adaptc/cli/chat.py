"""Define the command ``adaptc chat``, which talks to a model at a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.app import Device, Dtype, Quantize, Tokenizer, app, parse_named_paths, prints_errors


@app.command()
@prints_errors
def chat(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A transformers model directory, a GGUF file, or a program or package (.pt2) that generates.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An adapter to swap to, any number of times; the first one answers first.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What comes before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=1e-3, help="Sample at this temperature; by default as the model's config says.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of sampling.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="How long a conversation may be, in tokens; by default all the model takes."),
    ] = None,
    backend: Annotated[str, typer.Option(help="eager or inductor.")] = "eager",
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Talk to a model, and swap its adapters while the conversation goes on. Works on local files, without a network.

    /adapter NAME swaps, /base takes the adapter away, /help lists the other commands. Ctrl-C stops an answer.
    """
    from adaptc.chat.terminal import configure_environment

    configure_environment()
    from adaptc.chat.conversation import TokenChoice
    from adaptc.chat.loop import run_chat
    from adaptc.chat.models import ModelOptions

    choice = TokenChoice(max_new_tokens, temperature, greedy, seed)
    model_options = ModelOptions(max_length, backend, device, dtype, tokenizer, quantize)
    run_chat(model, parse_named_paths(adapter or []), system=system, choice=choice, options=model_options)
