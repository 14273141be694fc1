"""Define the commands on serving engines: check whether one takes an adapter as it is meant, and convert for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.app import (
    Adapter,
    Component,
    Force,
    Json,
    Out,
    Output,
    app,
    choose_output_path,
    print_result,
    prints_errors,
)

Engine = Annotated[
    str,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="vllm, sglang, llama.cpp, openvino, onnxruntime-genai, diffusers or peft.",
        show_default=False,
    ),
]


@app.command()
@prints_errors
def check(
    adapter: Annotated[
        Path, typer.Argument(metavar="DIR", help="A PEFT directory with safetensors.", show_default=False)
    ],
    engine: Engine,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With llama.cpp: the model, whose family is checked.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell whether a serving engine takes an adapter as it is meant, with another meaning, or not. Exits with 1 if not.

    The config and the header of the tensors are read, and neither is torch imported nor the engine.
    """
    from adaptc.engines.check import check_adapter

    report = check_adapter(adapter, engine, model=model)
    print_result(as_json, report)
    if not report.is_as_meant:
        raise typer.Exit(1)


@app.command()
@prints_errors
def convert(
    adapter: Adapter,
    engine: Engine,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The rank of all modules; by default the least that holds the adapter."),
    ] = None,
    max_error: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The largest relative error of a weight's change that is written.")
    ] = 1e-3,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The model's directory, for methods other than LoRA, and for llama.cpp.",
            show_default=False,
        ),
    ] = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Write an adapter so that a serving engine takes it as it is meant: as LoRA of one rank, and a scale of 1.

    The result is a directory, for llama.cpp a GGUF file, and for diffusers either.
    """
    if model is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    from adaptc.engines.export import export_adapter

    path = choose_output_path(out, output, force, adapter, model)
    report = export_adapter(
        adapter, path, engine=engine, rank=rank, max_error=max_error, model=model, component=component
    )
    print_result(as_json, report, report.path)
