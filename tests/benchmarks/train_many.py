"""Many adapters trained in one step next to one after the other: SmolLM2's sizes, 8 adapters of ranks 4 to 32 on all
linear layers, one row of 64 tokens each, in one interleaved run. Ratios are over 8 separate steps of adaptc.

``python -m tests.benchmarks.train_many`` prints these rows, with the load of the machine (``3``: three rounds).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F

import adaptc
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import smollm2, tokens

RANKS = (4, 8, 16, 32, 4, 8, 16, 32)
LENGTH = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def next_token_loss(outputs: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def run(rounds: int = 5) -> list[Row]:
    """Rows of a step of 8 adapters together and apart, of adaptc and of PEFT; and of a client's among 8 over alone."""
    base = smollm2()
    x = tokens(len(RANKS), LENGTH)
    names = [f"a{i}" for i in range(len(RANKS))]
    configs = [adaptc.LoraConfig(r=r, target_modules=TARGETS) for r in RANKS]
    program = adaptc.compile(base, configs[-1], training=True)
    bank: Any = program.bank(dict(zip(names, configs, strict=True)), training=True, optimizer=adam)
    modules = [adaptc.compile(base, c, training=True).module() for c in configs]
    optimizers = [adam([p for p in m.parameters() if p.requires_grad]) for m in modules]
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft_config(RANKS[0]), adapter_name=names[0])
    for name, rank in zip(names[1:], RANKS[1:], strict=True):
        theirs.add_adapter(name, peft_config(rank))
    their_optimizers = {n: adam([p for k, p in theirs.named_parameters() if f".{n}." in k]) for n in names}

    def together(rows: list[str] = names) -> None:
        bank.forward_backward(x, rows, next_token_loss, x["input_ids"])
        bank.step()

    def one_after_the_other() -> None:
        for i, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            own = {k: v[i : i + 1] for k, v in x.items()}
            module(**own, labels=own["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def their_adapters() -> None:
        for i, (name, optimizer) in enumerate(their_optimizers.items()):
            own = {k: v[i : i + 1] for k, v in x.items()}
            theirs.set_adapter(name)
            theirs(**own, labels=own["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    work = f"a step of {len(RANKS)} adapters, a row of {LENGTH} tokens each"
    calls: dict[str, Callable[[], object]] = {
        "adaptc, 8 separate steps": one_after_the_other,
        "adaptc, one step of a bank": together,
        "PEFT, adapter after adapter": their_adapters,
    }
    rows = interleave(work, calls, "adaptc, 8 separate steps", rounds, 1)
    alone: dict[str, Callable[[], object]] = {
        "8 rows of one client": lambda: together([names[3]] * len(names)),
        "a row of each of 8": together,
    }
    return rows + interleave("a bank's step of as many tokens", alone, "8 rows of one client", rounds, 1)


def peft_config(rank: int) -> Any:
    return peft.LoraConfig(r=rank, target_modules=TARGETS)


if __name__ == "__main__":
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(markdown(run(*map(int, sys.argv[1:]))))
