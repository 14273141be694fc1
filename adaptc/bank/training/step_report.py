"""Report what a step did to each adapter of a bank, and what a batch gave each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaptc.errors import AdaptcError, did_you_mean
from adaptc.tables import Column, Report, Table


@dataclass(frozen=True)
class StepResult:
    """The result of a step for one adapter.

    ``steps``: how many steps it has taken. ``grad_norm``: the norm of its gradients before they were clipped.
    ``learning_rates``: of this step, for each group of parameters. ``skipped``: why the step was not taken; "" where it
    was.
    """

    adapter: str
    steps: int
    grad_norm: float
    learning_rates: tuple[float, ...]
    skipped: str = ""


@dataclass(frozen=True, repr=False)
class StepReport(Report):
    """A report of one step, with a :class:`StepResult` for each adapter whose rows the last batches had."""

    ROWS = ("adapters",)
    ROW_NAME = "adapter"

    results: Mapping[str, StepResult]

    @property
    def skipped(self) -> dict[str, str]:
        """Return the adapters whose step was skipped, each with the reason."""
        return {n: r.skipped for n, r in self.results.items() if r.skipped}

    def __getitem__(self, name: str) -> StepResult:
        """Return the result of one adapter. Raises KeyError where the step had nothing for it."""
        if name not in self.results:
            raise KeyError(f"the step had no gradients of an adapter {name!r}{did_you_mean(name, self.results)}")
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def sections(self) -> Iterable[str | Table]:
        skipped = len(self.skipped)
        yield f"step of {len(self) - skipped} adapters" + (f", and {skipped} skipped" if skipped else "")
        columns = ["adapter", Column("steps", True), Column("gradient", True), Column("learning rate", True), "skipped"]
        yield Table(columns, [self._row(r) for r in self.results.values()])

    def _row(self, r: StepResult) -> tuple[Any, ...]:
        rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(r.learning_rates))
        return r.adapter, r.steps, f"{r.grad_norm:.4g}", rates, r.skipped

    def values(self) -> dict[str, Any]:
        adapters = {
            n: {
                "steps": r.steps,
                "grad_norm": r.grad_norm,
                "learning_rates": list(r.learning_rates),
                "skipped": r.skipped or None,
            }
            for n, r in self.results.items()
        }
        return {"adapters": adapters}


@dataclass(frozen=True)
class AdapterLoss:
    """The result of a batch for one adapter.

    ``loss``: its loss, a detached scalar; None where it failed. ``error``: why it failed; None where it did not. An
    adapter that failed got no gradients.
    """

    adapter: str
    loss: Tensor | None = None
    error: Exception | None = None

    def value(self) -> float:
        """Return the loss as a number. Raises AdaptcError, from the error, where the adapter failed."""
        if self.loss is None:
            raise AdaptcError(f"adapter {self.adapter!r} got no gradients: {self.error}") from self.error
        return float(self.loss)
