"""Commands that write: a model with its adapter merged, and what they must not replace."""

from __future__ import annotations

import contextvars
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import adaptc
from adaptc import CheckpointError, LoraConfig
from adaptc.adapter_files import atomic_write
from adaptc.adapter_files.directory import write_adapter
from adaptc.capture import model_files
from tests.generation.packaged import tokenizer
from tests.test_cli import Files, call, files, refused

__all__ = ["files"]
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "LICENSE").write_text("mine")
    prog = adaptc.compile(model, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    adaptc.save_adapter(prog, folder / "adapter")
    torch.save(prog(input_ids=IDS).logits, folder / "logits.pt")
    adaptc.save(prog, folder / "adapted.pt2")
    return folder


@pytest.mark.long
def test_merge_a_model_and_an_adapter(made: Path, tmp_path: Path) -> None:
    found = json.loads(call("merge", made / "model", made / "adapter", "-o", tmp_path / "m", "--json").stdout)
    assert found["wrote"] == str(tmp_path / "m")
    assert call("merge", made / "model", tmp_path / "n", "--adapter", made / "adapter").stdout.endswith("n\n")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
    torch.testing.assert_close(got, torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
    names = [{p.name for p in d.iterdir()} for d in (made / "model", tmp_path / "m", tmp_path / "n")]
    assert names[0] == names[1] == names[2]
    ids = [
        transformers.AutoTokenizer.from_pretrained(d)("w9 w3")["input_ids"] for d in (made / "model", tmp_path / "m")
    ]
    assert ids[0] == ids[1]


@pytest.mark.long
def test_merge_a_model_by_its_files(made: Path, tmp_path: Path) -> None:
    words = ("merge", made / "model", made / "adapter", "-o", tmp_path / "m", "--by-file")
    found = json.loads(call(*words, "--json").stdout)
    assert found["wrote"] == str(tmp_path / "m")
    assert [w["weight"] for w in found["weights"]] == ["model.layers.0.self_attn.q_proj.weight"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
    torch.testing.assert_close(got, torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {p.name for p in (made / "model").iterdir()}
    refused(*words, said="is there already; --force replaces it")
    assert "--keep" in call(*words[:-2], tmp_path / "n", "--by-file", "--keep", "residual", code=2).stderr
    assert "model directory" in call("merge", made / "adapted.pt2", tmp_path / "n.pt2", "--by-file", code=2).stderr
    assert call(*words[:-2], tmp_path / "n", "--by-file", "--dequantize", code=1).stderr.count("plain weights") == 1
    assert not (tmp_path / "n").exists()


@pytest.mark.long
def test_a_model_is_merged_by_its_files_by_default(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded, and equal to PEFT's merge."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "model")
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    expected: Any = peft.PeftModel.from_pretrained(model, str(made / "adapter")).merge_and_unload().eval()
    monkeypatch.setattr(model_files, "read_model", lambda *_: pytest.fail("the model was read into memory"))
    result = call("--verbose", "merge", tmp_path / "model", made / "adapter", "-o", tmp_path / "m")
    assert not re.search("warning", result.stderr)
    names = {p.name for p in (tmp_path / "model").glob("*.safetensors")}
    assert len(names) > 2
    assert {p.name for p in (tmp_path / "m").glob("*.safetensors")} == names
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_what_the_files_have_no_place_for_is_merged_in_memory(made: Path, tmp_path: Path) -> None:
    """An adapter of the head alone, which is tied to the embedding."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=3, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    head = LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    adapted = adaptc.compile(model, head)
    adaptc.save_adapter(adapted, tmp_path / "adapter")
    words = ("merge", tmp_path / "model", tmp_path / "adapter", "-o", tmp_path / "m")
    assert "the merged model has two weights for it" in call(*words, "--by-file", code=1).stderr
    assert not (tmp_path / "m").exists()
    assert "warning: merging in memory, since the files have no place for it" in call(*words).stderr
    call(*words[:-1], tmp_path / "n", "--in-memory")
    for name in ("m", "n"):
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-5, atol=1e-6
            )
    assert "model directory" in call("merge", made / "adapted.pt2", tmp_path / "o.pt2", "--in-memory", code=2).stderr


# -- what a file holds -------------------------------------------------------------------------------------------------


def test_show_a_model_directory(made: Path) -> None:
    out = call("show", made / "model").stdout
    state = transformers.AutoModelForCausalLM.from_pretrained(made / "model").state_dict()
    count = sum(t.numel() for t in state.values())
    assert f"LlamaForCausalLM in {made / 'model'}: {len(state)} tensors, {count:,d} parameters" in out
    assert re.search(r"hidden_size +24\n", out)
    found = json.loads(call("show", made / "model", "--json").stdout)
    assert {k: t["shape"] for k, t in found["tensors"].items()} == {k: [*t.shape] for k, t in state.items()}
    assert {t["dtype"] for t in found["tensors"].values()} == {"float32"}
    assert found["config"]["files"] == 1
    assert found["bytes"] == (made / "model" / "model.safetensors").stat().st_size


def test_show_a_gguf_adapter(made: Path, tmp_path: Path) -> None:
    call("convert", made / "adapter", tmp_path / "a.gguf", "--for", "llama.cpp", "--model", made / "model")
    (tmp_path / "renamed").write_bytes((tmp_path / "a.gguf").read_bytes())
    found = json.loads(call("show", tmp_path / "a.gguf", "--json").stdout)
    assert found["kind"] == "GGUF adapter of llama"
    assert found["config"]["adapter.lora.alpha"] == 3
    assert found["tensors"]["blk.0.attn_q.weight.lora_a"] == {"shape": [3, 24], "dtype": "f32"}
    assert found["tensors"]["blk.0.attn_q.weight.lora_b"] == {"shape": [24, 3], "dtype": "f32"}
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(9))
    refused("show", tmp_path / "broken.gguf", said="is no GGUF file that can be read")


def test_show_an_onnx_file(tmp_path: Path) -> None:
    onnx: Any = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(torch.ones(5, 3).numpy(), "w")
    sizes = [onnx.helper.make_tensor_value_info(n, 1, ["batch", k]) for n, k in (("x", 5), ("y", 3))]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", sizes[:1], sizes[1:], [weight])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    found = json.loads(call("show", tmp_path / "m.onnx", "--json").stdout)
    assert found["tensors"] == {"w": {"shape": [5, 3], "dtype": "float"}}
    assert found["config"]["inputs"] == ["x float[batch, 5]"]
    assert found["config"]["outputs"] == ["y float[batch, 3]"]
    assert found["config"]["nodes"] == "MatMul x1"
    (tmp_path / "m.onnx").write_bytes(b"no")
    refused("show", tmp_path / "m.onnx", said="is no ONNX file that can be read")


def test_onnx_files_have_a_branch_for_the_base_or_one_graph(made: Path, tmp_path: Path) -> None:
    """Both files give one model's outputs; ``show`` counts the operators of the branches too."""
    pytest.importorskip("onnxruntime")
    logits = {}
    for option in ("--base-branch", "--no-base-branch"):
        path = tmp_path / f"m{option}.onnx"
        found = json.loads(call("onnx", made / "adapted.pt2", "-o", path, option, "--json").stdout)
        assert found == {"wrote": str(path)}
        session = adaptc.exporters.onnx_session(path)
        session.load_adapter("a", made / "adapter")
        given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        given = {n: t.numpy() for n, t in given.items() if n in session.input_names}
        logits[option] = [torch.as_tensor(session.run(given, a)["logits"]) for a in (None, "a")]
    torch.testing.assert_close(logits["--base-branch"][1], torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits["--base-branch"], logits["--no-base-branch"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*logits["--base-branch"], atol=1e-3)

    shown = [json.loads(call("show", tmp_path / f"m{o}.onnx", "--json").stdout)["config"] for o in logits]
    counts = [{k.split()[-2]: v for k, v in found.items() if " of " in k} for found in shown]
    assert list(counts[0]) == ["then_branch", "else_branch"]
    assert "If x1" in shown[0]["nodes"]
    products = [int(re.findall(r"MatMul x(\d+)", text)[0]) for text in (*counts[0].values(), shown[1]["nodes"])]
    assert products[0] > products[1]
    assert products[0] == products[2]
    assert counts[1] == {}


@pytest.mark.long
def test_merge_a_model_refuses(made: Path, tmp_path: Path) -> None:
    model, adapter = made / "model", made / "adapter"
    refused("merge", model, adapter, "-o", adapter, "--force", said="holds an adapter")
    refused("merge", model, adapter, "-o", model, said="is there already; --force replaces it")
    assert "which adapter" in call("merge", model, "-o", tmp_path / "m", code=2).stderr
    assert "once" in call("merge", model, adapter, "-o", tmp_path / "m", "--adapter", adapter, code=2).stderr
    prompt = adaptc.compile(
        transformers.AutoModelForCausalLM.from_pretrained(model),
        adaptc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    adaptc.save_adapter(prompt, tmp_path / "prompt")
    said = call("merge", model, tmp_path / "prompt", "-o", tmp_path / "m", code=1).stderr
    assert "prompt_tuning changes what the program reads, which no weight can hold" in said
    assert not (tmp_path / "m").exists()


@pytest.mark.long
def test_an_adapter_does_not_go_into_a_model(made: Path) -> None:
    """Which could not be loaded any more."""
    before = sorted(p.name for p in (made / "model").iterdir())
    refused("export-adapter", made / "adapted.pt2", "-o", made / "model", "--force", said="it holds a model")
    assert sorted(p.name for p in (made / "model").iterdir()) == before
    transformers.AutoModelForCausalLM.from_pretrained(made / "model")


# -- what is there -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "swap", "unload", "compile"])
def test_another_name_of_what_is_read_is_not_replaced(files: Files, tmp_path: Path, command: str) -> None:
    read = files.base if command == "compile" else files.program
    before = read.read_bytes()
    more = [files.adapter] if command in ("swap", "compile") else []
    (tmp_path / "link.pt2").symlink_to(read)
    (tmp_path / "folder").symlink_to(read.parent)
    for out in (tmp_path / "link.pt2", tmp_path / "folder" / read.name):
        refused(command, read, *more, "-o", out, "--force", said=f"leads to {read}, which the command reads")
    if more:
        weights = files.adapter / "adapter_model.safetensors"
        refused(command, read, *more, "-o", weights, "--force", said=f"leads to {files.adapter}, which the command")
    assert read.read_bytes() == before


def test_directories_that_are_read_are_not_replaced_under_another_name(files: Files, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(files.adapter)
    refused("combine", f"{files.adapter}=1", "-o", tmp_path / "a", "--force", said=f"leads to {files.adapter}")
    weights = files.adapter / "adapter_model.safetensors"
    words = ("to-lora", weights, "--model", files.base, "--rank", 1, "-o", files.adapter, "--force")
    refused(*words, said=f"leads to {weights}")


def raced(monkeypatch: pytest.MonkeyPatch, come: Any) -> None:
    """Let ``moved_in`` happen between a command's look at its output and its write."""
    begin = atomic_write._make_stage

    def late(stage: Path) -> int:
        come()
        return begin(stage)

    monkeypatch.setattr(atomic_write, "_make_stage", late)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("command", ["merge", "swap", "compile"])
def test_who_was_first_stays(
    files: Files, tmp_path: Path, command: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pt2"
    raced(monkeypatch, lambda: out.write_text("another's"))
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    words = [command, files.base if command == "compile" else files.program]
    words += [] if command == "merge" else [files.adapter]
    refused(*words, "-o", out, said="made by somebody else in the meantime")
    assert out.read_text() == "another's"
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt2"]
    call(*words, "-o", out, "--force")
    adaptc.load(out)


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_who_was_first_stays_of_directories(
    files: Files, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    raced(monkeypatch, lambda: (out / name).write_text("another's"))
    refused("export-adapter", files.program, "-o", out, said="made by somebody else in the meantime")
    assert [p.name for p in out.iterdir()] == [name]
    assert (out / name).read_text() == "another's"


@pytest.mark.parametrize("r", [3, 4])
def test_a_writer_that_was_overtaken_replaces_nothing(tmp_path: Path, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes all of the adapter after this one found the directory empty."""
    folder, usual, calls = tmp_path / "folder", atomic_write.copy_mode, list[Any]()

    def save(r: int) -> None:
        write_adapter(folder, {"peft_type": "LORA", "r": r}, {"a.lora_A.weight": torch.full((1, 2), float(r))})

    def overtaken(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # both files were looked for by now
            monkeypatch.setattr(atomic_write, "copy_mode", usual)
            contextvars.Context().run(save, 3)

    monkeypatch.setattr(atomic_write, "copy_mode", overtaken)
    with (
        atomic_write.forbid_overwrite(folder),
        pytest.raises(CheckpointError, match="made by somebody else in the meantime"),
    ):
        save(r)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert len(calls) == 2
    (weights,) = load_file(folder / "adapter_model.safetensors").values()
    assert weights.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_at_once_one_wins(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    written: list[str] = []
    start = threading.Barrier(6)

    def write(i: int) -> None:
        file, folder = tmp_path / "file", tmp_path / "folder"
        start.wait()
        with atomic_write.forbid_overwrite(file):
            try:
                with atomic_write.atomic_replace(file) as new:
                    new.write_text(str(i))
                written.append(f"file {i}")
            except CheckpointError:
                pass
        start.wait()
        with atomic_write.forbid_overwrite(folder):
            try:
                write_adapter(folder, {"peft_type": "LORA", "r": i}, {"a.lora_A.weight": torch.full((1, 2), float(i))})
                written.append(f"folder {i}")
            except CheckpointError:
                pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    (of_file,) = (w for w in written if w.startswith("file"))
    assert (tmp_path / "file").read_text() == of_file.removeprefix("file ")
    (of_folder,) = (w for w in written if w.startswith("folder"))
    found = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert str(found["r"]) == of_folder.removeprefix("folder ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_names_are_new_for_one_command_alone(files: Files, tmp_path: Path) -> None:
    call("unload", files.program, tmp_path / "o.pt2")
    call("unload", files.program, "-o", tmp_path / "o.pt2", "--force")
    adaptc.save(files.own, tmp_path / "o.pt2")
    assert not atomic_write.is_protected(tmp_path / "o.pt2")


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "suffix", "options"),
    [("openvino", ".xml", ()), ("executorch", ".pte", ("--max-size", 40, "--max-rank", 5, "--backend", "portable"))],
)
def test_programs_for_other_runtimes(
    command: str, suffix: str, options: tuple[Any, ...], made: Path, tmp_path: Path
) -> None:
    open_model = getattr(adaptc.exporters, f"{command}_model")
    path, merged = tmp_path / f"any{suffix}", tmp_path / f"merged{suffix}"
    found = json.loads(call(command, made / "adapted.pt2", "-o", path, *options, "--json").stdout)
    assert found == {"wrote": str(path)}
    model = open_model(path)
    model.load_adapter("a", made / "adapter")
    mask = torch.ones_like(IDS)
    given = {n: t.numpy() for n, t in (("input_ids", IDS), ("attention_mask", mask)) if n in model.input_names}
    logits = torch.as_tensor(model.run(given, "a")["logits"])
    torch.testing.assert_close(logits, torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
    call(command, made / "adapted.pt2", merged, *options, "--adapters", "merged")
    model = open_model(merged)
    assert model.is_merged
    logits = torch.as_tensor(model.run(given)["logits"])
    torch.testing.assert_close(logits, torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
    refused(command, made / "adapted.pt2", "-o", path, *options, said="is there already; --force replaces it")
    refused(command, made / "adapted.pt2", "-o", tmp_path / "a.bin", *options, said=f"must end in {suffix}")
    rows = tmp_path / f"rows{suffix}", "--adapters", "rows"
    if command == "executorch":
        refused(command, made / "adapted.pt2", "-o", *rows, said="not supported")
        return
    call(command, made / "adapted.pt2", "-o", *rows)
    model = open_model(rows[0])
    model.load_adapter("a", made / "adapter")
    logits = torch.as_tensor(model.run(given, adapters=["a"] * len(IDS))["logits"])
    torch.testing.assert_close(logits, torch.load(made / "logits.pt"), rtol=1e-4, atol=1e-5)
