"""What a chat opens: directories, GGUF files and saved programs; and what it says where something is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import adaptc
from adaptc.chat import models
from adaptc.chat.active_adapter import ChatAdapters
from adaptc.chat.models import ModelOptions, open_model
from tests.support.chats import SIZES, SPECIAL, ChatModel, no_output
from tests.support.families import FAMILIES, VOCAB
from tests.support.gguf_files import write_gguf


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, dict[str, Any]]]:
    """What would be captured: (model, adapter, options)."""
    calls: list[tuple[Any, Any, dict[str, Any]]] = []
    monkeypatch.setattr(models, "compile_for_generation", lambda m, a, **options: calls.append((m, a, options)))
    return calls


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[9, 12, 41]])).logits


def test_a_model_directory(chats: ChatModel, captured: list[Any]) -> None:
    found = open_model(chats.folder / "model", ModelOptions(max_length=33, backend="inductor"))
    assert found.generators == ()
    assert found.tokenizer("w9 w12")["input_ids"] == [9, 12]
    assert found.tokenizer.chat_template == chats.opened_model.tokenizer.chat_template
    assert found.capture is not None
    found.capture(None)
    found.capture("a directory")
    (model, usual, options), (again, adapter, _) = captured
    assert model is again
    torch.testing.assert_close(logits(model), logits(chats.model))
    assert (usual.target_modules, adapter) == ("all-linear", "a directory")
    assert options == {"max_batch": 1, "max_length": 33, "backend": "inductor"}


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(chats: ChatModel, captured: list[Any]) -> None:
    for dtype in (None, "bfloat16"):
        capture = open_model(chats.folder / "model", ModelOptions(dtype=dtype, device="cpu")).capture
        assert capture is not None
        capture(None)
    assert [m.dtype for m, _, _ in captured] == [torch.float32, torch.bfloat16]


def test_a_gguf_file(tmp_path: Path, captured: list[Any]) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", VOCAB, special=SPECIAL)["output"]
    found = open_model(tmp_path / "tiny.gguf", ModelOptions())
    assert found.tokenizer("w9 w12", add_special_tokens=False)["input_ids"]
    assert found.capture is not None
    found.capture(None)
    ((model, _, _),) = captured
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.lm_head.weight.detach(), written)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(adaptc.CheckpointError, match=r"tiny\.gguf"):
        open_model(tmp_path / "tiny.gguf", ModelOptions())


def test_weights_are_stored_in_few_bits(chats: ChatModel, tmp_path: Path, captured: list[Any]) -> None:
    file = tmp_path / "tiny.gguf"
    sizes: dict[str, Any] = {"hidden": 32, "inner": 64, "heads": 4, "kv_heads": 4}
    write_gguf(file, VOCAB, special=SPECIAL, kinds={"blk.0.ffn_up": Kind.Q4_0, "token_embd": Kind.Q8_0}, **sizes)
    for path, scheme in ((file, "file"), (file, "int8"), (chats.folder / "model", "int4")):
        capture = open_model(path, ModelOptions(quantize=scheme)).capture
        assert capture is not None
        capture(None)
    stored = [{n: str(t.scheme) for n, t in m.named_parameters() if hasattr(t, "scheme")} for m, _, _ in captured]
    up, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert stored[0] == {up: "int4 in groups of 32", table: "int8 in groups of 32"}
    assert stored[1][up] == "int8"
    assert table not in stored[1]
    assert all(how.startswith("int4") for how in stored[2].values())
    with pytest.raises(adaptc.ConfigError, match=r"'file' keeps the blocks of a GGUF file, and .*model is none"):
        open_model(chats.folder / "model", ModelOptions(quantize="file"))


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.capture.model_files import read_gguf

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(adaptc.CheckpointError, match="package gguf: install it"):
        read_gguf(tmp_path / "tiny.gguf")


@pytest.mark.long
def test_a_program_that_generates(chats: ChatModel, tmp_path: Path) -> None:
    generator = chats.opened_model.generators[0]
    adaptc.swap(generator, chats.folder / "one")
    file = adaptc.save(generator, tmp_path / "program.pt2")
    with pytest.raises(adaptc.CheckpointError, match=r"no tokenizer in .* --tokenizer"):
        open_model(file, ModelOptions())
    found = open_model(file, ModelOptions(tokenizer=chats.folder / "model"))
    (made,) = found.generators
    assert found.capture is None
    assert list(found.bundled_adapters) == ["own"]
    own = ChatAdapters(found, {}, no_output).current
    assert own.name == "own"
    ids = torch.tensor([[9, 12, 41, 30]])
    answer = own.generator.generate(ids, max_new_tokens=6, do_sample=False)
    assert answer[0, 4:].tolist() == chats.uncached_answer("one", ids[0].tolist())
    assert made.new_cache().max_length == SIZES["max_length"]
    for how in (ModelOptions(max_length=9), ModelOptions(dtype="float16"), ModelOptions(quantize="int8")):
        with pytest.raises(adaptc.ConfigError, match="is part of a saved program"):
            open_model(file, how)


def test_what_is_missing_is_named(chats: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(adaptc.CheckpointError, match=r"there is no model at .*none: give a transformers model dir"):
        open_model(tmp_path / "none", ModelOptions())
    shutil.copytree(chats.folder / "model", tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(adaptc.CheckpointError, match="there is no model in"):
        open_model(tmp_path / "m", ModelOptions())
    bare = tmp_path / "bare"
    chats.model.save_pretrained(bare)
    wanted = r"there is no tokenizer in .*bare.*save_pretrained.*--tokenizer"
    with pytest.raises(adaptc.CheckpointError, match=wanted) as said:
        open_model(bare, ModelOptions())
    assert "no file of one is there" in str(said.value)
    assert "sentencepiece" not in str(said.value), "what transformers says of its own installation"
    assert open_model(bare, ModelOptions(tokenizer=tmp_path / "m")).tokenizer("w9")["input_ids"] == [9]
    with pytest.raises(adaptc.CheckpointError, match="does not generate"):
        open_model(adaptc.save(chats.uncached_program, tmp_path / "p.pt2"), ModelOptions())
    (tmp_path / "text").write_text("no program")
    with pytest.raises(adaptc.CheckpointError, match="cannot be read as an exported program"):
        open_model(tmp_path / "text", ModelOptions())


def test_models_with_an_encoder_do_not_talk(chats: ChatModel, tmp_path: Path) -> None:
    chats.opened_model.tokenizer.save_pretrained(tmp_path)
    FAMILIES["t5"].build().save_pretrained(tmp_path)
    with pytest.raises(adaptc.CheckpointError, match=r"holds a model with an encoder \(t5\)"):
        open_model(tmp_path, ModelOptions(max_length=33))


def test_options_are_checked_before_anything_is_read(chats: ChatModel) -> None:
    with pytest.raises(adaptc.BackendError, match="eagre"):
        ModelOptions(backend="eagre")
    with pytest.raises(adaptc.ConfigError, match="float3"):
        ModelOptions(dtype="float3")
    with pytest.raises(adaptc.ConfigError, match="scheme='int5' is not one of"):
        ModelOptions(quantize="int5")
    with pytest.raises(adaptc.ConfigError, match="device='nowhere'"):
        open_model(chats.folder / "model", ModelOptions(device="nowhere"))
