"""Train adapters of several configs side by side on the same batches, and keep the best.

All configs see the same rows in the same order, and have the seed of their first values in common. Configs of one
program train in one step of its bank. Each has its own optimizer and learning rate, so its losses are those of a run of
its own.

With a directory, a run that was stopped goes on: the newest complete state of all adapters is there, and the best
adapter of each config by its evaluation.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.adapter_files.atomic_write import atomic_replace
from adaptc.adapter_files.locate import check_plain_name
from adaptc.bank.bank_report import bytes_of
from adaptc.binding.sources.configs import as_config
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, short_repr
from adaptc.joint_training.datum import IGNORED, pad_field
from adaptc.joint_training.program_groups import ProgramGroup, ProgramGroups
from adaptc.joint_training.sweep_report import SweepReport, SweepResult
from adaptc.torch_typing import is_mapping

_STATE_NAME = "sweep.json"
#: the beginning of the names of folders with the state of all configs
_STATES_PREFIX = "state-"


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep, see :func:`sweep`. Raises ConfigError for a value that is none."""

    steps: int
    batch_size: int = 4
    learning_rate: float | Mapping[str, float] = 1e-4
    max_grad_norm: float | None = 1.0
    eval_steps: int | None = None
    patience: int | None = None
    save_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_steps", "patience", "save_steps"):
            value: Any = getattr(self, name)  # callers may give anything
            if value is None and name not in ("steps", "batch_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={short_repr(value)} must be a positive integer")

    def rate_of(self, name: str) -> float:
        """Return the learning rate of a config. Raises ConfigError where it has none."""
        rate: Any = self.learning_rate.get(name) if is_mapping(self.learning_rate) else self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < inf:
            raise ConfigError(f"learning_rate of {name!r} is {short_repr(rate)}: expected a number, or one by name")
        return float(rate)


@dataclass(eq=False)
class _Run:
    """One config in training."""

    group: ProgramGroup
    result: SweepResult
    seconds: list[float] = field(default_factory=list[float])
    evaluations_since_best: int = 0


