"""Train adapters of several configs side by side on the same batches, and keep the best.

All configs see the same rows in the same order, and have the seed of their first values in common. Configs of one
program train in one step of its bank. Each has its own optimizer, learning rate and scheduler, so its losses are those
of a run of its own.

With a directory, a run that was stopped goes on: the newest complete state of all adapters is there, and the best
adapter of each config by its evaluation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.bank.bank_report import bytes_of
from adaptc.binding.sources.configs import as_config
from adaptc.errors import ConfigError, did_you_mean, short_repr
from adaptc.joint_training.program_groups import ProgramGroup, ProgramGroups
from adaptc.joint_training.sweep_batches import (
    BatchLoss,
    StepLoss,
    TokenRow,
    collate,
    count_labels,
    fingerprint_rows,
    read_rows,
    row_indices,
    split_rows,
)
from adaptc.joint_training.sweep_directory import SweepDirectory, SweepState
from adaptc.joint_training.sweep_report import SweepPoint, SweepReport, SweepResult
from adaptc.torch_typing import is_mapping
from adaptc.value_types import field_rules, validate_option

#: the schedules of learning rates that need no more than the numbers of steps, by transformers' names
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep, see :func:`sweep`. Raises ConfigError for a value that is none."""

    steps: int
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float | Mapping[str, float] = 1e-4
    lr_scheduler_type: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    packing: bool = True
    eval_steps: int | None = None
    patience: int | None = None
    save_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = field_rules(type(self))
        for f in fields(self):
            value: Any = getattr(self, f.name)  # callers may give anything
            if f.name in rules and not is_mapping(value):
                validate_option(f.name, rules[f.name], value)
            lowest = 1 if f.name in _COUNTS else 0 if f.name in ("warmup_steps", "weight_decay") else None
            if lowest is not None and isinstance(value, (int, float)) and value < lowest:
                raise ConfigError(f"{f.name}={short_repr(value)} must be a number from {lowest} upwards")

    def rate_of(self, name: str) -> float:
        """Return the learning rate of a config. Raises ConfigError where it has none."""
        rate: Any = self.learning_rate.get(name) if is_mapping(self.learning_rate) else self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < inf:
            raise ConfigError(f"learning_rate of {name!r} is {short_repr(rate)}: expected a number, or one by name")
        return float(rate)

    def training_of(self, name: str) -> dict[str, Any]:
        """Return the options with which a bank trains a config."""
        rate, decay = self.rate_of(name), self.weight_decay
        training: dict[str, Any] = {
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=decay),
            "max_grad_norm": self.max_grad_norm,
        }
        if self.lr_scheduler_type != "constant":
            training["scheduler"] = self._make_scheduler
        return training

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        from transformers import get_scheduler

        return get_scheduler(self.lr_scheduler_type, optimizer, self.warmup_steps, self.steps)

    def describe(self) -> dict[str, Any]:
        """Return the options that must be the same for a run to go on. It may be longer than before, unless the
        learning rate falls until its end."""
        falls = self.lr_scheduler_type in ("linear", "cosine")
        changeable = {"eval_steps", "save_steps", *(() if falls else ("steps",))}
        return {k: v for k, v in asdict(self).items() if k not in changeable}


