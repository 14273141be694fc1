"""A task: a model that knows something, rows to train it on, and what it gets right of two held-out parts.

:data:`TASKS` has them all. Both are made here from fixed seeds, so every method begins from the same model and sees the
same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Row = Mapping[str, Tensor]
#: a model's logits for a batch without its labels
Logits = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Scores:
    """``accuracy`` and ``loss`` on held-out rows of the task; ``known_loss`` on what the base model knew before."""

    accuracy: float
    loss: float
    known_loss: float


@dataclass(frozen=True)
class Task:
    """A task that is ready to run.

    ``small_model`` makes the same model with fewer layers and other values, of which parameters are counted.
    ``targets``: the names of the "layers" that are adapted, or of the "norms". ``options``: fields of every config.
    ``head``: the module that is trained beside every adapter, at a rate of its own. ``collate`` makes a batch of rows.
    ``score`` says how good a model is, on the part "test" or "validation".
    """

    name: str
    model: nn.Module
    layers: int
    small_model: Callable[[int], nn.Module]
    targets: Mapping[str, list[str]]
    options: Mapping[str, Any]
    train_rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], dict[str, Tensor]]
    score: Callable[[Logits, str], Scores]
    head: str = ""


@dataclass(frozen=True)
class Plan:
    """The settings of a task that all methods share.

    ``rate_factor``: its learning rates over those of the search. ``head_rate``: the rate of a head that is trained.
    """

    steps: int
    batch: int
    budget: int
    rate_factor: float = 1.0
    head_rate: float | None = None
    seed: int = 0


def text() -> Task:
    """Return the task of :mod:`tests.comparison.text_task`, whose packages are imported only now."""
    from tests.comparison.text_task import make

    return make()


def vision() -> Task:
    """Return the task of :mod:`tests.comparison.vision_task`."""
    from tests.comparison.vision_task import make

    return make()


#: the learning rates of the search
RATES = (0.005, 0.02, 0.08)
#: name of the search for learning rates, which trains on the vision task and reads its validation part
SEARCH = "rates"
#: name -> the settings and the task; the search comes first, since the others take its rates
TASKS: dict[str, tuple[Plan, Callable[[], Task]]] = {
    SEARCH: (Plan(steps=120, batch=32, budget=7680, head_rate=0.005), vision),
    "vision": (Plan(steps=120, batch=32, budget=7680, head_rate=0.005), vision),
    "text": (Plan(steps=60, batch=16, budget=230_400, rate_factor=0.4), text),
}
