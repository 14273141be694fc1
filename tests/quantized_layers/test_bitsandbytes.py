"""Layers of bitsandbytes are captured as they are, and compute what the library computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn

import adaptc
from adaptc import CaptureError, LoraConfig
from adaptc.capture.capture import capture
from adaptc.passes.analysis.program_facts import all_module_types
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.replace_layers import plain_layers
from tests.support.quantized_models import (
    HAS_FEW_ROWS_KERNEL,
    Net,
    adapters,
    check_adapted,
    check_close,
    check_refused,
    plain_twin,
    replaced,
)

#: sizes whose rows are whole numbers of blocks, and others. The library's AVX-512 kernel misreads even sizes between.
SIZES, ODD_SIZES = (64, 128, 32), (15, 17, 23)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Keep the library from compiling what it computes odd sizes by, once for each size."""
    with torch.compiler.set_stance("force_eager"):
        yield


def four_bit(
    layer: nn.Linear,
    kind: str = "nf4",
    block: int = 64,
    double: bool = False,
    compute: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
    kernel: bool = False,
) -> Any:
    """Return ``layer`` as a Linear4bit, not yet quantised. ``kernel`` lets eval mode pack the weight for CPUs."""
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute, double, kind, storage
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.data, False, None, block, double, kind, quant_storage=storage, module=made
    )
    made.bias = layer.bias
    if not kernel:
        made.support_avx512bf16_for_cpu = False
    return made


def eight_bit(layer: nn.Linear, threshold: float = 0.0) -> Any:
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    made.weight = bnb.nn.Int8Params(layer.weight.data, False)
    made.bias = layer.bias
    return made


def net(make: Callable[[nn.Linear], Any], sizes: tuple[int, int, int] = SIZES, dtype: Any = torch.float32) -> Any:
    model = replaced(Net(sizes).to(dtype), make).to("cpu")
    model.is_loaded_in_4bit = isinstance(model.up, bnb.nn.Linear4bit)
    model.is_loaded_in_8bit = not model.is_loaded_in_4bit
    return model


