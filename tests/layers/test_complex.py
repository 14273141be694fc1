"""Complex layers: what PEFT makes of them, imaginary parts and all, or a refusal by name."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from tests.support.method_table import BY_NAME
from tests.support.subject import assert_valid, quiet

#: defined by lengths, orders, real transforms and rotations
REAL = (
    *("dora", "oft", "boft", "hra", "vblora", "fourierft", "waveft", "c3a", "delora", "peanut", "deft"),
    *("pvera", "tinylora", "frod"),
)
KEPT = (
    *("lora", "ia3", "ia3_inputs", "road", "road_4", "loha", "lokr", "miss", "miss_bat"),
    *("vera", "randlora", "shira", "hira", "gralora", "unilora"),
)


class Net(torch.nn.Module):
    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(*widths, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model(name: str) -> Net:
    torch.manual_seed(2)
    return Net(BY_NAME[name].widths).eval()


def values(parameters: dict[str, Tensor]) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for p in parameters.values():
            if p.is_complex():
                p.copy_(torch.randn_like(p) * 0.5)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", KEPT)
def test_as_peft(name, tmp_path):
    entry, base = BY_NAME[name], model(name)
    x = torch.randn(3, entry.widths[0], dtype=torch.complex64)
    with quiet():
        wrapped = peft.get_peft_model(
            copy.deepcopy(base), getattr(peft, entry.cls)(target_modules=["layer"], **entry.config)
        ).eval()
        values({n: p for n, p in wrapped.named_parameters() if p.requires_grad})
        wrapped.save_pretrained(str(tmp_path))
        expected = wrapped(x).detach()
        theirs = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    program = adaptc.compile(base, tmp_path, example_inputs=x)
    assert_valid(program)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(program(x), expected, **close)
    merged = adaptc.merge(program)
    for key, value in theirs.items():
        torch.testing.assert_close(merged.state_dict[key], value, **close)
        moved = (merged.state_dict[key] - base.state_dict()[key]).imag.abs().max()
        assert float(moved) > 1e-2 or (key.endswith("bias") and torch.equal(value, base.state_dict()[key]))
    torch.testing.assert_close(merged(x), expected, **close)
    back = adaptc.unmerge(merged)
    assert all(torch.equal(back.state_dict[k], t) for k, t in program.state_dict.items())
    (site,) = merged.merge_report.sites
    assert site.delta > 1e-2


@pytest.mark.few(4)
@pytest.mark.parametrize("name", REAL)
def test_refused_by_name(name):
    entry = BY_NAME[name]
    config = getattr(adaptc, entry.cls)(target_modules=["layer"], **entry.config)
    with pytest.raises(adaptc.TargetError, match=r"layer\.weight.*real weights.*complex64"):
        adaptc.compile(model(name), config, example_inputs=torch.randn(3, entry.widths[0]).cfloat())


def test_adapters_of_complex_layers_are_trained():
    x = torch.randn(3, 15, dtype=torch.complex64)
    program = adaptc.compile(
        model("lora"), adaptc.LoraConfig(r=3, target_modules=["layer"]), example_inputs=x, training=True
    )
    module = program.module()
    module(x).abs().sum().backward()
    trained = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(g is not None for g in trained.values())
