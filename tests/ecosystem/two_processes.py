"""One of two processes that train together; started by ``test_distributed``. Arguments: how, and a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.training import batch, module, steps, trainable


def main(how: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trained = module()
    whole = trained
    if how == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(whole)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(whole)
    rows = {k: t[rank * 2 : rank * 2 + 2] for k, t in batch(4).items()}
    found = torch.tensor(steps(lambda: trained(**rows).loss, trainable(trained), 4))
    dist.all_reduce(found)
    frozen = sum(p.grad is not None for p in trained.parameters() if not p.requires_grad)
    state = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in whole.state_dict().items()}
    if how == "ddp":
        assert trained.load_state_dict(trained.state_dict()).missing_keys == []
    if rank == 0:
        torch.save({"losses": (found / 2).tolist(), "state": state, "frozen": frozen}, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
