"""Export a model with quantised weights: ``torch.export`` sees plain weights, and the program gets the quantised ones.

A stand-in has the shape and dtype of its weight and is all zeros. ``torch.export`` reads no values, so the memory of a
stand-in is never touched, and takes no room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.passes.quantized.quantized_tensor import QuantizedTensor


@contextlib.contextmanager
def float_stand_ins(model: nn.Module) -> Iterator[Callable[[ExportedProgram], None]]:
    """Run the block with plain parameters in the place of ``model``'s quantised ones.

    The block is given a function that puts the quantised weights into a program that was exported in the block.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    weights: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(weight, QuantizedTensor):
                replaced.append((module, name, weight))

    def put_back(program: ExportedProgram) -> None:
        for fqn, tensor in program.state_dict.items():
            if id(tensor) in weights:
                program.state_dict[fqn] = weights[id(tensor)]

    try:
        for module, name, weight in replaced:
            if id(weight) not in stand_ins:
                zeros = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
                stand_in = stand_ins[id(weight)] = nn.Parameter(zeros, requires_grad=False)
                weights[id(stand_in)] = weight
            setattr(module, name, stand_ins[id(weight)])
        yield put_back
    finally:
        for module, name, weight in replaced:
            setattr(module, name, weight)
