"""Adapters of q, k and v get the fused layer of a model, and the reverse, exactly: PEFT runs what is written."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc.errors import ConfigError
from tests.engines.adapter_directories import IDS, SIZES, load_model, model_directory
from tests.test_cli import call

pytestmark = pytest.mark.usefixtures("no_progress_bars")
EXPORT = adaptc.engines.export_adapter
#: rows of each part in the models of these tests
ROWS = {"q_proj": 24, "k_proj": 12, "v_proj": 12, "gate_proj": 37, "up_proj": 37}
ATTENTION, MLP = "self_attn", "mlp"
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@cache
def phi3_directory() -> Path:
    """A Phi 3 in float64, with fused layers of the sizes of ``model_directory``'s."""
    torch.manual_seed(0)
    sizes = {**SIZES, "pad_token_id": 0}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).double()
    model.save_pretrained(path := Path(mkdtemp()) / "phi3")
    return path


def write_adapter(path: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    modules = sorted({k.rpartition(".lora_")[0] for k in tensors})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": modules, **options}
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


def factors(name: str, rank: int, rows: int, seed: int, columns: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": 0.2 * up}


def split_adapter(path: Path, parts: tuple[str, ...], shared: bool = False, ranks: Any = None) -> Path:
    """An adapter of parts in block 1, at the names of a split model."""
    tensors: dict[str, Tensor] = {}
    for seed, part in enumerate(parts):
        name = f"model.layers.1.{MLP if part in GATE_UP else ATTENTION}.{part}"
        tensors |= factors(name, (ranks or {}).get(part, 3), ROWS[part], 0 if shared else seed)
    return write_adapter(
        path, tensors, rank_pattern=ranks or {}, alpha_pattern={"k_proj": 5} if "k_proj" in parts else {}
    )


def changed_weight(adapter: Path, part: str) -> Tensor:
    """The change of a part by PEFT's formula; zeros where the adapter has none."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    keys = [k for k in tensors if f".{part}.lora_A" in k]
    if not keys:
        return torch.zeros(ROWS[part], 24, dtype=torch.float64)
    down, up = tensors[keys[0]], tensors[keys[0].replace("lora_A", "lora_B")]
    return config["alpha_pattern"].get(part, config["lora_alpha"]) / down.shape[0] * (up @ down)


def by_hand(adapter: Path) -> Tensor:
    """The logits of Phi 3 whose fused weights have the changes of the parts, rows after rows."""
    model: Any = transformers.Phi3ForCausalLM.from_pretrained(phi3_directory()).eval()
    layer = model.model.layers[1]
    with torch.no_grad():
        for fused, parts in ((layer.self_attn.qkv_proj, QKV), (layer.mlp.gate_up_proj, GATE_UP)):
            fused.weight += torch.cat([changed_weight(adapter, part) for part in parts])
        return model(IDS).logits


def peft_logits(adapter: Path, model: Any) -> Tensor:
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        return adapted.eval()(IDS).logits


@pytest.mark.parametrize("parts", [QKV, (*QKV, *GATE_UP), ("k_proj",), ("up_proj", "v_proj", "q_proj")])
def test_parts_become_the_fused_layer(parts: tuple[str, ...], tmp_path: Path) -> None:
    adapter = split_adapter(tmp_path / "in", parts, ranks={"q_proj": 2} if "q_proj" in parts else None)
    report = EXPORT(adapter, tmp_path / "out", engine="vllm", model=phi3_directory())
    assert report.fit is not None
    assert report.fit.error == 0
    fused = transformers.Phi3ForCausalLM.from_pretrained(phi3_directory())
    torch.testing.assert_close(peft_logits(report.path, fused), by_hand(adapter), rtol=1e-12, atol=1e-12)
    tensors = load_file(report.path / "adapter_model.safetensors")
    assert {k.split(".")[-3] for k in tensors} <= {"qkv_proj", "gate_up_proj"}
    own = {p: 2 if p == "q_proj" else 3 for p in parts}
    sums = [sum(n for p, n in own.items() if p in group) for group in (QKV, GATE_UP)]
    assert report.rank == max(sums)
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    assert adaptc.engines.check_adapter(report.path, "vllm").is_as_meant


def test_b_is_block_diagonal_and_an_equal_a_is_shared(tmp_path: Path) -> None:
    apart = EXPORT(split_adapter(tmp_path / "a", QKV), tmp_path / "apart", engine="vllm", model=phi3_directory())
    up = load_file(apart.path / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    ]
    assert apart.rank == 9
    blocks = [(slice(0, 24), slice(0, 3)), (slice(24, 36), slice(3, 6)), (slice(36, 48), slice(6, 9))]
    assert all(bool(up[b].all()) for b in blocks)
    for rows, columns in blocks:
        up[rows, columns] = 0
    assert not up.any()
    same = EXPORT(split_adapter(tmp_path / "s", QKV, True), tmp_path / "same", engine="vllm", model=phi3_directory())
    assert same.rank == 3
    fused = transformers.Phi3ForCausalLM.from_pretrained(phi3_directory())
    torch.testing.assert_close(peft_logits(same.path, fused), by_hand(tmp_path / "s"), rtol=1e-12, atol=1e-12)


def test_a_fused_layer_becomes_its_parts(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.qkv_proj", 3, 48, 0) | factors(
        "model.layers.0.mlp.gate_up_proj", 3, 74, 1
    )
    adapter = write_adapter(tmp_path / "in", tensors)
    report = EXPORT(adapter, tmp_path / "out", engine="vllm", model=load_model())
    assert report.rank == 3
    by_parts: Any = load_model()
    layer = by_parts.model.layers[0]
    with torch.no_grad():
        for name, group in ((f"{ATTENTION}.qkv_proj", QKV), (f"{MLP}.gate_up_proj", GATE_UP)):
            down, up = (tensors[f"model.layers.0.{name}.lora_{x}.weight"] for x in "AB")
            changes = (7 / 3 * (up @ down)).split([ROWS[p] for p in group])
            for part, change in zip(group, changes, strict=True):
                getattr(getattr(layer, name.partition(".")[0]), part).weight += change
        expected = by_parts(IDS).logits
    torch.testing.assert_close(peft_logits(report.path, load_model()), expected, rtol=1e-12, atol=1e-12)
    names = {k.split(".")[-3] for k in load_file(report.path / "adapter_model.safetensors")}
    assert names == {*QKV, *GATE_UP}


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.qkv_proj", 3, 48, 0)
    bias = torch.arange(48, dtype=torch.float64)
    tensors["model.layers.0.self_attn.qkv_proj.lora_B.bias"] = bias
    adapter = write_adapter(tmp_path / "in", tensors, lora_bias=True)
    report = EXPORT(adapter, tmp_path / "out", engine="peft", rank=3, model=model_directory())
    found = load_file(report.path / "adapter_model.safetensors")
    biases = [found[f"base_model.model.model.layers.0.self_attn.{p}.lora_B.bias"] for p in QKV]
    torch.testing.assert_close(torch.cat(biases), 7 / 3 * bias)
    again = EXPORT(report.path, tmp_path / "again", engine="peft", rank=3, model=phi3_directory())
    found = load_file(again.path / "adapter_model.safetensors")
    torch.testing.assert_close(found["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.bias"], 7 / 3 * bias)


def test_llama_cpp_gets_the_tensors_of_the_fused_layer(tmp_path: Path) -> None:
    adapter = split_adapter(tmp_path / "in", QKV)
    path = EXPORT(adapter, tmp_path / "a.gguf", engine="llama.cpp", model=phi3_directory()).path
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}
    assert {*found} == {"blk.1.attn_qkv.weight.lora_a", "blk.1.attn_qkv.weight.lora_b"}
    change = found["blk.1.attn_qkv.weight.lora_b"] @ found["blk.1.attn_qkv.weight.lora_a"]
    expected = torch.cat([changed_weight(adapter, part) for part in QKV])
    torch.testing.assert_close(change, expected.float(), rtol=1e-5, atol=1e-5)


def test_sglang_takes_both_forms_and_gets_the_layers_it_wants_beside_others(tmp_path: Path) -> None:
    fused = write_adapter(tmp_path / "fused", factors("model.layers.0.self_attn.qkv_proj", 3, 48, 0))
    report = EXPORT(fused, tmp_path / "out", engine="sglang", model=model_directory())
    assert {k.split(".")[-3] for k in load_file(report.path / "adapter_model.safetensors")} == {"qkv_proj"}
    for name, part in (("q", "q_proj"), ("k", "k_proj"), ("up", "up_proj")):
        adapter = split_adapter(tmp_path / name, (part,))
        with pytest.raises(ConfigError, match="--model"):
            EXPORT(adapter, tmp_path / f"{name}-out", engine="sglang")
        report = EXPORT(adapter, tmp_path / f"{name}-out", engine="sglang", model=model_directory())
        assert adaptc.engines.check_adapter(report.path, "sglang").is_as_meant
        expected = peft_logits(adapter, load_model())
        torch.testing.assert_close(peft_logits(report.path, load_model()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "codegen"}, r"The order of its rows is known for .*phi3.*, and not for codegen"),
        ({"num_key_value_heads": 1}, r"has 48 rows in the model, and its parts have q_proj 24, k_proj 6, v_proj 12"),
        ({"num_attention_heads": None, "num_key_value_heads": None}, r"k_proj unknown"),
    ],
)
def test_layers_whose_order_or_sizes_are_not_known_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    shutil.copytree(phi3_directory(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    adapter = split_adapter(tmp_path / "in", ("q_proj", "v_proj"))
    with pytest.raises(ConfigError, match=said):
        EXPORT(adapter, tmp_path / "out", engine="vllm", model=tmp_path / "model")
    odd = write_adapter(tmp_path / "odd", factors("model.layers.0.self_attn.qkv_proj", 3, 47, 0))
    with pytest.raises(ConfigError, match=r"changes 47 rows, and in the model its parts have q_proj 24"):
        EXPORT(odd, tmp_path / "out", engine="vllm", model=model_directory())
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_layers_stay(tmp_path: Path) -> None:
    report = EXPORT(split_adapter(tmp_path / "in", QKV), tmp_path / "out", engine="vllm")
    assert {k.split(".")[-3] for k in load_file(report.path / "adapter_model.safetensors")} == {*QKV}


def test_the_command_fuses_with_the_model(tmp_path: Path) -> None:
    adapter = split_adapter(tmp_path / "in", QKV)
    call("convert", adapter, tmp_path / "out", "--for", "vllm", "--model", phi3_directory())
    assert {k.split(".")[-3] for k in load_file(tmp_path / "out" / "adapter_model.safetensors")} == {"qkv_proj"}


def test_a_fused_layer_has_the_dtype_of_its_parts(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for seed, part in enumerate(QKV):
        tensors |= factors(f"model.layers.1.{ATTENTION}.{part}", 3, ROWS[part], seed)
    adapter = write_adapter(tmp_path / "in", {k: t.bfloat16() for k, t in tensors.items()}, lora_alpha=3)
    report = EXPORT(adapter, tmp_path / "out", engine="vllm", model=phi3_directory())
    assert {t.dtype for t in load_file(report.path / "adapter_model.safetensors").values()} == {torch.bfloat16}
