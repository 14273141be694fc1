"""Turn base linear layers into ``adaptc::product``, with the kind of matmul that is fastest for each weight.

Takes a graph for inference on a CPU, after fusing and hoisting, and a function that says which kind is fastest. Values
stay the same up to rounding. Only matmuls with base weights are looked at: those of adapters are thin. No node has the
number of rows. The op reads it in each call, so nothing is compiled anew for another batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from adaptc.passes.graph.ops import argument
from adaptc.passes.graph.pass_infra import GraphPass, PassResult
from adaptc.passes.protocol.matmul_op import COLUMNS, LINEAR, ROW_CLASS_LIMITS

aten = torch.ops.aten


@dataclass(frozen=True)
class MatmulChoice:
    """The kind of matmul for one weight.

    ``kind`` is used at the ``classes`` of row counts, because of ``why``. ``ratios`` has its time over that of
    ``linear`` at each class. ``columns`` are the classes at which the matmul by columns is used instead of oneDNN, and
    ``column_ratios`` has its times.
    """

    kind: str
    classes: tuple[int, ...] = ()
    reason: str = ""
    ratios: tuple[float, ...] = ()
    columns: tuple[int, ...] = ()
    column_ratios: tuple[float, ...] = ()

    def split_by_kind(self) -> list[MatmulChoice]:
        """Return this choice split into choices of a single kind, to be shown."""
        if not self.columns:
            return [self]
        other = MatmulChoice(COLUMNS, self.columns, self.reason, self.column_ratios)
        own = MatmulChoice(self.kind, self.classes, self.reason, self.ratios)
        return [own, other] if self.classes else [other]


@dataclass(frozen=True)
class MatmulChoices:
    """The choices for the matmuls of the base, one for each; ``caption`` says in print which matmuls these are."""

    choices: tuple[MatmulChoice, ...] = ()
    caption: str = "matmuls"

    def __str__(self) -> str:
        """Return a line for each kind, row counts and reason; '' where nothing was chosen."""
        groups = self._counts()
        return "\n".join(
            f"{self.caption}: {count} by {kind}{_row_counts_text(classes)} "
            f"({why}{self._time_ratios(kind, classes, why)})"
            for (kind, classes, why), count in groups.most_common()
        )

    def _time_ratios(self, *key: Any) -> str:
        found = [r for c in self._single_kinds() if (c.kind, c.classes, c.reason) == key for r in c.ratios]
        return f", {min(found):.2f} to {max(found):.2f} of linear's time" if found else ""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return ``kind``, ``rows``, ``why`` and ``count`` of each line of the text."""
        return [
            {"kind": kind, "rows": _row_counts_text(classes).removeprefix(" at "), "why": why, "count": count}
            for (kind, classes, why), count in self._counts().most_common()
        ]

    def _single_kinds(self) -> list[MatmulChoice]:
        return [part for c in self.choices for part in c.split_by_kind()]

    def _counts(self) -> Counter[tuple[str, tuple[int, ...], str]]:
        return Counter((c.kind, c.classes, c.reason) for c in self._single_kinds())


def _row_counts_text(classes: Collection[int]) -> str:
    """Return the row counts of ``classes`` in words, as in ' at 1, 2 to 4 rows'; '' for no classes."""
    lows = [1, *(most + 1 for most in ROW_CLASS_LIMITS)]
    names = [f"{low} to {most}" if low < most else f"{most}" for low, most in zip(lows, ROW_CLASS_LIMITS, strict=False)]
    names.append(f"more than {ROW_CLASS_LIMITS[-1]}")
    return f" at {', '.join(names[c] for c in classes)} rows" if classes else ""


@dataclass(frozen=True)
class ChooseMatmuls(GraphPass):
    """A pass that chooses the matmuls of base layers.

    Its count is that of the layers with a kind other than ``linear``, and its data are the :class:`MatmulChoices`.

    ``base`` has the placeholders of base weights. ``choose`` maps (rows, columns, dtype) of a weight to its choice.
    ``compiled`` is for graphs that a compiler gets. It would copy a weight that is not contiguous, so such a weight
    keeps ``linear``.
    """

    name: ClassVar[str] = "choose_matmuls"

    base: Collection[str] = field(repr=False)
    choose: Callable[[int, int, torch.dtype], MatmulChoice] = field(repr=False)
    compiled: bool = False

    def apply(self, subject: fx.Graph) -> PassResult[fx.Graph]:
        choices: list[MatmulChoice] = []
        for node in subject.find_nodes(op="call_function", target=aten.linear.default):
            x, weight, bias = (argument(node, i) for i in range(3))
            value = weight.meta.get("val")
            if weight.op != "placeholder" or weight.name not in self.base or not _is_cpu_matrix(value):
                continue
            out, into = map(int, value.shape)
            if self.compiled and not value.is_contiguous():
                choice = MatmulChoice(LINEAR, (), "the weight does not lie row by row")
            else:
                choice = self.choose(out, into, value.dtype)
            choices.append(choice)
            if choice.kind != LINEAR:
                node.target, node.kwargs = torch.ops.adaptc.product.default, {}
                node.args = (x, weight, bias, choice.kind, list(choice.classes), list(choice.columns))
        changed = sum(c.kind != LINEAR for c in choices)
        return PassResult(subject, changed, data=MatmulChoices(tuple(choices)))


def _is_cpu_matrix(value: Any) -> bool:
    fits = isinstance(value, Tensor) and value.ndim == 2 and value.device.type == "cpu"
    return fits and all(isinstance(s, int) for s in value.shape)
