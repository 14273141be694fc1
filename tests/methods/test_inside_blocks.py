"""Layers called inside blocks of a program: every method does there what it does outside, with the same files."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows

import adaptc
from tests.support.layer_table import LAYERS
from tests.support.method_table import ENTRIES
from tests.support.subject import FILE, Subject, assert_close, assert_valid, subject, targets

BLOCKS = ("no_grad", "autocast", "cond", "map", "cond_in_no_grad")
#: torch's own, while it captures branches
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Enclosed(nn.Module):
    """A layer called inside a block."""

    def __init__(self, layer: nn.Module, block: str) -> None:
        super().__init__()
        self.layer, self.block = layer, block

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.called(x))

    def called(self, x: Tensor) -> Tensor:
        if self.block == "no_grad":
            with torch.no_grad():
                return self.layer(x)
        if self.block == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)
        if self.block == "map":
            return map_rows(lambda row: self.layer(row.unsqueeze(0)).squeeze(0), x)
        if self.block == "cond_in_no_grad":
            with torch.no_grad():
                return self.branches(x)
        return self.branches(x)

    def branches(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 10**6, lambda t: self.layer(t) * 3, lambda t: self.layer(t) + 0, (x,))


@cache
def enclosed(layer: str, widths: tuple[int, int], block: str) -> adaptc.AdaptedProgram:
    """A layer in a block, captured once and without an adapter."""
    model = Enclosed(LAYERS[layer].model(widths).layer, block)
    config = adaptc.LoraConfig(r=3, **targets(layer if layer in ("experts", "functional") else "linear"))
    if layer == "conv2d_groups":
        config = adaptc.LoHaConfig(r=3, target_modules=["layer"])
    return adaptc.unload(adaptc.compile(model, config, example_inputs=LAYERS[layer].args(widths, 3)))


def dense(s: Subject) -> bool:
    """Whether the adapter makes a grouped convolution read all its channels."""
    weight = f"layer.{s.attachment.param}"
    merged = adaptc.merge(s.program).state_dict[weight]
    return merged.shape != s.program.state_dict[weight].shape


#: every method with a meaning for weights at every layer, each in one of the blocks
WEIGHTS = [e for e in ENTRIES if e.has_weight_form]
CASES = [(e.name, n, BLOCKS[(i + j) % len(BLOCKS)]) for i, e in enumerate(WEIGHTS) for j, n in enumerate(e.layers())]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.has_weight_form], ids=lambda e: e.name)
def test_a_method_without_a_weight_has_no_place_there(entry):
    s = subject(entry.name, "linear")
    with pytest.raises(adaptc.TargetError, match=r"no form on the weight.*called inside a block"):
        adaptc.compile(enclosed("linear", entry.widths, "no_grad"), s.directory)


@pytest.mark.long
@pytest.mark.few(3)
# Of some convolutions in branches torch fixes the sizes of images.
@pytest.mark.filterwarnings("ignore:Enclosed was captured for some sizes alone. dimension [234] of input 'x' is fixed")
@pytest.mark.parametrize(("entry", "layer", "block"), CASES)
def test_as_outside(entry, layer, block, tmp_path):
    s = subject(entry, layer)
    base = enclosed(layer, s.entry.widths, block)
    lacks_bias = entry == "beft" and getattr(s.base.layer, "bias", None) is None
    if lacks_bias or dense(s):
        reason = "has no bias, so the change has no place" if lacks_bias else r"'layer\.weight.*3 groups.*block"
        with pytest.raises(adaptc.TargetError, match=reason):
            adaptc.compile(base, s.directory)
        return
    program = adaptc.compile(base, s.directory)
    assert_valid(program)
    (a,), (outside,) = program.adaptation.attachments, s.program.adaptation.attachments
    assert (a.kind, program.ops[a.id]) == (outside.kind, s.program.ops[outside.id])
    merged = adaptc.merge(program)
    assert_valid(merged)
    assert merged.state_dict.keys() == adaptc.merge(s.program).state_dict.keys()
    for name, value in adaptc.merge(s.program).state_dict.items():
        assert torch.equal(merged.state_dict[name], value), name
    back = adaptc.unmerge(merged)
    unloaded = adaptc.unload(program)
    assert_valid(unloaded)
    assert all(unloaded.state_dict[n].data_ptr() == t.data_ptr() for n, t in base.state_dict.items())
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    other = adaptc.compile(base, s.config(**s.entry.other_config))
    adaptc.swap(other, s.directory)
    assert_valid(other)
    for batch in (2, 5):
        args, expected = s.args(batch), s.program(*s.args(batch))
        for runs in (program, program.module(), merged, back, loaded, adaptc.merge(loaded), other):
            assert_close(runs(*args), expected, 1e-9)
        assert torch.equal(unloaded(*args), base(*args))
    found = load_file(adaptc.save_adapter(program, tmp_path / "adapter") / FILE)
    given = load_file(s.directory / FILE)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[k], v) for k, v in given.items())
