"""A whole model's forward pass with one adapter: transformers, PEFT, PEFT compiled, and adaptc with both backends.

One adaptc program records its calls as CUDA graphs by itself (``cuda_graphs=True``).

Times are of the wall clock around a call and the wait for it, since a small model's decoding is the launches' time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adaptc
from adaptc.runtime.calls.recorded_calls import CudaGraphs
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.model import RANK
from tests.gpu.suite import Compile
from tests.gpu.timing import captured as capture
from tests.gpu.tiny import peft_model, tokens

BASE = "transformers base"
#: calls of it are replays already, copies of inputs and outputs included
RECORDED = "adaptc, eager, cuda_graphs=True"
#: of the adapters that are swapped in, in this order
SWAPPED_RANKS = (16, 8, 32, 64)
#: what outputs may differ by, relative to their norm
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Result:
    """``swaps``: (rank, milliseconds of a swap to it and of the first call after it), in the order they were made."""

    rows: list[Row]
    swaps: list[tuple[int, float]]


def run(
    model: nn.Module, device: torch.device, dtype: torch.dtype, works: Mapping[str, tuple[int, int]],
    rounds: int, compiled: Compile, captured: bool = False,
) -> Result:  # fmt: skip
    """``works``: name -> rows and length of the input. With ``captured`` a call is the replay of a CUDA graph.

    Raises AssertionError where outputs differ, and RecompileError where a swap compiles something.
    """
    base: Any = model.to(device, dtype)
    vocabulary = int(base.config.vocab_size)
    # All of it in the base's type. By default PEFT, and adaptc as PEFT, would keep the adapter in float32.
    options = {"autocast_adapter_dtype": False}
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft_model(base, RANK, folder, **options)
        ours = {b: adaptc.compile(base, folder, backend=b, **options) for b in ("eager", "inductor")}
        recorded = adaptc.compile(base, folder, cuda_graphs=device.type == "cuda", **options)
    for p in theirs.parameters():
        p.requires_grad_(False)
    bound = {name: p.bind(p.binding, form="apply") for name, p in ours.items()}
    candidates: dict[str, Callable[..., Any]] = {
        BASE: base,
        "PEFT": theirs,
        "PEFT, compiled": compiled(theirs),
        "adaptc, eager": bound["eager"],
        "adaptc, inductor": bound["inductor"],
        RECORDED: recorded.bind(recorded.binding, form="apply"),
    }
    rows: list[Row] = []
    for work, shape in works.items():
        inputs = tokens(*shape, device, vocabulary)
        check(candidates, inputs, ALLOWED[dtype])
        calls = {n: _timed(c, inputs, device, captured and n != RECORDED) for n, c in candidates.items()}
        rows += interleave(work, calls, BASE, rounds)
    if device.type == "cuda":
        check_recorded(recorded.recorded)
    inputs = tokens(*next(iter(works.values())), device, vocabulary)
    return Result(rows, list(swap_times(ours["eager"], inputs, device)))


def swap_times(
    program: adaptc.AdaptedProgram, inputs: dict[str, Tensor], device: torch.device
) -> Iterator[tuple[int, float]]:
    """What swaps to adapters of other ranks take, each with the first call after it."""
    call = _timed(program, inputs, device, False)
    call()
    slots = {n.replace(".default.", "."): t for n, t in program.binding.values.items() if ".lora_" in n and t.ndim == 2}
    for rank in SWAPPED_RANKS:
        adapter = {
            n: (torch.randn(*((rank, t.shape[1]) if ".lora_A." in n else (t.shape[0], rank)), device=device) / 999).to(
                t
            )
            for n, t in slots.items()
        }
        with adaptc.debug.assert_no_recompiles():
            start = time.perf_counter()
            adaptc.swap(program, adapter)
            call()
            yield rank, (time.perf_counter() - start) * 1e3


def _timed(
    call: Callable[..., Any], inputs: dict[str, Tensor], device: torch.device, captured: bool
) -> Callable[[], None]:
    """A call and the wait for it, or the replay of one as a CUDA graph where there is a GPU."""
    if captured and device.type == "cuda":
        with torch.no_grad():
            graph, kept = capture(lambda: call(**inputs).logits)

        def replay(kept: Any = kept) -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay
    return synchronized(call, inputs, device)


def check(candidates: Mapping[str, Callable[..., Any]], inputs: dict[str, Tensor], allowed: float) -> None:
    """All but the base compute the same, or their times mean nothing."""
    with torch.no_grad():
        logits = {name: call(**inputs).logits.double() for name, call in candidates.items() if name != BASE}
    expected = logits["PEFT"]
    for name, found in logits.items():
        apart = float((found - expected).norm() / expected.norm())
        # Not `apart > allowed`, which a NaN is not.
        if not apart <= allowed:
            raise AssertionError(f"{name}: logits differ from PEFT's by {apart:.1e} of their norm")


def check_recorded(graphs: CudaGraphs) -> None:
    """Raise AssertionError where no call was replayed: its times would be those of plain calls."""
    if not graphs.count:
        raise AssertionError(f"{RECORDED}: no call was replayed: {graphs or 'none was recorded'}")


def synchronized(call: Callable[..., Any], inputs: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run
