"""Promise 3: unmerging gives back every bit, after any number of cycles, in any dtype, with any method."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.support.method_table import BY_NAME
from tests.support.subject import Subject, base_model_and_program, save_random_adapter

METHODS = ["lora", "dora", "oft", "ia3", "fourierft", "lokr", "shira"]


def bits(t: torch.Tensor) -> torch.Tensor:
    """So that two NaNs are equal, and 0 is not -0."""
    return t.detach().contiguous().view(torch.uint8) if t.ndim else t.detach().reshape(1).view(torch.uint8)


@pytest.mark.few(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d_odd", "conv2d_groups"])
@pytest.mark.parametrize("method", METHODS)
def test_every_bit_comes_back(method: str, layer: str, dtype: torch.dtype, tmp_path) -> None:
    entry = BY_NAME[method]
    if layer not in entry.layers():
        layer = "linear"
    s = Subject(entry, layer)
    adapter = save_random_adapter(s, s.config(), tmp_path)
    program = adaptc.compile(base_model_and_program(layer, entry.widths, dtype)[1], adapter)
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in s.args(3))
    before, expected = {k: v.clone() for k, v in program.state_dict.items()}, program(*args)
    current, outputs = program, []
    for _ in range(5):
        merged = adaptc.merge(current)
        outputs.append(merged(*args))
        current = adaptc.unmerge(merged)
    assert set(current.state_dict) == set(before)
    for name, t in current.state_dict.items():
        assert torch.equal(bits(t), bits(before[name])), name
    assert torch.equal(bits(current(*args)), bits(expected))
    assert all(torch.equal(bits(o), bits(outputs[0])) for o in outputs)
    assert not torch.equal(outputs[0], adaptc.unload(current)(*args))
