"""What two processes do together; see ``two_processes``. Each function gives what the first process found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer  # noqa: F401  # imported once, and not in each process

import adaptc
from adaptc import AdaptcError, CheckpointError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.training import batch, module, optimizer_of, quantized_module, steps, train, trainable

#: of the state of a module that is held in parts
WHOLE = StateDictOptions(full_state_dict=True)


def own_rows() -> dict[str, Tensor]:
    """This process's half of the rows."""
    rank = dist.get_rank()
    return {k: t[rank * 2 : rank * 2 + 2] for k, t in batch(4).items()}


def mean(found: list[float]) -> list[float]:
    """Over the processes."""
    total = torch.tensor(found)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def frozen_gradients(trained: Any) -> int:
    return sum(p.grad is not None for p in trained.parameters() if not p.requires_grad)


def ddp(folder: Path) -> dict[str, Any]:
    """Four steps; and how many bytes of gradients are sent in each."""
    one, sent = module(), Counter[str]()
    both = DistributedDataParallel(one)

    def send(group: Any, bucket: Any) -> Any:
        sent["bytes"] += bucket.buffer().nbytes
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    # torch reads annotations, and takes none that are text.
    both.register_comm_hook(None, lambda group, bucket: send(group, bucket))
    rows = own_rows()
    found = mean(steps(lambda: both(**rows).loss, trainable(both), 4))
    assert both.load_state_dict(both.state_dict()).missing_keys == []
    with pytest.raises(AdaptcError, match="give what is inside"):
        adaptc.save_adapter(both, folder / "wrapped")
    return {"losses": found, "state": one.state_dict(), "frozen": frozen_gradients(both), "bytes": sent["bytes"]}


def quantized(folder: Path) -> dict[str, Any]:
    """Four steps on a quantised base: with DistributedDataParallel, and with FSDP2, which shards the adapter alone."""
    found: dict[str, Any] = {}
    rows = own_rows()
    one = quantized_module()
    both = DistributedDataParallel(one)
    found["ddp"] = mean(steps(lambda: both(**rows).loss, trainable(both), 4))
    found["ddp state"] = one.state_dict()
    one = quantized_module()
    weights = {n: t for n, t in one.named_parameters() if isinstance(t, QuantizedTensor)}
    fully_shard(one, ignored_params={p for p in one.parameters() if not p.requires_grad})
    found["fsdp"] = go(one, optimizer_of(one), 4)
    assert weights
    assert all(one.get_parameter(n) is t for n, t in weights.items())
    adaptc.save_adapter(one, folder / "quantized")
    found["fsdp state"] = load_file(folder / "quantized/adapter_model.safetensors")
    one = quantized_module()
    fully_shard(one)
    with pytest.raises(AdaptcError, match=r"quantised weight '.*q_proj.weight'.*fully_shard\(module, ignored_params="):
        one(**rows)
    return found


def in_parts() -> tuple[Any, torch.optim.Optimizer]:
    one = module()
    fully_shard(one)
    return one, optimizer_of(one)


def go(one: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    rows = own_rows()
    return mean(steps(lambda: one(**rows).loss, trainable(one), count, optimizer))


def fsdp(folder: Path) -> dict[str, Any]:
    """Four steps; and what the program says whose tensors no longer train."""
    one, optimizer = in_parts()
    found = go(one, optimizer, 4)
    for stale in (adaptc.save_adapter, adaptc.save):
        with pytest.raises(AdaptcError, match=r"does not have what was trained.*11 more.*in every process"):
            stale(one.owner, folder / "stale")
    with pytest.raises(AdaptcError, match="does not have what was trained"):
        adaptc.merge(one.owner)
    with torch.no_grad():
        one.eval()(**own_rows())  # after which FSDP has all parameters whole for a while
    adaptc.save_adapter(one, folder / "four")
    adaptc.swap(one.owner, folder / "four")
    adaptc.save_adapter(one.owner, folder / "swapped")
    return {
        "losses": found,
        "state": load_file(folder / "four/adapter_model.safetensors"),
        "frozen": frozen_gradients(one),
    }


def fsdp_begins(folder: Path) -> dict[str, Any]:
    """Two steps, and what is needed to go on."""
    one, optimizer = in_parts()
    found = go(one, optimizer, 2)
    one.save_pretrained(folder / "adapter", is_main_process=dist.get_rank() == 0)
    assert (folder / "adapter/adapter_config.json").is_file(), "back before it is written"
    state, kept = get_model_state_dict(one, options=WHOLE), get_optimizer_state_dict(one, optimizer, options=WHOLE)
    with pytest.raises(CheckpointError, match="could not write"):
        one.save_pretrained(Path(__file__) / "no directory")
    if dist.get_rank() == 0:
        torch.save(kept, folder / "optimizer.pt")
    return {"losses": found, "state": state}


def fsdp_goes_on(folder: Path) -> dict[str, Any]:
    """Two more steps."""
    one, optimizer = in_parts()
    one.load_state_dict(load_file(folder / "adapter/adapter_model.safetensors"))
    set_optimizer_state_dict(one, optimizer, torch.load(folder / "optimizer.pt"), options=WHOLE)
    found = go(one, optimizer, 2)
    adaptc.save_adapter(one, folder / "resumed")
    set_model_state_dict(one, load_file(folder / "adapter/adapter_model.safetensors"), options=WHOLE)
    again = {k: t.full_tensor() for k, t in one.state_dict().items()}
    return {"losses": found, "loaded": again}


def merged(folder: Path) -> dict[str, Any]:
    """A merged model whose weights lie in two processes, written whole by the first."""
    one = adaptc.merge(module().owner).module()
    whole = one(**own_rows()).logits
    fully_shard(one)
    assert torch.equal(one(**own_rows()).logits, whole)
    one.save_pretrained(folder / "merged", is_main_process=dist.get_rank() == 0)
    assert (folder / "merged/config.json").is_file(), "back before it is written"
    return {"rows": {k: t for k, t in own_rows().items() if k != "labels"}, "logits": whole.detach()}


#: two rows in each process, which are the four that one has
TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "ddp_backend": "gloo",
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 4,
    "ddp_find_unused_parameters": False,
}


def trainer(folder: Path) -> dict[str, Any]:
    found, made = train(module(), folder / "trainer", **TRAINER)
    assert isinstance(made.model_wrapped, DistributedDataParallel)
    return {"losses": found}


def trainer_goes_on(folder: Path) -> dict[str, Any]:
    found, made = train(module(), folder / "other", resume=str(folder / "trainer/checkpoint-2"), **TRAINER)
    return {"losses": found, "state": made.model.state_dict()}


def quantized_trainer(folder: Path) -> dict[str, Any]:
    found, made = train(quantized_module(), folder / "quantized_trainer", bf16=True, **TRAINER)
    assert isinstance(made.model_wrapped, DistributedDataParallel)
    return {"losses": found}
