"""What fine-tuning changed, as an adapter: of modules, state dicts and files, read one tensor at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc
from adaptc.adapters import model_tensors
from tests.support.combining import IDS, load_peft_adapter, net
from tests.support.oracle import EXPECTED_WARNINGS, quiet


def tuned(base: nn.Module, rank: int, names: str, seed: int = 0) -> nn.Module:
    """The model after a change of that rank of its matrices, and of its other tensors."""
    model = copy.deepcopy(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not any(n in name for n in names.split()):
                continue
            flat = p.reshape(p.shape[0], -1) if p.ndim > 1 else p.reshape(1, -1)
            r = min(rank, *flat.shape)
            change = torch.randn(flat.shape[0], r, generator=g) @ torch.randn(r, flat.shape[1], generator=g)
            p.add_(0.2 * change.reshape(p.shape))
    return model


@pytest.mark.long
def test_a_change_of_low_rank_comes_back(tmp_path: Path):
    base = net()
    other = tuned(base, 2, "up mix turned down")
    found = adaptc.subtract_adapter(other, base, rank=2)
    assert found.report.error < 1e-5
    assert {s.site for s in found.report.sites} == {"up.weight", "mix.weight", "turned.weight", "down.weight"}
    assert found.config.lora_bias
    prog = adaptc.compile(net(), found, example_inputs=IDS)
    torch.testing.assert_close(prog(IDS), other(IDS), rtol=1e-4, atol=1e-4)
    peft_model = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "diff"))
    torch.testing.assert_close(peft_model(IDS), other(IDS), rtol=1e-4, atol=1e-4)
    table = adaptc.subtract_adapter(tuned(base, 2, "table"), base, rank=2)
    torch.testing.assert_close(
        adaptc.compile(net(), table, example_inputs=IDS)(IDS), tuned(base, 2, "table")(IDS), rtol=1e-4, atol=1e-4
    )


def test_a_rank_or_a_part_of_the_energy_is_kept():
    base = net()
    other = tuned(base, 5, "up down", seed=3)
    few = adaptc.subtract_adapter(other, base, rank=1)
    part = adaptc.subtract_adapter(other, base, rank=0.9, target_modules=["up"])
    assert 0 < few.report.error < 1
    assert part.report.kept_energy >= 0.9
    (site,) = part.report.sites
    delta = other.up.weight - base.up.weight
    s = torch.linalg.svdvals(delta.double()).square()
    assert site.rank == int((s.cumsum(0) / s.sum() < 0.9).sum()) + 1
    assert site.error == pytest.approx(float((s[site.rank :].sum() / s.sum()).sqrt()), rel=1e-3)


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, **more)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
def test_directories_of_transformers(tied: bool, tmp_path: Path):
    """In several files, with norms that changed too, and with an embedding that is the head."""
    base = llama(tie_word_embeddings=tied)
    other = tuned(base, 3, "q_proj down_proj embed_tokens norm")
    base.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    other.save_pretrained(tmp_path / "tuned", max_shard_size="9KB")
    assert (tmp_path / "base" / model_tensors.SAFE_WEIGHTS_INDEX_NAME).is_file()
    found = adaptc.subtract_adapter(tmp_path / "tuned", tmp_path / "base", rank=3)
    assert found.report.error < 1e-5
    assert len(found.report.saved_modules) == 5
    ids = torch.randint(0, 53, (2, 7))
    want = other(ids).logits
    prog = adaptc.compile(llama(tie_word_embeddings=tied), found)
    torch.testing.assert_close(prog(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)
    adaptc.save_adapter(found, tmp_path / "diff")
    with quiet(*EXPECTED_WARNINGS):
        theirs = load_peft_adapter(tmp_path / "diff", llama(tie_word_embeddings=tied))
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)
    again = adaptc.subtract_adapter(other, tmp_path / "base", rank=3)
    assert again.tensors.keys() == found.tensors.keys()


def test_one_tensor_of_each_model_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files are read as they are needed."""
    one, other = {f"{i}.weight": torch.randn(7, 5) for i in range(6)}, {}
    other = {k: t + 1 for k, t in one.items()}
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    alive: list[Any] = []
    read = model_tensors._TensorsOnDisk.__getitem__

    def reading(self: Any, key: str) -> Any:
        import weakref

        t = read(self, key)
        alive.append(weakref.ref(t))
        assert sum(r() is not None for r in alive) <= 4
        return t

    monkeypatch.setattr(model_tensors._TensorsOnDisk, "__getitem__", reading)
    found = adaptc.subtract_adapter(tmp_path / "b.safetensors", tmp_path / "a.safetensors", rank=1)
    assert found.report.error < 1e-5
    assert len(alive) == 12


