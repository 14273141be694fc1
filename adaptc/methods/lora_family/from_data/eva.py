"""EVA: A of the principal components of the layer's inputs, and ranks by their variance (Paischer et al., 2410.07170).

B is zero. The rows of A are right singular vectors of the inputs, with their mean taken off, found batch by batch. All
layers together keep as many terms as their configs' ranks, those that explain the most of the variance of their input.
A layer gets at most ``rho`` times its rank, and may get none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import ConfigError
from adaptc.global_generator import seeded_global_generator
from adaptc.methods.lora_family.from_data.data_options import DataOptions

#: PEFT's seed and number of subspace iterations
SEED, ITERATIONS = 42, 4


@dataclass
class EvaConfig(DataOptions):
    """PEFT's ``EvaConfig``: same names, same defaults, for ``LoraConfig(init_lora_weights="eva")``.

    Raises ConfigError for values without a meaning.

    Attributes:
        rho: the largest rank of a layer, as a multiple of its ``r``; 1 keeps all ranks.
        tau: the cosine similarity with its last value from which on a component counts as found.
        use_label_mask: whether positions with the label ``label_mask_value`` are left out.
        label_mask_value: the label of positions that are left out.
        whiten: whether components are divided by the square roots of their singular values. PEFT does so once for each
            layer that reads the same input, so that all but the first are divided too often; here it is done once.
        adjust_scaling_factors: whether alpha follows the rank, so that every layer keeps its scale alpha / r.

    Example:
        >>> config = adaptc.LoraConfig(init_lora_weights="eva", eva_config=adaptc.EvaConfig(rho=1.5))
    """

    scheme: ClassVar[str] = "eva"
    option: ClassVar[str] = "eva_config"

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho >= 1:
            raise ConfigError(f"EvaConfig.rho must be at least 1, got {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"EvaConfig.tau must be from 0 to 1, got {self.tau!r}")


class InputComponents:
    """The principal components of one input of layers, which follow the batches (incremental PCA, as in PEFT).

    ``components``: (n, in), None before the first batch. ``values``: their singular values (n,). ``ratios``: the part
    of the variance that each explains (n,). ``found``: whether each changed by less than ``tau`` (n,).
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.components: Tensor | None = None
        self.values = self.ratios = self._mean = self._variance = torch.zeros(0)
        self.found = torch.zeros(count, dtype=torch.bool)
        self.rows = self.most_rows = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (rows, in). Fewer rows than components are left out."""
        self.most_rows = max(self.most_rows, x.shape[0])
        if x.shape[0] < self.count:
            return
        x, before = x.float(), self.components
        rows, total = x.shape[0], self.rows + x.shape[0]
        own_mean = x.mean(0)
        mean, variance = self._updated_moments(x)
        if before is None:
            data = (x - mean).float()
        else:
            shift = (self.rows / total * rows) ** 0.5 * (self._mean - own_mean)
            data = torch.vstack([self.values[:, None] * before, x - own_mean, shift])
        with seeded_global_generator(SEED, x.device):
            _, S, V = torch.svd_lowrank(data, q=min(2 * self.count, *data.shape), niter=ITERATIONS)
        rows_of_v = V.mT[: self.count]
        largest = rows_of_v.gather(1, rows_of_v.abs().argmax(1, keepdim=True))
        self.components, self.values = rows_of_v * largest.sign(), S[: self.count]
        self.ratios = self.values**2 / (variance * total).sum()
        self._mean, self._variance, self.rows = mean, variance, total
        if before is not None:
            self.found = torch.cosine_similarity(self.components, before) >= self.tau

    def _updated_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of all rows, with those of ``x``, in float64."""
        rows, total = x.shape[0], self.rows + x.shape[0]
        own = x.double()
        mean, squares = own.mean(0), own.var(0, correction=0) * rows
        if not self.rows:
            return mean, squares / rows
        shift = mean - self._mean
        squares = squares + self._variance * self.rows + shift**2 * (self.rows * rows / total)
        return self._mean + shift * (rows / total), squares / total

    def first_rows(self, rank: int, whiten: bool) -> Tensor:
        """Return A for a layer that got ``rank`` of the components."""
        assert self.components is not None
        rows = self.components[:rank]
        return rows / self.values[:rank].sqrt()[:, None] if whiten else rows.clone()


def distribute_ranks(
    ratios: Mapping[str, Tensor], readers: Mapping[str, Sequence[str]], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return the rank of each layer: the ``budget`` terms with the largest ``ratios`` are kept.

    ``ratios``: layer -> the part of the variance that each component of its input explains, for the first layer of
    those that read one input. ``readers``: these first layers -> the others. ``most``: layer -> its largest rank.
    """
    owners = {**{n: n for n in ratios}, **{o: n for n, others in readers.items() for o in others}}
    terms = [(name, value) for name, first in owners.items() for value in ratios[first][: most[name]]]
    order = torch.stack([value for _, value in terms]).argsort(descending=True)
    counts = Counter(terms[int(i)][0] for i in order[:budget])
    ranks = {name: counts.get(name, 0) for name in owners}
    for name, first in owners.items():  # as in PEFT, the first of those that read one input has the largest rank
        if ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks
