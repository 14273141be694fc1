"""Train AdaMSS with ``use_asa``: clusters of rows leave the training step by step, the least important ones first.

Each step is that of PEFT's ``update_and_allocate``, but for one thing. Where n clusters are to stay, PEFT keeps those
above the n-th largest score, which are n - 1; here n stay. The program is compiled from an ``AdamssConfig`` and trained
through ``program.module()``. A cluster that has left keeps the values it had, whatever the optimizer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.errors import AdaptcError
from adaptc.methods.sparse.adamss import LAYOUT, Adamss, AdamssConfig
from adaptc.methods.sparse.adamss import A as SLOT_A
from adaptc.methods.sparse.adamss import B as SLOT_B
from adaptc.state.core import ProgramCore

#: key of a site, index of a cluster
_Cluster = tuple[str, int]


class SubspaceAllocator:
    """An allocator that ends the training of the least important clusters of an AdaMSS adapter.

    Make one before training. Call it after ``loss.backward()``, with the gradients still there, and after the
    optimizer's step. From step ``init_warmup`` to ``final_warmup`` it follows the importance of every cluster. Every
    ``mask_interval`` steps of these, only the most important ones go on, and fewer each time.

    Args:
        program: a program whose adapter is AdaMSS with ``use_asa`` and trains.

    Raises:
        AdaptcError: the program's adapter is not such a one, or is not trainable.

    Example:
        >>> config = adaptc.AdamssConfig(r=3, num_subspaces=3, use_asa=True, asa_target_subspaces=2, init_warmup=0,
        ...     final_warmup=4, mask_interval=2, target_modules=["0"])
        >>> adapted = adaptc.compile(model, config, example_inputs=x, training=True)
        >>> module = adapted.module()
        >>> optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        >>> allocator = adaptc.training.SubspaceAllocator(adapted)
        >>> for step in range(5):
        ...     module(x).sum().backward()
        ...     optimizer.step()
        ...     allocator.update_and_allocate(step)
        ...     optimizer.zero_grad()
        >>> len(allocator.active_clusters)
        2
    """

    def __init__(self, program: ProgramCore) -> None:
        self._program, self._config = program, _asa_config(program)
        self._sites = _adamss_sites(program)
        for key, (a, b, _) in self._sites.items():
            if not (a.requires_grad and b.requires_grad):
                raise AdaptcError(f"the adapter at {key!r} is not trainable: compile it with inference_mode=False")
        clusters = [(key, k) for key, (_, _, sizes) in self._sites.items() for k in range(len(sizes) - 1)]
        self._total = len(clusters)
        self._active = set(clusters)
        self._importance: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._left: dict[_Cluster, list[Tensor]] = {}

    @property
    def active_clusters(self) -> list[tuple[str, int]]:
        """Return the clusters that train, each as (key of the site, index of the cluster), in their order."""
        return sorted(self._active)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Follow the importance of clusters, and end the training of some where this step is one for it.

        Call it once per training step.

        Args:
            step: the number of the step, beginning with 0 or 1, as in PEFT.

        Raises:
            AdaptcError: gradients are missing, or the program was swapped to another adapter.
        """
        now = {key: (a, b) for key, (a, b, _) in _adamss_sites(self._program).items()}
        if any(now[key][0] is not a or now[key][1] is not b for key, (a, b, _) in self._sites.items()):
            raise AdaptcError("the program was swapped since the allocator was made; make another for this adapter")
        if self._config.init_warmup <= step <= self._config.final_warmup:
            self._update_importance()
            if step % self._config.mask_interval == 0:
                self._keep_best(self._budget(step))
                self._importance.clear()
        for cluster, values in self._left.items():
            for part, value in zip(self._parameters(cluster), values, strict=True):
                part.copy_(value)

    def _budget(self, step: int) -> int:
        """Return how many clusters may stay at ``step``."""
        c = self._config
        left = 1 - (step - c.init_warmup) / (c.final_warmup - c.init_warmup)
        return int(c.asa_target_subspaces + (self._total - c.asa_target_subspaces) * left**c.asa_schedule_exponent)

    def _update_importance(self) -> None:
        """Update the moving averages of the sensitivity |p dL/dp| of every element, and of the uncertainty of that."""
        c = self._config
        for key, (a, b, _) in self._sites.items():
            if not any(key == site for site, _ in self._active):
                continue
            averages = self._importance.setdefault(key, [(torch.zeros_like(p), torch.zeros_like(p)) for p in (a, b)])
            for i, p in enumerate((a, b)):
                if p.grad is None:
                    raise AdaptcError(
                        f"{key}.{(SLOT_A, SLOT_B)[i]} has no gradient: call update_and_allocate after loss.backward() "
                        "and before zero_grad()"
                    )
                mean, doubt = averages[i]
                now = (p * p.grad).abs()
                doubt = c.asa_uncertainty_beta * doubt + (1 - c.asa_uncertainty_beta) * (now - mean).abs()
                mean = c.asa_importance_beta * mean + (1 - c.asa_importance_beta) * now
                averages[i] = mean, doubt

    def _keep_best(self, budget: int) -> None:
        """Let only the ``budget`` most important of the clusters train that train now."""
        if budget >= len(self._active):
            return
        scores = {}
        for key, k in self.active_clusters:
            products = [mean * doubt for mean, doubt in self._importance[key]]
            scores[key, k] = sum(float(part.mean()) for part in self._parts((key, k), products))
        order = sorted(scores, key=lambda cluster: scores[cluster], reverse=True)
        for cluster in order[budget:]:
            self._active.remove(cluster)
            self._left[cluster] = [part.clone() for part in self._parameters(cluster)]

    def _parameters(self, cluster: _Cluster) -> tuple[Tensor, Tensor]:
        a, b, _ = self._sites[cluster[0]]
        return self._parts(cluster, [a, b])

    def _parts(self, cluster: _Cluster, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the cluster's own parts of two tensors shaped as A and B of its site."""
        (key, k), (a, b) = cluster, tensors
        *sizes, (r, _) = self._sites[key][2]
        start, (rows, terms) = sum(n for n, _ in sizes[:k]), sizes[k]
        return a[k, :terms, :r], b[start : start + rows, :terms]


def _asa_config(program: ProgramCore) -> AdamssConfig:
    config = program.binding.config
    if not isinstance(config, AdamssConfig) or not config.use_asa:
        raise AdaptcError(f"the program's adapter is of type {config.peft_type or 'none'}, not ADAMSS with use_asa")
    return config


def _adamss_sites(program: ProgramCore) -> dict[str, tuple[Tensor, Tensor, list[list[int]]]]:
    """Return, for each AdaMSS site of the current adapter by its key, A, B and the sizes of its clusters."""
    _asa_config(program)
    values = program.binding.values
    return {
        a.key: (values[a.slots[SLOT_A]], values[a.slots[SLOT_B]], values[a.slots[LAYOUT]].tolist())
        for a in program.adaptation.attachments
        if isinstance(program.binding.methods.get(a.id), Adamss)
    }
