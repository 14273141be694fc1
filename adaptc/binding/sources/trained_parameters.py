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
        return _saved_modules(values, weights)
    if peft_type != "LORA":
        raise CheckpointError(
            f"{source}: module {next(iter(biases))!r} has a trained bias, and {peft_type} trains none in PEFT. Drop "
            "the biases (diff_b), or split the file and compile for a list of adapters."
        )
    saved = _saved_modules({m: own for m, own in values.items() if m not in biases}, weights)
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
    saved = _saved_modules(values, weights).tensors
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
    if isinstance(base, QuantizedTensor) or base.is_meta:
        raise CheckpointError(
            f"{location}: the file has a change of the whole {param}, and the values that it is added to are "
            f"{'quantised' if isinstance(base, QuantizedTensor) else 'not here'}. Bind it to a program of the model as "
            "it was trained, and give the directory that adaptc.save_adapter writes of that."
        )
    wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
    value = base.detach().to(wide) + change.to(device=base.device, dtype=wide)
    return value.to(base.dtype)


def _saved_modules(values: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor]) -> TrainedParameters:
    """Return whole modules with these values. Their other parameters are the base's: PEFT saves all of a module."""
    if not values:
        return TrainedParameters()
    tensors: dict[str, Tensor] = {}
    for module, own in values.items():
        names = [n for fqn in weights if fqn.startswith(f"{module}.") and "." not in (n := fqn[len(module) + 1 :])]
        tensors |= {f"{module}.{n}": own[n] if n in own else weights[f"{module}.{n}"].detach().clone() for n in names}
    return TrainedParameters(tensors, {"modules_to_save": list(values)})
