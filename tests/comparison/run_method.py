"""Run one method on one task in this process: ``python -m tests.comparison.run_method`` reads the run from its input.

It writes the result to the folder that is given, also where the method fails, and says on its output which step it is
at. :func:`tests.comparison.runs.run_apart` is its other end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptc
from tests.comparison.budget import extrapolated, nearest_value
from tests.comparison.compared import COMPARED, Compared
from tests.comparison.measure import file_bytes, machine, peak_bytes, reset_peak, swap_seconds
from tests.comparison.results import Run, new_result, write_result
from tests.comparison.task import SEARCH, TASKS, Logits, Task
from tests.comparison.train import train

Progress = Callable[[int], None]


def make_config(compared: Compared, task: Task, steps: int, value: Any, layers: int) -> Any:
    """Return the config of a method for a model of ``layers`` layers, with ``value`` for the option that sizes it."""
    options = {**task.options, **compared.options}
    options |= {name: max(1, int(share * steps)) for name, share in compared.steps_options.items()}
    if compared.sized_by:
        options[compared.sized_by] = value
    if compared.layers_option:
        options[compared.layers_option] = layers
    if compared.places != "program":
        options["target_modules"] = task.targets[compared.places]
    return getattr(adaptc, compared.config)(**options)


def count_trained(program: adaptc.AdaptedProgram) -> int:
    """Return how many parameters the module of a program trains."""
    return sum(p.numel() for p in program.module().parameters() if p.requires_grad)


def sized_value(compared: Compared, task: Task, steps: int, budget: int) -> Any:
    """Return the value of the method's option that comes nearest to the budget; None where it has no such option."""
    if not compared.sized_by:
        return None
    bases = [_captured(task.small_model(layers)) for layers in (1, 2)]

    def count(value: Any) -> int:
        one, two = (
            count_trained(adaptc.compile(base, make_config(compared, task, steps, value, layers), training=True))
            for layers, base in enumerate(bases, 1)
        )
        return extrapolated(one, two, task.layers)

    return nearest_value(compared.values, count, budget)[0]


def _captured(model: Any) -> Any:
    """Return a model as a program without an adapter, so that it is captured once for all values."""
    return adaptc.unload(adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules="all-linear"), training=True))


def logits_of(model: Any) -> Logits:
    """Return a function that gives the logits of a model or program without gradients.

    Virtual tokens come first in the logits and are left out.
    """

    def logits(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found = model(**inputs).logits
        return found[:, -inputs["input_ids"].shape[1] :] if "input_ids" in inputs else found

    return logits


def run_method(run: Run, task: Task, progress: Progress = lambda step: None) -> dict[str, Any]:
    """Return the values of a run: those of the search for a learning rate, or those of the comparison."""
    settings, compared = run.settings, COMPARED[run.method]
    value = sized_value(compared, task, settings["steps"], settings["budget"])
    config = make_config(compared, task, settings["steps"], value, task.layers)
    option = {compared.sized_by: value} if compared.sized_by else {}
    with tempfile.TemporaryDirectory() as folder:
        compute = partial(_search, run) if run.task == SEARCH else partial(_compare, run)
        return {"option": option, **compute(task, config, folder, progress)}


def _search(run: Run, task: Task, config: Any, folder: str, progress: Progress) -> dict[str, Any]:
    losses: dict[str, float] = {}
    steps = run.settings["steps"]
    for number, rate in enumerate(run.settings["learning_rate"]):
        torch.manual_seed(run.settings["seed"])
        program = adaptc.compile(task.model, config, training=True)
        train(program, task, run.settings, rate, folder, lambda step, n=number: progress(n * steps + step))
        losses[f"{rate:g}"] = task.score(logits_of(program.module().eval()), "validation").loss
    return {"validation_losses": losses}


def _compare(run: Run, task: Task, config: Any, folder: str, progress: Progress) -> dict[str, Any]:
    settings, adapter = run.settings, Path(folder) / "adapter"
    base = task.score(logits_of(task.model), "test")
    torch.manual_seed(settings["seed"])
    program = adaptc.compile(task.model, config, training=True)
    reset_peak()
    trained = train(program, task, settings, settings["learning_rate"], folder, progress)
    peak = peak_bytes()
    adaptc.save_adapter(program, adapter)
    # The file is scored, not the module that was trained.
    served = adaptc.compile(task.model, adapter)
    swap = swap_seconds(served, adapter)
    scores = task.score(logits_of(served), "test")
    return {
        "parameters": trained.parameters,
        "accuracy": scores.accuracy,
        "base_accuracy": base.accuracy,
        "held_out_loss": scores.loss,
        "forgetting": scores.known_loss - base.known_loss,
        "base_known_loss": base.known_loss,
        "final_loss": trained.final_loss,
        "step_seconds": trained.step_seconds,
        "peak_bytes": peak,
        "file_bytes": file_bytes(adapter),
        "swap_seconds": swap,
        "machine": machine(),
    }


def run_and_write(run: Run, folder: Path, progress: Progress = lambda step: None) -> None:
    """Write the result of a run; an error of the method is its result."""
    try:
        values = run_method(run, TASKS[run.task][1](), progress)
    except Exception as error:
        values = {"error": f"{type(error).__name__}: {error}"}
    write_result(run.path(folder), new_result(run, values))


def main() -> None:
    """Run what the input says: a JSON object with the fields of a run, ``folder`` and ``threads``."""
    # What libraries print must not lie between the steps.
    steps = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")  # of other libraries, about versions and devices
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked.pop("threads"))
    folder = Path(asked.pop("folder"))
    run_and_write(Run(**asked), folder, lambda step: print(step, file=steps, flush=True))


if __name__ == "__main__":
    main()
