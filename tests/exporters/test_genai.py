"""Folders for ONNX Runtime GenAI: its greedy tokens equal those of adaptc, with two adapters and the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc import LoraConfig
from tests.support.oracle import quiet

SIZES = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "fr": {"r": 3, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 17},
    "de": {"r": 5, "target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 13},
}


def llama(**options: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": 97, "num_key_value_heads": 1, "max_position_embeddings": 64, **SIZES}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, eos_token_id=2, **options)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genai")
    for name, options in CONFIGS.items():
        torch.manual_seed(len(name) + int(options["r"]))
        with quiet(".*"):
            config = peft.LoraConfig(**options, init_lora_weights=False)
            peft.get_peft_model(llama(), config).save_pretrained(str(path / name))
    adaptc.exporters.export_genai(llama(), LoraConfig(target_modules=["q_proj", "down_proj"]), path / "model")
    for name in CONFIGS:
        file = path / f"{name}.onnx_adapter"
        adaptc.exporters.save_onnx_adapter(path / name, file, model=path / "model" / "model.onnx")
    return path


def test_a_step_in_onnxruntime(folder: Path) -> None:
    """Prompts on an empty cache, and then several tokens and one on a cache, for two rows, one of them padded."""
    session = adaptc.exporters.onnx_session(folder / "model" / "model.onnx")
    names = [n for n in session.input_names if n.startswith("past")]
    assert names == [f"past_key_values.{i}.{k}" for i in range(2) for k in ("key", "value")]
    assert session.output_names == ["logits", *(n.replace("past_key_values", "present") for n in names)]
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for adapter in (None, *CONFIGS):
        oracle = llama() if adapter is None else peft.PeftModel.from_pretrained(llama(), str(folder / adapter)).eval()
        if adapter is not None:
            session.load_adapter(adapter, folder / f"{adapter}.onnx_adapter")
        with torch.no_grad():
            expected = oracle(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        cache = {n: torch.zeros(2, 1, 0, 10).numpy() for n in names}
        for start, end in ((0, 5), (5, 8), (8, 9)):
            given = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
            }
            out = session.run({**{n: t.numpy() for n, t in given.items()}, **cache}, adapter)
            found = torch.from_numpy(out["logits"])
            counted = mask[:, start:end].bool()
            torch.testing.assert_close(found[counted], expected[:, start:end][counted], rtol=1e-4, atol=1e-5)
            cache = {n: out[n.replace("past_key_values", "present")] for n in names}


def test_the_config_says_what_the_file_is(folder: Path) -> None:
    config = json.loads((folder / "model" / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["vocab_size"], model["context_length"], model["eos_token_id"], model["pad_token_id"]) == (
        97,
        64,
        2,
        2,
    )
    expected = {"head_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    assert {n: decoder[n] for n in expected} == expected
    assert (folder / "model" / decoder["filename"]).is_file()


def test_tokens_of_genai(folder: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed here")
    model = og.Model(str(folder / "model"))
    adapters = og.Adapters(model)
    for name in CONFIGS:
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
    generator = adaptc.compile_for_generation(llama(), str(folder / "fr"), max_length=64)
    prompts = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(4))
    found: dict[str | None, list[list[int]]] = {}
    for name in (None, *CONFIGS):
        found[name] = []
        for prompt in prompts:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=30, do_sample=False)
            run = og.Generator(model, params)
            if name is not None:
                run.set_active_adapter(adapters, name)
            run.append_tokens(prompt.tolist())
            while not run.is_done():
                run.generate_next_token()
            found[name].append([int(t) for t in run.get_sequence(0)])
            program: Any = generator
            if name is None:
                with program.disabled():
                    wanted = program.generate(prompt[None], max_length=30, do_sample=False)
            else:
                program.swap(folder / name)
                wanted = program.generate(prompt[None], max_length=30, do_sample=False)
            tokens = wanted[0].tolist()
            # GenAI leaves the token out that ends a text.
            assert found[name][-1] == (tokens[:-1] if tokens[-1] == 2 else tokens), name
    assert len({str(tokens) for tokens in found.values()}) == 3, "the adapters change nothing"


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    target = tmp_path / "model"
    with pytest.raises(adaptc.ConfigError, match="takes a model of transformers that generates"):
        adaptc.exporters.export_genai(torch.nn.Linear(3, 5), config, target)
    t5 = transformers.T5Config(d_model=20, d_ff=28, d_kv=6, num_layers=1, num_heads=3, vocab_size=97)
    with pytest.raises(adaptc.ConfigError, match="has an encoder"):
        adaptc.exporters.export_genai(transformers.T5ForConditionalGeneration(t5), config, target)
    mistral = transformers.MistralConfig(vocab_size=97, num_key_value_heads=1, sliding_window=4, **SIZES)
    with pytest.raises(adaptc.CaptureError, match="keeps a DynamicSlidingWindowLayer"):
        adaptc.exporters.export_genai(transformers.MistralForCausalLM(mistral), config, target)
    with pytest.raises(adaptc.TargetError):
        adaptc.exporters.export_genai(llama(), LoraConfig(target_modules=["nothing"]), target)
    target.write_text("")
    with pytest.raises(adaptc.CheckpointError, match="it is a file"):
        adaptc.exporters.export_genai(llama(), config, target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
