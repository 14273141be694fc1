"""Tracing a launch on a GPU that is not there: tensors are fake and all their sizes symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def guards_of_launch(launch: Callable[..., object], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """What a launch with bfloat16 tensors of these shapes made the program depend on, none if it holds for any size.

    Equal sizes are one symbol. Fails if the launch is not in the trace.
    """
    env = ShapeEnv(duck_shape=True)
    mode = FakeTensorMode(shape_env=env)

    def fake(shape: tuple[int, ...]) -> Tensor:
        sizes = [DimDynamic.DUCK] * len(shape)
        symbolic = mode.from_tensor(
            torch.empty(shape, device="meta"), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
        )
        return torch.empty_strided(symbolic.shape, symbolic.stride(), dtype=torch.bfloat16, device="cuda")

    with mode:
        graph = make_fx(launch)(*map(fake, shapes)).graph
    found = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(found) == 1, f"expected one launch in the trace, found {len(found)}:\n{graph}"
    return [str(g.expr) for g in env.guards]
