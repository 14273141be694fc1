"""Promise 4: changes are computed in float32 and rounded once; the report has each weight's largest change and largest
rounding error, and ``verify`` compares outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig

SIZES = [(7, 11), (11, 5), (5, 9)]


def compiled(dtype: torch.dtype, scale: float = 1.0) -> tuple[nn.Module, adaptc.AdaptedProgram]:
    torch.manual_seed(4)
    net = nn.Sequential(*(nn.Linear(*s) for s in SIZES)).to(dtype).eval()
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["0", "2"], init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=torch.randn(3, 7, dtype=dtype))
    with torch.no_grad():
        for name, t in program.binding.values.items():
            if "lora_B" in name:
                t.mul_(scale)
    return net, program


def exact(net: nn.Module, program: adaptc.AdaptedProgram, site: str) -> tuple[Tensor, Tensor]:
    """The changed weight in float64, and the change."""
    v = {k: t.double() for k, t in program.binding.values.items()}
    change = 2 / 3 * v[f"{site}.lora_B.default.weight"] @ v[f"{site}.lora_A.default.weight"]
    return net.get_submodule(site).weight.double() + change, change


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_report_is_what_a_computation_in_float64_says(dtype: torch.dtype, scale: float) -> None:
    net, program = compiled(dtype, scale)
    merged = adaptc.merge(program)
    rows = {row.fqn: row for row in merged.merge_report.sites}
    assert set(rows) == {"0.weight", "2.weight"}
    for site in ("0", "2"):
        wanted, change = exact(net, program, site)
        found = merged.state_dict[f"{site}.weight"]
        assert found.dtype == dtype
        row = rows[f"{site}.weight"]
        assert row.delta == pytest.approx(float(change.detach().abs().max()), rel=1e-5)
        if dtype in (torch.bfloat16, torch.float16):
            # Rounded once: what comes is the nearest number there is.
            assert torch.equal(found, wanted.float().to(dtype))
            error = float((found.double() - wanted).detach().abs().max())
            assert row.error == pytest.approx(error, rel=1e-3)
            assert row.error > 0
        else:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
            assert row.error <= float(torch.finfo(dtype).eps) * float(wanted.detach().abs().max())
    text = str(merged.merge_report)
    assert "0.weight" in text
    assert "largest rounding error" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_compares_outputs_and_can_fail(dtype: torch.dtype) -> None:
    net, program = compiled(dtype)
    report = adaptc.verify(program, net)
    assert report.ok, str(report)
    assert [c.passed for c in report.checks] == [True] * 4
    with torch.no_grad():
        net.get_submodule("1").weight = nn.Parameter(net.get_submodule("1").weight * 1.5)  # no longer the program's
    wrong = adaptc.verify(program, net)
    assert not wrong.ok
    assert [c.name for c in wrong.checks if c.passed is False] == ["base equals model"]
