"""Define the commands that train adapters: ``sweep`` and ``train-server``."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.cli.app import (
    Device,
    Dtype,
    Json,
    Quantize,
    Tokenizer,
    app,
    print_message,
    print_result,
    printable,
    prints_errors,
)


@app.command()
@prints_errors
def sweep(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A transformers model directory, or a GGUF file.", show_default=False),
    ],
    description: Annotated[
        Path,
        typer.Argument(metavar="SWEEP.yaml", help="The configs, the dataset and the options.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to keep the adapters and the state of the run. A run that is there goes on.",
            show_default=False,
        ),
    ],
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
) -> None:
    """Train adapters of several configs side by side on one dataset, and keep the best of each.

    DIR/NAME has the best adapter of a config, and DIR/curves.svg the losses. Ctrl-C ends the run after its step; the
    same command goes on from there, also with more steps.
    """
    from adaptc.errors import CheckpointError, ConfigError
    from adaptc.joint_training.sweep import sweep as train
    from adaptc.joint_training.sweep_directory import PICTURE_NAMES, STATE_NAME
    from adaptc.joint_training.sweep_file import read_sweep_file
    from adaptc.joint_training.text_rows import check_lengths, read_dataset
    from adaptc.server.read_served import ModelOptions, check_model_path, read_plain_model, read_tokenizer

    plan = read_sweep_file(description)
    if output.exists() and not (output / STATE_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} is there already, and holds no sweep that could go on: choose another directory"
        )
    model_options = ModelOptions(device=device, dtype=dtype, quantize=quantize)
    check_model_path(model)
    words = read_tokenizer(tokenizer or model)
    sources = [s for s in (plan.dataset, plan.eval_dataset) if s is not None]
    rows = [read_dataset(s, plan.folder, words, plan.max_length) for s in sources]
    base = read_plain_model(model, model_options)
    positions = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for source, found in zip(sources, rows, strict=True):
        check_lengths(source, found, positions)
    held_out = rows[1] if plan.eval_dataset is not None else None
    with _live_table() as show, _interrupted_after_steps() as is_interrupted:

        def on_step(report: Any) -> None:
            show(report)
            if is_interrupted():
                raise KeyboardInterrupt

        try:
            report = train(
                base, plan.configs, rows[0], eval_dataset=held_out, directory=output, on_step=on_step, **plan.options
            )
        except KeyboardInterrupt:
            print_message("stopped", f"the same command goes on from the newest state in {output}", "yellow")
            raise typer.Exit(130) from None
    for theme, name in PICTURE_NAMES.items():
        try:
            report.draw(output / name, theme)
        except ConfigError as error:  # matplotlib is missing
            print_message("note", f"no picture was drawn: {error}", "yellow")
            break
    if report.best is not None and not as_json:
        typer.echo(printable(f"the best adapter is {output / report.best}"))
    print_result(as_json, report, output)


@contextmanager
def _live_table() -> Generator[Callable[[Any], None]]:
    """Run the block with a function that shows a report on a terminal, in the place of the last one."""
    from adaptc.progress import can_show_status

    if not can_show_status():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # It begins with the first report, since the stages before that have a status line of their own.
    live = Live(console=Console(stderr=True), transient=True)
    with ExitStack() as stack:

        def show(report: Any) -> None:
            if not live.is_started:
                stack.enter_context(live)
            live.update(Text(printable(report.render(shutil.get_terminal_size((120, 24)).columns))))

        yield show


@contextmanager
def _interrupted_after_steps() -> Generator[Callable[[], bool]]:
    """Run the block so that the first Ctrl-C only sets what the function it gets returns. The second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()

    def note(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@app.command()
@prints_errors
def train_server(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A transformers model directory, or a GGUF file.", show_default=False),
    ],
    adapter_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let clients write and read adapters below this directory."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ADAPTC_API_KEY", help="The key that requests must bring.", show_default=False),
    ] = None,
    capacity: Annotated[int, typer.Option(min=1, help="The most clients at once.")] = 8,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of an adapter.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a batch, padding counted.")] = 8192,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a call waits for those of others, to share a batch.")
    ] = 0.01,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Train adapters of clients in other processes, over HTTP, by the calls of adaptc.training.Service.

    adaptc.training.connect("http://HOST:PORT") gives clients in Python. The routes are /v1/training/create,
    forward_backward, optim_step, sample, save_state and more.
    """
    from adaptc.joint_training.service import Service
    from adaptc.server.read_served import ModelOptions, read_plain_model
    from adaptc.server.request_checks import check_packages
    from adaptc.server.run import HostedApp, run_app
    from adaptc.server.training_app import TrainingServerOptions, build_training_app

    check_packages("fastapi", "uvicorn")
    options = TrainingServerOptions(adapter_root, api_key)
    model_options = ModelOptions(device=device, dtype=dtype, quantize=quantize)

    def open_app() -> HostedApp:
        base = read_plain_model(model, model_options)
        service = Service(base, capacity=capacity, max_rank=max_rank, max_tokens=max_tokens, wait=wait)
        return HostedApp(build_training_app(service, options), f"trains adapters of {model.name}", service.close)

    run_app(open_app, host, port)
