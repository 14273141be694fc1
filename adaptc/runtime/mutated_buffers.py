"""Find and copy the buffers that a program writes to while it runs, such as caches and counters.

As in a PyTorch model, calls of one program see what earlier calls wrote. A callable that was bound to a program has
state of its own, which begins as the program's is at that moment. So requests that are served side by side do not share
a buffer. The copies share memory with each other as the tensors did, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from adaptc.passes.graph.mutation import memory_groups, written_inputs
from adaptc.passes.graph.storage import memory_address
from adaptc.torch_modes import outside_modes


def written_placeholders(graph: fx.Graph) -> set[str]:
    """Return the names of the placeholders whose memory a graph writes to."""
    memory = memory_groups(graph)
    dirty = {memory[n] for node in graph.nodes for n in written_inputs(node)}
    return {n.name for n in graph.find_nodes(op="placeholder") if memory[n] in dirty}


@outside_modes()
@torch.no_grad()
def copy_sharing_memory(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a copy of each tensor in ``names``, and of each of ``tensors`` that shares memory with one of these."""
    memory = {memory_address(tensors[n]) for n in names}
    copies: dict[int, torch.UntypedStorage] = {}
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or memory_address(t) not in memory:
            continue
        storage = copies.get(memory_address(t))
        if storage is None:
            storage = copies[memory_address(t)] = t.untyped_storage().clone()
        made = torch.empty(0, dtype=t.dtype, device=t.device)
        out[name] = made.set_(storage, t.storage_offset(), t.shape, t.stride())  # type: ignore[arg-type]
    return out
