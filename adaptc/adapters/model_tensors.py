"""Read models as tensors by name, one at a time, from a module, a state dict, or safetensors files.

A tensor is read when it is asked for, and freed when the caller drops it. This file also tells what kind of layer each
weight belongs to. Neither a model nor code of a directory is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaptc.capture.model_files import read_skeleton
from adaptc.capture.quantised import check_not_quantised
from adaptc.errors import CheckpointError, ConfigError, short_repr
from adaptc.passes.graph.ops import Op, aten
from adaptc.quantized_layers.replace_layers import plain_layers

SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
_CONV_OPS = {nn.Conv1d: ("conv1d", aten.conv1d.default), nn.Conv2d: ("conv2d", aten.conv2d.default)}
_CONV_OPS[nn.Conv3d] = ("conv3d", aten.conv3d.default)


class ModelTensors(Protocol):
    """The tensors of a model by name. ``keys`` has the names, and indexing reads a tensor."""

    @property
    def source(self) -> str: ...
    @property
    def entries(self) -> Mapping[str, Any]: ...
    def __getitem__(self, key: str) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class _TensorsInMemory:
    source: str
    entries: Mapping[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key].detach()


@dataclass(frozen=True, eq=False)
class _TensorsOnDisk:
    """The tensors of safetensors files. ``keys`` maps each name to the open file that has it."""

    source: str
    entries: Mapping[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        try:
            return self.entries[key].get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.source}: {key!r} cannot be read ({short_repr(str(error))})") from error


@contextmanager
def open_model_tensors(model: Any) -> Iterator[ModelTensors]:
    """Run the block with the tensors of ``model``.

    Raises CheckpointError for files, ConfigError for a value that is no model, and CaptureError for a quantised one
    that cannot be read.
    """
    if isinstance(model, nn.Module):
        with plain_layers(model) as plain:
            check_not_quantised(plain)
            tensors = _without_tied(plain.state_dict(), _tied_parameters(plain))
        yield _TensorsInMemory(type(model).__name__, tensors)
    elif isinstance(model, Mapping) and model and all(isinstance(t, Tensor) for t in model.values()):
        yield _TensorsInMemory("a state dict", model)
    elif isinstance(model, (str, os.PathLike)):
        with ExitStack() as stack:
            entries: dict[str, Any] = {}
            for file in safetensors_files(Path(model)):
                try:
                    opened = stack.enter_context(safe_open(file, "pt"))
                    entries |= dict.fromkeys(opened.keys(), opened)
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(
                        f"{file} is no readable safetensors file ({short_repr(str(error))})"
                    ) from error
            if not entries:
                raise CheckpointError(f"{model} holds no tensors")
            yield _TensorsOnDisk(str(model), entries)
    else:
        raise ConfigError(
            f"a model is a module, a state dict, a .safetensors file or a directory of them; got {type(model).__name__}"
        )


def safetensors_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"there is no file or directory {path}")
    if (path / SAFE_WEIGHTS_INDEX_NAME).is_file():
        try:
            names = set(json.loads((path / SAFE_WEIGHTS_INDEX_NAME).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path / SAFE_WEIGHTS_INDEX_NAME} cannot be read ({short_repr(str(error))})"
            ) from error
        if odd := [n for n in sorted(map(str, names)) if Path(n).name != n]:  # a path could lead anywhere
            raise CheckpointError(
                f"{path / SAFE_WEIGHTS_INDEX_NAME} names {short_repr(odd[0])}, and all files of a model lie beside it"
            )
        files = [path / n for n in sorted(map(str, names))]
        if missing := [f.name for f in files if not f.is_file()]:
            raise CheckpointError(f"{path} lacks {missing[0]}, which its index names")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors files; save the model with safe_serialization=True")
    return files


class ModelLayers:
    """The layers of a model: its modules by path. Without a model, every matrix counts as a linear layer's weight."""

    def __init__(self, model: nn.Module | None) -> None:
        self.modules = None if model is None else dict(model.named_modules(remove_duplicate=False))
        self.tied_names = {} if model is None else _tied_parameters(model)

    def op_of_weight(self, module: str, param: str, shape: tuple[int, ...]) -> Op | None:
        """Return the op of a weight for which LoRA has a form, or None for all other tensors."""
        if param != "weight" or len(shape) < 2:
            return None
        if self.modules is None:
            return Op("linear", shape, aten.linear.default) if len(shape) == 2 else None
        layer: Any = self.modules.get(module)
        if isinstance(layer, nn.Linear):
            return Op("linear", shape, aten.linear.default)
        if isinstance(layer, nn.Embedding):
            if layer.max_norm is not None:
                raise ConfigError(
                    f"{module!r} is an embedding with max_norm, which LoRA's own rows would keep to as well, so that "
                    "no LoRA is near the change; leave it out of target_modules"
                )
            return Op("embedding", (shape[1], shape[0]), aten.embedding.default)
        if type(layer).__name__ == "Conv1D":  # transformers' linear layer with a transposed weight
            return Op("addmm", (shape[1], shape[0]), aten.addmm.default)
        for kind, (name, target) in _CONV_OPS.items():
            if isinstance(layer, kind):
                return Op(name, shape, target, (layer.stride, layer.padding, layer.dilation, layer.groups))
        return None

    def tied_modules(self, key: str) -> list[str]:
        """Return the modules whose weight is tied to the one called ``key``."""
        return [n.rpartition(".")[0] for n, first in self.tied_names.items() if first == key]


def find_layers(*models: Any) -> ModelLayers:
    """Return the layers of the first model that tells them: a module, or a directory with a ``config.json``."""
    for model in models:
        if isinstance(model, nn.Module):
            return ModelLayers(model)
        if isinstance(model, (str, os.PathLike)) and (Path(model) / "config.json").is_file():
            return ModelLayers(read_skeleton(Path(model)))
    return ModelLayers(None)


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return for each name of a tied parameter the first name of that parameter."""
    first: dict[int, str] = {}
    out = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(p), name) != name:
            out[name] = first[id(p)]
    return out


def _without_tied(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if k not in tied}
