"""Divide adapters that train on one model into programs: those whose configs fit one program share its bank.

A config of another method, or with other layers, gets a program of its own on the same base weights. Programs take
packed rows where the model keeps the texts of a row apart, which the first program of a model tells.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.bank.training.training_bank import TrainingBank
from adaptc.binding.sources.configs import as_config
from adaptc.errors import CaptureError, ConfigError, SwapError
from adaptc.joint_training.sampling import Sampler
from adaptc.joint_training.text_layout import example_packed_inputs, keeps_texts_apart
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions


@dataclass(eq=False)
class ProgramGroup:
    """The adapters of one program: its bank, a config with its sites, and their sampler once one samples.

    ``packs``: whether texts of one adapter share rows; else each text is a row, which is padded.
    """

    bank: TrainingBank
    config: Any
    packs: bool
    sampler: Sampler | None = None


class ProgramGroups:
    """The programs of ``model`` that train. ``max_rank``: the largest rank; None for any. ``packing``: whether texts
    share rows, if the model keeps them apart.

    Raises ConfigError where the model is no causal language model of transformers.
    """

    def __init__(self, model: Any, max_rank: int | None = None, packing: bool = True) -> None:
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generation_config"):
            raise ConfigError(
                f"{type(model).__name__} is no causal language model of transformers: prog.bank(training=True) trains "
                "adapters of any model"
            )
        self.model, self.max_rank = model, max_rank
        self.groups: list[ProgramGroup] = []
        self.vocab_size: int = config.get_text_config(decoder=True).vocab_size
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        #: whether programs take packed rows; None until the first program tells
        self._packs: bool | None = None if packing and takes_positions else False

    def add(self, name: str, config: Any, **options: Any) -> ProgramGroup:
        """Add an adapter of ``config``, and return its group, whose program has the sites of ``config``.

        ``options`` are those of :meth:`TrainingBank.add`. Where no program has the sites, there is a new one. Raises
        ConfigError for an option that cannot be honoured, TargetError where the config selects no layer.
        """
        config = as_config(config)
        for group in self.groups:
            try:
                group.bank.add(name, config, **options)
            except SwapError:  # the program has other sites, or another method
                continue
            return group
        program, packs = self._compile(config)
        bank: Any = program.bank(training=True, max_rank=self.max_rank, optimizer=make_adam)
        bank.add(name, config, **options)
        group = ProgramGroup(bank, config, packs)
        self.groups.append(group)
        return group

    def _compile(self, config: Any) -> tuple[AdaptedProgram, bool]:
        """Return a program for ``config``, and whether it takes packed rows."""
        compile_options: dict[str, Any] = {"training": True}
        if self._packs is not False:
            device = next(self.model.parameters()).device
            inputs = example_packed_inputs(self.vocab_size, device)
            try:
                program = compile_model(
                    AdaptedProgram, self.model, config, RunOptions(), example_inputs=inputs, **compile_options
                )
            except CaptureError:  # the model takes no call without a mask
                self._packs = False
            else:
                if self._packs is None:
                    self._packs = keeps_texts_apart(program, self.vocab_size, device)
                if self._packs:
                    return program, True
        return compile_model(AdaptedProgram, self.model, config, RunOptions(), **compile_options), False

    def remove(self, group: ProgramGroup, name: str) -> None:
        """Remove an adapter, and its program with the last."""
        group.bank.remove(name)
        if not len(group.bank):
            self.groups.remove(group)


def make_adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Return AdamW, whose options are set before each step."""
    return torch.optim.AdamW(parameters)
