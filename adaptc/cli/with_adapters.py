"""Define the commands on adapters: export one from a program, combine several, and make LoRA of other adapters or of
changed models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.cli.app import (
    Component,
    Force,
    Json,
    KeyMapping,
    Out,
    Output,
    Program,
    app,
    choose_output_path,
    import_adaptc,
    parse_key_mapping,
    print_result,
    prints_errors,
)

Model = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="A transformers model directory, or a program (.pt2): the weights that the adapters are for.",
        show_default=False,
    ),
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="The rank of the result, at every layer that has as much.", show_default=False)
]
Energy = Annotated[
    float | None,
    typer.Option(
        help="Instead of a rank: the part of each weight's change to keep, 0 to 1, of the squares.", show_default=False
    ),
]


@app.command("export-adapter")
@prints_errors
def export_adapter(
    program: Program,
    out: Out = None,
    output: Output = None,
    force: Force = False,
    base_model: Annotated[str | None, typer.Option(help="Recorded as base_model_name_or_path.")] = None,
    form: Annotated[str, typer.Option("--format", help="peft, diffusers or kohya.")] = "peft",
    component: Annotated[str | None, typer.Option(help="Of a pipeline, such as unet: for diffusers and kohya.")] = None,
    as_json: Json = False,
) -> None:
    """Write the program's adapter as a PEFT adapter directory, which peft.PeftModel.from_pretrained loads, or as a file
    of diffusers or kohya."""
    adaptc = import_adaptc()

    path = choose_output_path(out, output, force, program)
    written = adaptc.save_adapter(adaptc.load(program), path, base_model=base_model, format=form, component=component)
    print_result(as_json, written_path=written)


@app.command()
@prints_errors
def combine(
    weighted_adapters: Annotated[
        list[str],
        typer.Argument(metavar="DIR=WEIGHT...", help="Adapters, each with its weight.", show_default=False),
    ],
    output: Output = None,
    force: Force = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four with _svd "
            "behind. By default svd for LoRA, and the weighted sum for IA3 and its like.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="For ties, dare and magnitude_prune: the part of the entries to keep.")
    ] = None,
    majority_sign: Annotated[str, typer.Option(help="For ties and dare_ties: total or frequency.")] = "total",
    svd_rank: Annotated[int | None, typer.Option(help="For the methods with svd; by default the largest rank.")] = None,
    svd_clamp: Annotated[float | None, typer.Option(help="For the methods with svd: a quantile to clamp to.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="For dare, which draws.", show_default=False)
    ] = None,
    key_mapping: KeyMapping = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Make one adapter of several: adaptc combine one=0.5 two=-0.3 -o mixed --method ties --density 0.2.

    With --model, what adapters of any methods change of its weights is combined, into LoRA.
    """
    import torch

    adaptc = import_adaptc()

    parsed_adapters = [_parse_weighted_path(g) for g in weighted_adapters]
    path = choose_output_path(None, output, force, model, *(Path(adapter) for adapter, _ in parsed_adapters))
    options: dict[str, Any] = {"key_mapping": parse_key_mapping(key_mapping), "model": _load_model(model)}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    combined = adaptc.combine(
        parsed_adapters,
        method=method,
        density=density,
        majority_sign_method=majority_sign,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        generator=generator,
        **options,
    )
    _save_and_report(combined, path, as_json)


@app.command("to-lora")
@prints_errors
def to_lora(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER|PROG.pt2", help="An adapter, with --model, or a program that has one.", show_default=False
        ),
    ],
    out: Out = None,
    output: Output = None,
    force: Force = False,
    rank: Rank = None,
    energy: Energy = None,
    model: Model = None,
    key_mapping: KeyMapping = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Make LoRA of an adapter of any method that changes weights, and tell how near it is."""
    adaptc = import_adaptc()

    path, rank_or_energy = choose_output_path(out, output, force, source, model), _rank_or_energy(rank, energy)
    adapter: Any = adaptc.load(source) if source.suffix == ".pt2" else source
    options: dict[str, Any] = {"key_mapping": parse_key_mapping(key_mapping), "component": component}
    _save_and_report(adaptc.convert_to_lora(adapter, _load_model(model), rank=rank_or_energy, **options), path, as_json)


@app.command()
@prints_errors
def extract(
    model_a: Annotated[
        Path, typer.Argument(metavar="MODEL_A", help="The model that was trained or merged.", show_default=False)
    ],
    model_b: Annotated[Path, typer.Argument(metavar="MODEL_B", help="The model it was made of.", show_default=False)],
    out: Out = None,
    output: Output = None,
    force: Force = False,
    rank: Rank = None,
    energy: Energy = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Only modules whose name ends so; may be given several times.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make LoRA of what MODEL_A has changed of MODEL_B: directories or files of safetensors, read tensor by tensor."""
    adaptc = import_adaptc()

    path, rank_or_energy = choose_output_path(out, output, force, model_a, model_b), _rank_or_energy(rank, energy)
    _save_and_report(
        adaptc.subtract_adapter(model_a, model_b, rank=rank_or_energy, target_modules=target or None), path, as_json
    )


def _parse_weighted_path(text: str) -> tuple[str, float]:
    """Return the directory and the weight of ``DIR=WEIGHT``; raise BadParameter for anything else."""
    path, _, weight = text.rpartition("=")
    try:
        return path or text, float(weight)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no DIR=WEIGHT, such as adapters/fr=0.5", param_hint="'DIR=WEIGHT'"
        ) from None


def _rank_or_energy(rank: int | None, energy: float | None) -> float:
    if (rank is None) == (energy is None):
        raise typer.BadParameter("give one of --rank and --energy", param_hint="'--rank'")
    return float(energy) if rank is None else rank  # type: ignore[arg-type]


def _load_model(path: Path | None) -> Any:
    from adaptc.capture.model_files import read_model

    adaptc = import_adaptc()

    if path is None:
        return None
    return adaptc.load(path) if path.is_file() else read_model(path)


def _save_and_report(adapter: Any, path: Path, as_json: bool) -> None:
    adaptc = import_adaptc()

    print_result(as_json, adapter.report, adaptc.save_adapter(adapter, path))
