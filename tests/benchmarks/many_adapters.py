"""One batch on many adapters next to PEFT, in one interleaved run: SmolLM2's sizes, rank 16 on all linear layers, seven
adapters and one row of the base. Ratios are over the same batch on one adapter.

``python -m tests.benchmarks.many_adapters`` prints these rows alone, with the load of the machine (``1``: one round).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import adaptc
from tests.benchmarks.against_peft import Sides
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import tokens

ROWS, ADAPTERS = 8, 7
#: adapters of a large bank, of which four are in use
MANY = 50


def run(sides: Sides, folder: Path, rounds: int = 5, new: int = 16) -> list[Row]:
    """Rows of forward, generation, base rows, many adapters of other ranks, memory, inductor, and adding one from disk.
    Those of memory are in megabytes."""
    dirs = {f"a{i}": _written(sides, folder / f"a{i}", 16, i) for i in range(ADAPTERS)}
    bank = sides.program.bank(dirs)
    names: list[str | None] = [*dirs, None]
    for name, d in dirs.items():
        sides.peft.load_adapter(str(d), adapter_name=name)
    mixed = [n or "__base__" for n in names]
    one = sides.program.bind(str(dirs["a0"]))
    sides.peft.set_adapter("a0")
    for model in (sides.base, sides.peft):
        model.config.use_cache = False  # type: ignore[union-attr]
    rows: list[Row] = []
    for length in (1, 64):
        x = tokens(ROWS, length)
        calls = {
            "adaptc, one adapter": _calling(one, x),
            "adaptc, a bank": _calling(bank, x, adapters=names),
            "PEFT, one adapter": _calling(sides.peft, x),
            "PEFT, adapter_names": _calling(sides.peft, x, adapter_names=mixed),
        }
        rows += interleave(
            f"8 rows of {length}, eager", calls, "adaptc, one adapter", rounds * (3 if length == 1 else 1)
        )
    x = tokens(ROWS, 1)
    base = {"prog.base": _calling(sides.program.base, x), "a bank": _calling(bank, x, adapters=[None] * ROWS)}
    rows += interleave("8 rows of the base", base, "prog.base", rounds * 3)
    many = {f"m{i}": _written(sides, folder / f"m{i}", 4 + (i * 7) % 61, 100 + i) for i in range(MANY)}
    few = dict(list(many.items())[:: MANY // 4][:4])
    large, small = sides.program.bank(many), sides.program.bank(few)
    used = [*few, *few]
    for length in (1, 64):
        y = tokens(ROWS, length)
        calls = {
            "a bank of 4": _calling(small, y, adapters=used),
            f"a bank of {MANY}": _calling(large, y, adapters=used),
        }
        work = f"4 of {MANY} adapters of ranks 4 to 64 in use, 8 rows of {length}"
        rows += interleave(work, calls, "a bank of 4", rounds * (3 if length == 1 else 1))
    rows += memory(large, many, used)
    rows += compiled(sides, dirs, names, rounds)
    file = dirs["a0"] / "adapter_model.safetensors"
    rows += interleave("an adapter from disk", _adding(sides, bank, dirs["a0"], file), "reading the file", rounds)
    return rows + generation(sides, dirs, names, rounds, new)


def memory(bank: Any, files: dict[str, Path], used: list[str]) -> list[Row]:
    """Megabytes: of a bank over those of its adapters' files, and of the stack that calls keep over those in use."""
    on_disk = {n: sum(t.nbytes for t in load_file(d / "adapter_model.safetensors").values()) for n, d in files.items()}
    every, in_use = sum(on_disk.values()), sum(on_disk[n] for n in set(used))
    sizes = {"its adapters": every, "a bank, of its adapters": bank.nbytes}
    rows = [Row(f"megabytes of {len(files)} adapters", n, b / 1e6, b / every, 0) for n, b in sizes.items()]
    kept = {"those in use": in_use, "the stack of those in use": bank.held}
    return rows + [Row("megabytes beside them", n, b / 1e6, b / in_use, 0) for n, b in kept.items()]


def compiled(sides: Sides, dirs: dict[str, Path], names: list[str | None], rounds: int) -> list[Row]:
    """One token of each row by inductor, whose code has room for as many adapters as there are."""
    program = adaptc.compile(sides.base, str(dirs["a0"]), backend="inductor")
    bank, x = program.bank(dirs, capacity=ADAPTERS), tokens(ROWS, 1)
    calls = {
        "adaptc, one adapter": _calling(program.bind(str(dirs["a0"])), x),
        "adaptc, a bank": _calling(bank, x, adapters=names),
    }
    return interleave("8 rows of 1, inductor", calls, "adaptc, one adapter", rounds * 3)


def generation(sides: Sides, dirs: dict[str, Path], names: list[str | None], rounds: int, new: int) -> list[Row]:
    """Per new token of eight prompts."""
    for model in (sides.base, sides.peft):
        model.generation_config.use_cache = model.config.use_cache = True  # type: ignore[union-attr]
    gen = adaptc.compile_for_generation(sides.base, str(dirs["a0"]), max_batch=ROWS, max_length=256)
    bank = gen.bank(dirs)
    x = tokens(ROWS, 16)
    how: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mixed = [n or "__base__" for n in names]
    calls = {
        "adaptc, one adapter": lambda: gen.generate(**x, **how),
        "adaptc, a bank": lambda: bank.generate(**x, **how, adapters=names),
        "PEFT, one adapter": lambda: sides.peft.generate(**x, **how),
        "PEFT, adapter_names": lambda: sides.peft.generate(**x, **how, adapter_names=mixed),
    }
    found = interleave("generate, batch 8, per new token", calls, "adaptc, one adapter", rounds, 1)
    return [Row(r.work, r.candidate, r.milliseconds / new, r.ratio, r.rounds) for r in found]


def _adding(sides: Sides, bank: Any, folder: Path, file: Path) -> dict[str, Callable[[], object]]:
    def ours() -> None:
        bank.add("new", folder)
        bank.remove("new")

    def theirs() -> None:
        sides.peft.load_adapter(str(folder), adapter_name="new")
        sides.peft.delete_adapter("new")

    def read() -> float:
        return float(sum(t.sum() for t in load_file(file).values()))

    return {"reading the file": read, "bank.add": ours, "PEFT, load_adapter": theirs}


def _calling(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(**inputs, **more)

    return call


def _written(sides: Sides, folder: Path, rank: int, seed: int) -> Path:
    """An adapter of that rank with random tensors on disk, at the layers of another."""
    folder.mkdir()
    like = sides.dirs[0]
    config = json.loads((like / "adapter_config.json").read_text()) | {"r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, t in load_file(like / "adapter_model.safetensors").items():
        shape = (rank, t.shape[1]) if "lora_A" in key else (t.shape[0], rank)
        tensors[key] = torch.randn(shape, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        print(f"{machine()}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        print(markdown(run(Sides(Path(tmp)), Path(tmp), *map(int, sys.argv[1:]))))
