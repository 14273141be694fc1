"""Quantised models are refused by name before anything is captured. Stand-ins have the structure of their libraries."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear

import adaptc
from adaptc import CaptureError, LoraConfig
from adaptc.capture.quantised import check_not_quantised

WIDTH = 24
CONFIG = LoraConfig(r=2, target_modules=["q_proj"])


class Wrapped(Tensor):
    """As torchao's tensors: whole numbers and a scale that say they are float32."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> Any:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Any:
        return cls(inner["values"], inner["scale"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "Wrapped"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise RuntimeError(f"{func} is not for quantised weights")


def whole(dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.zeros(WIDTH, WIDTH, dtype=dtype)


def named(name: str, where: str, *bases: type) -> type:
    return type(name, bases or (nn.Linear,), {"__module__": where})


def wrapped() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight = nn.Parameter(Wrapped(whole(), torch.ones(())), requires_grad=False)
    return layer


def with_tensor(name: str, t: Tensor, kind: Any = nn.Linear) -> nn.Module:
    layer = kind(WIDTH, WIDTH, bias=False)
    if name == "weight":
        del layer.weight
    layer.register_buffer(name, t)
    return layer


def of_bitsandbytes() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    kind = named("Params4bit", "bitsandbytes.nn.modules", nn.Parameter)
    layer.weight = kind(whole(torch.uint8), requires_grad=False)
    return layer


#: what stands at q_proj -> what the error says of it
LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchao": (wrapped, r"Linear, whose 'weight' is a .*Wrapped"),
    "bitsandbytes": (lambda: named("Linear4bit", "bitsandbytes.nn.modules")(WIDTH, WIDTH), "modules.Linear4bit"),
    "bitsandbytes' tensor": (of_bitsandbytes, r"Linear, whose 'weight' is a bitsandbytes.nn.modules.Params4bit"),
    "gptq": (lambda: named("TorchQuantLinear", "gptqmodel.nn_modules.qlinear.torch")(WIDTH, WIDTH), "TorchQuantLinear"),
    "awq": (lambda: named("WQLinear_GEMM", "awq.modules.linear.gemm")(WIDTH, WIDTH), "WQLinear_GEMM"),
    "hqq": (lambda: named("HQQLinear", "hqq.core.quantize")(WIDTH, WIDTH), "HQQLinear"),
    "eetq": (lambda: named("EetqLinear", "eetq.modules.qlinear")(WIDTH, WIDTH), "EetqLinear"),
    "quanto": (lambda: named("QLinear", "optimum.quanto.nn.qlinear")(WIDTH, WIDTH), "QLinear"),
    "transformers' own": (lambda: AutoBitLinear(WIDTH, WIDTH, bias=False), r"integrations.bitnet.AutoBitLinear"),
    "gguf": (lambda: named("GgufLinear", "transformers.integrations.gguf.utils")(WIDTH, WIDTH), "GgufLinear"),
    "packed": (lambda: with_tensor("qweight", whole(torch.int32)), r"whose 'qweight' is stored as torch.int32"),
    "int8": (lambda: with_tensor("weight", whole()), r"whose 'weight' is stored as torch.int8"),
    "float8": (
        lambda: with_tensor("weight", whole(torch.float32).to(torch.float8_e4m3fn)),
        r"whose 'weight' is stored as torch.float8_e4m3fn",
    ),
    "torch": (
        lambda: named("Linear", "torch.ao.nn.quantized.dynamic.modules.linear")(WIDTH, WIDTH),
        r"torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    ),
}


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=3)).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_a_quantised_layer_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was captured")

    monkeypatch.setattr(torch.export, "export", captured)
    make, said = LAYERS[name]
    model = llama()
    model.model.layers[1].self_attn.q_proj = make()
    where = rf"LlamaForCausalLM is quantised: 'model.layers.1.self_attn.q_proj' is a .*{said}.*dequantise"
    for use in (adaptc.compile, adaptc.compile_for_generation):
        with pytest.raises(CaptureError, match=where):
            use(model, CONFIG)
    with pytest.raises(CaptureError, match=where):
        adaptc.subtract_adapter(model, model, rank=2)
    with pytest.raises(CaptureError, match=r"LlamaModel is quantised: 'layers.1.self_attn.q_proj'"):
        adaptc.compile(model.model, CONFIG, example_inputs={"input_ids": torch.ones(2, 5, dtype=torch.long)})


@pytest.mark.filterwarnings("ignore:.*quantize:")
def test_quantised_tensors_and_programs() -> None:
    layer = nn.Linear(3, 4)
    layer.register_buffer("w", torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8))
    with pytest.raises(CaptureError, match="'w' is a quantised tensor"):
        check_not_quantised(nn.Sequential(layer))
    program = torch.export.export(nn.Sequential(nn.Linear(3, 4)), (torch.ones(2, 3),))
    program.state_dict["0.weight"] = nn.Parameter(Wrapped(whole(), torch.ones(())), requires_grad=False)
    with pytest.raises(CaptureError, match=r"the program is quantised: '0.weight' is a .*Wrapped"):
        adaptc.compile(program, LoraConfig(r=2, target_modules=["0"]))


def said(method: str = "new_one", **config: Any) -> Any:
    model = llama()
    quantiser = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method, **config))
    vars(model).update(is_quantized=True, hf_quantizer=quantiser)
    return model


def test_what_a_model_says_of_itself() -> None:
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM says that it is quantised \(new_one\)"):
        adaptc.compile(said(), CONFIG)


@pytest.mark.parametrize(
    "model",
    [
        lambda: said(dequantize=True),
        lambda: said(run_compressed=False),
        # transformers turns most GGUF files into plain weights, without a word in the config.
        lambda: said("gguf"),
        lambda: nn.Sequential(named("StableEmbedding", "bitsandbytes.nn.modules", nn.Embedding)(5, 3)),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Embedding(5, 3)),
        lambda: llama().to(torch.bfloat16),
    ],
)
def test_what_is_plain(model: Callable[[], nn.Module]) -> None:
    check_not_quantised(model())
