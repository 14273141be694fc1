"""Models merged file by file: what ``from_pretrained`` loads is what PEFT merges, and memory never holds the model."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc.adapters.directories import merge_files
from adaptc.adapters.directories.write_tensors import TensorEntry
from adaptc.errors import CheckpointError, ConfigError, MergeError
from tests.support.oracle import quiet

pytestmark = pytest.mark.usefixtures("no_progress_bars")

KIND = transformers.LlamaForCausalLM
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "attention_bias": True,
}
IDS = torch.arange(14).reshape(2, 7)
LORA: dict[str, Any] = {"r": 3, "init_lora_weights": False}
METHODS: dict[str, Any] = {
    "lora with saved modules": peft.LoraConfig(
        **LORA, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"]
    ),
    "dora": peft.LoraConfig(**LORA, target_modules="all-linear", use_dora=True),
    "lora with biases": peft.LoraConfig(**LORA, target_modules=["q_proj", "o_proj"], lora_bias=True),
    "loha": peft.LoHaConfig(r=3, target_modules=["v_proj", "down_proj"], init_weights=False),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "pissa": peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"),
}


@cache
def made(name: str, **more: Any) -> tuple[Path, Path, dict[str, Tensor]]:
    """A model's directory, an adapter's, and the tensors that PEFT merges them to."""
    folder = Path(mkdtemp())
    torch.manual_seed(0)
    KIND(transformers.LlamaConfig(**{**SIZES, **more})).save_pretrained(folder / "model", max_shard_size="9KB")
    (folder / "model" / "tokenizer.json").write_text("{}")
    # PEFT takes trained biases for shards, and says that it saves the embeddings that it was told to change.
    with quiet(".*tensor.s. have invalid shape.*", "Setting `save_embedding_layers`.*"):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(KIND.from_pretrained(folder / "model"), METHODS[name])
        for n, p in adapted.named_parameters():
            if p.requires_grad and "ia3" in n:
                torch.nn.init.uniform_(p, 0.5, 2.0)
            elif p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        adapted.save_pretrained(folder / "adapter")
        base = KIND.from_pretrained(folder / "model")
        merged = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    return folder / "model", folder / "adapter", {k: t.detach() for k, t in merged.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_the_merged_model_is_pefts(name: str, tmp_path: Path) -> None:
    model, adapter, expected = made(name)
    before = contents(model)
    report = adaptc.merge_directory(model, adapter, tmp_path / "merged")
    assert contents(model) == before
    loaded = KIND.from_pretrained(tmp_path / "merged")
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, t in found.items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-5)
    old = KIND.from_pretrained(model).state_dict()
    changed = {k for k, t in found.items() if not torch.equal(t, old[k]) and not k.endswith("bias")}
    assert {s.fqn for s in report.sites} == changed != set()
    adapted = adaptc.compile(KIND.from_pretrained(model).eval(), str(adapter))
    in_memory = adaptc.merge(adapted).state_dict
    assert all(torch.equal(found[k], in_memory[k]) for k in changed)


@pytest.mark.long
def test_files_keep_their_names_keys_order_and_what_lies_beside_them(tmp_path: Path) -> None:
    model, adapter, expected = made("loha")
    adaptc.merge_directory(str(model), str(adapter), str(tmp_path / "merged"))
    names = [p.name for p in sorted(model.iterdir())]
    assert len([n for n in names if n.endswith(".safetensors")]) > 4
    assert [p.name for p in sorted((tmp_path / "merged").iterdir())] == names
    for name in names:
        old, new = model / name, tmp_path / "merged" / name
        if name.endswith(".safetensors"):
            with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
                assert list(a.keys()) == list(b.keys())
                assert a.metadata() == b.metadata()
                for key in a.keys():  # noqa: SIM118
                    torch.testing.assert_close(b.get_tensor(key), expected[key], rtol=1e-5, atol=1e-5)
        else:
            text = name == "tokenizer.json"
            assert (
                old.read_text() == new.read_text()
                if text
                else json.loads(old.read_bytes()) == json.loads(new.read_bytes())
            )


@pytest.mark.long
def test_memory_never_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in one file: what is allocated while it is written is a small part of it."""
    sizes = {**SIZES, "vocab_size": 4001, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10}
    torch.manual_seed(0)
    config = peft.LoraConfig(**LORA, target_modules="all-linear")
    model = KIND(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "model")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    del model
    nbytes = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert nbytes > 90 << 20
    seen: list[int] = []
    real = merge_files.write_tensors

    def allocated() -> int:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) << 10

    def write(path: Path, entries: Any, *args: Any) -> None:
        def watched(entry: Any) -> Any:
            def make() -> Tensor:
                made = entry.make()
                seen.append(allocated())
                return made

            return entry._replace(make=make)

        seen.append(allocated())
        real(path, {k: watched(e) for k, e in entries.items()}, *args)

    monkeypatch.setattr(merge_files, "write_tensors", write)
    adaptc.merge_directory(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    assert len(seen) > 70
    assert max(seen) - seen[0] < nbytes / 4


@pytest.mark.long
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, _ = made("loha")
    shutil.copytree(model, tmp_path / "merged")
    before, source = contents(tmp_path / "merged"), contents(model)
    real, calls = merge_files.write_tensors, list[Path]()

    def write(path: Path, *args: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(merge_files, "write_tensors", write)
    for target in ("merged", "new"):
        calls.clear()
        with pytest.raises(CheckpointError, match=rf"{target} .*No space left.* unchanged"):
            adaptc.merge_directory(model, adapter, tmp_path / target)
    assert contents(tmp_path / "merged") == before
    assert contents(model) == source
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.mark.long
def test_files_of_another_sharding_are_replaced(tmp_path: Path) -> None:
    model, adapter, expected = made("loha")
    KIND.from_pretrained(model).save_pretrained(tmp_path / "merged")
    adaptc.merge_directory(model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.safetensors").exists()
    found = KIND.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(found[k], t, rtol=1e-5, atol=1e-5) for k, t in expected.items())


def refused(error: type[Exception], said: str, model: Path, adapter: Any, target: Path, **options: Any) -> None:
    before = contents(model)
    with pytest.raises(error, match=said):
        adaptc.merge_directory(model, adapter, target, **options)
    assert contents(model) == before
    assert not target.exists() or target == model


@pytest.mark.long
def test_refusals_write_nothing(tmp_path: Path) -> None:
    model, adapter, _ = made("loha")
    target = tmp_path / "merged"
    refused(CheckpointError, "cannot replace the one it is made of", model, adapter, model)
    refused(ConfigError, "exclude each other", model, adapter, target, dequantize=True, requantize=True)
    refused(ConfigError, "has plain weights", model, adapter, target, dequantize=True)
    refused(ConfigError, "has plain weights", model, adapter, target, requantize=True)
    refused(CheckpointError, f"there is no model in {adapter}", adapter, adapter, target)
    with pytest.raises(CheckpointError, match="there is no model in"):
        adaptc.merge_directory(tmp_path / "nowhere", adapter, target)
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    tensors = load_file(odd / "adapter_model.safetensors")
    key = next(k for k in tensors if "layers.1" in k)
    save_file({**tensors, key: tensors[key] * float("nan")}, odd / "adapter_model.safetensors")
    refused(adaptc.AdaptcError, "finite|NaN", model, odd, target)
    for name, config, said in (
        ("prompt", adaptc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "no weight can hold"),
        (
            "bias",
            adaptc.LoraConfig(r=2, target_modules=["up_proj"], lora_bias=True, init_lora_weights=False),
            "no bias",
        ),
    ):
        adaptc.save_adapter(adaptc.compile(KIND.from_pretrained(model).eval(), config), tmp_path / name)
        refused(MergeError, said, model, tmp_path / name, target)
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    shard = sorted(cut.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-5])
    refused(CheckpointError, shard.name, cut, adapter, target)
    shard.unlink()
    refused(CheckpointError, f"lacks {shard.name}", cut, adapter, target)
    shutil.copy(model / shard.name, shard)
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({k: t for k, t in tensors.items() if k != lost}, shard, {"format": "pt"})
    refused(CheckpointError, lost, cut, adapter, target)


@pytest.mark.long
def test_one_of_two_tied_weights_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    KIND(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    config = adaptc.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    prog = adaptc.compile(KIND.from_pretrained(tmp_path / "model").eval(), config)
    adaptc.save_adapter(prog, tmp_path / "adapter")
    refused(MergeError, "tied to .*two weights", tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    other = adaptc.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    prog = adaptc.compile(KIND.from_pretrained(tmp_path / "model").eval(), other)
    adaptc.save_adapter(prog, tmp_path / "other")
    adaptc.merge_directory(tmp_path / "model", tmp_path / "other", tmp_path / "merged")
    got = KIND.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, prog(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_bytes_of_each_tensor_are_told_when_they_are_written(tmp_path: Path) -> None:
    shapes = {"a": ((3, 5), torch.float32), "b": ((7,), torch.float16), "c": ((0, 5), torch.float32)}
    entries = {k: TensorEntry(s, d, lambda s=s, d=d: torch.ones(s, dtype=d)) for k, (s, d) in shapes.items()}
    told: list[int] = []
    merge_files.write_tensors(tmp_path / "x.safetensors", entries, {}, told.append)
    assert told == [60, 14, 0]
