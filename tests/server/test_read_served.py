"""What a server reads: directories, GGUF files and saved programs; and what it says where something is missing."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import adaptc
from adaptc.server import ServerOptions, open_server
from adaptc.server.read_served import ModelOptions, read_model_and_tokenizer
from adaptc.server.request_checks import check_packages
from tests.support.chats import SPECIAL, ChatModel, tokenizer
from tests.support.families import FAMILIES, VOCAB
from tests.support.gguf_files import write_gguf


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[9, 12, 41]])).logits


def test_a_model_directory(chat_model: ChatModel) -> None:
    model, words = read_model_and_tokenizer(chat_model.folder / "model", ModelOptions())
    assert words("w9 w12")["input_ids"] == [9, 12]
    assert words.chat_template == tokenizer().chat_template
    torch.testing.assert_close(logits(model), logits(chat_model.model))


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(chat_model: ChatModel) -> None:
    folder = chat_model.folder / "model"
    options = [ModelOptions(dtype=name, device="cpu") for name in (None, "bfloat16")]
    dtypes = [read_model_and_tokenizer(folder, how)[0].dtype for how in options]
    assert dtypes == [torch.float32, torch.bfloat16]


def test_a_gguf_file(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", VOCAB, special=SPECIAL)["output"]
    model, words = read_model_and_tokenizer(tmp_path / "tiny.gguf", ModelOptions())
    assert words("w9 w12", add_special_tokens=False)["input_ids"]
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.lm_head.weight.detach(), written)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(adaptc.CheckpointError, match=r"tiny\.gguf"):
        read_model_and_tokenizer(tmp_path / "tiny.gguf", ModelOptions())


def test_weights_are_stored_in_few_bits(chat_model: ChatModel, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    sizes: dict[str, Any] = {"hidden": 32, "inner": 64, "heads": 4, "kv_heads": 4}
    write_gguf(file, VOCAB, special=SPECIAL, kinds={"blk.0.ffn_up": Kind.Q4_0, "token_embd": Kind.Q8_0}, **sizes)
    stored: list[dict[str, str]] = []
    for path, scheme in ((file, "file"), (file, "int8"), (chat_model.folder / "model", "int4")):
        model, _ = read_model_and_tokenizer(path, ModelOptions(quantize=scheme))
        stored.append({n: str(t.scheme) for n, t in model.named_parameters() if hasattr(t, "scheme")})
    up, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert stored[0] == {up: "int4 in groups of 32", table: "int8 in groups of 32"}
    assert stored[1][up] == "int8"
    assert table not in stored[1]
    assert stored[2]
    assert all(how.startswith("int4") for how in stored[2].values())
    with pytest.raises(adaptc.ConfigError, match=r"'file' keeps the blocks of a GGUF file, and .*model is none"):
        read_model_and_tokenizer(chat_model.folder / "model", ModelOptions(quantize="file"))


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.capture.model_files import read_gguf

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(adaptc.CheckpointError, match="package gguf: install it"):
        read_gguf(tmp_path / "tiny.gguf")


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    for version, is_old in (("5.24.1", True), ("5.9.0", True), ("5.25.0.dev0", False), ("6.0.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        with pytest.raises(adaptc.ConfigError, match=f"5.25, and this is {version}") if is_old else nullcontext():
            check_packages()


def test_what_is_missing_is_named(chat_model: ChatModel, tmp_path: Path) -> None:
    def opened(path: Path, **model_options: Any) -> Any:
        return open_server(path, ServerOptions("base"), **model_options)

    with pytest.raises(adaptc.CheckpointError, match=r"there is no model at .*none: give a transformers model dir"):
        opened(tmp_path / "none")
    shutil.copytree(chat_model.folder / "model", tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(adaptc.CheckpointError, match="there is no model in"):
        opened(tmp_path / "m")
    bare = tmp_path / "bare"
    chat_model.model.save_pretrained(bare)
    wanted = r"there is no tokenizer in .*bare.*save_pretrained.*--tokenizer"
    with pytest.raises(adaptc.CheckpointError, match=wanted) as said:
        opened(bare)
    assert "no file of one is there" in str(said.value)
    assert "sentencepiece" not in str(said.value), "what transformers says of its own installation"
    _, words = read_model_and_tokenizer(bare, ModelOptions(tokenizer=tmp_path / "m"))
    assert words("w9")["input_ids"] == [9]
    (tmp_path / "text").write_text("no program")
    with pytest.raises(adaptc.CheckpointError, match="cannot be read as an exported program"):
        opened(tmp_path / "text")


def test_models_with_an_encoder_are_not_served(chat_model: ChatModel, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    FAMILIES["t5"].build().save_pretrained(tmp_path)
    with pytest.raises(adaptc.CheckpointError, match=r"holds a model with an encoder \(t5\)"):
        read_model_and_tokenizer(tmp_path, ModelOptions())


def test_options_are_checked_before_anything_is_read(chat_model: ChatModel) -> None:
    with pytest.raises(adaptc.BackendError, match="eagre"):
        ModelOptions(backend="eagre")
    with pytest.raises(adaptc.ConfigError, match="float3"):
        ModelOptions(dtype="float3")
    with pytest.raises(adaptc.ConfigError, match="scheme='int5' is not one of"):
        ModelOptions(quantize="int5")
    with pytest.raises(adaptc.ConfigError, match="device='nowhere'"):
        read_model_and_tokenizer(chat_model.folder / "model", ModelOptions(device="nowhere"))
