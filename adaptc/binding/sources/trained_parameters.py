"""Take parameters that a file of another format trains as they are, as PEFT has them: biases and whole modules.

The biases of layers become PEFT's trained biases. A module that has no adapter beside them, such as a norm, becomes one
of PEFT's ``modules_to_save``, with all of its parameters. A change is added to the base's value in float32 and rounded
once, to the dtype of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.formats.file_layer import FileLayer
from adaptc.adapter_files.formats.full_rank import check_shape
from adaptc.errors import CheckpointError
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class TrainedParameters:
    """Parameters that an adapter trains: tensors by PEFT's bare keys, and the config fields that choose them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])


def trained_parameters(
    layers: Mapping[str, FileLayer], weights: Mapping[str, Tensor], peft_type: str, source: str
) -> TrainedParameters:
    """Return the parameters that ``layers`` train beside an adapter of ``peft_type``.

    Raises CheckpointError for parameters that the model lacks, and for biases of a method that trains none.
    """
    values = {m: values for m, layer in layers.items() if (values := _values(m, layer, weights, source))}
    # A matrix's bias can be trained alone, and a norm's comes with its module.
    only_biases = {m for m, own in values.items() if own.keys() == {"bias"} and weights[f"{m}.weight"].ndim > 1}
    biases = {m for m in values if layers[m].peft_type or m in only_biases}
    if not biases:
        return _saved_modules(values, weights, source)
    if peft_type != "LORA":
        raise CheckpointError(
            f"{source}: module {next(iter(biases))!r} has a trained bias, and {peft_type} trains none in PEFT. Drop "
            "the biases (diff_b), or split the file and compile for a list of adapters."
        )
    saved = _saved_modules({m: own for m, own in values.items() if m not in biases}, weights, source)
    inside = {f"{m}.base_layer.bias": values[m]["bias"] for m in biases if layers[m].peft_type}
    alone = {f"{m}.bias": values[m]["bias"] for m in biases if not layers[m].peft_type}
    return TrainedParameters(
        {**saved.tensors, **inside, **alone}, {**saved.fields, "bias": "all" if alone else "lora_only"}
    )


def whole_module_tensors(
    layers: Mapping[str, FileLayer], weights: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the parameters of modules of which a file trains nothing else, by the keys of PEFT's LN tuning."""
    values = {m: _values(m, layer, weights, source) for m, layer in layers.items()}
    saved = _saved_modules(values, weights, source).tensors
    return {".ln_tuning_layers.".join(key.rsplit(".", 1)): t for key, t in saved.items()}


def _values(module: str, layer: FileLayer, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    location = f"{source}: module {module!r}"
    for param, t in (*layer.differences.items(), *layer.whole.items()):
        base = weights.get(f"{module}.{param}")
        if base is None:
            raise CheckpointError(
                f"{location}: the file trains its {param}, and the model's module has none. The adapter was made for "
                "another model."
            )
        check_shape(location, param, t, tuple(base.shape))
        out[param] = t if param in layer.whole else _changed(location, param, base, t)
    return out


def _changed(location: str, param: str, base: Tensor, change: Tensor) -> Tensor:
    value = _known_value(location, param, base)
    wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
    return (value.to(wide) + change.to(device=base.device, dtype=wide)).to(base.dtype)


def _known_value(location: str, param: str, base: Tensor) -> Tensor:
    """Return the value of a base parameter. Raises CheckpointError where it is quantised, or not here: a package has
    NaN for what is not in its file."""
    is_quantized = isinstance(base, QuantizedTensor)
    if is_quantized or base.is_meta or bool(base.isnan().any()):
        raise CheckpointError(
            f"{location}: it is trained as a whole, and the file has a change of its {param}, or none. The base's "
            f"{param}, to which that is added, is {'quantised' if is_quantized else 'not here'}. Compile the model as "
            "it was trained for this file, and give what adaptc.save_adapter writes of that program."
        )
    return base.detach()


def _saved_modules(
    values: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor], source: str
) -> TrainedParameters:
    """Return whole modules with these values. Their other parameters are the base's: PEFT saves all of a module."""
    if not values:
        return TrainedParameters()
    tensors: dict[str, Tensor] = {}
    for module, own in values.items():
        names = [n for fqn in weights if fqn.startswith(f"{module}.") and "." not in (n := fqn[len(module) + 1 :])]
        location = f"{source}: module {module!r}"
        for name in names:
            kept = None if name in own else _known_value(location, name, weights[f"{module}.{name}"]).clone()
            tensors[f"{module}.{name}"] = own[name] if kept is None else kept
    return TrainedParameters(tensors, {"modules_to_save": list(values)})
