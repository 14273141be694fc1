"""Models of transformers as ONNX files with adapters as inputs, compared with PEFT at sizes that were not captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from tests.support.oracle import quiet


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))


def llama() -> Any:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, num_key_value_heads=1, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


def llama4() -> Any:
    """Its rotary positions are complex numbers, which no runtime has."""
    sizes = {"hidden_size": 20, "intermediate_size_mlp": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 97, "num_key_value_heads": 1, "head_dim": 10, "attention_chunk_size": 32}
    config = transformers.Llama4TextConfig(moe_layers=[], use_cache=False, **sizes)
    return transformers.Llama4ForCausalLM(config)


def bert() -> Any:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=97, num_labels=3, **sizes))


def vit() -> Any:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=12, patch_size=4, **sizes))


def t5() -> Any:
    sizes = {"d_model": 20, "d_ff": 28, "d_kv": 6, "num_layers": 2, "num_heads": 3}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, use_cache=False, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def text(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - length // 3 :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))}


def pair(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), "decoder_input_ids": ids(batch, length + 2)}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int, int], dict[str, Tensor]], list[str]]] = {
    "llama": (llama, text, ["q_proj", "down_proj"]),
    "llama4": (llama4, text, ["q_proj", "down_proj"]),
    "bert": (bert, text, ["query", "output.dense"]),
    "vit": (vit, pixels, ["q_proj", "projection"]),
    "t5": (t5, pair, ["q", "wo"]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    make, inputs, targets = MODELS[name]

    def model() -> Any:
        torch.manual_seed(3)
        return make().eval()

    for adapter, rank, names in (("fr", 3, targets), ("de", 5, targets[:1])):
        torch.manual_seed(rank)
        config = peft.LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
        with quiet(".*"):
            peft.get_peft_model(model(), config).save_pretrained(str(tmp_path / adapter))
    program = adaptc.compile(model(), tmp_path / "fr")
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    merged = adaptc.exporters.export_onnx(program, tmp_path / "merged.onnx", adapters="merged")
    for adapter in ("fr", "de"):
        session.load_adapter(adapter, tmp_path / adapter)
    for size in ((2, 7), (1, 3), (5, 17)):
        given = inputs(*size)
        arrays = {n: t.numpy() for n, t in given.items()}
        for adapter in (None, "fr", "de"):
            oracle = model()
            if adapter is not None:
                oracle = peft.PeftModel.from_pretrained(oracle, str(tmp_path / adapter)).eval()
            with torch.no_grad():
                expected = oracle(**given).logits
            found = session.run(arrays, adapter, ["logits"])["logits"]
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
            if adapter == "fr":
                import onnxruntime

                (found,) = onnxruntime.InferenceSession(str(merged)).run(["logits"], arrays)
                torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
