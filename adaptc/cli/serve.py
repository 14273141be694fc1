"""Define the command ``adaptc serve``, which answers requests of many adapters over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.app import Device, Dtype, Quantize, ServedModel, Tokenizer, app, parse_named_paths, prints_errors


@app.command()
@prints_errors
def serve(
    model: ServedModel,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An adapter that requests name as their model, any number of times.",
            show_default=False,
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let requests load adapters that lie below this directory."),
    ] = None,
    load_on_use: Annotated[
        bool,
        typer.Option(
            "--load-on-use",
            help="Take the name of a directory below the adapter root as a model, loaded at its first request.",
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="The base's name in requests; by default that of the file or directory.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ADAPTC_API_KEY", help="The key that requests must bring.", show_default=False),
    ] = None,
    max_adapters: Annotated[int | None, typer.Option(min=1, help="The most adapters at once.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of an adapter.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of a step; 256 where the model is compiled here.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks of the pool of keys and values; 256 by default.")
    ] = None,
    page_size: Annotated[int | None, typer.Option(min=4, help="Positions of a block; 32 by default.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="The most requests that wait or run.")] = 1024,
    backend: Annotated[str, typer.Option(help="eager or inductor.")] = "eager",
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    tokenizer: Tokenizer = None,
    autocast_adapter_dtype: Annotated[
        bool,
        typer.Option(help="Keep adapters of a half-precision base in float32, as PEFT does, or in the base's dtype."),
    ] = True,
) -> None:
    """Answer requests of many adapters over HTTP, as OpenAI's API does.

    /v1/chat/completions, /v1/completions, /v1/responses and /v1/models are there. The model of a request is the base or
    an adapter's name; "adapter": {"fr": 0.7, "de": 0.3} in its body mixes adapters. /metrics is for Prometheus.
    """
    from adaptc.server import ServerOptions, open_server
    from adaptc.server.run import run_server

    options = ServerOptions(
        name or model.resolve().stem,
        adapter_root,
        api_key,
        max_adapters,
        max_rank,
        max_batch_tokens,
        num_blocks,
        page_size,
        max_requests,
        load_on_use=load_on_use,
        adapters=parse_named_paths(adapter or []),
    )
    model_options = {
        "backend": backend,
        "device": device,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "quantize": quantize,
        "autocast_adapter_dtype": autocast_adapter_dtype,
    }
    run_server(lambda: open_server(model, options, **model_options), host, port)
