"""Quantised models merged file by file: to plain weights, and to weights of the same scheme."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc.errors import CheckpointError, ConfigError, MergeError
from tests.quantized_layers.test_packed_words import Packed, QuantLinear, TorchQuantLinear, WQLinear_GEMM
from tests.support.oracle import quiet

pytestmark = pytest.mark.usefixtures("no_progress_bars")

KIND = transformers.LlamaForCausalLM
#: rows that the library's kernel on CPUs takes; the vocabulary is odd
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(14).reshape(2, 7)
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
#: name -> the layer as its library packs it, and what the config says
PACKED: dict[str, tuple[Callable[[nn.Linear], Packed], dict[str, Any]]] = {
    "gptq": (QuantLinear, {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}),
    "gptq v2, 8 bits": (
        lambda layer: TorchQuantLinear(layer, bits=8),
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"},
    ),
    "gptq, act order": (
        lambda layer: QuantLinear(layer, act_order=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    ),
    "awq": (WQLinear_GEMM, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
}
TARGETS = ["q_proj", "down_proj"]


@cache
def plain_and_adapter() -> tuple[Path, Path]:
    folder = Path(mkdtemp())
    torch.manual_seed(0)
    KIND(transformers.LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder / "plain")
    with quiet():
        config = peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
        peft.get_peft_model(KIND.from_pretrained(folder / "plain"), config).save_pretrained(folder / "adapter")
    return folder / "plain", folder / "adapter"


@cache
def bitsandbytes_model(scheme: str) -> Path:
    folder = Path(mkdtemp()) / "model"
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[scheme])
    model = KIND.from_pretrained(plain_and_adapter()[0], quantization_config=config, dtype="auto")
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@cache
def packed_model(name: str) -> tuple[Path, dict[str, Tensor]]:
    """A directory with words of GPTQ or AWQ, and the values of its quantised weights, by a reading of its own."""
    make, config = PACKED[name]
    folder = Path(mkdtemp()) / "model"
    model = KIND.from_pretrained(plain_and_adapter()[0], dtype=torch.float16)
    state, values = dict(model.state_dict()), dict[str, Tensor]()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path != "lm_head":
            made = make(layer)
            values[f"{path}.weight"] = made.values()
            del state[f"{path}.weight"]
            state |= {f"{path}.{k}": t for k, t in made.state_dict().items()}
    model.save_pretrained(folder)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    return folder, values


def merged_by_peft(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of a plain model with these weights, as PEFT merges the adapter into it, in float32."""
    with quiet():
        model = KIND.from_pretrained(plain_and_adapter()[0], dtype=torch.float32)
        model.load_state_dict({k: t.float() for k, t in state.items()})
        merged = peft.PeftModel.from_pretrained(model, str(plain_and_adapter()[1])).merge_and_unload()
    return {k: t.detach().to(dtype) for k, t in merged.state_dict().items()}


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The weights of a directory by the library's own dequantisation."""
    from bitsandbytes import functional

    state = dict[str, Tensor]()
    model: Any = KIND.from_pretrained(folder, dtype="auto")
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if type(weight).__name__ == "Params4bit":
            state[f"{path}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            state[f"{path}.weight"] = (weight.data.float() * weight.SCB[:, None] / 127).bfloat16()
        elif isinstance(weight, Tensor):
            state[f"{path}.weight"] = weight.detach()
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.mark.long
@pytest.mark.parametrize("scheme", BITSANDBYTES)
def test_bitsandbytes_to_plain_weights(scheme: str, tmp_path: Path) -> None:
    model = bitsandbytes_model(scheme)
    before = contents(model)
    report = adaptc.merge_directory(model, plain_and_adapter()[1], tmp_path / "merged", dequantize=True)
    assert contents(model) == before
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    loaded = KIND.from_pretrained(tmp_path / "merged", dtype="auto")
    expected = merged_by_peft(dequantized(model), torch.bfloat16)
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, t in found.items():
        assert t.dtype == torch.bfloat16
        torch.testing.assert_close(t, expected[key], rtol=1e-2, atol=1e-3)  # one rounding to bfloat16
    assert len(report.sites) == 4
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "merged").values())


