"""Divide adapters that train on one model into programs: those whose configs fit one program share its bank.

A config of another method, or with other layers, gets a program of its own on the same base weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adaptc.bank.training.training_bank import TrainingBank
from adaptc.binding.sources.configs import as_config
from adaptc.errors import ConfigError, SwapError
from adaptc.joint_training.sampling import Sampler
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.runtime.options import RunOptions


@dataclass(eq=False)
class ProgramGroup:
    """The adapters of one program: its bank, a config with its sites, and their sampler once one samples."""

    bank: TrainingBank
    config: Any
    sampler: Sampler | None = None


class ProgramGroups:
    """The programs of ``model`` that train. ``max_rank``: the largest rank; None for any.

    Raises ConfigError where the model is no causal language model of transformers.
    """

    def __init__(self, model: Any, max_rank: int | None = None) -> None:
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generation_config"):
            raise ConfigError(
                f"{type(model).__name__} is no causal language model of transformers: prog.bank(training=True) trains "
                "adapters of any model"
            )
        self.model, self.max_rank = model, max_rank
        self.groups: list[ProgramGroup] = []

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
        made = compile_model(AdaptedProgram, self.model, config, RunOptions(), training=True)
        bank: Any = made.bank(training=True, max_rank=self.max_rank, optimizer=make_adam)
        bank.add(name, config, **options)
        group = ProgramGroup(bank, config)
        self.groups.append(group)
        return group

    def remove(self, group: ProgramGroup, name: str) -> None:
        """Remove an adapter, and its program with the last."""
        group.bank.remove(name)
        if not len(group.bank):
            self.groups.remove(group)


def make_adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Return AdamW, whose options are set before each step."""
    return torch.optim.AdamW(parameters)
