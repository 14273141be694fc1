"""Multitask prompt tuning: virtual tokens, prompt * (C_t R_t) for the task t of each row of a batch (Wang et al., arXiv
2303.02861).

File keys: ``prompt_embeddings`` (n, width), ``prefix_task_cols`` (tasks, n, ranks), ``prefix_task_rows`` (tasks, ranks,
width), with no module path. The program takes one more input, ``task_ids`` (batch,), int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptc.errors import ConfigError, short_repr
from adaptc.methods._shared.option_checks import check_integers, warn_unused
from adaptc.methods.prompt.prompt_tuning import RANDOM, SAMPLE_VOCAB, TEXT, PromptTuningConfig, initial_rows
from adaptc.methods.prompt.virtual_tokens import IGNORE_INDEX, PROMPT_EMBEDDINGS, VirtualTokens, VirtualTokensFiles
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.coefficients import ExtraInput, ExtraValues
from adaptc.passes.protocol.method import InitialValues
from adaptc.passes.protocol.parts.extra_inputs import ExtraInputs
from adaptc.passes.protocol.parts.method_part import Slot, Slots

COLS, ROWS, TASKS = "prefix_task_cols", "prefix_task_rows", "task_ids"
AVERAGE, EXACT, SHARED = "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """PEFT's ``MultitaskPromptTuningConfig``: same names, same defaults.

    Three values of ``prompt_tuning_init`` start from the tensors in ``prompt_tuning_init_state_dict_path``.
    "AVERAGE_SOURCE_TASKS" takes the mean of their tasks, and "EXACT_SOURCE_TASK" the task ``prompt_tuning_init_task``;
    the adapter then has one task. "ONLY_SOURCE_SHARED" takes ``prompt_embeddings`` alone.

    Attributes:
        prompt_tuning_init_state_dict_path: the file of the tensors that three values of ``prompt_tuning_init`` start
            from.
        prompt_tuning_init_task: the task of "EXACT_SOURCE_TASK".
        num_ranks: the rank of a task's factors.
        num_tasks: the number of tasks; calls take ``task_ids`` (batch,).

    Example:
        >>> config = adaptc.MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3)
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    init_schemes: ClassVar[tuple[str, ...]] = (RANDOM, TEXT, SAMPLE_VOCAB, AVERAGE, EXACT, SHARED)

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name, how = type(self).__name__, self.prompt_tuning_init
        if how in (AVERAGE, EXACT, SHARED) and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(f"{name}.prompt_tuning_init={how!r} needs prompt_tuning_init_state_dict_path")
        if how not in (AVERAGE, EXACT, SHARED):
            why = f"with prompt_tuning_init={how!r}: {AVERAGE!r}, {EXACT!r} and {SHARED!r} are what read it"
            warn_unused(self, ("prompt_tuning_init_state_dict_path",), why)
        if self.num_ranks is None or self.num_tasks is None or self.prompt_tuning_init_task is None:
            raise ConfigError(f"{name}: num_ranks, num_tasks and prompt_tuning_init_task are integers, and not None")
        check_integers(self, {"num_ranks": self.num_ranks, "num_tasks": self.num_tasks})
        check_integers(self, {"prompt_tuning_init_task": self.prompt_tuning_init_task}, 0)

    def init_scheme(self) -> tuple[Any, ...]:
        how = self.prompt_tuning_init
        source = (how, self.prompt_tuning_init_state_dict_path, self.prompt_tuning_init_task)
        return source if how in (AVERAGE, EXACT, SHARED) else super().init_scheme()

    def method(self, name: str, kind: str) -> MultitaskPromptTuning:
        assert self.num_virtual_tokens is not None
        tasks, ranks = self.num_tasks or 1, self.num_ranks or 1
        return MultitaskPromptTuning(self.num_virtual_tokens, self.init_scheme(), self.num_stacks, tasks, ranks)


class MultitaskFiles(VirtualTokensFiles):
    method: MultitaskPromptTuning

    def read(self, op: Op, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.method.split_stacks(n, t, 1) if n == COLS else t for n, t in super().read(op, found).items()}

    def write(self, op: Op, slots: Slots) -> dict[str, Tensor]:
        return {n: self.method.join_stacks(t, 1) if n == COLS else t for n, t in super().write(op, slots).items()}


class MultitaskInputs(ExtraInputs):
    method: MultitaskPromptTuning

    def extras(self) -> Mapping[str, ExtraInput]:
        return {TASKS: ExtraInput(torch.int64)}

    def check_inputs(self, slots: Slots, given: ExtraValues) -> str:
        tasks = slots[COLS].shape[0]
        found = [int(t) for t in given[TASKS].unique() if not 0 <= t < tasks]
        return f"{TASKS} has {found[0]}, and the adapter has tasks from 0 to {tasks - 1}" if found else ""


