"""Layers divided among processes compute, learn and are saved as in one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc import AdaptcError
from adaptc.distributed import load_state, shard_tensors
from tests.distributed.models import grouped_llama, optimizer_of
from tests.distributed.tensor_jobs import CASES, half, own_program, train, trained_of
from tests.ecosystem.two_processes import together

JOBS = "tests.distributed.tensor_jobs"


@functools.cache
def alone(name: str) -> tuple[dict[str, Any], Any]:
    module = own_program(name).module().train()
    return train(module, optimizer_of(trained_of(module))), module


def equals_one_process(found: dict[str, Any], name: str) -> None:
    expected, module = alone(name)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    for key in ("losses", "norms", "gradients", "logits"):
        close(found[key], expected[key])
    assert all(g.any() for g in found["gradients"].values())
    close(found["adapter"], dict(module.state_dict()))


@pytest.mark.long
def test_two_processes_equal_one(tmp_path: Path) -> None:
    found = together(tmp_path, "all_cases", jobs=JOBS)["all_cases"]
    assert found.keys() == CASES.keys()
    for name, one in found.items():
        equals_one_process(one, name)
        adaptc.swap(own_program(name), tmp_path / f"{name}-2")
    sizes = {n: p.numel() for n, p in alone("lora")[1].named_parameters()}
    held = found["lora"]["held"]
    whole = {n for n, size in sizes.items() if held[n] == size}
    assert all(held[n] * 2 == size for n, size in sizes.items() if n not in whole)
    first = [n.removeprefix("model.layers.0.") for n in whole if ".layers.0." in n]
    col = [f"self_attn.{x}_proj.lora_A" for x in "qkv"] + [f"mlp.{x}_proj.lora_A" for x in ("gate", "up")]
    row = [f"{x}.{n}" for x in ("self_attn.o_proj", "mlp.down_proj") for n in ("lora_B.default.weight", "bias")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    assert sorted(first) == sorted([f"{n}.default.weight" for n in col] + row + norms)


@pytest.mark.long
def test_four_processes_equal_one(tmp_path: Path) -> None:
    equals_one_process(together(tmp_path, "four", jobs=JOBS, processes=4)["four"]["queries"], "queries")


@pytest.mark.long
def test_adapters_states_and_bases_go_into_shards(tmp_path: Path) -> None:
    grouped_llama().save_pretrained(tmp_path / "base")
    found = together(tmp_path, "swapped", "states", "streamed", "dropout", jobs=JOBS)
    # The norms of the model in files round to float32.
    torch.testing.assert_close(found["streamed"]["losses"], alone("lora")[0]["losses"][:2], rtol=1e-6, atol=0)
    # One process goes on from the state of two.
    module = own_program(seed=4).module().train()
    optimizer = optimizer_of(trained_of(module))
    assert load_state(tmp_path / "states", module, optimizer) == (3, {})
    torch.testing.assert_close(train(module, optimizer, 2)["losses"], found["states"]["losses"], rtol=1e-9, atol=0)


@pytest.mark.long
def test_half_precision(tmp_path: Path) -> None:
    """Sums of two processes are rounded to bfloat16 once more, by up to 2 ** -8. Gradients take several in a row."""
    found, expected = together(tmp_path, "half", jobs=JOBS)["half"], half(tmp_path)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=2**-8, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=2**-6, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, g in expected["gradients"].items():
        assert g.dtype == torch.float32
        assert (found["gradients"][name] - g).norm() <= 2**-5 * g.norm(), name


@pytest.mark.long
def test_what_cannot_be_sharded_is_refused_by_name(tmp_path: Path) -> None:
    assert together(tmp_path, "refused", jobs=JOBS) == {"refused": {}}


def test_processes_are_needed() -> None:
    with pytest.raises(AdaptcError, match=r"needs its processes: call torch.distributed.init_process_group"):
        shard_tensors(None, None)  # type: ignore[arg-type]
