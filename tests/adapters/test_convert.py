"""LoRA of any method: exact at full rank, with the error told below, at every kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from tests.adapters.test_combine import close, deltas, randomize, weighted
from tests.support.combining import IDS, load_peft_adapter, net

TARGETS = ["up", "down"]
CONFIGS: dict[str, Any] = {
    "adalora": adaptc.AdaLoraConfig(total_step=10, init_r=3, target_modules=TARGETS),
    "boft": adaptc.BOFTConfig(boft_block_size=1, target_modules=["up"]),
    "c3a": adaptc.C3AConfig(block_size=1, target_modules=TARGETS),
    "delora": adaptc.DeloraConfig(r=3, target_modules=TARGETS),
    "dora": adaptc.LoraConfig(r=3, use_dora=True, target_modules=TARGETS),
    "fourierft": adaptc.FourierFTConfig(n_frequency=11, target_modules=TARGETS),
    "hira": adaptc.HiraConfig(r=2, target_modules=TARGETS),
    "deft": adaptc.DeftConfig(r=2, decomposition_method="qr", target_modules=TARGETS),
    "glora": adaptc.GloraConfig(r=2, target_modules=TARGETS),
    "gralora": adaptc.GraloraConfig(r=3, gralora_k=1, hybrid_r=2, target_modules=TARGETS),
    "hra": adaptc.HRAConfig(r=2, target_modules=TARGETS),
    "ia3": adaptc.IA3Config(target_modules=TARGETS, feedforward_modules=["down"]),
    "loha": adaptc.LoHaConfig(r=2, target_modules=[*TARGETS, "mix"]),
    "lokr": adaptc.LoKrConfig(r=2, target_modules=TARGETS),
    "lora": adaptc.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["table", *TARGETS, "mix", "turned"]),
    "miss": adaptc.MissConfig(r=3, target_modules=TARGETS),
    "peanut": adaptc.PeanutConfig(r=3, depth=1, target_modules=TARGETS),
    "pissa": adaptc.LoraConfig(r=3, init_lora_weights="pissa", target_modules=TARGETS),
    "vera": adaptc.VeraConfig(r=4, target_modules=["up"]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", list(CONFIGS))
def test_at_full_rank_it_is_the_adapter(name: str, tmp_path: Path):
    prog = adaptc.compile(net(), CONFIGS[name], example_inputs=IDS)
    randomize(prog, 1)
    path = adaptc.save_adapter(prog, tmp_path / "given")
    found = adaptc.convert_to_lora(prog, rank=99)
    assert found.report.error < 1e-6
    want = prog(IDS)
    assert not torch.allclose(want, net()(IDS), atol=1e-3)
    torch.testing.assert_close(adaptc.compile(net(), found, example_inputs=IDS)(IDS), want, rtol=1e-4, atol=1e-4)
    theirs = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "lora"))
    torch.testing.assert_close(theirs(IDS), want, rtol=1e-4, atol=1e-4)
    of_file = adaptc.convert_to_lora(path, net(), rank=99, example_inputs=IDS)
    close(deltas(of_file), deltas(found), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["loha", "dora", "lora"])
def test_the_error_that_is_told_is_the_error(name: str):
    prog = adaptc.compile(net(), CONFIGS[name], example_inputs=IDS)
    randomize(prog, 2)
    whole = deltas(adaptc.convert_to_lora(prog, rank=99))
    for rank in (1, 0.8):
        found = adaptc.convert_to_lora(prog, rank=rank)
        got = deltas(found)
        for site in found.report.sites:
            want = whole[site.site]
            error = float((got[site.site] - want).norm() / want.norm())
            assert error == pytest.approx(site.error, abs=1e-4)
            assert site.change == pytest.approx(float(want.norm()), rel=1e-3)
            s = torch.linalg.svdvals(want.flatten(1)).square()
            fewest = 1 if rank == 1 else int((s.cumsum(0) / s.sum() < rank).sum()) + 1
            assert site.rank == fewest
        assert found.report.to_dict()["error"] == found.report.error
        assert "relative error" in str(found.report)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_layers_inside_others_are_changed_once():
    """PEFT's LoRA adds itself twice at the out_proj of MultiheadAttention."""
    torch.manual_seed(1)
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    prog = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["attn"]), example_inputs=x)
    randomize(prog, 1)
    found = adaptc.convert_to_lora(prog, rank=6)
    again = adaptc.compile(model, found, example_inputs=x)
    torch.testing.assert_close(again(x), prog(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prog(x), model(x), atol=1e-2)


def test_tensors_trained_whole_stay(tmp_path: Path):
    config = adaptc.LoHaConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    prog = adaptc.compile(net(), config, example_inputs=IDS)
    randomize(prog, 4)
    found = adaptc.convert_to_lora(prog, rank=7)
    assert found.report.saved_modules == ("down",)
    theirs = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "lora"))
    torch.testing.assert_close(theirs(IDS), prog(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_adapters_of_different_methods_are_combined_by_their_changes(tmp_path: Path):
    found = {}
    for i, name in enumerate(("loha", "dora", "pissa")):
        prog = adaptc.compile(net(), CONFIGS[name], example_inputs=IDS)
        randomize(prog, i)
        found[name] = adaptc.save_adapter(prog, tmp_path / name)
    parts = [deltas(adaptc.convert_to_lora(p, net(), rank=99, example_inputs=IDS)) for p in found.values()]
    weights = (0.5, -1.0, 2.0)
    pairs = dict(zip(found.values(), weights, strict=True))
    options: dict[str, Any] = {"model": net(), "example_inputs": IDS}
    whole = adaptc.combine(pairs, svd_rank=99, **options)
    close(deltas(whole), weighted(*zip(weights, parts, strict=True)), 1e-4)
    ties = adaptc.combine(pairs, method="ties_svd", density=0.5, svd_rank=2, **options)
    assert 0 < ties.report.error < 1
    with pytest.raises(adaptc.ConfigError, match="method='cat' works on factors"):
        adaptc.combine(pairs, method="cat", **options)
    with pytest.raises(adaptc.ConfigError, match="to combine adapters of different methods give model="):
        adaptc.combine(pairs)
    with pytest.raises(adaptc.ConfigError, match=r"\(dora\) adapters do together.*give model="):
        adaptc.combine({found["dora"]: 0.5})
    with pytest.raises(adaptc.ConfigError, match=r"its first values changed the base.*give model="):
        adaptc.combine({found["pissa"]: 0.5})
    prog = adaptc.compile(net(), CONFIGS["adalora"], example_inputs=IDS)
    with pytest.raises(adaptc.ConfigError, match="what ADALORA adapters do together"):
        adaptc.combine([(prog, 1.0)])


def test_what_has_no_lora_is_refused():
    fresh = adaptc.compile(net(), adaptc.LoraConfig(r=2, target_modules=TARGETS), example_inputs=IDS)
    with pytest.raises(adaptc.ConfigError, match="changes no weight"):
        adaptc.convert_to_lora(fresh, rank=2)
    for rank in (0, -1, 0.0, 1.5, True, float("nan"), "8"):
        with pytest.raises(adaptc.ConfigError, match="must be an integer of at least 1"):
            adaptc.convert_to_lora(fresh, rank=rank)  # pyright: ignore[reportArgumentType]
    with pytest.raises(adaptc.AdaptcError, match="has no adapter"):
        adaptc.convert_to_lora(adaptc.unload(fresh), rank=2)
    with pytest.raises(adaptc.ConfigError, match="known with the model"):
        adaptc.convert_to_lora("some-directory", rank=2)
    with pytest.raises(adaptc.ConfigError, match="model goes with an adapter that is no program's"):
        adaptc.convert_to_lora(fresh, net(), rank=2)
    bounded = torch.nn.Sequential(torch.nn.Embedding(9, 5, max_norm=1.0)).eval()
    config = adaptc.LoHaConfig(r=2, target_modules=["0"], init_weights=False)
    prog = adaptc.compile(bounded, config, example_inputs=IDS % 9)
    with pytest.raises(adaptc.ConfigError, match="an embedding with max_norm"):
        adaptc.convert_to_lora(prog, rank=2)
    other = torch.nn.Sequential(torch.nn.Embedding(9, 5, max_norm=1.0))
    with pytest.raises(adaptc.ConfigError, match="an embedding with max_norm"):
        adaptc.subtract_adapter(bounded, other, rank=2)
    rows = adaptc.compile(
        net(), adaptc.TrainableTokensConfig(target_modules=["table"], token_indices=[1, 3]), example_inputs=IDS
    )
    with pytest.raises(adaptc.ConfigError, match="trains tensors of the model as they are"):
        adaptc.convert_to_lora(rows, rank=2)
