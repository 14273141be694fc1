"""Store weights of a program, or parameters of a model, in few bits, and report what that costs in accuracy.

Nothing else of the program changes: its graph reads the same weights, whose values are those of the scheme. All weights
are made before the first one is replaced, so a failure changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.errors import ConfigError, PassError
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassResult
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.quantized.scheme import Scheme
from adaptc.torch_typing import vector_norm

#: dtypes of weights that schemes store
QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightQuantization:
    """A report of the storing of one weight.

    Attributes:
        fqn: the weight's name.
        scheme: the name of the scheme, in words.
        error: the norm of the change of the weight over the norm of the weight.
        bytes_before: the bytes of the weight as it was.
        bytes_after: the bytes of the stored tensors.
    """

    fqn: str
    scheme: str
    error: float
    bytes_before: int
    bytes_after: int


#: makes the quantised form of a weight; raises ConfigError where the weight has none
Quantizer = Callable[[Tensor], QuantizedTensor]


@dataclass(frozen=True)
class QuantizeBy:
    """The quantizer of a scheme, with the options of a :class:`QuantizedTensor`.

    ``is_transposed``: the weight is stored as (in, out), and quantised along the other axis. ``row_axes``: 2 for a
    stack of experts.
    """

    scheme: Scheme
    is_transposed: bool = False
    row_axes: int = 1

    def __call__(self, weight: Tensor) -> QuantizedTensor:
        return QuantizedTensor.quantize(weight, self.scheme, self.is_transposed, self.row_axes)


def quantize_weight(fqn: str, weight: Tensor, quantizer: Quantizer) -> QuantizedTensor:
    """Return ``weight`` as ``quantizer`` makes it, a parameter where it is one.

    Raises ConfigError, which names the weight, where the weight cannot be stored so.
    """
    check_quantizable(fqn, weight)
    try:
        made = quantizer(weight.detach())
    except ConfigError as error:
        raise ConfigError(f"{fqn!r}: {error}") from error
    is_parameter = isinstance(weight, torch.nn.Parameter)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made  # type: ignore[return-value]


def check_quantizable(fqn: str, weight: Tensor) -> None:
    """Raise ConfigError, which names the weight, where it is quantised already or of a dtype that schemes lack."""
    if isinstance(weight, QuantizedTensor):
        raise ConfigError(f"{fqn!r} is quantised already, by {weight.scheme}; leave it out with exclude=")
    if weight.dtype not in QUANTIZABLE:
        raise ConfigError(f"{fqn!r} is {weight.dtype}, and weights of float32, bfloat16 and float16 are quantised")


def describe_quantization(fqn: str, before: Tensor, after: QuantizedTensor) -> WeightQuantization:
    """Return the report of one weight. Its old values are read once more, and nothing is kept of them."""
    old = before.detach().float()
    change, size = float(vector_norm(after.dequantize().float() - old)), float(vector_norm(old))
    return WeightQuantization(
        fqn, str(after.scheme), change / size if size else change, before.nbytes, after.stored_bytes
    )


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """A pass that stores weights in few bits; its count is that of the weights, its data a WeightQuantization of each.

    ``quantizers`` maps the FQN of a weight to what makes its quantised form. ``progress`` wraps the sequence of names.
    """

    name: ClassVar[str] = "quantize_weights"

    quantizers: Mapping[str, Quantizer] = field(repr=False)
    progress: Callable[[Sequence[str]], Any] = field(default=iter, repr=False)

    def apply(self, subject: ExportedProgram) -> PassResult[ExportedProgram]:
        lifted = LiftedProgram(subject)
        if unknown := [f for f in self.quantizers if f not in lifted.placeholders]:
            raise PassError(f"the program has no weight {unknown[0]!r}")
        made: dict[str, QuantizedTensor] = {}
        rows: list[WeightQuantization] = []
        for fqn in self.progress(list(self.quantizers)):
            old = lifted.tensor(fqn)
            made[fqn] = quantize_weight(fqn, old, self.quantizers[fqn])
            rows.append(describe_quantization(fqn, old, made[fqn]))
        for fqn, weight in made.items():
            lifted.set_tensor(fqn, weight)
        return PassResult(lifted.finish(), len(rows), data=tuple(rows))
