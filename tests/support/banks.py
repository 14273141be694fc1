"""What tests of banks share: adapters with random tensors, and what each row must be by programs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptc
from tests.support.oracle import tensors_of


@torch.no_grad()
def save_random_adapters(program: adaptc.AdaptedProgram, folder: Path, count: int = 2, size: float = 0.3) -> list[Path]:
    """Directories of adapters whose tensors are the program's with noise of their own; the program keeps the last."""
    out = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        for t in program.binding.values.values():
            if t.is_floating_point() and t.ndim:
                t.add_(size * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype))
        out.append(Path(adaptc.save_adapter(program, folder / f"{seed}")))
    return out


def outputs_by_adapter(
    program: adaptc.AdaptedProgram, adapter_by_name: Mapping[str, Any], call: Callable[[Callable[..., Any]], Any]
) -> dict[str | None, dict[str, Tensor]]:
    """What each adapter, and None, makes of a call by itself."""
    with torch.no_grad():
        found = {n: tensors_of(call(program.bind(a))) for n, a in adapter_by_name.items()}
        return {None: tensors_of(call(program.base)), **found}


def expected_rows(output_by_adapter: Mapping[str | None, Tensor], row_adapters: Sequence[str | None]) -> Tensor:
    """Row by row of what each adapter makes by itself."""
    return torch.stack([output_by_adapter[name][row] for row, name in enumerate(row_adapters)])


def check_rows(
    found: Any,
    single_outputs: Mapping[str | None, Mapping[str, Tensor]],
    row_adapters: Sequence[str | None],
    tol: float = 5e-6,
) -> None:
    """Each row is what its adapter makes of it by itself, within ``tol`` of the largest number; adapters differ."""
    outs = {k: t for k, t in tensors_of(found).items() if t.ndim and t.shape[0] == len(row_adapters)}
    assert outs
    for key, t in outs.items():
        want = expected_rows({n: o[key] for n, o in single_outputs.items()}, row_adapters)
        size = float(want.detach().abs().max())
        torch.testing.assert_close(t, want, rtol=0, atol=tol * size, msg=lambda m, k=key: f"{k}: {m}")
    names = [n for n in dict.fromkeys(row_adapters) if n is not None]
    for name in names:
        difference = max(float((single_outputs[name][k] - single_outputs[None][k]).abs().max()) for k in outs)
        assert difference > 1e-3, f"{name} changes nothing"
