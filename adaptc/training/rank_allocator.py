"""Train AdaLoRA: cut singular values step by step, and compute the loss term that keeps its factors orthogonal.

Zhang et al., arXiv 2303.10512; each step is that of PEFT's ``update_and_allocate`` and its model's forward. The program
is compiled from an ``AdaLoraConfig`` and trained through ``program.module()``. After each cut, the singular values of
the least important terms are zero. The program's binding knows which these are, so ``save_adapter`` writes only the
others.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods.lora_family.adalora import AdaLora, AdaLoraConfig
from adaptc.state.core import ProgramCore

_SLOT_NAMES = ("lora_A", "lora_E", "lora_B")


def orthogonal_loss(program: ProgramCore) -> Tensor:
    """Return the term that AdaLoRA adds to a loss: ``orth_reg_weight`` times the mean of |P P^T - I| over all A and
    B^T.

    PEFT's model adds it to the ``loss`` of its output; here the caller does, before ``backward()``. The norm is
    Frobenius'.

    Args:
        program: a program whose adapter is AdaLoRA.

    Returns:
        a scalar in the adapter's dtype.

    Raises:
        AdaptcError: the program's adapter is not AdaLoRA.

    Example:
        >>> config = adaptc.AdaLoraConfig(init_r=3, target_r=2, total_step=10, tfinal=2, target_modules=["0"])
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> loss = adapted.module()(x).sum() + adaptc.training.orthogonal_loss(adapted)
        >>> loss.backward()
    """
    terms = []
    for site in _adalora_sites(program).values():
        A, B = site["lora_A"], site["lora_B"]
        for P in (A @ A.mT, B.mT @ B):
            identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
            terms.append(torch.linalg.matrix_norm(P - identity).reshape(-1))
    return _adalora_config(program).orth_reg_weight * torch.cat([t.to(terms[0].device) for t in terms]).mean()


class RankAllocator:
    """An allocator that cuts the ranks of an AdaLoRA adapter while it is trained.

    Make one before training. Call it after ``loss.backward()``, with the gradients still there, and after the
    optimizer's step (as PEFT advises). Up to step ``total_step - tfinal`` it follows the importance of every term.
    Every ``deltaT`` steps after ``tinit`` it sets all singular values but the most important ones to zero, and keeps
    fewer each time. From then on the terms are fixed.

    Args:
        program: a program whose adapter is AdaLoRA and trains.

    Raises:
        AdaptcError: the program's adapter is not AdaLoRA, is not trainable, or has been cut already.
        ConfigError: ``target_r`` is greater than ``init_r``.

    Example:
        >>> config = adaptc.AdaLoraConfig(init_r=3, target_r=2, total_step=10, tfinal=2, target_modules=["0"])
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> module = adapted.module()
        >>> optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        >>> allocator = adaptc.training.RankAllocator(adapted)
        >>> for step in range(10):
        ...     module(x).sum().backward()
        ...     optimizer.step()
        ...     allocator.update_and_allocate(step)
        ...     optimizer.zero_grad()
    """

    def __init__(self, program: ProgramCore) -> None:
        self._program, self._sites = program, _adalora_sites(program)
        config = _adalora_config(program)
        if config.target_r > config.init_r:
            raise ConfigError(f"target_r={config.target_r} is greater than init_r={config.init_r}: ranks can only fall")
        for key, site in self._sites.items():
            if not all(t.requires_grad for t in site.values()):
                raise AdaptcError(f"the adapter at {key!r} is not trainable: compile it with inference_mode=False")
            if site["lora_E"].shape[-2] != config.init_r:
                raise AdaptcError(
                    f"the adapter at {key!r} has rank {site['lora_E'].shape[-2]} of init_r={config.init_r}: it was "
                    "saved with its ranks cut, and trains on as it is, without an allocator"
                )
        matrices = sum(site["lora_E"].shape[:-2].numel() for site in self._sites.values())
        self._initial_terms, self._final_terms = config.init_r * matrices, config.target_r * matrices
        self._importance: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    @property
    def rank_pattern(self) -> dict[str, Any] | None:
        """Return ``<key of the site>.lora_E`` -> a list that says of each term whether it is left, in PEFT's form.

        None before the first cut.
        """
        return _adalora_config(self._program).rank_pattern

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Follow the importance of terms, and cut ranks where this step is one for it. Call it once per training step.

        Args:
            step: the number of the step, beginning with 0 or 1, as in PEFT.

        Raises:
            AdaptcError: gradients are missing, or the program was swapped to another adapter.
        """
        config = _adalora_config(self._program)
        if any(t is not self._sites[k][n] for k, s in _adalora_sites(self._program).items() for n, t in s.items()):
            raise AdaptcError("the program was swapped since the allocator was made; make another for this adapter")
        assert config.total_step is not None
        end = config.total_step - config.tfinal
        if step > end:
            self._zero_cut_terms({k: torch.tensor(m) for k, m in self._saved_masks(config).items()})
            return
        if step < end:
            self._update_importance(config)
        if step == end or (step > config.tinit and step % config.deltaT == 0):
            self._allocate_terms(self._term_budget(config, step))
        if step == end:
            self._importance.clear()

    def _saved_masks(self, config: AdaLoraConfig) -> Mapping[str, Any]:
        if config.rank_pattern is None:
            raise AdaptcError(
                "this step is after the last in which ranks are cut, and none were: call update_and_allocate in every "
                "step of training"
            )
        return {key.removesuffix("lora_E").removesuffix("."): mask for key, mask in config.rank_pattern.items()}

    def _term_budget(self, config: AdaLoraConfig, step: int) -> int:
        """Return the number of terms that may stay at ``step``. It falls from the first to the last number with the
        cube of the time that is left."""
        assert config.total_step is not None
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((self._initial_terms - self._final_terms) * left**3 + self._final_terms)

    def _update_importance(self, config: AdaLoraConfig) -> None:
        """Update the moving averages of the sensitivity |p dL/dp| of every element, and of the uncertainty of that."""
        for key, site in self._sites.items():
            for name, p in site.items():
                if p.grad is None:
                    raise AdaptcError(
                        f"{key}.{name} has no gradient: call update_and_allocate after loss.backward() and before "
                        "zero_grad()"
                    )
                now = (p * p.grad).abs()
                mean, doubt = self._importance.get((key, name), (torch.zeros_like(now), torch.zeros_like(now)))
                mean = config.beta1 * mean + (1 - config.beta1) * now
                doubt = config.beta2 * doubt + (1 - config.beta2) * (now - mean).abs()
                self._importance[key, name] = mean, doubt

    def _allocate_terms(self, budget: int) -> None:
        if not self._importance:
            raise AdaptcError("no step before this one was seen: call update_and_allocate in every step of training")
        scores: dict[str, Tensor] = {}
        for key in self._sites:
            a, e, b = (mean * doubt for mean, doubt in (self._importance[key, n] for n in _SLOT_NAMES))
            scores[key] = e.squeeze(-1) + (a.mean(-1) + b.mean(-2))
        dropped = self._initial_terms - budget
        if dropped:
            everything = torch.cat([s.reshape(-1).cpu() for s in scores.values()])
            threshold = torch.kthvalue(everything, dropped).values.item()
            kept = {key: s > threshold for key, s in scores.items()}
        else:
            kept = {key: torch.ones_like(s, dtype=torch.bool) for key, s in scores.items()}
        self._zero_cut_terms(kept)
        self._store_rank_pattern({f"{key}.lora_E".removeprefix("."): mask.tolist() for key, mask in kept.items()})

    def _zero_cut_terms(self, masks: Mapping[str, Tensor]) -> None:
        for key, mask in masks.items():
            E = self._sites[key]["lora_E"]
            E.masked_fill_(~mask.to(E.device).unsqueeze(-1), 0.0)

    def _store_rank_pattern(self, pattern: dict[str, Any]) -> None:
        """Write the terms that are left into the program's binding; its tensors stay the ones that are trained."""
        program = self._program
        binding = program.binding
        config = copy.copy(binding.config)  # a copy by its constructor would give its warnings again
        config.rank_pattern = pattern  # type: ignore[attr-defined]
        attachments = {a.id: a for a in program.adaptation.attachments}
        methods = {
            i: dataclasses.replace(m, kept=config.rank_mask(attachments[i].key)) if isinstance(m, AdaLora) else m  # type: ignore[attr-defined]
            for i, m in binding.methods.items()
        }
        program.install(dataclasses.replace(binding, config=config, methods=methods))


def _adalora_config(program: ProgramCore) -> AdaLoraConfig:
    config = program.binding.config
    if not isinstance(config, AdaLoraConfig):
        raise AdaptcError(f"the program's adapter is of type {config.peft_type or 'none'}, not ADALORA")
    return config


def _adalora_sites(program: ProgramCore) -> dict[str, dict[str, Tensor]]:
    """Return, for each AdaLoRA site of the current adapter by its key, its tensors ``lora_A``, ``lora_E`` and
    ``lora_B``."""
    _adalora_config(program)
    binding = program.binding
    found = {
        a.key: {name: binding.values[a.slots[name]] for name in _SLOT_NAMES}
        for a in program.adaptation.attachments
        if isinstance(binding.methods.get(a.id), AdaLora)
    }
    if not found:
        raise AdaptcError("the program's adapter adapts no layer with AdaLoRA: its target_modules are empty")
    return found
