"""Put plain linear layers with quantised weights in the place of other libraries' layers, for a while.

The stored tensors are shared with the library's layer wherever its layout allows, and nothing is written to that layer.
A weight is read once for as long as its layer lives: further captures get the same tensors. A weight that was replaced
or written to meanwhile is read anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from adaptc.errors import CaptureError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.quantized_layers.bitsandbytes_layers import BITSANDBYTES
from adaptc.quantized_layers.gguf_layers import GGUF
from adaptc.quantized_layers.hqq_layers import HQQ
from adaptc.quantized_layers.linear_layer import QuantizedLinear, class_path
from adaptc.quantized_layers.packed_words import AWQ, GPTQ
from adaptc.quantized_layers.torchao_weights import TORCHAO_FORMATS, find_torchao_codes, read_torchao_weight

_READERS = (BITSANDBYTES, GPTQ, AWQ, HQQ, GGUF)
#: what is read, for messages
READ_FORMATS = "; ".join([*(r.formats for r in _READERS), TORCHAO_FORMATS])


class _KnownWeight(NamedTuple):
    """A weight that was read, and the state of the codes that it was read from."""

    codes: ref[Tensor]
    state: tuple[int, int]
    weight: QuantizedTensor


#: module -> name of the weight and dtype -> the weight
_known: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], _KnownWeight]] = WeakKeyDictionary()


@contextlib.contextmanager
def plain_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Run the block with plain layers in the place of the quantised ones that can be read, and restore the model.

    The block is given the model: ``model`` itself, or a plain layer where it is a quantised layer. Layers and weights
    with several names keep them all. Quantised layers that cannot be read stay as they are.

    Raises CaptureError where tensors of a layer contradict each other, or an option of it is not read. Nothing was
    replaced then.
    """
    root, swaps = _find_swaps(model)
    try:
        for holder, name, _, new in swaps:
            setattr(holder, name, new)
        yield root
    finally:
        for holder, name, old, _ in swaps:
            setattr(holder, name, old)


def _find_swaps(model: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, str, object, object]]]:
    """Return the model's plain root, and each (holder, attribute, old value, new value)."""
    swaps: list[tuple[nn.Module, str, object, object]] = []
    layers: dict[int, QuantizedLinear | None] = {}
    weights: dict[int, nn.Parameter] = {}
    dtype = _model_dtype(model)
    modules = list(model.named_modules(remove_duplicate=False))
    by_path = dict(modules)
    for path, module in modules:
        if id(module) not in layers:
            layers[id(module)] = _plain_layer(model, path, module, dtype)
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
                if (codes := find_torchao_codes(weight)) is not None:
                    if id(weight) not in weights:
                        read = _reading(model, path, module, lambda n=name, w=weight: read_torchao_weight(w, n))
                        made = _read_once(module, name, weight.dtype, codes, read)
                        weights[id(weight)] = nn.Parameter(made, requires_grad=False)
                    swaps.append((module, name, weight, weights[id(weight)]))
        new = layers[id(module)]
        if new is not None and path:
            parent, _, name = path.rpartition(".")
            swaps.append((by_path[parent], name, module, new))
    return layers[id(model)] or model, swaps


def _plain_layer(model: nn.Module, path: str, module: nn.Module, dtype: torch.dtype) -> QuantizedLinear | None:
    """Return the plain layer for ``module``, or None for a module of no library."""
    for reader in _READERS:
        if (codes := reader.find_codes(module)) is not None:
            read = _reading(model, path, module, lambda r=reader: r.read(module, dtype))
            made = QuantizedLinear(_read_once(module, "", dtype, codes, read), getattr(module, "bias", None))
            made.training = module.training
            return made
    return None


def _reading(
    model: nn.Module, path: str, module: nn.Module, read: Callable[[], QuantizedTensor]
) -> Callable[[], QuantizedTensor]:
    """Return ``read`` with errors that name the model and the layer."""

    def named() -> QuantizedTensor:
        try:
            return read()
        except CaptureError as error:
            kind = class_path(type(module))
            raise CaptureError(
                f"{type(model).__name__} is quantised, and its layer {path!r}, a {kind}, cannot be read: {error}"
            ) from error

    return named


def _read_once(
    module: nn.Module, name: str, dtype: torch.dtype, codes: Tensor, read: Callable[[], QuantizedTensor]
) -> QuantizedTensor:
    """Return the weight of ``module`` as ``read`` makes it, or as it was made of these ``codes`` before."""
    if codes.is_inference():  # such a tensor does not count the writes to it
        return read()
    known = _known.setdefault(module, {})
    state, entry = (codes._version, codes.data_ptr()), known.get((name, dtype))
    if entry is None or entry.codes() is not codes or entry.state != state:
        entry = known[name, dtype] = _KnownWeight(ref(codes), state, read())
    return entry.weight


def _model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first plain weight, or torch's default dtype where it has none."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.itemsize > 1:
            return parameter.dtype
    return torch.get_default_dtype()
