"""Mixtures of experts with few bits: adapters give what PEFT's give on the dequantised model, and all else works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from tests.support.oracle import assert_same_gradients, gradients_by_key

pytestmark = pytest.mark.long

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
#: family -> its tiny config; GPT-OSS stores its experts as (experts, in, out)
CONFIGS: dict[str, Any] = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=32, num_experts=5, num_experts_per_tok=2),
    "mixtral": transformers.MixtralConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2),
    "gpt_oss": transformers.GptOssConfig(**_SIZES, num_local_experts=3, num_experts_per_tok=2),
}
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def models(family: str, scheme: str) -> tuple[Any, Any]:
    """Return a model with few bits, and one with its values as plain weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    plain = copy.deepcopy(model)
    adaptc.quantize(model, scheme)
    with torch.no_grad():
        for (name, own), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if isinstance(own, QuantizedTensor):
                theirs.copy_(own.dequantize())
            assert isinstance(own, QuantizedTensor) or "experts" not in name or own.ndim < 3
    return model, plain


def check(found: Tensor, expected: Tensor) -> None:
    """Logits are equal, but for sums in another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.detach().abs().max()))


def peft_adapter(plain: nn.Module, targets: dict[str, Any], path: Path) -> Any:
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=3, init_lora_weights=False, **targets))
    theirs.save_pretrained(path)
    return theirs


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("targets", TARGETS)
def test_outputs_and_gradients_are_those_of_peft(family: str, scheme: str, targets: str, tmp_path: Path) -> None:
    model, plain = models(family, scheme)
    theirs = peft_adapter(plain, TARGETS[targets], tmp_path)
    program = adaptc.compile(model, str(tmp_path))
    for tokens in (ids(), ids(1, 3)):
        check(program(input_ids=tokens).logits, theirs(tokens).logits)
    module = adaptc.compile(model, str(tmp_path), training=True).module()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for side in (module, theirs):
        side(input_ids=ids(), labels=ids()).loss.backward()
    assert_same_gradients(gradients_by_key(module), gradients_by_key(theirs))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_all_else_works_on_them(family: str, tmp_path: Path) -> None:
    model, plain = models(family, "nf4")
    config = LoraConfig(r=3, init_lora_weights=False, **TARGETS["attention"])
    program = adaptc.compile(model, config)
    path = adaptc.save_adapter(program, tmp_path / "adapter")
    expected = adaptc.compile(plain, path)(input_ids=ids()).logits
    mask = torch.ones_like(ids())
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    check(loaded(input_ids=ids(), attention_mask=mask).logits, expected)
    names = {n for n, t in program.state_dict.items() if isinstance(t, QuantizedTensor)}
    assert {n for n, t in loaded.state_dict.items() if isinstance(t, QuantizedTensor)} == names
    assert all(loaded.state_dict[n].has_same_values(program.state_dict[n]) for n in names)
    for options in ({"dequantize": True}, {"keep": "residual"}):
        merged = adaptc.merge(program, **options)
        check(merged(input_ids=ids()).logits, expected)
        assert torch.equal(adaptc.unmerge(merged)(input_ids=ids()).logits, program(input_ids=ids()).logits)
    bank = program.bank(max_rank=4)
    bank.add("a", path)
    check(bank(input_ids=ids(), adapters=["a", None]).logits[:1], expected[:1])
    generator = adaptc.compile_for_generation(model, path, max_batch=2, max_length=32)
    plain_generator = adaptc.compile_for_generation(plain, path, max_batch=2, max_length=32)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(generator.generate(ids(), **options), plain_generator.generate(ids(), **options))


@pytest.mark.slow
def test_a_package_and_compiled_code_give_the_same(tmp_path: Path) -> None:
    model, _plain = models("qwen3_moe", "int8")
    config = LoraConfig(r=3, init_lora_weights=False, **TARGETS["attention"])
    program = adaptc.compile(model, config)
    expected = program(input_ids=ids()).logits
    package = adaptc.load_package(adaptc.package(program, tmp_path / "package.pt2"))
    path = adaptc.save_adapter(program, tmp_path / "adapter")
    compiled = adaptc.compile(model, path, backend="inductor")
    for found in (package(input_ids=ids(), attention_mask=torch.ones_like(ids())), compiled(input_ids=ids())):
        check(found.logits, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_that_an_adapter_changes_are_merged(family: str) -> None:
    model, _ = models(family, "int8")
    program = adaptc.compile(model, LoraConfig(r=3, init_lora_weights=False, **TARGETS["experts"]))
    expected = program(input_ids=ids()).logits
    merged = adaptc.merge(program, dequantize=True)
    check(merged(input_ids=ids()).logits, expected)
    again = adaptc.merge(program, requantize=True)
    weight = again.state_dict["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.row_axes == 2
    assert float((again(input_ids=ids()).logits - expected).norm() / expected.norm()) < 0.1
    assert torch.equal(adaptc.unmerge(again)(input_ids=ids()).logits, expected)
