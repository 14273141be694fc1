"""adaptc next to PEFT on the same work, in one process, interleaved: SmolLM2, rank 16 on all 210 linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load, load_file
from torch import nn

import adaptc
from adaptc import LoraConfig
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.model import RANK, smollm2, tokens

CONFIG = {"r": RANK, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Sides:
    """The same model three times: plain, in PEFT, and as a program; with two adapters on disk."""

    def __init__(self, folder: Path) -> None:
        self.base = smollm2()
        self.peft: PeftModel = get_peft_model(  # type: ignore[assignment]
            copy.deepcopy(self.base), PeftLoraConfig(**CONFIG, init_lora_weights=False)
        )
        self.dirs = [folder / "one", folder / "two"]
        for i, d in enumerate(self.dirs):
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for name, p in self.peft.named_parameters():
                    if "lora_" in name:
                        p.copy_(torch.randn(p.shape, generator=g) * 0.02)
            self.peft.save_pretrained(str(d))
        self.program = adaptc.compile(self.base, str(self.dirs[1]))
        self.peft.eval()

    def check(self) -> None:
        """The three compute the same, or their times mean nothing."""
        with torch.no_grad():
            ours, theirs = self.program(**tokens(2, 9)).logits, self.peft(**tokens(2, 9)).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def forward(sides: Sides, rounds: int) -> list[Row]:
    rows: list[Row] = []
    unloaded = adaptc.unload(sides.program)
    for work, inputs, n in (("decode 1x1", tokens(1, 1), rounds * 3), ("prefill 1x128", tokens(1, 128), rounds)):

        def no_grad(fn: Callable[..., object], inputs: dict[str, torch.Tensor] = inputs) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    fn(**inputs)

            return run

        rows += interleave(
            f"{work}, eager",
            {
                "transformers base": no_grad(sides.base),
                "captured base": no_grad(unloaded),
                "PEFT": no_grad(sides.peft),
                "adaptc": no_grad(sides.program),
            },
            "transformers base",
            n,
        )
    return rows


def swapping(sides: Sides, rounds: int) -> list[Row]:
    file = sides.dirs[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    prepared = [sides.program.bind(str(d)).binding for d in sides.dirs]
    turn = {"n": 0}

    def next_dir() -> str:
        turn["n"] += 1
        return str(sides.dirs[turn["n"] % 2])

    def next_binding() -> object:
        turn["n"] += 1
        return prepared[turn["n"] % 2]

    sides.peft.load_adapter(str(sides.dirs[1]), adapter_name="other")
    names = ["default", "other"]

    def set_adapter() -> None:
        turn["n"] += 1
        sides.peft.set_adapter(names[turn["n"] % 2])

    def load_adapter() -> None:
        sides.peft.load_adapter(next_dir(), adapter_name="fresh")
        sides.peft.delete_adapter("fresh")

    rows = interleave(
        "swap to a prepared adapter",
        {"PEFT set_adapter": set_adapter, "adaptc swap(binding)": lambda: adaptc.swap(sides.program, next_binding())},
        "PEFT set_adapter",
        rounds * 3,
    )
    sides.peft.set_adapter("default")
    sides.peft.delete_adapter("other")
    rows += interleave(
        "swap from tensors in memory",
        {"adaptc swap(state dict)": lambda: adaptc.swap(sides.program, tensors)},
        "adaptc swap(state dict)",
        rounds,
    )
    rows += interleave(
        "swap from disk",
        {
            "safetensors load_file alone": lambda: load_file(file),
            "the same into memory of its own": lambda: load(Path(file).read_bytes()),
            "PEFT hotswap_adapter": lambda: hotswap_adapter(sides.peft, next_dir(), adapter_name="default"),
            "PEFT load_adapter + delete_adapter": load_adapter,
            "adaptc swap(directory)": lambda: adaptc.swap(sides.program, next_dir()),
        },
        "safetensors load_file alone",
        rounds,
    )
    return rows


def merging(sides: Sides, rounds: int) -> list[Row]:
    def peft_cycle() -> None:
        sides.peft.merge_adapter()
        sides.peft.unmerge_adapter()

    return interleave(
        "merge and unmerge 210 sites",
        {"PEFT": peft_cycle, "adaptc": lambda: adaptc.unmerge(adaptc.merge(sides.program))},
        "PEFT",
        max(3, rounds // 3),
        warmup=1,
    )


def training(sides: Sides, rounds: int) -> list[Row]:
    program = adaptc.compile(sides.base, LoraConfig(**CONFIG), training=True)
    batch = {**tokens(4, 64), "labels": tokens(4, 64)["input_ids"]}
    half = {**batch, "labels": batch["labels"].clone()}
    half["labels"][:, :32] = -100  # prompts, as long as what answers them

    def step(model: nn.Module, batch: dict[str, torch.Tensor], autocast: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    sides.peft.train()
    module, labelled = program.module(), program.module(logits="labelled")
    rows: list[Row] = []
    for work, sided in (
        ("training step 4x64", {"PEFT": step(sides.peft, batch), "adaptc": step(module, batch)}),
        (
            f"the same, half of the labels ignored ({memory({'PEFT': sides.peft, 'adaptc': labelled}, half)})",
            {"PEFT": step(sides.peft, half), "adaptc, logits='labelled'": step(labelled, half)},
        ),
        (
            "the same in bfloat16 autocast",
            {"PEFT": step(sides.peft, batch, True), "adaptc": step(module, batch, True)},
        ),
    ):
        rows += interleave(work, sided, "PEFT", max(5, rounds // 3), warmup=1)
    sides.peft.gradient_checkpointing_enable({"use_reentrant": False})
    again = {"PEFT": sides.peft, "adaptc": program.module(gradient_checkpointing=True)}
    rows += interleave(
        f"the same with gradient checkpointing ({memory(again, batch)})",
        {name: step(model, batch) for name, model in again.items()},
        "PEFT",
        max(5, rounds // 3),
        warmup=1,
    )
    sides.peft.gradient_checkpointing_disable()
    sides.peft.eval()
    return rows


def memory(models: Mapping[str, nn.Module], batch: dict[str, torch.Tensor]) -> str:
    """The most memory that a step takes above what there is before it."""
    return ", ".join(f"{name} {peak(model, batch) / 2**20:.0f} MB at its peak" for name, model in models.items())


def peak(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward and a backward hold at once, at most, as torch's profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    model(**batch).loss.backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model(**batch).loss.backward()
    model.zero_grad()
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def run(sides: Sides, rounds: int = 15) -> list[Row]:
    sides.check()
    return [*forward(sides, rounds), *swapping(sides, rounds), *merging(sides, rounds), *training(sides, rounds)]
