"""Whole programs on the GPU, next to PEFT: outputs, a swap to another rank, merging, and merging undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.gpu.cases import BF16, DEVICE, F32, bits
from tests.gpu.tiny import TARGETS, peft_model, tiny_llama, tokens

pytest.importorskip("peft")

#: relative to the norm of the outputs
ALLOWED = {F32: 1e-5, BF16: 2e-2}
backends = pytest.mark.parametrize("backend", ["eager", "inductor"])


def _logits(model: Any, rows: int, length: int) -> Tensor:
    with torch.no_grad():
        return model(**tokens(rows, length, DEVICE)).logits


def _check_same(ours: Any, theirs: Any, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> None:
    for rows, length in shapes:
        found, expected = _logits(ours, rows, length), _logits(theirs, rows, length)
        assert found.dtype == expected.dtype == dtype
        assert found.device.type == DEVICE.type
        assert (found.double() - expected.double()).norm() <= ALLOWED[dtype] * expected.double().norm()


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_next_to_peft_and_swapped_to_another_rank(backend, dtype, tmp_path: Path) -> None:
    base = tiny_llama().to(DEVICE, dtype)
    first, second = (peft_model(base, rank, tmp_path / str(rank)) for rank in (4, 16))
    program = adaptc.compile(base, str(tmp_path / "4"), backend=backend)
    # An adapter that changed nothing would pass what follows.
    assert (_logits(first, 2, 9) - _logits(base, 2, 9)).norm() > 2 * ALLOWED[dtype] * _logits(base, 2, 9).norm()
    _check_same(program, first, dtype, ((2, 9), (1, 40)))
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, str(tmp_path / "16"))
        _check_same(program, second, dtype, ((2, 9), (1, 40), (3, 17)))
        adaptc.swap(program, str(tmp_path / "4"))
        _check_same(program, first, dtype, ((2, 9),))
    _check_same(program.base, base, dtype, ((2, 9),))


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_merged_and_unmerged_bit_by_bit(backend, dtype, tmp_path: Path) -> None:
    base = tiny_llama().to(DEVICE, dtype)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    theirs = peft_model(base, 4, tmp_path)
    program = adaptc.compile(base, str(tmp_path), backend=backend)
    adapted = _logits(program, 2, 9)
    merged = adaptc.merge(program)
    _check_same(merged, theirs.merge_and_unload(), dtype, ((2, 9), (1, 40)))
    back = adaptc.unmerge(merged)
    assert torch.equal(bits(_logits(back, 2, 9)), bits(adapted))
    state = back.state_dict
    assert all(torch.equal(bits(state[name]), bits(t)) for name, t in before.items())
    assert all(torch.equal(bits(t), bits(before[name])) for name, t in base.state_dict().items())


def test_trained_like_peft(tmp_path: Path) -> None:
    base = tiny_llama().to(DEVICE)
    theirs = peft_model(base, 4, tmp_path)
    program = adaptc.compile(base, str(tmp_path), training=True)
    module = program.module()
    batch = tokens(3, 17, DEVICE)
    batch["labels"] = batch["input_ids"]
    theirs.train()
    losses = [model(**batch).loss for model in (module, theirs)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    ours = sorted(p.grad.norm().item() for p in module.parameters() if p.grad is not None)
    expected = sorted(p.grad.norm().item() for p in theirs.parameters() if p.grad is not None)
    assert len(ours) == 2 * len(TARGETS) * 2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_kernels_run_what_the_graph_says_and_can_be_written_into_it(dora, tmp_path: Path) -> None:
    base = tiny_llama().to(DEVICE)
    config = adaptc.LoraConfig(r=5, target_modules=TARGETS, use_dora=dora, init_lora_weights=False, inference_mode=True)
    program = adaptc.compile(base, config, form="apply")
    program.kernels = DEVICE.type != "cuda" or None
    graph = program.module()
    _check_same(program, graph, F32, ((2, 9), (1, 3)))
    assert program.fusion.kernels == len(program.adaptation.attachments)
    if DEVICE.type == "cuda":
        adaptc.save(adaptc.debug.lower(program), tmp_path / "low.pt2")
        loaded = adaptc.load(tmp_path / "low.pt2")
        assert [n for n in loaded.graph.nodes if str(n.target).startswith("adaptc.")]
        _check_same(loaded, graph, F32, ((2, 9), (1, 3)))
        _check_same(adaptc.unload(loaded), base, F32, ((2, 9),))


@backends
def test_calls_replayed_as_cuda_graphs(backend, tmp_path: Path) -> None:
    base = tiny_llama().to(DEVICE)
    theirs = [peft_model(base, rank, tmp_path / str(seed), seed=seed) for seed, rank in enumerate((4, 4, 16))]
    if DEVICE.type != "cuda":
        with pytest.raises(adaptc.errors.BackendError, match="needs a base on one CUDA device"):
            adaptc.compile(base, str(tmp_path / "0"), backend=backend, cuda_graphs=True)
        return
    program = adaptc.compile(base, str(tmp_path / "0"), backend=backend, cuda_graphs=True)
    for _ in range(2):
        for seed, peft in enumerate(theirs):
            adaptc.swap(program, str(tmp_path / str(seed)))
            for _ in range(3):
                _check_same(program, peft, F32, ((2, 9), (1, 1)))
    assert program.recorded.count >= 4
    assert not program.recorded.reasons
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _check_same(program, theirs[-1], F32, ((2, 9),))
    stream.synchronize()
