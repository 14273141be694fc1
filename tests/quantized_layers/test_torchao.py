"""Weights of torchao are captured as they are, and compute what the library computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as ao
from torch import Tensor, nn
from torchao.quantization.granularity import PerGroup, PerTensor

import adaptc
from adaptc import LoraConfig
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.replace_layers import plain_layers
from tests.support.quantized_models import Net, adapters, check_adapted, check_close, check_refused, plain_twin

SIZES = (48, 32, 64)
CONFIGS: dict[str, Callable[[], Any]] = {
    "rows": ao.Int8WeightOnlyConfig,
    "groups": lambda: ao.Int8WeightOnlyConfig(granularity=PerGroup(16)),
    "tensor": lambda: ao.Int8WeightOnlyConfig(granularity=PerTensor()),
    "dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    "unpacked": ao.IntxWeightOnlyConfig,
    "unpacked, 4 bits": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "asymmetric": lambda: ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(16), mapping_type=ao.MappingType.ASYMMETRIC
    ),
}


def is_target(_: Any, name: str) -> bool:
    return name in ("up", "down")


def net(make: Callable[[], Any] = CONFIGS["rows"], dtype: torch.dtype = torch.float32) -> Any:
    model = Net(SIZES).to(dtype).eval()
    with torch.no_grad():
        model.up.weight += 0.1  # asymmetric schemes have zeros to keep
    ao.quantize_(model, make(), is_target)
    return model


def values(layer: Any) -> Tensor:
    return layer.weight.dequantize()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_values_are_the_librarys(name: str, dtype: torch.dtype) -> None:
    model = net(CONFIGS[name], dtype)
    expected = [values(model.up), values(model.down)]
    codes = [model.up.weight.qdata.data_ptr(), model.down.weight.qdata.data_ptr()]
    held = model.up.weight
    with plain_layers(model) as plain:
        weights = [plain.up.weight, plain.down.weight]
    assert model.up.weight is held
    for weight, value, address in zip(weights, expected, codes, strict=True):
        assert isinstance(weight, QuantizedTensor)
        assert weight.dtype == dtype
        assert torch.equal(weight.dequantize(), value)
        assert weight.stored["codes"].data_ptr() == address
    assert ("zeros" in weights[0].stored) == (name == "asymmetric")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without `get_apply_tensor_subclass`")
def test_models_are_adapted_as_peft_adapts_them(name: str, tmp_path: Path) -> None:
    build = partial(net, CONFIGS[name])
    x = torch.randn(3, SIZES[0])
    # PEFT takes one class of torchao's; the others are compared with the library's values.
    known = name in ("rows", "groups", "tensor", "dynamic")
    made = adapters(build if known else lambda: plain_twin(build(), values), tmp_path)
    program = check_adapted(build(), made, (x,), 0.02 if name == "dynamic" else 1e-5)
    assert isinstance(program.state_dict["up.weight"], QuantizedTensor)
    with torch.no_grad():
        check_close(program.base(x), build()(x), 0.02 if name == "dynamic" else 1e-5)


def test_the_rounding_of_inputs_is_part_of_the_scheme() -> None:
    with plain_layers(net(CONFIGS["dynamic"])) as plain:
        assert plain.up.weight.scheme.activations == "int8"


def test_tied_weights_stay_tied_and_embeddings_are_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.up = nn.Embedding(13, 16), nn.Linear(16, 13, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.up(torch.tanh(self.embedding(ids)))

    model = Tied().eval()
    ao.quantize_(model, CONFIGS["rows"](), is_target)
    model.embedding.weight = model.up.weight
    ids = torch.randint(0, 13, (2, 5))
    with torch.no_grad():
        expected = model(ids)
    with plain_layers(model) as plain:
        assert plain.embedding.weight is plain.up.weight
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=(ids,))
    check_close(program.base(ids), expected, 1e-6)
    assert model.embedding.weight is model.up.weight


def with_weight(config: Callable[[], Any] = CONFIGS["rows"], **changes: Any) -> Callable[[], Any]:
    """Return a model whose second weight has other attributes."""

    def build() -> Any:
        model = net(config)
        for name, change in changes.items():
            setattr(model.down.weight, name, change(getattr(model.down.weight, name)))
        return model

    return build


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = ao.Int8Tensor.from_hp(torch.randn(2, 8, 16), ao.PerRow())
        self.weight = nn.Parameter(weight, requires_grad=False)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "codes": (
        with_weight(qdata=lambda t: t[:-1]),
        r"Net is quantised.* 'down', a .*Linear,.*'weight.qdata' must be torch.int8 \(64, 32\), and is .*\(63, 32\)",
    ),
    "scales": (
        with_weight(scale=lambda t: t[1:]),
        r"'weight.scale' must be torch.float32 \(64, 1\), and is .*\(63, 1\)",
    ),
    "nan": (with_weight(scale=lambda t: t * torch.nan), "'weight.scale' has values that are not finite"),
    "groups": (with_weight(CONFIGS["groups"], block_size=lambda _: [1, 24]), "24 does not divide the 32 columns"),
    "row blocks": (with_weight(block_size=lambda _: [2, 32]), "blocks of 2 rows, and one or all rows are read"),
    "zeros": (
        with_weight(CONFIGS["asymmetric"], zero_point=lambda t: t[1:] + 1),
        r"'weight.zero_point' must be torch.int8 \(64, 2\)",
    ),
    "fixed scales": (with_weight(act_quant_scale=lambda _: torch.ones(1, 1)), "fixed scales of inputs"),
    "asymmetric inputs": (
        partial(net, lambda: ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ao.MappingType.ASYMMETRIC)),
        "'weight' rounds inputs as PerRow, ASYMMETRIC",
    ),
    "unpacked with rounded inputs": (
        partial(net, lambda: ao.Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(16))),
        "rounds inputs by 'int8_asym_per_token'.*use IntxWeightOnlyConfig",
    ),
    "three axes": (lambda: nn.Sequential(Bank()), r"layer '0', a .*Bank, .*\(2, 8, 16\), and weights with two axes"),
    "float8": (
        partial(net, ao.Float8WeightOnlyConfig),
        r"Net is quantised: 'up' is a .*Linear, whose 'weight' is a torchao.*Float8Tensor.*reads quantised ones of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    build, said = REFUSED[name]
    check_refused(build(), said, SIZES[0])
