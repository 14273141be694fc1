"""Train the stages of a program in several processes, under a schedule of ``torch.distributed.pipelining``.

Every process makes the same calls, with the same inputs. Loss and gradients are those of one process with the whole
batch. Stage ``s`` of ``n`` processes runs in process ``s % n``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from adaptc.distributed.split_program import SplitProgram
from adaptc.distributed.staged_module import gathered_adapter, require_config
from adaptc.errors import AdaptcError, ConfigError, listing, short_repr
from adaptc.passes.protocol.program_method import ProgramMethod
from adaptc.state.adapter_output import write_file_tensors
from adaptc.training.pretrained_module import count_labels
from adaptc.training.program_module import ProgramModule
from adaptc.training.sharded_tensors import is_first_process

#: the schedules by their names in torch: those of one stage in each process, and those of several
SCHEDULES = {"GPipe": False, "1F1B": False, "Interleaved1F1B": True, "LoopedBFS": True}
#: how many shapes of batches have their buffers at once
_MAX_SHAPES = 4

LossFunction = Callable[[Any, Tensor], Tensor]


class TrainingPipeline:
    """The stages that this process runs, and the schedule by which it trains them with the other processes.

    Args:
        split: the stages; those of other processes need not be kept.
        microbatches: into how many parts a batch is cut, along its first axis.
        schedule: a schedule's name in torch: "GPipe" or "1F1B" for one stage in each process, "Interleaved1F1B" or
            "LoopedBFS" for several.
        group: the processes of the pipeline; None for all.
        loss: a function of the program's outputs and the target that gives the mean loss of a microbatch, for programs
            that do not return their ``loss``.

    Raises:
        ConfigError: the number of stages does not fit the number of processes or the schedule, a stage is not kept, or
            there is no loss.

    Example:
        >>> prog = adaptc.compile(lm, LoraConfig(r=2), training=True)
        >>> halves = adaptc.split(prog, boundaries=["model.layers.0.mlp"])
        >>> pipe = adaptc.distributed.TrainingPipeline(halves, microbatches=2)  # doctest: +SKIP
        >>> loss = pipe.step(input_ids=ids, labels=ids)  # doctest: +SKIP
    """

    def __init__(
        self,
        split: SplitProgram,
        *,
        microbatches: int,
        schedule: str = "1F1B",
        group: Any = None,
        loss: LossFunction | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise AdaptcError("a pipeline needs its processes: call torch.distributed.init_process_group first")
        self.split, self.group, self.loss = split, group, loss
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.schedule, self.microbatches = schedule, microbatches
        self._check()
        self.loss_position = split.outputs.position_of("loss")
        if loss is None and self.loss_position is None:
            raise ConfigError(
                "the program returns no loss: give loss=, a function of its outputs and the target, or compile the "
                "model with training=True where it is one of transformers"
            )
        #: stage -> its module, for the stages of this process; replace none of them, but shard them as you like
        self.modules: dict[int, ProgramModule] = {
            s: split.programs[s].module() for s in range(self.rank, split.count, self.size)
        }
        self.device = _device_of(self.modules.values())
        self._schedules: dict[Any, Any] = {}
        self._label_count: Tensor | None = None
        self._make_schedule()  # which torch checks

    def _check(self) -> None:
        schedule, count = self.schedule, self.split.count
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule={short_repr(schedule)} is not one of {listing(map(repr, SCHEDULES))}")
        n: Any = self.microbatches
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"microbatches={short_repr(n)} must be a number from 1")
        if count % self.size or (count != self.size and not SCHEDULES[schedule]):
            fits = f"a multiple of {self.size}" if SCHEDULES[schedule] else f"{self.size}"
            raise ConfigError(
                f"{count} stages in {self.size} processes: the schedule {schedule!r} needs {fits} stages; split the "
                "program so, or start other processes"
            )
        if lost := [s for s in range(self.rank, count, self.size) if s not in self.split.programs]:
            raise ConfigError(f"process {self.rank} runs stage {lost[0]}, which the split does not keep")

    # -- training ------------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the trained parameters of this process's stages, for its optimizer.

        Returns:
            an iterator.
        """
        return (p for m in self.modules.values() for p in m.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch all stages to training mode, or to inference mode.

        Args:
            mode: whether to train.

        Returns:
            the pipeline.
        """
        for module in self.modules.values():
            module.train(mode)
        return self

    def eval(self) -> Self:
        """Switch all stages to inference mode.

        Returns:
            the pipeline.
        """
        return self.train(False)

    def step(self, *args: Tensor, target: Tensor | None = None, **inputs: Any) -> Tensor:
        """Compute loss and gradients of a batch, microbatch by microbatch; gradients are added to those there are.

        The loss is the mean over the batch. For a causal language model it is the mean over all labels of the batch,
        however they lie in it. For any other it is the mean of the microbatches' losses.

        Args:
            *args: the program's positional inputs, which only the first stage reads.
            target: what ``loss`` compares with; None for the ``labels``.
            **inputs: the program's keyword inputs, whole, in every process.

        Returns:
            the loss, in every process.

        Raises:
            ConfigError: the batch cannot be cut into the microbatches.
            AdaptcError: an input does not fit the program.
        """
        losses: list[Tensor] = []
        schedule, target = self._prepare(args, inputs, target)
        given = args if 0 in self.modules else ()
        schedule.step(*given, target=target, losses=losses, return_outputs=False, **inputs)
        return self._shared_loss(losses)

    def evaluate(self, *args: Tensor, target: Tensor | None = None, **inputs: Any) -> Tensor:
        """Compute the loss of a batch as :meth:`step` does, without gradients.

        Args:
            *args: the program's positional inputs, which only the first stage reads.
            target: what ``loss`` compares with; None for the ``labels``.
            **inputs: the program's keyword inputs, whole, in every process.

        Returns:
            the loss, in every process.

        Raises:
            ConfigError: the batch cannot be cut into the microbatches.
            AdaptcError: an input does not fit the program.
        """
        losses: list[Tensor] = []
        schedule, target = self._prepare(args, inputs, target, is_training=False)
        given = args if 0 in self.modules else ()
        with torch.no_grad():
            schedule.eval(*given, target=target, losses=losses, return_outputs=False, **inputs)
        return self._shared_loss(losses)

    def _prepare(
        self, args: tuple[Any, ...], inputs: Mapping[str, Any], target: Tensor | None, is_training: bool = True
    ) -> tuple[Any, Tensor]:
        """Return the schedule for a batch of these shapes, and the target."""
        tensors = {n: t for n, t in [*enumerate(args), *inputs.items()] if isinstance(t, Tensor)}
        if not tensors:
            raise AdaptcError("a batch has tensors, and none is given")
        rows = {n: t.shape[0] if t.ndim else 0 for n, t in tensors.items()}
        first = next(iter(rows.values()))
        if odd := [n for n, count in rows.items() if count != first]:
            raise ConfigError(
                f"the input {odd[0]!r} has {rows[odd[0]]} rows, and the batch has {first}: a batch is cut into "
                "microbatches along the first axis of every input"
            )
        if first % self.microbatches or not first:
            raise ConfigError(
                f"a batch of {first} rows cannot be cut into {self.microbatches} equal microbatches: give a multiple, "
                "or make the pipeline with another number"
            )
        target = inputs.get("labels") if target is None else target
        source = self.split.source
        is_mean_of_labels = self.loss is None and source is not None and source.is_causal_lm_loss
        self._label_count = self._count_labels(target) if is_mean_of_labels and target is not None else None
        key = (is_training, tuple((n, t.shape, t.dtype) for n, t in tensors.items()))
        if key not in self._schedules:
            while len(self._schedules) >= _MAX_SHAPES:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = self._make_schedule()
        return self._schedules[key], next(iter(tensors.values())) if target is None else target

    def _make_schedule(self) -> Any:
        """Return a schedule of torch for this process's stages; its buffers have the shapes of its first batch."""
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import get_schedule_class

        made = [PipelineStage(m, s, self.split.count, self.device, group=self.group) for s, m in self.modules.items()]
        kind: Any = get_schedule_class(self.schedule)
        stages = made if SCHEDULES[self.schedule] else made[0]
        try:
            return kind(stages, self.microbatches, loss_fn=self._loss_of_part, scale_grads=False)
        except ValueError as error:
            raise ConfigError(
                f"the schedule {self.schedule!r} does not take {self.microbatches} microbatches: {error}"
            ) from error

    def _loss_of_part(self, outputs: Any, target: Tensor) -> Tensor:
        """Return what a microbatch adds to the loss of the batch."""
        if self.loss is not None:
            return self.loss(self.split.outputs.with_tensors(outputs), target) / self.microbatches
        loss = outputs[self.loss_position]
        if self._label_count is None:
            return loss / self.microbatches
        # The mean over no labels is NaN: a microbatch in which none counts adds nothing.
        count = self._count_labels(target)
        return torch.where(count > 0, loss * (count / self._label_count), 0.0)

    def _count_labels(self, target: Tensor) -> Tensor:
        methods = [a.method for own in self.split.sites.attachments for a in own]
        return count_labels(target, any(isinstance(m, ProgramMethod) and m.changes("labels") for m in methods))

    def _processes(self) -> Any:
        """Return the group of the pipeline's processes, by which torch numbers them."""
        return self.group or dist.group.WORLD

    def _shared_loss(self, losses: list[Tensor]) -> Tensor:
        last = self.split.count - 1
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        loss = torch.stack([t.detach() for t in losses]).sum().to(none) if losses else none
        source = dist.get_global_rank(self._processes(), last % self.size)
        dist.broadcast(loss, src=source, group=self.group)
        return loss

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_adapter(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the adapter of all stages, as they are now, as one PEFT directory; every process calls it.

        The first process gathers the tensors and writes. All return when it has.

        Args:
            path: the directory.
            **options: ``safe_serialization`` and ``base_model`` of ``adaptc.save_adapter``.

        Returns:
            the path of the directory.

        Raises:
            CheckpointError: the files cannot be written.
        """
        from torch.distributed.device_mesh import DeviceMesh

        group = self._processes()
        config, tensors = gathered_adapter(self.modules.values())
        parts: list[Any] = [None] * self.size
        own = config, {k: t.cpu() for k, t in tensors.items()}
        dist.gather_object(own, parts if self.rank == 0 else None, dst=dist.get_global_rank(group, 0), group=group)
        with is_first_process(DeviceMesh.from_group(group, self.device.type)) as first:
            if first:
                found = require_config(next((c for c, _ in parts if c is not None), None))
                # In the order of the stages, which is that of the whole program's file.
                ordered = {k: t for _, part in parts for k, t in part.items()}
                write_file_tensors(path, found, ordered, **options)
        return Path(path)


def _device_of(modules: Iterable[ProgramModule]) -> torch.device:
    """Return the device that the modules compute on; their base may have no values yet, on the meta device."""
    tensors = [t.device for m in modules for t in m.tensors().values()]
    return next((d for d in tensors if d.type != "meta"), tensors[0])