def sweep(
    model: Any,
    configs: Mapping[str, Any],
    dataset: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    eval_dataset: Sequence[Mapping[str, Any]] | None = None,
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
    directory: str | os.PathLike[str] | None = None,
    on_step: Callable[[SweepReport], Any] | None = None,
    **options: Any,
) -> SweepReport:
    """Train an adapter of each config, side by side, and return how they did.

    Args:
        model: a causal language model of transformers.
        configs: name -> config, without dropout. Methods, ranks and layers may differ.
        dataset: rows with ``input_ids``, and maybe ``labels`` (-100 where there is no loss) as long.
        steps: how many steps to take, counted from the first even when the run goes on from a directory.
        eval_dataset: rows to evaluate on; None to judge by the training loss alone.
        loss: a function of outputs and a batch (``input_ids``, ``attention_mask``, ``labels``) that gives a scalar.
            None for the mean cross entropy of the next token.
        directory: where the best adapters and the state of the run are kept; None keeps nothing.
        on_step: a function that is called with a report after each step.
        **options: ``batch_size`` is 4. ``learning_rate`` is 1e-4, or a dict by name. ``max_grad_norm`` is 1.0, and
            ``seed`` 0. ``eval_steps``: how many steps lie between evaluations, by default a tenth of all.
            ``patience``: after how many evaluations without a better one a config stops; None for never.
            ``save_steps``: how many steps lie between states of the run, by default as ``eval_steps``.

    Returns:
        a report with a row for each config; ``report.best`` is the name of the best.

    Raises:
        ConfigError: an option has a value that cannot be honoured, or a config has dropout.
        CheckpointError: the directory holds a run with other configs or options, or a name is no name of a directory.
        AdaptcError: a row is malformed.

    Example:
        >>> configs = {f"r{r}": LoraConfig(r=r, target_modules=["q_proj"]) for r in (1, 2)}
        >>> rows = [{"input_ids": row} for row in ids]
        >>> sorted(adaptc.training.sweep(lm, configs, rows, steps=2).results)
        ['r1', 'r2']
    """
    given: Any = configs  # callers may give anything
    if not is_mapping(given) or not given or not all(isinstance(n, str) and n for n in given):
        raise ConfigError(f"configs={short_repr(configs)} must be a dict of configs by name")
    for name in given if directory is not None else ():
        check_plain_name(name, "the name of a config, which is that of its directory,")
        if name == _STATE_NAME or name.startswith(_STATES_PREFIX):
            raise ConfigError(f"{name!r} is what a sweep calls its own files in the directory: choose another name")
    try:
        read = SweepOptions(steps, **options)
    except TypeError as error:
        raise ConfigError(f"a sweep has no such option: {error}") from None
    tenth = max(1, steps // 10)
    read = replace(read, eval_steps=read.eval_steps or tenth, save_steps=read.save_steps or read.eval_steps or tenth)
    named = {n: as_config(c) for n, c in configs.items()}
    rows, held_out = (
        _read_rows("dataset", dataset),
        None if eval_dataset is None else _read_rows("eval_dataset", eval_dataset),
    )
    return _Sweep(model, named, read, loss or next_token_loss, directory and Path(directory)).run(
        rows, held_out, on_step
    )


class _Sweep:
    def __init__(self, model: Any, configs: Mapping[str, Any], options: SweepOptions, loss: Any, folder: Any) -> None:
        self.options, self.loss, self.folder, self.configs = options, loss, folder, configs
        self.groups, self.runs, self.step = ProgramGroups(model), dict[str, _Run](), 0
        state = self._read_state()
        for name, config in configs.items():
            training: dict[str, Any] = {
                "optimizer": _adam(options.rate_of(name)),
                "max_grad_norm": options.max_grad_norm,
            }
            if state is None:
                group = self.groups.add(name, config, seed=options.seed, **training)
                self.runs[name] = _Run(group, SweepResult(name, bytes=_bytes_in_training(group, name)))
                continue
            known = SweepResult(**state["results"][name])
            group = self.groups.add(name, config, seed=options.seed, **training)
            group.bank.remove(name)
            if not known.stopped:
                group.bank.load_state(name, self.folder / state["states"] / name, **training)
            self.runs[name] = _Run(group, known, evaluations_since_best=state["since_best"][name])
        self.step = 0 if state is None else state["step"]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, rows: Sequence[Mapping[str, Tensor]], held_out: Any, on_step: Any) -> SweepReport:
        count = self.options.steps
        while self.step < count and self._active():
            batch = collate([rows[i] for i in _row_indices(len(rows), self.options, self.step)])
            for group in dict.fromkeys(r.group for r in self._active().values()):
                self._train(group, batch)
            self.step += 1
            is_last = self.step == count
            if self.step % (self.options.eval_steps or count) == 0 or is_last:
                self._judge(held_out)
            if self.folder is not None and (self.step % (self.options.save_steps or count) == 0 or is_last):
                self._write_state()
            if on_step is not None:
                on_step(self.report())
        return self.report()

    def _active(self) -> dict[str, _Run]:
        return {n: r for n, r in self.runs.items() if not r.result.stopped}

    def _train(self, group: ProgramGroup, batch: Mapping[str, Tensor]) -> None:
        names = [n for n, r in self._active().items() if r.group is group]
        start = time.perf_counter()
        found = group.bank.forward_backward(*_for_each(names, batch, group), self.loss, _repeat(batch, len(names)))
        if any(one.error is None for one in found.values()):
            skipped = group.bank.step([n for n in names if found[n].error is None]).skipped
        else:
            skipped = {}
        seconds = (time.perf_counter() - start) / len(names)
        for name in names:
            run, error = self.runs[name], found[name].error or skipped.get(name)
            run.seconds.append(seconds)
            changes: dict[str, Any] = {"steps": group.bank.trainer(name).steps, "step_seconds": median(run.seconds)}
            if error is None:
                changes["loss"] = found[name].value()
            else:
                changes["skipped_steps"] = run.result.skipped_steps + 1
            run.result = replace(run.result, **changes)

    def _judge(self, held_out: Any) -> None:
        for name, run in self._active().items():
            score = run.result.loss if held_out is None else self._evaluate(name, run.group, held_out)
            changes: dict[str, Any] = {} if held_out is None else {"eval_loss": score}
            run.evaluations_since_best += 1
            if (
                score is not None
                and isfinite(score)
                and score < (run.result.best if run.result.best is not None else inf)
            ):
                changes |= {"best": score, "best_step": self.step}
                run.evaluations_since_best = 0
                if self.folder is not None:
                    run.group.bank.save_adapter(name, self.folder / name)
            patience = self.options.patience
            stops = patience is not None and run.evaluations_since_best >= patience and self.step < self.options.steps
            run.result = replace(run.result, **changes, stopped=stops)
            if stops:
                run.group.bank.remove(name)

    def _evaluate(self, name: str, group: ProgramGroup, held_out: Sequence[Mapping[str, Tensor]]) -> float:
        """Return the mean of the loss over batches of ``held_out``, weighted by their rows."""
        total, size = 0.0, self.options.batch_size
        with torch.no_grad():
            for i in range(0, len(held_out), size):
                batch = collate(held_out[i : i + size])
                inputs, rows = _for_each([name], batch, group)
                total += float(self.loss(group.bank(**inputs, adapters=rows), batch)) * len(rows)
        return total / len(held_out)

    def report(self) -> SweepReport:
        return SweepReport({n: r.result for n, r in self.runs.items()}, self.step, self.options.steps)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on; it may be longer than before."""
        options = {k: v for k, v in asdict(self.options).items() if k not in ("steps", "eval_steps", "save_steps")}
        return json.loads(
            json.dumps({"configs": {n: c.to_dict() for n, c in self.configs.items()}, **options}, default=str)
        )

    def _read_state(self) -> Any:
        path = None if self.folder is None else self.folder / _STATE_NAME
        if path is None or not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            description = state["description"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): remove the directory to begin anew") from error
        own = self._description()
        if wrong := [k for k in own if own[k] != description.get(k)]:
            raise CheckpointError(
                f"{path} is of a sweep with other {wrong[0]}: give the same to go on, or another directory"
            )
        return state

    def _write_state(self) -> None:
        """Write the state of all configs to a new folder, then name it in one file, and then remove the old folder."""
        new = f"{_STATES_PREFIX}{self.step}"
        for name, run in self._active().items():
            run.group.bank.save_state(name, self.folder / new / name)
        (self.folder / new).mkdir(parents=True, exist_ok=True)
        state = {
            "description": self._description(),
            "step": self.step,
            "states": new,
            "results": {n: asdict(r.result) for n, r in self.runs.items()},
            "since_best": {n: r.evaluations_since_best for n, r in self.runs.items()},
        }
        with atomic_replace(self.folder / _STATE_NAME) as path:
            path.write_text(json.dumps(state, indent=1), encoding="utf-8")
        for old in self.folder.glob(f"{_STATES_PREFIX}*"):
            if old.name != new:
                shutil.rmtree(old, ignore_errors=True)


def next_token_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross entropy of the next token, where ``labels`` (rows, length) are not -100."""
    labels = batch["labels"][:, 1:].to(outputs.logits.device)
    logits = outputs.logits[:, :-1]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as one batch, padded on the right: ``input_ids``, ``attention_mask`` and ``labels``."""
    return {
        "input_ids": pad_field([r["input_ids"] for r in rows], 0),
        "attention_mask": pad_field([torch.ones_like(r["input_ids"]) for r in rows], 0),
        "labels": pad_field([r["labels"] for r in rows], IGNORED),
    }


def _read_rows(what: str, dataset: Any) -> list[dict[str, Tensor]]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        raise AdaptcError(f"{what}={short_repr(dataset)} must be a list of rows with input_ids")
    found: list[dict[str, Tensor]] = []
    for i in range(len(dataset)):
        row: Any = dataset[i]
        if not hasattr(row, "keys") or "input_ids" not in row:
            raise AdaptcError(f"{what}[{i}] is {short_repr(row)}: expected a dict with input_ids")
        ids = torch.as_tensor(row["input_ids"])
        labels = torch.as_tensor(row["labels"]) if "labels" in row else ids
        if ids.ndim != 1 or ids.is_floating_point() or labels.shape != ids.shape or len(ids) < 2:
            raise AdaptcError(
                f"{what}[{i}] has input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)}: expected at least two "
                "token ids, and as many labels"
            )
        mask = row.get("attention_mask") if hasattr(row, "get") else None
        kept = slice(None) if mask is None else torch.as_tensor(mask).bool()
        found.append({"input_ids": ids[kept].long(), "labels": labels[kept].long()})
    return found


def _row_indices(count: int, options: SweepOptions, step: int) -> list[int]:
    """Return the rows of a step: each epoch has its own order, which the seed gives."""
    indices: list[int] = []
    for position in range(step * options.batch_size, (step + 1) * options.batch_size):
        epoch, place = divmod(position, count)
        indices.append(int(_row_order(count, options.seed, epoch)[place]))
    return indices


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _row_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _for_each(
    names: Sequence[str], batch: Mapping[str, Tensor], group: ProgramGroup
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the inputs of a batch that has the same rows for each adapter, and the adapter of each row."""
    inputs = {n: t for n, t in _repeat(batch, len(names)).items() if n != "labels"}
    rows = len(batch["input_ids"])
    return {n: t.to(group.bank.device) for n, t in inputs.items()}, [name for name in names for _ in range(rows)]


def _repeat(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {n: t.repeat(count, 1) for n, t in batch.items()}


def _adam(rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def _bytes_in_training(group: ProgramGroup, name: str) -> int:
    """Return the bytes of an adapter with its gradients and AdamW's two moments."""
    trained = sum(t.nbytes for t in group.bank.trainer(name).parameters.values())
    return bytes_of([group.bank[name]]) + 3 * trained
