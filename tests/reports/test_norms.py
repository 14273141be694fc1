"""Norms in the report: those of the tensors that a file holds, and of what a merge would add to each weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.reports.norms import CHANGE, Norms, SiteNorms
from tests.support.custom_models import UpDown
from tests.support.method_table import BY_NAME
from tests.support.subject import subject
from tests.support.training import CONFIG, VOCABULARY, model

#: entries that leave the weight as it is
BIAS_ALONE = ("beft", "glora_bias")


@pytest.mark.few(10)
@pytest.mark.parametrize("layer", ["linear", "conv2d_odd", "embedding"])
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_norms_are_those_of_tensors_and_of_changes(name: str, layer: str) -> None:
    s = subject(name, layer if layer in BY_NAME[name].layers() else "linear")
    prog = s.program
    before = {fqn: t.clone() for fqn, t in prog.state_dict.items()}
    (site,) = adaptc.report(prog, changes=True).norms.sites
    current = prog.state_dict
    slots = {n: current[f] for a in prog.adaptation.attachments for n, f in a.slots.items()}
    real = {n: float(t.double().norm()) for n, t in slots.items() if t.is_floating_point()}
    assert dict(site.slots) == pytest.approx(real, rel=1e-5)
    old = prog.base_tensors[site.fqn]
    merged = adaptc.merge(prog).state_dict[site.fqn] if s.entry.has_weight_form else None
    if merged is None:
        assert site.change is None
    elif merged.shape == old.shape:
        assert site.change == pytest.approx(float((merged - old).norm()), rel=1e-9)
        assert site.weight == pytest.approx(float(old.norm()), rel=1e-9)
        assert bool(site.change) is (name not in BIAS_ALONE)
    assert all(torch.equal(current[fqn], t) for fqn, t in before.items()), "nothing is changed"


@pytest.mark.long
def test_sites_that_were_not_trained_show() -> None:
    prog = adaptc.compile(model(), LoraConfig(**CONFIG), training=True)
    assert all(
        s.slots["lora_B.weight"] == 0 and s.relative_change == 0 for s in adaptc.report(prog, changes=True).norms.sites
    )
    module = prog.module()
    optimizer = torch.optim.SGD([p for n, p in module.named_parameters() if p.requires_grad and "q_proj" in n], lr=1.0)
    ids = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    report = adaptc.report(prog, changes=True)
    trained = {s.fqn: s.slots["lora_B.weight"] > 0 and (s.relative_change or 0) > 0 for s in report.norms.sites}
    assert trained == {fqn: "q_proj" in fqn for fqn in trained}
    assert any(trained.values())
    assert all(s.change is None for s in adaptc.report(prog).norms.sites), "not computed unasked"


def test_the_table_tells_the_layer_of_the_smallest_and_the_largest() -> None:
    sites = [
        SiteNorms(f"h.{i}.q.weight", {"lora_A.weight": 1.0 + i, "lora_B.weight": 5.0 - i}, 2.0, 4.0) for i in (0, 1, 2)
    ]
    rows = [line.split() for line in str(Norms(tuple(sites))).splitlines()[2:]]
    assert rows == [
        ["h.{0..2}.q", "x3", "lora_A.weight", "2.00e+00", "1.00e+00", "0", "3.00e+00", "2"],
        ["lora_B.weight", "4.00e+00", "3.00e+00", "2", "5.00e+00", "0"],
        [*CHANGE.split(), "5.00e-01", "5.00e-01", "0", "5.00e-01", "0"],
    ]
    assert str(Norms()) == ""


def test_the_report_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    prog = adaptc.compile(UpDown(), LoraConfig(r=3, target_modules=["up"]), example_inputs=torch.randn(2, 3, 7))
    text = str(adaptc.report(prog))
    assert "norm of" in text
    assert CHANGE not in text
    assert CHANGE in str(adaptc.report(prog, changes=True))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_changes_is_a_flag(value: Any) -> None:
    prog = adaptc.compile(UpDown(), LoraConfig(r=3, target_modules=["up"]), example_inputs=torch.randn(2, 3, 7))
    with pytest.raises(adaptc.ConfigError, match="changes"):
        adaptc.report(prog, changes=value)


def test_adapters_that_act_together_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(5, 7))
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    program = adaptc.compile(net, {"a": config, "b": config.replace(r=2)}, example_inputs=torch.randn(2, 5))
    report = adaptc.report(program, changes=True)
    data = report.to_dict()
    assert [(s["fqn"], s["adapter"], s["rank"]) for s in data["sites"]] == [("0.weight", "a", 3), ("0.weight", "b", 2)]
    assert list(data["norms"]) == ["0.weight (a)", "0.weight (b)"]
    for name, norms in data["norms"].items():
        values = program.binding.joint_adapters[name[-2]].values
        wanted = next(t for k, t in values.items() if "lora_A" in k).detach().norm()
        assert norms["slots"]["lora_A.weight"] == pytest.approx(float(wanted))
    text = str(report)
    assert "lora (a)" in text
    assert "0 (b)" in text