def values(layer: Any) -> Tensor:
    """Return the weight of a layer as the library reads it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return int8_vectorwise_dequant(layer.weight.data, scales)


FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4, double": {"kind": "fp4", "double": True, "block": 32},
    "nf4, double": {"double": True},
}


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES, ODD_SIZES])
def test_codes_and_values_of_four_bits_are_the_librarys(
    name: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    model = net(partial(four_bit, **FOUR_BIT[name]), sizes, dtype)
    for layer in (model.up, model.down):
        with plain_layers(layer) as plain:
            weight: Any = plain.weight
        assert isinstance(weight, QuantizedTensor)
        assert weight.dtype == dtype
        assert torch.equal(weight.dequantize(), values(layer))
        assert weight.stored["codes"].data_ptr() == layer.weight.data_ptr()
        assert weight.stored["scales"].data_ptr() == layer.weight.quant_state.absmax.data_ptr()


def test_codes_may_be_stored_in_another_dtype() -> None:
    layer = net(partial(four_bit, storage=torch.bfloat16)).up
    with plain_layers(layer) as plain:
        assert torch.equal(plain.weight.dequantize(), values(layer))


@pytest.mark.parametrize("sizes", [SIZES, ODD_SIZES])
def test_codes_and_values_of_eight_bits_are_the_librarys(sizes: tuple[int, int, int]) -> None:
    model = net(eight_bit, sizes)
    with plain_layers(model) as plain:
        weights = [plain.up.weight, plain.down.weight]
    for layer, weight in zip((model.up, model.down), weights, strict=True):
        assert torch.equal(weight.dequantize(), values(layer))
        assert weight.stored["codes"].data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [
        (None, torch.float32),
        (None, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_a_layer_computes_in_the_dtype_that_the_library_computes_in(
    compute: torch.dtype | None, dtype: torch.dtype
) -> None:
    model = net(partial(four_bit, compute=compute, double=True), ODD_SIZES, dtype)
    x = torch.randn(3, ODD_SIZES[0], dtype=dtype)
    with plain_layers(model) as plain, torch.no_grad():
        found = plain(x)
    with torch.no_grad():
        expected = model(x)
    assert found.dtype == expected.dtype == dtype
    check_close(found, expected, 4 * torch.finfo(dtype).eps if compute is None else 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["nf4", "fp4, double"])
def test_four_bit_models_are_adapted_as_peft_adapts_them(name: str, tmp_path: Path) -> None:
    build = partial(net, partial(four_bit, **FOUR_BIT[name]), ODD_SIZES)
    x = torch.randn(3, ODD_SIZES[0])
    program = check_adapted(build(), adapters(build, tmp_path), (x,), 1e-5)
    assert all(isinstance(program.state_dict[f"{n}.weight"], QuantizedTensor) for n in ("up", "down"))


def test_eight_bit_models_are_adapted_as_peft_adapts_them(tmp_path: Path) -> None:
    build = partial(net, eight_bit)
    model, x = build(), torch.randn(3, SIZES[0])
    # PEFT's model on the library's own values: in eval mode the library also rounds the layers' inputs.
    made = adapters(lambda: plain_twin(build(), values), tmp_path)
    check_adapted(model, made, (x,), 1e-5)
    (first, peft_model), _ = adapters(build, tmp_path / "of the library")
    with torch.no_grad():
        expected = peft_model(x)
    check_close(adaptc.compile(model, first, example_inputs=(x,))(x), expected, 0.03)


def test_all_linear_takes_quantised_layers_as_linear_layers() -> None:
    x, model = torch.randn(3, ODD_SIZES[0]), net(four_bit, ODD_SIZES)
    captured = capture(model, (x,))
    names = ("up", "down", "head")
    assert {captured.module_types[n] for n in names} == {"torch.nn.modules.linear.Linear"}
    assert {all_module_types(captured.program)[n] for n in names} == {"torch.nn.modules.linear.Linear"}
    program = adaptc.compile(model, LoraConfig(r=2, target_modules="all-linear"), example_inputs=(x,))
    assert {a.module for a in program.adaptation.attachments} == set(names)


def test_outlier_columns_are_computed_like_the_others() -> None:
    model = net(partial(eight_bit, threshold=1.0))
    x, twin = torch.randn(3, SIZES[0]), plain_twin(model, values)
    with plain_layers(model) as plain, torch.no_grad():
        check_close(plain(x), twin(x), 1e-6)


def test_a_weight_that_was_packed_for_a_cpu_is_read() -> None:
    """The library packs where the CPU has its kernel; the next test packs one by hand."""
    model = net(partial(four_bit, double=True, kernel=True, block=32))
    codes = model.up.weight.data.clone()
    x = torch.randn(3, SIZES[0])
    with torch.no_grad():
        expected = model(x)
    packed = getattr(model.up.weight.quant_state, "packing_format_for_cpu", False)
    assert packed == HAS_FEW_ROWS_KERNEL
    with plain_layers(model) as plain, torch.no_grad():
        assert torch.equal(plain.up.weight.stored["codes"], codes.reshape(-1))
        check_close(plain(x), expected, 0.02)


def test_a_weight_packed_for_a_cpu_has_the_codes_that_it_had() -> None:
    layer = net(partial(four_bit, block=32)).up
    state, codes = layer.weight.quant_state, layer.weight.data.clone()
    plain_values = values(layer)
    layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    with plain_layers(layer) as plain:
        weight: Any = plain.weight
    assert torch.equal(weight.stored["codes"], codes.reshape(-1))
    assert weight.dtype == torch.float32
    check_close(weight.dequantize(), plain_values, torch.finfo(torch.bfloat16).eps)


def test_a_weight_is_read_once_and_again_after_a_change() -> None:
    model = net(four_bit, ODD_SIZES)

    def read() -> Any:
        with plain_layers(model) as plain:
            return plain.up.weight.stored["table"], plain.up.weight

    first, second = read(), read()
    assert second[1].stored["codes"].data_ptr() == first[1].stored["codes"].data_ptr()
    assert first[0] is second[0]
    model.up = net(four_bit, ODD_SIZES).up
    model.up.weight.quant_state.code = model.up.weight.quant_state.code.clone()
    assert read()[0] is not first[0]


@pytest.mark.long
def test_weights_that_were_read_go_with_the_model() -> None:
    model = net(four_bit, ODD_SIZES)
    with plain_layers(model):
        pass
    known = weakref.ref(model.up)
    del model
    gc.collect()
    assert known() is None


def test_a_layer_with_two_names_keeps_both() -> None:
    model = net(four_bit, (15, 17, 23))
    model.again = model.up
    with plain_layers(model) as plain:
        assert plain.again is plain.up
        assert type(plain.up) is not type(model.head) or plain.up is not model.head
    assert model.again is model.up
    assert isinstance(model.up, bnb.nn.Linear4bit)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_as_it_was_after_an_error(training: bool) -> None:
    model = net(four_bit, ODD_SIZES).train(training)
    layers, state = (model.up, model.down), dict(model.state_dict())
    modes = []

    def fail() -> None:
        with plain_layers(model) as plain:
            modes.append(plain.up.training)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert modes == [training]
    assert (model.up, model.down) == layers
    with pytest.raises(CaptureError):
        adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=(torch.randn(3, 14),))
    assert (model.up, model.down) == layers
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def unquantized() -> Any:
    return replaced(Net(ODD_SIZES), four_bit)


def unquantized_8bit() -> Any:
    return replaced(Net(ODD_SIZES), eight_bit)


def with_state(**changes: Any) -> Callable[[], Any]:
    """Return a model whose second layer has other attributes of its ``quant_state``."""

    def build() -> Any:
        model = net(partial(four_bit, double=True), ODD_SIZES)
        for name, change in changes.items():
            state = model.down.weight.quant_state
            *path, last = name.split("__")
            for part in path:
                state = getattr(state, part)
            setattr(state, last, change(getattr(state, last)))
        return model

    return build


def cut_codes() -> Any:
    model = net(four_bit, ODD_SIZES)
    model.down.weight.data = model.down.weight.data[:-1]
    return model


def cut_scales_8bit() -> Any:
    model = net(eight_bit, ODD_SIZES)
    model.down.weight.SCB = model.down.weight.SCB[1:]
    return model


def of_plain_weights() -> Any:
    return replaced(Net(ODD_SIZES), lambda o: bnb.nn.Linear8bitLt(o.in_features, o.out_features, o.bias is not None))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "not quantised": (
        unquantized,
        r"layer 'up', a bitsandbytes.nn.modules.Linear4bit, .*not quantised yet.*to\(device",
    ),
    "8 bit, not quantised": (unquantized_8bit, r"layer 'up', a .*Linear8bitLt, .*not quantised yet.*to\(device"),
    "plain weights": (of_plain_weights, "has_fp16_weights=False"),
    "codes": (cut_codes, r"'down'.*'weight' must be torch.uint8 \(196,\), and is torch.uint8 \(195,\)"),
    "8 bit scales": (cut_scales_8bit, r"'down'.*'SCB' must be torch.float32 \(23,\), and is torch.float32 \(22,\)"),
    "scales": (with_state(absmax=lambda t: t[1:]), r"'weight.absmax' must be torch.uint8 \(7,\), and is .*\(6,\)"),
    "nan": (with_state(state2__absmax=lambda t: t * torch.nan), r"'weight.nested_absmax' has values .* not finite"),
    "table": (with_state(code=lambda t: t[:8]), r"'weight.quant_map' must be torch.float32 \(16,\)"),
    "block size": (with_state(blocksize=lambda _: 32), r"'weight.absmax' must be torch.uint8 \(13,\)"),
    "shape": (with_state(shape=lambda s: s[::-1]), r"of a weight \(17, 23\), and the layer has one of \(23, 17\)"),
    "kind": (with_state(quant_type=lambda _: "int4"), "quant_type is 'int4', and nf4, fp4 are read"),
    "embedding": (
        lambda: nn.Sequential(bnb.nn.Embedding4bit(8, 6)).to("cpu"),
        r"Sequential is quantised: '0' is a bitsandbytes.nn.modules.Embedding4bit.*quantised ones of .*Linear4bit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Embedding size")
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    build, said = REFUSED[name]
    check_refused(build(), said, 15)
