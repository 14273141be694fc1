"""Choose matmuls by what was measured on this CPU, where the room ``tuning`` is there.

This is the only file that imports that room. Without it every matmul is torch's own ``linear``, and nothing is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptc.passes.lower.choose_products import MatmulChoice, MatmulChoices
from adaptc.passes.optimize.sibling_cost import MatmulSpeed, default_speed
from adaptc.passes.protocol.matmul_op import LINEAR, PACKED
from adaptc.passes.train.choose_base_products import ChooseBaseMatmuls
from adaptc.tables import format_bytes


@dataclass(frozen=True)
class PackedWeights:
    """The packed copies that are held now: ``count`` of them, with ``nbytes`` in all.

    ``choices`` has one entry for each layer of the base: at which rows it reads a packed copy, and why.
    """

    count: int = 0
    nbytes: int = 0
    choices: tuple[MatmulChoice, ...] = ()

    def __str__(self) -> str:
        """Return a line for the memory and one for each reason; '' where nothing was to be packed."""
        if not self.choices:
            return ""
        lines = [f"packed: a second copy of {self.count} weights ({format_bytes(self.nbytes)})"]
        for group in MatmulChoices(self.choices).table_rows():
            count, why = f"{group['count']} layers", group["why"]
            if group["kind"] == PACKED:
                ratios = [r for c in self.choices if c.kind == PACKED and c.reason == why for r in c.ratios]
                times = f", {min(ratios):.2f} to {max(ratios):.2f} of its time" if ratios else ""
                lines.append(f"packed for {count} at {group['rows']} ({why}{times})")
            else:
                lines.append(f"not packed for {count} ({why})")
        return "\n".join(lines)


class PackedCode(Protocol):
    """The layers of one piece of code that read packed weights, and the choices that were made for all its layers."""

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def choices(self) -> Sequence[MatmulChoice]: ...

    def make_layer(self, out: int, width: int, dtype: torch.dtype, matmul_args: Sequence[Any], /) -> Any:
        """Return a layer that reads packed copies of a weight (out, width), or None where that is not faster."""
        ...


def memory_of_packed(packs: Iterable[PackedCode | None]) -> PackedWeights:
    """Return what several pieces of code hold now, a shared copy counted once; None is code that packs nothing."""
    found = [p for p in packs if p is not None]
    made = {id(c): c for p in found for layer in p.layers for c in layer.copies}
    nbytes = sum(c.numel() * c.itemsize for c in made.values())
    return PackedWeights(len(made), nbytes, tuple(c for p in found for c in p.choices))


try:
    from adaptc.tuning.adapter_speeds import adapter_speed
    from adaptc.tuning.compiled_matmuls import choose_compiled, choose_packaged
    from adaptc.tuning.matmul_table import choose_for_gradient, choose_matmul, chooses_matmuls
    from adaptc.tuning.packed_weights import PackedLayers
except ModuleNotFoundError as error:
    if error.name != "adaptc.tuning":
        raise
    PackedLayers: Any = None  # not called where no matmuls are chosen

    def chooses_matmuls() -> bool:
        return False

    def choose_matmul(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
        return MatmulChoice(LINEAR, (), "adaptc.tuning is not installed")

    choose_for_gradient = choose_compiled = choose_packaged = choose_matmul

    def adapter_speed(dtype: torch.dtype) -> MatmulSpeed:
        return default_speed(dtype)


def choose_trained(base: Mapping[str, Tensor]) -> ChooseBaseMatmuls | None:
    """Return the pass that chooses matmuls in lifted graphs that gradients flow through; None to choose nothing.

    ``base``: name of a placeholder -> its frozen weight.
    """
    return ChooseBaseMatmuls(choose_matmul, choose_for_gradient, base) if chooses_matmuls() else None
