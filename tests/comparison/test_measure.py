"""What a run costs is measured, not guessed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import adaptc
from tests.comparison.measure import file_bytes, machine, peak_bytes, reset_peak, swap_seconds

BLOCK = 300 * 2**20


def reset_by_the_system() -> bool:
    """Begin the peak anew, and return whether the system lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def test_the_peak_is_that_since_the_reset() -> None:
    reset_peak()
    before = peak_bytes()
    block = torch.ones(BLOCK, dtype=torch.uint8)
    assert peak_bytes() >= before + BLOCK * 0.9
    del block
    assert peak_bytes() >= before + BLOCK * 0.9
    reset_peak()
    found = peak_bytes()
    if reset_by_the_system():
        assert found < peak_bytes() + BLOCK / 2


def test_bytes_are_those_of_all_tensors_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for name, count in (("adapter_model.safetensors", 71), ("0/adapter_model.safetensors", 13), ("README.md", 1000)):
        (tmp_path / name).write_bytes(b"x" * count)
    assert file_bytes(tmp_path) == 84


def test_a_swap_that_is_timed_is_a_swap(tmp_path: Path) -> None:
    config = adaptc.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    x = torch.randn(2, 5)
    net, generator = nn.Sequential(nn.Linear(5, 7)), torch.Generator()
    one, other = (
        adaptc.compile(net, config, example_inputs=x, generator=generator.manual_seed(seed)) for seed in range(2)
    )
    adaptc.save_adapter(other, tmp_path)
    assert swap_seconds(one, tmp_path) > 0
    found, expected = (next(iter(p.module().state_dict().values())) for p in (one, other))
    torch.testing.assert_close(found, expected)


def test_the_machine_is_told() -> None:
    assert machine()["threads"] == torch.get_num_threads()
    assert machine()["cpu"]