def broken(kind: str, tmp_path: Path) -> tuple[Any, Any, dict[str, Any]]:
    base = net()
    state, other = base.state_dict(), tuned(base, 1, "up").state_dict()
    options: dict[str, Any] = {"rank": 2}
    if kind == "the same":
        other = state
    elif kind == "shape":
        other = other | {"up.weight": torch.ones(8, 10)}
    elif kind == "name":
        other = {k: t for k, t in other.items() if k != "down.weight"}
    elif kind == "NaN":
        other["up.weight"][1, 2] = float("nan")
    elif kind == "rank":
        options["rank"] = 0
    elif kind == "share":
        options["rank"] = 1.5
    elif kind == "no file":
        other = tmp_path / "none"
    elif kind == "no tensors":
        other = tmp_path
    elif kind == "damaged":
        (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
        other = tmp_path / "x.safetensors"
    elif kind == "index":
        (tmp_path / model_tensors.SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps({"weight_map": {"a": "gone.safetensors"}})
        )
        other = tmp_path
    elif kind == "elsewhere":
        (tmp_path / model_tensors.SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps({"weight_map": {"a": "../gone.safetensors"}})
        )
        other = tmp_path
    elif kind == "whole":
        other = dict(state) | {"norm.weight": torch.ones(3)}
        state = dict(state) | {"norm.weight": torch.zeros(3)}
        options["target_modules"] = ["norm"]
    elif kind == "model":
        other = 3
    return other, state, options


@pytest.mark.parametrize(
    ("targets", "named"),
    [(["up", "dwn"], "'dwn'"), ("up|dwn.*x", None), ("dwn.*", r"'dwn\.\*'"), (["u"], "'u'"), ([""], "''")],
)
def test_a_target_that_there_is_not_is_named(targets: Any, named: str | None):
    base = {"up.weight": torch.randn(7, 10), "down.weight": torch.randn(10, 7)}
    tuned = {n: t + 1 for n, t in base.items()}
    if named is None:
        assert adaptc.subtract_adapter(tuned, base, rank=1, target_modules=targets).tensors
        return
    with pytest.raises(adaptc.ConfigError, match=f"target_modules: {named} chooses no module that has tensors"):
        adaptc.subtract_adapter(tuned, base, rank=1, target_modules=targets)


@pytest.mark.parametrize(
    ("kind", "said"),
    {
        "the same": "no weight differs",
        "shape": r"'up.weight' has shape \(8, 10\).*\(7, 10\)",
        "name": "has 'down.weight', and a state dict has not",
        "NaN": "'up.weight' holds values that are NaN",
        "rank": "rank=0 must be an integer of at least 1",
        "share": "rank=1.5 must be",
        "no file": "there is no file or directory",
        "no tensors": "no .safetensors files",
        "damaged": "no readable safetensors file",
        "index": "lacks gone.safetensors",
        "elsewhere": "names '../gone.safetensors', and all files",
        "whole": "'norm.weight'.*no matrix that LoRA has a form for",
        "model": "a model is a module",
    }.items(),
)
def test_bad_models_are_refused(kind: str, said: str, tmp_path: Path):
    a, b, options = broken(kind, tmp_path)
    with pytest.raises(adaptc.AdaptcError, match=said):
        adaptc.subtract_adapter(a, b, **options)


@pytest.mark.parametrize("kept", ["file", "state dict"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_are_refused_where_they_differ(dtype: torch.dtype, kept: str, tmp_path: Path):
    """Beside plain weights that differ, codes that are the same, and a count that is no weight."""
    codes = torch.arange(70).reshape(7, 10).to(dtype)
    base = {"in.weight": torch.randn(7, 10), "up.weight": codes, "norm.steps": torch.tensor(3)}
    tuned = {**base, "in.weight": base["in.weight"] + 1}

    def given(state: dict[str, Tensor], name: str) -> Any:
        if kept == "state dict":
            return state
        save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    found = adaptc.subtract_adapter(given(tuned, "a"), given(base, "b"), rank=1)
    assert {k.rpartition(".lora_")[0].removeprefix("base_model.model.") for k in found.tensors} == {"in"}
    for other in (codes.flip(0), torch.randn(7, 10)):
        for a, b in (({**tuned, "up.weight": other}, base), (base, {**base, "up.weight": other})):
            with pytest.raises(adaptc.CheckpointError, match=f"'up.weight' is stored as {dtype} .*dequantise"):
                adaptc.subtract_adapter(given(a, "c"), given(b, "d"), rank=1)
