"""Train one adapter in several processes, which may be killed at any time. `torchrun` starts them:

    torchrun --nproc-per-node 2 examples/train_processes.py --out RUN --how pipeline
    torchrun --nproc-per-node 4 --max-restarts 3 examples/train_processes.py --out RUN --how shards --model MODEL

MODEL is a transformers directory with safetensors files, of which each process reads what it holds: its stages of the
model (pipeline), its shard of each block (shards), or its part of each linear layer (tensors). Without one, a small
random model is trained. RUN gets a state of training after every few steps, and the adapter in the end. The same
command, with any number of processes and any of the ways, goes on from the last state.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adaptc
from adaptc import LoraConfig
from adaptc.distributed import (
    StagedModule,
    TrainingPipeline,
    compile_from_config,
    load_base,
    load_state,
    save_state,
    shard_tensors,
)

ROWS, TOKENS = 8, 32


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--how", choices=("pipeline", "shards", "tensors"), default="pipeline")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def write_small_model(path: Path) -> Path:
    """A random model in a directory that all processes see; the first one writes it."""
    if dist.get_rank() == 0 and not path.exists():
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=512, **sizes))
        model.save_pretrained(path)
    dist.barrier()
    return path


def batch(step: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """The rows of a step, the same in all processes. Put your own data here."""
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def make_pipeline(prog: adaptc.AdaptedProgram) -> Any:
    """One stage of the model in each process."""
    count = dist.get_world_size()
    return TrainingPipeline(adaptc.split(prog, count), microbatches=max(ROWS // 2, count))


def make_shards(prog: adaptc.AdaptedProgram, blocks: int) -> Any:
    """A part of each block in each process; FSDP2 gathers a block while it computes."""
    module = StagedModule(adaptc.split(prog, blocks))
    for stage in module.stages:
        fully_shard(stage)
    return fully_shard(module)


def make_tensors(prog: adaptc.AdaptedProgram, device: str) -> Any:
    """A part of each linear layer in each process; all processes compute each batch together."""
    return shard_tensors(prog, init_device_mesh(device, (dist.get_world_size(),)))


def gradients_of_tensors(module: Any, rows: dict[str, Tensor]) -> Tensor:
    """Compute the loss of all rows and its gradients, which are equal in all processes."""
    loss = module(**rows).loss
    loss.backward()
    return loss.detach()


def gradients_of_shards(module: Any, rows: dict[str, Tensor]) -> Tensor:
    """Compute the loss of this process's rows and its gradients; return the mean loss of all processes."""
    loss = module(**{k: t.chunk(dist.get_world_size())[dist.get_rank()] for k, t in rows.items()}).loss
    loss.backward()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def main() -> None:
    options = read_options()
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model = options.model or write_small_model(options.out / "model")
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    # Equal first values in all processes.
    prog = compile_from_config(
        model, config, device=options.device, generator=torch.Generator(options.device).manual_seed(0)
    )
    facts = prog.adaptation.source.config
    if options.how == "pipeline":
        made = make_pipeline(prog)
    elif options.how == "shards":
        made = make_shards(prog, facts.num_hidden_layers)
    else:
        made = make_tensors(prog, options.device)
    trained: Any = load_base(made, model).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
    step, _ = load_state(options.out / "states", trained, optimizer) or (0, {})
    while step < options.steps:
        rows = batch(step, facts.vocab_size, options.device)
        optimizer.zero_grad()
        if options.how == "pipeline":
            loss = trained.step(**rows)
        elif options.how == "shards":
            loss = gradients_of_shards(trained, rows)
        else:
            loss = gradients_of_tensors(trained, rows)
        optimizer.step()
        step += 1
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.5f}", flush=True)
        if step % options.save_every == 0:
            save_state(options.out / "states", trained, optimizer, step)
    if options.how == "tensors":
        adaptc.save_adapter(trained, options.out / "adapter", base_model=str(model))
    else:
        trained.save_adapter(options.out / "adapter", base_model=str(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
