"""Define the commands that write programs for other runtimes: ``onnx``, ``openvino`` and ``executorch``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from adaptc.cli.app import (
    Force,
    Json,
    Out,
    Output,
    Program,
    app,
    choose_output_path,
    import_adaptc,
    print_result,
    prints_errors,
)


class Kernels(StrEnum):
    """The kernels of ExecuTorch."""

    XNNPACK = "xnnpack"
    PORTABLE = "portable"


Adapters = Annotated[
    str,
    typer.Option(
        help="inputs: each call takes any adapter, or none. merged: the current one is in the weights. rows: each row "
        "of a batch has its own, in ONNX and OpenVINO."
    ),
]


@app.command()
@prints_errors
def onnx(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    adapters: Adapters = "inputs",
    base_branch: Annotated[
        bool, typer.Option(help="Give calls without an adapter a branch of the graph. Some tools read one graph only.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write a program as an ONNX file, OUT.onnx, with its weights beside it in OUT.onnx.data.

    The adapter is a set of inputs that may be left out, in which case the base is computed.
    """
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    loaded = adaptc.load(program)
    written_path = adaptc.exporters.export_onnx(loaded, path, adapters=adapters, base_branch=base_branch)
    print_result(as_json, written_path=written_path)


@app.command()
@prints_errors
def openvino(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    adapters: Adapters = "inputs",
    as_json: Json = False,
) -> None:
    """Write a program as an OpenVINO model, OUT.xml, with its weights beside it in OUT.bin.

    The adapter is a set of inputs. OUT.base.safetensors has their values that compute the base.
    """
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    print_result(as_json, written_path=adaptc.exporters.export_openvino(adaptc.load(program), path, adapters=adapters))


@app.command()
@prints_errors
def executorch(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    adapters: Adapters = "inputs",
    max_rank: Annotated[int, typer.Option(min=2, help="Largest rank that adapters may have.")] = 64,
    max_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Largest value of sizes that have none of their own, such as a text's length.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[Kernels, typer.Option(help="The kernels of the base's layers.")] = Kernels.XNNPACK,
    as_json: Json = False,
) -> None:
    """Write a program for ExecuTorch, OUT.pte.

    The adapter is a set of inputs. The method adaptc_base of the file returns their values that compute the base.
    """
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    written_path = adaptc.exporters.export_executorch(
        adaptc.load(program),
        path,
        adapters=adapters,
        max_rank=max_rank,
        max_size=max_size,
        backend=backend.value,
    )
    print_result(as_json, written_path=written_path)
