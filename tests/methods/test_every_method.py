"""Every method at every kind of layer it has a meaning for: the table crossed with the checks."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.support.method_checks import CHECKS, cases, refusals
from tests.support.method_table import BY_NAME, ENTRIES
from tests.support.subject import Subject, adapter_parameters, assert_close, subject


@pytest.mark.long
@pytest.mark.few(160)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("entry", "layer"), cases())
def test_method(check, entry, layer, tmp_path):
    check(subject(entry, layer), tmp_path)


@pytest.mark.long
def test_refused_by_name():
    found = [*refusals()]
    assert found
    for entry, layer in found:
        s = Subject(BY_NAME[entry], layer)
        with pytest.raises((adaptc.TargetError, adaptc.ConfigError), match="layer"):
            s.compile(s.config())


@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_reports_and_verification(entry, tmp_path):
    """The report names the method, its tensors and why it stands where it does; the program verifies as its model."""
    s = subject(entry, "linear")
    report = adaptc.report(s.program)
    (site,) = report.sites
    a = s.attachment
    assert (site.method, site.form, site.why) == (a.method.name, a.form, a.why)
    assert site.why
    saved = {n for n, slot in a.method.slots(s.program.ops[a.id]).items() if slot.trainable}
    assert saved <= set(site.slots)
    assert site.params == sum(t.numel() for t in adapter_parameters(s.program).values()) > 0
    text = str(report)
    assert all(name in text for name in saved)
    verified = adaptc.verify(s.program, s.base)
    assert verified.ok, str(verified)


@pytest.mark.few(8)
@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_a_subset_of_the_sites(entry, tmp_path):
    """A program for two layers takes an adapter of one of them: the other computes the base."""
    s = subject(entry, "linear")
    torch.manual_seed(3)
    pair = Pair(*s.entry.widths).double().eval()
    pair.load_state_dict({"layer.weight": s.base.layer.weight, "layer.bias": s.base.layer.bias}, strict=False)
    x = s.args(5)
    program = adaptc.compile(pair, s.config(target_modules=["layer", "other"]), example_inputs=s.args(3))
    adaptc.swap(program, s.directory)
    with torch.no_grad():
        expected = s.program(*x) + torch.tanh(pair.other(*x))
    assert_close(program(*x), expected, 1e-9)
    if s.entry.has_weight_form:
        assert_close(adaptc.merge(program)(*x), expected, 1e-9)


class Pair(torch.nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layer, self.other = torch.nn.Linear(i, o), torch.nn.Linear(i, o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) + torch.tanh(self.other(x))
