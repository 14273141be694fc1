"""GGUF files for llama.cpp, read back with gguf: names, alpha, shapes, and the order of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.engines.gguf_families import FAMILIES
from adaptc.errors import CheckpointError, ConfigError
from tests.engines.adapter_directories import SIZES, adapter_directory, model_directory, write_directory

EXPORT = adaptc.engines.export_adapter


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of a GGUF file, in torch's order of sizes."""
    reader = gguf.GGUFReader(path)
    fields = {f.name: f.contents() for f in reader.fields.values()}
    return fields, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def change_of(name: str, module: str) -> Tensor:
    """The change of a module's weight by PEFT's formula, from the files of an adapter."""
    adapter = adaptc.load_adapter(adapter_directory(name))
    assert isinstance(adapter.config, adaptc.LoraConfig)
    up, down = (adapter.tensors[f"{module}.{n}.weight"] for n in ("lora_B", "lora_A"))
    return adapter.config.method(module, "linear").scale(None) * (up @ down)  # type: ignore[arg-type]


def turned_rows(change: Tensor, heads: int) -> Tensor:
    """Rows of q or k where the pairs that are turned are neighbours: row 2 i + j of a head is j * half + i before."""
    size = change.shape[0] // heads
    rows = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return change[rows]


def test_names_alpha_and_rows_are_those_of_llama_cpp(tmp_path: Path) -> None:
    report = EXPORT(adapter_directory("patterns"), tmp_path / "lora.gguf", engine="llama.cpp", model=model_directory())
    fields, tensors = read(report.path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert (fields["general.architecture"], fields["adapter.lora.alpha"], report.rank) == ("llama", 5.0, 5)
    assert "adapter.alora.invocation_tokens" not in fields
    layers = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    names = {f"blk.{i}.{n}.weight.lora_{f}" for i in range(2) for n in layers for f in "ab"}
    assert {*tensors} == names
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    heads = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}
    for i in range(2):
        for name, layer in layers.items():
            a, b = (tensors[f"blk.{i}.{name}.weight.lora_{f}"] for f in "ab")
            meant = change_of("patterns", f"model.layers.{i}.{layer}").float()
            meant = turned_rows(meant, heads[name]) if name in heads else meant
            # llama.cpp multiplies by alpha / rank, and the rank is the last size of lora_b.
            torch.testing.assert_close(fields["adapter.lora.alpha"] / b.shape[-1] * (b @ a), meant)


def other_model(tmp_path: Path, **changes: Any) -> Path:
    """The model's directory with another config."""
    folder = tmp_path / "model"
    shutil.copytree(model_directory(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in ("llama", "mistral")])
def test_other_families_keep_the_order_of_rows(kind: str, tmp_path: Path) -> None:
    ranks = {"model.layers.1.self_attn.qkv_proj": 3} if kind == "phi3" else {"model.layers.1.self_attn.q_proj": 3}
    adapter = write_directory(tmp_path / "in", {"lora_alpha": 6}, ranks)
    model = other_model(tmp_path, model_type=kind)
    (model / "model.safetensors").unlink()  # of a Llama, whose layers are not fused
    fields, tensors = read(EXPORT(adapter, tmp_path / "x.gguf", engine="llama.cpp", model=model).path)
    assert fields["general.architecture"] == FAMILIES[kind].architecture
    name = "blk.1.attn_qkv.weight" if kind == "phi3" else "blk.1.attn_q.weight"
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {f"{name}.lora_a": (3, 5), f"{name}.lora_b": (7, 3)}
    assert float(tensors[f"{name}.lora_b"].unique()) == 2


def test_an_embedding_has_its_first_factor_by_tokens(tmp_path: Path) -> None:
    report = EXPORT(adapter_directory("embedding"), tmp_path / "x.gguf", engine="llama.cpp", model=model_directory())
    tensors = read(report.path)[1]
    a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert (a.shape, b.shape) == ((61, 3), (24, 3))
    original = adaptc.load_adapter(adapter_directory("embedding")).tensors
    down, up = (original[f"model.embed_tokens.lora_embedding_{f}"].float() for f in "AB")
    torch.testing.assert_close(a @ b.mT, 2 / 3 * (up @ down).mT)
    model = other_model(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens' is tied to another layer"):
        EXPORT(adapter_directory("embedding"), tmp_path / "y.gguf", engine="llama.cpp", model=model)
    assert not (tmp_path / "y.gguf").exists()


def test_the_invocation_tokens_of_alora_are_written(tmp_path: Path) -> None:
    report = EXPORT(adapter_directory("alora"), tmp_path / "x.gguf", engine="llama.cpp", model=model_directory())
    fields, tensors = read(report.path)
    assert fields["adapter.alora.invocation_tokens"] == [5, 6]
    b, a = (tensors[f"blk.0.attn_v.weight.lora_{f}"] for f in "ba")
    original = adaptc.load_adapter(adapter_directory("alora")).tensors
    up, down = (original[f"model.layers.0.self_attn.v_proj.{n}.weight"].float() for n in ("lora_B", "lora_A"))
    torch.testing.assert_close(b @ a, 5 / 3 * (up @ down))


def test_what_llama_cpp_has_no_tensor_for_is_refused_by_name(tmp_path: Path) -> None:
    def refuse(said: str, adapter: Path, model: Path, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error, match=said):
            EXPORT(adapter, tmp_path / "x.gguf", engine="llama.cpp", model=model)
        assert not (tmp_path / "x.gguf").exists()

    adapter = write_directory(tmp_path / "in", {}, {"model.layers.0.self_attn.turn_proj": 3})
    refuse(r"no tensor for 'model\.layers\.0\.self_attn\.turn_proj'", adapter, model_directory())
    beyond = write_directory(tmp_path / "beyond", {}, {"model.layers.2.mlp.up_proj": 3})
    refuse(r"no tensor for 'model\.layers\.2\.mlp\.up_proj'", beyond, model_directory())
    heads = write_directory(tmp_path / "heads", {}, {"model.layers.0.self_attn.q_proj": 3})
    refuse(r"B has 7 rows, .*no 4 heads", heads, model_directory())
    refuse(
        r"'mamba', and adapters for llama\.cpp are written for llama",
        adapter,
        other_model(tmp_path, model_type="mamba"),
    )
    refuse(r"config\.json", adapter, tmp_path / "nothing", CheckpointError)
    refuse(r"has lora_bias", adapter_directory("bias"), model_directory())


def test_a_directory_is_no_place_for_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a directory, and llama\.cpp reads one file"):
        EXPORT(adapter_directory("patterns"), tmp_path, engine="llama.cpp", model=model_directory())


def test_without_gguf_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'adaptc\[gguf\]'"):
        EXPORT(adapter_directory("patterns"), tmp_path / "x.gguf", engine="llama.cpp", model=model_directory())
