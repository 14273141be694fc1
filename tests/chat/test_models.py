"""What a chat opens: directories, GGUF files and saved programs; and what it says where something is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.chat import models
from adaptc.chat.active_adapter import ChatAdapters
from adaptc.chat.models import ModelOptions, open_model
from tests.support.chats import SIZES, SPECIAL, ChatModel, no_output
from tests.support.families import FAMILIES, VOCAB


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
    written = write_gguf(tmp_path / "tiny.gguf")
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


def write_gguf(path: Path) -> torch.Tensor:
    """A llama of one layer with words as its tokens; gives the weight of its head."""
    import gguf
    import numpy as np

    hidden, inner, heads = 24, 40, 3
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, hidden),
        "output": (VOCAB, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        **{f"blk.0.attn_{n}": (hidden, hidden) for n in ("q", "k", "v", "output")},
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (hidden,)),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(i) for i in range(10)] + ["Ġ", "Ġw"]
    tokens = [*SPECIAL, *letters]
    tokens += [f"<{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(["Ġ w"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(tensors["output"])


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
    for how in (ModelOptions(max_length=9), ModelOptions(dtype="float16")):
        with pytest.raises(adaptc.ConfigError, match="is part of a saved program"):
            open_model(file, how)


@pytest.mark.long
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
    with pytest.raises(adaptc.ConfigError, match="device='nowhere'"):
        open_model(chats.folder / "model", ModelOptions(device="nowhere"))
