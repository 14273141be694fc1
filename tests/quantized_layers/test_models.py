"""Whole models of transformers that were quantised are captured, adapted, trained and generate as PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torchao.quantization as ao
import transformers
from torchao.quantization.granularity import PerGroup

import adaptc
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.quantized_models import adapters, check_close

pytestmark = pytest.mark.long

NAMES = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Keep bitsandbytes from compiling what it computes odd sizes by, once for each size."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a tiny llama, whose rows are whole numbers of the libraries' blocks."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=40, initializer_range=0.2)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def load(path: str, name: str) -> Any:
    """Return the llama as transformers quantises it on loading."""
    config = MODELS[name][0]()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel computes in bfloat16
    return model.eval()


FOUR_BIT = partial(transformers.BitsAndBytesConfig, load_in_4bit=True)
#: kind -> (config, how far its outputs may be from PEFT's); bitsandbytes rounds inputs of int8 layers, too
MODELS: dict[str, tuple[Callable[[], Any], float]] = {
    "nf4": (partial(FOUR_BIT, bnb_4bit_quant_type="nf4"), 1e-4),
    "fp4, double": (partial(FOUR_BIT, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True), 1e-4),
    "int8": (partial(transformers.BitsAndBytesConfig, load_in_8bit=True), 0.1),
    "torchao": (lambda: transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()), 1e-4),
    "torchao, groups": (
        lambda: transformers.TorchAoConfig(ao.Int8WeightOnlyConfig(granularity=PerGroup(32))),
        1e-4,
    ),
}
IDS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_a_llama_is_adapted_as_peft_adapts_it(name: str, saved: str, tmp_path: Path) -> None:
    build, tolerance = partial(load, saved, name), MODELS[name][1]
    made = adapters(build, tmp_path, NAMES)
    model = build()
    program = adaptc.compile(model, made[0][0], example_inputs={"input_ids": IDS})
    for path, other in made:
        adaptc.swap(program, path)
        with torch.no_grad():
            check_close(program(input_ids=IDS).logits, other(input_ids=IDS).logits, tolerance)
    held = {n: t for n, t in program.state_dict.items() if isinstance(t, QuantizedTensor)}
    assert len(held) == 7 * model.config.num_hidden_layers


@pytest.mark.long
@pytest.mark.parametrize("name", ["nf4", "torchao"])
def test_a_llama_generates_as_peft_lets_it(name: str, saved: str, tmp_path: Path) -> None:
    build = partial(load, saved, name)
    (first, peft_model), _ = adapters(build, tmp_path, NAMES)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = build()
    layer = model.model.layers[1].mlp.up_proj
    generator = adaptc.compile_for_generation(model, first, max_length=16)
    assert torch.equal(generator.generate(IDS, **options), peft_model.generate(input_ids=IDS, **options))
    assert model.model.layers[1].mlp.up_proj is layer


@pytest.mark.long
@pytest.mark.parametrize("name", ["fp4, double", "torchao, groups"])
def test_a_llama_trains_as_peft_trains_it(name: str, saved: str, tmp_path: Path) -> None:
    build, tolerance = partial(load, saved, name), MODELS[name][1]
    (first, peft_model), _ = adapters(build, tmp_path, NAMES)
    module = adaptc.compile(build(), first, training=True).module()
    peft_model.train()
    for model in (module, peft_model):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    expected = {
        n.split("layers.")[1].replace(".default", ""): p.grad
        for n, p in peft_model.named_parameters()
        if p.requires_grad
    }
    found = {
        n.split("layers.")[1].replace(".default", ""): p.grad for n, p in module.named_parameters() if p.requires_grad
    }
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        check_close(gradient, expected[key], tolerance)
    module.eval()
    peft_model.eval()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(module.generate(IDS, **options), peft_model.generate(input_ids=IDS, **options))
