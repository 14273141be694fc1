"""Run a graph whose parameters are sharded by tensor parallelism.

The graph has the sizes of the whole model, and so do sharded tensors: torch.distributed.tensor finds for each op how
its result is sharded, and sends what is needed. Three things it does not do by itself, and this mode does:

- Tensors that are the same in each process (inputs, masks, labels) may meet sharded ones in an op.
- A sum of which each process has a part is added up where it arises. Else each later op would decide anew.
- Attention of sharded heads is that of each process's own heads, on whatever kernel the device has.

Random numbers of a call are equal in all processes: dropout on a tensor that each of them has must be the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode

from adaptc.errors import AdaptcError, ConfigError, listing
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.graph.train_eval import SDPA

#: the axis of heads in what attention reads
_HEADS = 1
aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class ShardedOps(TorchFunctionMode):
    """A mode in which ops take sharded and whole tensors together; see above."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh = mesh

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs or {}))
        if not any(isinstance(t, DTensor) for t in flat):
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_unflatten([self._on_mesh(t) for t in flat], spec)
        try:
            found = self._attention(func, *args, **kwargs) if func is SDPA else func(*args, **kwargs)
        except AdaptcError:
            raise
        except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
            raise explain(func, flat, error) from error
        return pytree.tree_map_only(DTensor, _added_up, found)

    def _on_mesh(self, t: Any) -> Any:
        """Return ``t`` as a tensor of the mesh where it is a tensor, which all processes have."""
        if not isinstance(t, Tensor) or isinstance(t, DTensor):
            return t
        return DTensor.from_local(t, self.mesh, [Replicate()], run_check=False)

    def _attention(
        self, func: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> DTensor:
        has_heads = all(t.ndim == 4 and not t.shape[_HEADS] % self.mesh.size() for t in (q, k, v))
        is_sharded = any(t.placements[0] == Shard(_HEADS) for t in (q, k, v))
        placement = Shard(_HEADS) if has_heads and is_sharded else Replicate()
        local = [t.redistribute(placements=[placement]).to_local() for t in (q, k, v)]
        mask = attn_mask
        if mask is not None:
            own_heads = mask.ndim == q.ndim and mask.shape[_HEADS] == q.shape[_HEADS] and q.shape[_HEADS] > 1
            mask = mask.redistribute(placements=[placement if own_heads else Replicate()]).to_local()
        # The order of its axes in memory differs between kernels, and a later view must not depend on it.
        out = func(*local, mask, *args, **kwargs).contiguous()
        return DTensor.from_local(out, self.mesh, [placement], run_check=False)


class _AddUp(torch.autograd.Function):
    """A sum over the processes that each of them gets. Backward gives each process's part the gradient of the sum.

    Torch's own ``redistribute`` would give it the form of the part, which does not exist for means.
    """

    @staticmethod
    def forward(ctx: Any, t: DTensor) -> DTensor:
        return t.redistribute(placements=[Replicate()])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _added_up(t: DTensor) -> DTensor:
    """Return ``t``, or its sum over the processes where each has a part of it."""
    return _AddUp.apply(t) if any(p.is_partial() for p in t.placements) else t  # type: ignore[return-value]


def explain(func: Any, values: Sequence[Any], error: BaseException) -> AdaptcError:
    """Return the error for an op that failed: it says its name, and which tensors it got."""
    got = listing((f"{tuple(t.shape)} sharded as {t.placements[0]}" for t in values if isinstance(t, DTensor)), 4)
    if func in _VIEWS:
        sizes = [int(n) for n in values if isinstance(n, int)]
        return ConfigError(
            f"{func} of a tensor {got} to the sizes {sizes} would cut through heads, or other groups of columns, for "
            "their number does not divide among the processes. Leave the layers that make it out of the plan, or take "
            "another number of processes"
        )
    said = str(error).strip().partition("\n")[0]
    return AdaptcError(
        f"{func} does not work on sharded tensors ({got}): {said}. Leave the layers that it reads out of the plan, or "
        "choose another method"
    )


class ShardedCall:
    """A callable that runs graphs with sharded parameters on a mesh. Inputs and outputs are whole, and the same in each
    process."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __call__(self, graph: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        is_training = bool(getattr(graph, "training", False))
        with self._equal_random_numbers() if is_training else nullcontext(), ShardedOps(self.mesh):
            out = graph(*args, **kwargs)
        return pytree.tree_map_only(DTensor, lambda t: t.full_tensor(), out)

    def refuse(self, what: str) -> None:
        """Raise AdaptcError for ``what``, which does not work on sharded parameters."""
        raise AdaptcError(
            f"{what} does not work for a module of shard_tensors, whose parameters are divided among processes: use "
            "prog.module(), or FSDP2 and stages (examples/training_processes.md)"
        )

    @contextmanager
    def _equal_random_numbers(self) -> Iterator[None]:
        kind = self.mesh.device_type
        seed = torch.randint(2**62, (), device=kind)
        dist.broadcast(seed, group=self.mesh.get_group(), group_src=0)
        devices = [] if kind == "cpu" else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind), warnings.catch_warnings():
            # Torch warns that processes may draw different numbers on a CPU, which is what the seed is for.
            warnings.filterwarnings("ignore", "DTensor random operators")
            torch.manual_seed(int(seed))
            yield