@dataclass(frozen=True)
class MultitaskPromptTuning(VirtualTokens):
    """Multitask prompt tuning with ``tasks`` tasks, whose factors C and R have rank ``ranks``."""

    name: ClassVar[str] = "multitask_prompt_tuning"
    files = MultitaskFiles(names=(PROMPT_EMBEDDINGS, COLS, ROWS))
    extra_inputs = MultitaskInputs()

    tasks: int = 1
    ranks: int = 1

    def slots(self, op: Op) -> dict[str, Slot]:
        cols = self.rows_slot(self.ranks, self.tasks)
        return {**super().slots(op), COLS: cols, ROWS: Slot((self.tasks, self.ranks, op.out_features))}

    def prompt(self, slots: Slots, given: ExtraValues) -> Tensor:
        return self._task_rows(slots, given, 0)

    def _task_rows(self, slots: Slots, given: ExtraValues, stack: int) -> Tensor:
        cols, rows = (torch.index_select(slots[n], 0, given[TASKS]) for n in (COLS, ROWS))
        return self.stack_rows(slots[PROMPT_EMBEDDINGS], stack) * (self.stack_rows(cols, stack) @ rows)

    # -- a decoder's places --------------------------------------------------------------------------------------------

    def has_decoder_tokens(self) -> bool:
        return self.sides == 2

    def decoder_tokens(self, value: Tensor, slots: Slots, given: ExtraValues, plain: int) -> Tensor:
        return self.pad_front(value, slots, plain)

    def decoder_attention_mask(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.pad_front(value, slots, 1)

    def decoder_labels(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.pad_front(value, slots, IGNORE_INDEX)

    def decoder_shifted(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        n = self.virtual_token_count(slots)
        # The program put its start token in front of the labels of the virtual tokens; it belongs behind them, in front
        # of the labels of the text.
        return torch.cat([value[:, :n], value[:, :1], value[:, n + 1 :]], 1)

    def decoder_inputs_embeds(self, value: Tensor, slots: Slots, given: ExtraValues) -> Tensor:
        return self.overwrite_first_rows(self._task_rows(slots, given, 1), value)

    # -- values --------------------------------------------------------------------------------------------------------

    def init(self, op: Op, W: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> InitialValues:
        whole = replace(self, count=self.count * self.sides, sides=1)  # as files have it
        shapes = {n: s.shape for n, s in whole.slots(op).items()}
        values = {n: 0.02 * torch.randn(shapes[n], generator=generator) for n in (COLS, ROWS)}
        if self.first and self.first[0] in (AVERAGE, EXACT, SHARED):
            values |= _load_source_values(*self.first)
        else:
            values[PROMPT_EMBEDDINGS] = initial_rows(self, op, W, generator)
        for name, shape in shapes.items():
            if tuple(values[name].shape) != shape:
                raise ConfigError(
                    f"{name!r} of {short_repr(self.first[1])} gives {tuple(values[name].shape)}, and the config "
                    f"{shape}: num_virtual_tokens and num_ranks must be the source's, and num_tasks 1 where its tasks "
                    "become one"
                )
        return InitialValues(self.files.read(op, {n: t.to(W.device, dtype) for n, t in values.items()}))


def _load_source_values(scheme: str, path: str, task: int) -> dict[str, Tensor]:
    """Return the first values that are read from the file ``path``: rows, and for ``how`` other than SHARED one task.

    Raises ConfigError where the file cannot be read, lacks a tensor, or has no task number ``task``.
    """
    try:
        source = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, weights_only=True)
        found = {n: source[n].float().cpu() for n in (PROMPT_EMBEDDINGS, *(() if scheme == SHARED else (COLS, ROWS)))}
    except KeyError as error:
        raise ConfigError(f"prompt_tuning_init_state_dict_path={short_repr(path)} has no tensor {error}") from error
    except Exception as error:  # whatever is wrong with a file
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path={short_repr(path)} cannot be read as a file of tensors: "
            f"{short_repr(str(error))}"
        ) from error
    if scheme == EXACT and task >= found[COLS].shape[0]:
        raise ConfigError(f"prompt_tuning_init_task={task}, and {short_repr(path)} has {found[COLS].shape[0]} tasks")
    for name in found.keys() & {COLS, ROWS}:
        t = found[name]
        found[name] = t.mean(0, keepdim=True) if scheme == AVERAGE else t[task : task + 1]
    return found