@pytest.mark.long
@pytest.mark.parametrize("scheme", BITSANDBYTES)
def test_bitsandbytes_to_its_own_scheme(scheme: str, tmp_path: Path) -> None:
    """Weights that the adapter leaves are the same bytes, and the others are as near as the scheme can be."""
    model = bitsandbytes_model(scheme)
    report = adaptc.merge_directory(model, plain_and_adapter()[1], tmp_path / "merged", requantize=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    old, new = tensors_of(model), tensors_of(tmp_path / "merged")
    assert old.keys() == new.keys()
    for key, t in old.items():
        if not any(f"{name}." in key for name in TARGETS):
            assert torch.equal(t, new[key])
    exact = merged_by_peft(dequantized(model), torch.float32)
    found = dequantized(tmp_path / "merged")
    errors = {s.fqn: s.error for s in report.sites}
    for key in errors:
        change, size = (found[key].float() - exact[key]).norm(), exact[key].norm()
        assert change < {"nf4": 0.12, "fp4": 0.15, "int8": 0.01}[scheme] * size, key
        assert errors[key] == pytest.approx(float((found[key].float() - exact[key]).abs().max()), rel=0.05)
    got = KIND.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert type(got.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    assert bool(got(input_ids=IDS).logits.isfinite().all())


@pytest.mark.long
@pytest.mark.parametrize("name", PACKED)
def test_packed_words_to_plain_weights(name: str, tmp_path: Path) -> None:
    model, values = packed_model(name)
    adaptc.merge_directory(model, plain_and_adapter()[1], tmp_path / "merged", dequantize=True)
    plain = {k: t for k, t in tensors_of(model).items() if k.endswith(".weight")}
    expected = merged_by_peft({**plain, **values}, torch.float16)
    found = KIND.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    for key, t in found.items():
        assert t.dtype == torch.float16
        torch.testing.assert_close(t, expected[key], rtol=2e-3, atol=1e-3)


def refused(error: type[Exception], said: str, model: Path, target: Path, **options: Any) -> None:
    before = contents(model)
    with pytest.raises(error, match=said):
        adaptc.merge_directory(model, plain_and_adapter()[1], target, **options)
    assert contents(model) == before
    assert not target.exists()


def changed(source: Path, target: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """A copy of a model in one file, with other entries of its ``quantization_config`` and other tensors."""
    shutil.copytree(source, target)
    text = json.loads((target / "config.json").read_text())
    text["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(text))
    held = {**load_file(target / "model.safetensors"), **tensors}
    save_file({k: t for k, t in held.items() if t is not None}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.long
def test_refusals_write_nothing(tmp_path: Path) -> None:
    model, target, layer = packed_model("gptq")[0], tmp_path / "merged", "model.layers.1.self_attn.q_proj"
    scales = load_file(model / "model.safetensors")[f"{layer}.scales"]
    refused(MergeError, r"down_proj.weight' and 3 more weights .* dequantize=True or requantize=True", model, target)
    refused(MergeError, "requantize=True is for bitsandbytes", model, target, requantize=True)
    refused(ConfigError, "exclude each other", model, target, requantize=True, dequantize=True)
    for number, (config, tensors, said) in enumerate(
        [
            ({"quant_method": "fp8"}, {}, "quantised by 'fp8'"),
            ({"bits": 3}, {}, f"{layer.replace('1', '0')}.*|its codes have 3 bits"),
            ({"group_size": 24}, {}, "group_size=24"),
            ({}, {f"{layer}.qzeros": None}, f"{layer}.weight.*qzeros"),
            ({}, {f"{layer}.scales": scales * float("nan")}, f"{layer}.weight|not finite"),
            ({}, {f"{layer}.scales": scales[:, :-1].contiguous()}, f"{layer}.weight"),
        ]
    ):
        odd = changed(model, tmp_path / str(number), config, tensors)
        refused(CheckpointError, said, odd, target, dequantize=True)


def test_damaged_weights_of_bitsandbytes_are_refused_by_name(tmp_path: Path) -> None:
    model = bitsandbytes_model("nf4")
    name = "model.layers.1.self_attn.q_proj.weight"
    key = f"{name}.quant_state.bitsandbytes__nf4"
    file = next(f for f in model.glob("*.safetensors") if key in load_file(f))
    held = load_file(file)

    def text(value: Any) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)

    state = json.loads(bytes(held[key].tolist()))
    cases: dict[str, dict[str, Tensor | None]] = {
        "is no JSON": {key: torch.tensor([1, 2, 255], dtype=torch.uint8)},
        "says no scheme": {key: text({**state, "quant_type": "nf5"})},
        "must be an object": {key: text([1])},
        "weights .outputs, inputs. are read": {key: text({**state, "shape": [64]})},
        "absmax": {f"{name}.absmax": None},
        "must be torch.uint8": {name: held[name][:-1].clone()},
        "not finite": {f"{name}.nested_absmax": held[f"{name}.nested_absmax"] * float("inf")},
    }
    for said, tensors in cases.items():
        odd = tmp_path / said.replace(" ", "-")
        shutil.copytree(model, odd)
        save_file({k: t for k, t in {**held, **tensors}.items() if t is not None}, odd / file.name, {"format": "pt"})
        refused(CheckpointError, f"{name}.*{said}", odd, tmp_path / "merged", dequantize=True)
