"""Cosines and ranks of adapters' changes are those of PEFT's own changes, and LoRA's factors are not multiplied out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.passes.protocol.parts.low_rank import LowRank

SITES = ["0", "2", "3"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=SITES, init_lora_weights=False),
    "ranks": LoraConfig(r=2, rank_pattern={"2": 4}, target_modules=["0", "2"], init_lora_weights=False),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["0", "2"], init_lora_weights=False),
    "loha": adaptc.LoHaConfig(r=2, target_modules=SITES, init_weights=False),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6), nn.Conv1d(6, 5, 3)).double().eval()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[3](self.layers[2](torch.tanh(self.layers[0](x))).mT)


X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).double()


def config_of(name: str) -> Any:
    config = CONFIGS[name]
    return config.replace(target_modules=[f"layers.{t}" for t in config.target_modules])


@pytest.fixture(scope="module")
def programs() -> dict[str, adaptc.AdaptedProgram]:
    net = Net().eval()
    return {name: adaptc.compile(net, config_of(name), example_inputs=X) for name in CONFIGS}


@pytest.fixture(scope="module")
def changes(programs: dict[str, adaptc.AdaptedProgram], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapter -> site -> what PEFT's merge adds to the weight."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for name, program in programs.items():
        path = adaptc.save_adapter(program, folder / name)
        base = Net().eval()
        merged: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)).merge_and_unload()
        found[name] = {
            f"layers.{s}": (merged.layers[int(s)].weight - base.layers[int(s)].weight).detach()
            for s in SITES
            if f"layers.{s}" in config_of(name).target_modules
        }
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_cosines_are_those_of_pefts_changes(programs: Any, changes: Any) -> None:
    report = adaptc.debug.compare_adapters(programs)
    for site in report.sites:
        for a in programs:
            for b in programs:
                if site.site in changes[a] and site.site in changes[b]:
                    expected = cosine(changes[a][site.site], changes[b][site.site])
                    assert site.cosine(a, b) == pytest.approx(expected, abs=1e-9)
                else:
                    assert site.cosine(a, b) in (None, 1.0) or a == b
    for a in programs:
        for b in programs:
            rows = [
                torch.cat([changes[n].get(f"layers.{s}", torch.zeros(1)).flatten() if f"layers.{s}" in changes[n]
                           else torch.zeros_like(changes["lora"][f"layers.{s}"]).flatten() for s in SITES])
                for n in (a, b)
            ]  # fmt: skip
            assert report.cosine(a, b) == pytest.approx(cosine(*rows), abs=1e-9)
    table = report.to_pandas()
    assert len(table) == 6 * len(report.sites)
    assert [*table.columns] == ["site", "a", "b", "cosine"]
    assert "1.000" in str(report)


def test_effective_ranks_are_those_of_pefts_changes(programs: Any, changes: Any) -> None:
    for name, program in programs.items():
        report = adaptc.debug.measure_spectra(program)
        assert [s.site for s in report.sites] == [*changes[name]]
        for site in report.sites:
            change = changes[name][site.site]
            values = torch.linalg.svdvals(change.flatten(1))
            shares = values[values > 1e-12] / values.sum()
            assert site.norm == pytest.approx(float(change.norm()), rel=1e-6)
            assert site.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-5)
            assert max(site.singular_values) == pytest.approx(float(values.max()), rel=1e-6)
    ranks = {s.site: s.rank for s in adaptc.debug.measure_spectra(programs["ranks"]).sites}
    assert ranks == {"layers.0": 2, "layers.2": 4}


def test_effective_rank_is_the_rank_of_equal_singular_values() -> None:
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["0"])
    factors = {"0.lora_A.weight": torch.eye(3, 7), "0.lora_B.weight": 5 * torch.eye(11, 3)}
    (site,) = adaptc.debug.measure_spectra(adaptc.Adapter(config, factors)).sites
    assert site.effective_rank == pytest.approx(3)
    factors["0.lora_B.weight"] = torch.zeros(11, 3)
    assert adaptc.debug.measure_spectra(adaptc.Adapter(config, factors)).sites[0].effective_rank == 0


def test_no_factors_are_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of 40,009 by 50,021 would take 8 GB."""
    monkeypatch.setattr(LowRank, "matrix", lambda _: pytest.fail("multiplied out"))
    generator, config = torch.Generator().manual_seed(0), LoraConfig(r=2, target_modules=["0"])
    one, other = (
        adaptc.Adapter(
            config,
            {
                "0.lora_A.weight": torch.randn(2, 50021, generator=generator),
                "0.lora_B.weight": torch.randn(40009, 2, generator=generator),
            },
        )
        for _ in range(2)
    )
    total = adaptc.Adapter(
        config.replace(r=4),
        {
            "0.lora_A.weight": torch.cat([a.tensors["0.lora_A.weight"] for a in (one, other)]),
            "0.lora_B.weight": torch.cat([a.tensors["0.lora_B.weight"] for a in (one, other)], 1),
        },
    )
    report = adaptc.debug.compare_adapters({"one": one, "total": total})
    assert report.cosine("one", "total") == pytest.approx(0.5**0.5, abs=0.02)
    assert adaptc.debug.measure_spectra(total).sites[0].effective_rank == pytest.approx(4, abs=0.05)


def test_adapters_of_one_program_are_compared() -> None:
    config = LoraConfig(r=3, target_modules=["layers.0"], init_lora_weights=False)
    net = Net().eval()
    joint = adaptc.compile(net, {"a": config, "b": config.replace(target_modules=["layers.2"])}, example_inputs=X)
    report = adaptc.debug.compare_adapters(joint)
    assert report.adapters == ("a", "b")
    assert report.cosine("a", "b") == 0
    assert report.sites[0].cosine("a", "b") is None


def test_directories_are_called_by_their_names(programs: Any, tmp_path: Path) -> None:
    one = adaptc.save_adapter(programs["lora"], tmp_path / "x" / "one")
    two = adaptc.save_adapter(programs["ranks"], tmp_path / "two")
    assert adaptc.debug.compare_adapters([one, str(two)]).adapters == ("one", "two")
    again = adaptc.save_adapter(programs["lora"], tmp_path / "y" / "one")
    assert adaptc.debug.compare_adapters([one, again]).adapters == (str(one), str(again))
    with pytest.raises(ConfigError, match="two adapters have the same name"):
        adaptc.debug.compare_adapters([one, one])
    with pytest.raises(ConfigError, match="give two adapters at least"):
        adaptc.debug.compare_adapters({"one": one})
    with pytest.raises(ConfigError, match="a dict of names and adapters"):
        adaptc.debug.compare_adapters(one)


def test_adapters_of_other_shapes_are_refused(programs: Any) -> None:
    config = LoraConfig(r=2, target_modules=["layers.0"])
    odd = {"layers.0.lora_A.weight": torch.ones(2, 5), "layers.0.lora_B.weight": torch.ones(11, 2)}
    with pytest.raises(ConfigError, match=r"'layers\.0'.*lora \(1, 11, 7\), odd \(1, 11, 5\)"):
        adaptc.debug.compare_adapters({"lora": programs["lora"], "odd": adaptc.Adapter(config, odd)})