_COUNTS = ("steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "patience", "save_steps")


@dataclass(eq=False)
class _Run:
    """One config in training."""

    group: ProgramGroup
    result: SweepResult
    points: list[SweepPoint] = field(default_factory=list[SweepPoint])
    seconds: list[float] = field(default_factory=list[float])
    evaluations_since_best: int = 0


def sweep(
    model: Any,
    configs: Mapping[str, Any],
    dataset: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    eval_dataset: Sequence[Mapping[str, Any]] | None = None,
    loss: BatchLoss | None = None,
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
        loss: a function of outputs and a batch that gives the mean of a batch, a scalar. The batch has ``input_ids``,
            ``labels``, and ``position_ids`` of packed rows or ``attention_mask``. None for the mean cross entropy of
            the next token.
        directory: where the best adapters and the state of the run are kept; None keeps nothing.
        on_step: a function that is called with a report after each step. Where it raises KeyboardInterrupt, the state
            is written first.
        **options: ``batch_size`` is 4, and ``gradient_accumulation_steps`` 1: how many batches a step has.
            ``learning_rate`` is 1e-4, or a dict by name. ``lr_scheduler_type`` is "constant", "constant_with_warmup",
            "linear" or "cosine", with ``warmup_steps``. ``weight_decay`` is 0, ``max_grad_norm`` 1, and ``seed`` 0.
            ``packing``: whether short texts share rows, where the model keeps them apart. ``eval_steps``: how many
            steps lie between evaluations, by default a tenth of all. ``patience``: after how many evaluations without
            a better one a config stops; None for never. ``save_steps``: how many steps lie between states of the run,
            by default as ``eval_steps``.

    Returns:
        a report with a row for each config; ``report.best`` is the name of the best.

    Raises:
        ConfigError: an option has a value that cannot be honoured, or a config has dropout, or another sweep runs in
            the directory.
        CheckpointError: the directory holds a run with other configs, rows or options, or a name is no name of a
            directory.
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
    known = [f.name for f in fields(SweepOptions)]
    for name in options:
        if name not in known:
            raise ConfigError(f"a sweep has no option {name!r}{did_you_mean(name, known)}")
    read = SweepOptions(steps, **options)
    if is_mapping(read.learning_rate) and (wrong := [n for n in read.learning_rate if n not in given]):
        raise ConfigError(
            f"learning_rate is of {short_repr(wrong[0])}, which is no config{did_you_mean(str(wrong[0]), given)}"
        )
    tenth = max(1, steps // 10)
    read = replace(read, eval_steps=read.eval_steps or tenth, save_steps=read.save_steps or read.eval_steps or tenth)
    named = {n: as_config(c) for n, c in configs.items()}
    groups = ProgramGroups(model, packing=read.packing)
    rows = read_rows("dataset", dataset, groups.vocab_size)
    held_out = None if eval_dataset is None else read_rows("eval_dataset", eval_dataset, groups.vocab_size)
    kept = None
    if directory is not None:
        hashes = {"dataset": fingerprint_rows(rows), "eval_dataset": held_out and fingerprint_rows(held_out)}
        description = {"configs": {n: c.to_dict() for n, c in named.items()}, **hashes, **read.describe()}
        kept = SweepDirectory(Path(directory), [*named], description)
    is_new = kept is not None and not kept.path.is_dir()
    with ExitStack() as stack:
        if kept is not None and not is_new:
            stack.enter_context(kept.held(is_new))
        made = _Sweep(groups, named, read, loss, kept)
        if kept is not None and is_new:  # not before, for a call that fails makes no directory
            stack.enter_context(kept.held(is_new))
        return made.run(rows, held_out, on_step)


class _Sweep:
    def __init__(
        self,
        groups: ProgramGroups,
        configs: Mapping[str, Any],
        options: SweepOptions,
        loss: BatchLoss | None,
        directory: SweepDirectory | None,
    ) -> None:
        self.options, self.loss, self.directory = options, loss, directory
        self.runs, self.step = dict[str, _Run](), 0
        state = None if directory is None else directory.read()
        for name, config in configs.items():
            training = options.training_of(name)
            group = groups.add(name, config, seed=options.seed, **training)
            if state is None:
                self.runs[name] = _Run(group, SweepResult(name, bytes=_bytes_in_training(group, name)))
                continue
            group.bank.remove(name)
            known = state.results[name]
            if not known.stopped:
                group.bank.load_state(name, state.folder / name, **training)
            self.runs[name] = _Run(group, known, [*state.points[name]], evaluations_since_best=state.since_best[name])
        self.step = 0 if state is None else state.step
        #: whether all configs have taken the same steps, and were judged; and the step of the newest state
        self._is_whole, self._saved_step = True, self.step

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, rows: Sequence[TokenRow], held_out: Sequence[TokenRow] | None, on_step: Any) -> SweepReport:
        count = self.options.steps
        try:
            while self.step < count and self._active():
                self._take_step(rows, held_out)
                is_due = self.step % (self.options.save_steps or count) == 0
                if is_due or self.step == count or not self._active():
                    self._save()
                if on_step is not None:
                    on_step(self.report())
        except KeyboardInterrupt:
            if self._is_whole:
                self._save()
            raise
        return self.report()

    def _take_step(self, rows: Sequence[TokenRow], held_out: Sequence[TokenRow] | None) -> None:
        self._is_whole = False
        size, batches = self.options.batch_size, self.options.gradient_accumulation_steps
        chosen = [rows[i] for i in row_indices(len(rows), size * batches, self.options.seed, self.step)]
        for group in dict.fromkeys(r.group for r in self._active().values()):
            # The mean over all tokens of a step is the same however its rows are divided; a caller's loss may not be.
            self._train(group, split_rows(chosen, size, by_length=self.loss is None and not group.packs))
        self.step += 1
        if self.step % (self.options.eval_steps or self.options.steps) == 0 or self.step == self.options.steps:
            self._judge(held_out)
        self._is_whole = True

    def _active(self) -> dict[str, _Run]:
        return {n: r for n, r in self.runs.items() if not r.result.stopped}

    def _train(self, group: ProgramGroup, parts: Sequence[Sequence[TokenRow]]) -> None:
        names = [n for n, r in self._active().items() if r.group is group]
        loss = StepLoss(self.loss, sum(map(count_labels, parts)), len(parts))
        totals, errors = dict.fromkeys(names, 0.0), dict[str, Any]()
        start = time.perf_counter()
        for part in parts:
            active = [n for n in names if n not in errors]
            if active:
                batch = collate(part, group.packs)
                targets = _repeat(batch, len(active))
                for name, one in group.bank.forward_backward(*_for_each(active, batch, group), loss, targets).items():
                    if one.error is not None:
                        errors[name] = one.error
                        group.bank.trainer(name).zero_grad()
                    else:
                        totals[name] += one.value()
        if done := [n for n in names if n not in errors]:
            errors |= group.bank.step(done).skipped
        seconds = (time.perf_counter() - start) / len(names)
        for name in names:
            run = self.runs[name]
            run.seconds.append(seconds)
            changes: dict[str, Any] = {"steps": group.bank.trainer(name).steps, "step_seconds": median(run.seconds)}
            if name in errors:
                changes["skipped_steps"] = run.result.skipped_steps + 1
            else:
                changes["loss"] = totals[name]
            run.points.append(SweepPoint(self.step + 1, changes.get("loss")))
            run.result = replace(run.result, **changes)

    def _judge(self, held_out: Sequence[TokenRow] | None) -> None:
        for name, run in self._active().items():
            score = run.result.loss if held_out is None else self._evaluate(name, run.group, held_out)
            changes: dict[str, Any] = {} if held_out is None else {"eval_loss": score}
            if held_out is not None:
                run.points[-1] = SweepPoint(self.step, run.points[-1].loss, score)
            run.evaluations_since_best += 1
            best = inf if run.result.best is None else run.result.best
            if score is not None and isfinite(score) and score < best:
                changes |= {"best": score, "best_step": self.step}
                run.evaluations_since_best = 0
                if self.directory is not None:
                    run.group.bank.save_adapter(name, self.directory.path / name)
            patience = self.options.patience
            stops = patience is not None and run.evaluations_since_best >= patience and self.step < self.options.steps
            run.result = replace(run.result, **changes, stopped=stops)
            if stops:
                run.group.bank.remove(name)

    def _evaluate(self, name: str, group: ProgramGroup, held_out: Sequence[TokenRow]) -> float:
        """Return the mean of the loss over batches of ``held_out``, weighted by their rows, as ``Trainer`` does."""
        total, count, size = 0.0, 0, self.options.batch_size
        with torch.no_grad():
            for i in range(0, len(held_out), size):
                part = held_out[i : i + size]
                labels = count_labels(part)
                if self.loss is None and not labels:
                    continue
                batch = collate(part, group.packs)
                inputs, rows = _for_each([name], batch, group)
                loss = StepLoss(self.loss, labels, 1)(group.bank(**inputs, adapters=rows), batch)
                total, count = total + float(loss) * len(part), count + len(part)
        return total / count if count else float("nan")

    def report(self) -> SweepReport:
        points = {n: tuple(r.points) for n, r in self.runs.items()}
        return SweepReport({n: r.result for n, r in self.runs.items()}, self.step, self.options.steps, points)

    def _save(self) -> None:
        """Write the state of all configs, where it is not there."""
        if self.directory is None or self._saved_step == self.step:
            return
        found, since = self.report(), {n: r.evaluations_since_best for n, r in self.runs.items()}
        state = SweepState(self.step, self.directory.path, found.results, since, found.points)
        self.directory.write(state, lambda name, path: self.runs[name].group.bank.save_state(name, path))
        self._saved_step = self.step


def _for_each(
    names: Sequence[str], batch: Mapping[str, Tensor], group: ProgramGroup
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the inputs of a batch that has the same rows for each adapter, and the adapter of each row."""
    inputs = {n: t for n, t in _repeat(batch, len(names)).items() if n != "labels"}
    rows = len(batch["input_ids"])
    return {n: t.to(group.bank.device) for n, t in inputs.items()}, [name for name in names for _ in range(rows)]


def _repeat(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {n: t.repeat(count, 1) for n, t in batch.items()}


def _bytes_in_training(group: ProgramGroup, name: str) -> int:
    """Return the bytes of an adapter with its gradients and AdamW's two moments."""
    trained = sum(t.nbytes for t in group.bank.trainer(name).parameters.values())
    return bytes_of([group.bank[name]]) + 3 * trained
