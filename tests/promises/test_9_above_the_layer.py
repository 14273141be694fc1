"""Promise 9 for adapters above the layer: threads call, swap, bind and write prompts, prefixes, routers and adapters
that begin at a token, of other sizes, and each result is all of one adapter."""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import shared_base_program
from tests.support.prompts import prompt_oracle
from tests.support.turns import PATIENCE, Turns
from tests.support.xlora import OTHERS, experts, peft_model, save_xlora_adapter

IDS = torch.randint(4, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
SECONDS, THREADS = 3, 4


def _prompts(path: Path, cls: str, **more: Any) -> list[Path]:
    paths = [path / str(n) for n in (3, 5)]
    for i, p in enumerate(paths):
        prompt_oracle("llama", p, cls, seed=i, num_virtual_tokens=3 + 2 * i, **more)
    return paths


def _routers(path: Path) -> list[Path]:
    sets = [experts("llama", path / "some"), experts("llama", path / "others", OTHERS["llama"])]
    return [save_xlora_adapter(peft_model("llama", e, seed=i), path / f"x{i}") for i, e in enumerate(sets)]


def _invoked(path: Path) -> list[Path]:
    out: list[Path] = []
    for i, tokens in enumerate(([int(IDS[0, 2])], [int(IDS[0, 4]), int(IDS[0, 5])])):
        config = adaptc.LoraConfig(
            r=2 + i,
            target_modules=["q_proj", "down_proj"],
            alora_invocation_tokens=tokens,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(i)
        program = adaptc.compile(shared_base_program("llama"), config)
        out.append(adaptc.save_adapter(program, path / f"a{i}"))
    return out


KINDS: dict[str, Callable[[Path], list[Path]]] = {
    "prompt tuning": lambda path: _prompts(path, "PromptTuningConfig"),
    "prefix tuning": lambda path: _prompts(path, "PrefixTuningConfig"),
    "x-lora": _routers,
    "alora": _invoked,
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_threads_see_whole_adapters(kind: str, tmp_path: Path) -> None:
    paths = KINDS[kind](tmp_path)
    program = adaptc.compile(shared_base_program("llama"), str(paths[0]))
    with torch.no_grad():
        outputs = [program.bind(str(p))(input_ids=IDS).logits for p in paths]
        plain = FAMILIES["llama"].build()(input_ids=IDS).logits

    def adapter(out: Tensor) -> int:
        found = [i for i, o in enumerate(outputs) if o.shape == out.shape and torch.allclose(out, o, 1e-3, 1e-4)]
        assert len(found) == 1, "an output of no adapter"
        return found[0]

    def bound(i: int) -> None:
        assert adapter(program.bind(str(paths[i]))(input_ids=IDS).logits) == i

    def written(i: int) -> None:
        place = tmp_path / f"{threading.get_ident()}-{time.monotonic_ns()}"
        adapter(program.bind(str(adaptc.save_adapter(program, place)))(input_ids=IDS).logits)

    def stored(i: int) -> None:
        path = adaptc.save(program, tmp_path / f"{threading.get_ident()}-{time.monotonic_ns()}.pt2")
        adapter(adaptc.load(path)(input_ids=IDS).logits)
        path.unlink()

    deeds: dict[Callable[[int], object], int] = {
        lambda i: adapter(program(input_ids=IDS).logits): 40,
        lambda i: adaptc.swap(program, str(paths[i])): 16,
        bound: 8,
        written: 4,
        stored: 1,
        lambda i: torch.testing.assert_close(program.base(input_ids=IDS).logits, plain): 6,
    }
    done, faults = [0], []
    turns = Turns(SECONDS, lambda: done[0] > 20)

    def work(number: int) -> None:
        rng = random.Random(number)
        with torch.no_grad():
            while turns.go_on() and not faults:
                try:
                    rng.choices(list(deeds), list(deeds.values()))[0](rng.randrange(2))
                except BaseException:
                    faults.append(traceback.format_exc())
                done[0] += 1

    pool = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        for t in pool:
            t.start()
        for t in pool:
            t.join(SECONDS + 2 * PATIENCE)
    finally:
        sys.setswitchinterval(interval)
    assert not faults, faults[0]
    assert not any(t.is_alive() for t in pool), "threads wait for each other"
    assert done[0] > 20
