"""Runs models and programs, and compares the float tensors of their outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch

Call = dict[str, Any]
Outputs = dict[str, torch.Tensor]


@torch.no_grad()
def run(model: Any, call: Call) -> Outputs:
    """Return the float tensors of a model's output by name, from a copy of the inputs."""
    torch.manual_seed(0)
    return float_tensors(model(**copy.deepcopy(call)))


def float_tensors(output: Any, name: str = "", *, detached: bool = True) -> Outputs:
    """Return the float tensors in an output by their path in it, without caches."""
    if isinstance(output, torch.Tensor):
        value = output.detach().clone() if detached else output
        return {name or "output": value} if output.is_floating_point() else {}
    if isinstance(output, dict):
        items = [(k, v) for k, v in output.items() if "past_key_values" not in k and "cache" not in k]
    elif isinstance(output, (list, tuple)):
        of_images = name.endswith(".pooler_output") or ".deepstack_features." in name
        if of_images and all(isinstance(v, torch.Tensor) for v in output):
            # A model has the features of each image, and a program those of all images in one tensor.
            return float_tensors(torch.cat([v.flatten(0, -2) for v in output]), name, detached=detached)
        items = [(str(i), v) for i, v in enumerate(output)]
    else:
        return {}
    return {
        k: v
        for key, value in items
        for k, v in float_tensors(value, f"{name}.{key}" if name else key, detached=detached).items()
    }


def difference(one: Outputs, other: Outputs) -> str:
    """Return by how much two outputs differ; nothing where they are equal but for rounding."""
    shared = [name for name in one if name in other]
    if not shared:
        return f"no output in common: {', '.join(one)}; {', '.join(other)}"
    faults = {name: fault for name in shared if (fault := _fault(one[name].double(), other[name].double()))}
    if not faults:
        return ""
    said = "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:2])
    return f"{said}; logits are equal" if "logits" in shared and "logits" not in faults else said


def _fault(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"has shape {tuple(a.shape)} in place of {tuple(b.shape)}"
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "is not finite elsewhere"
    a, b = a[a.isfinite()], b[b.isfinite()]
    if a.numel() and (worst := (a - b).abs().max().item()) > 1e-4 * (scale := b.abs().max().item()) + 1e-6:
        return f"differs by {worst:.1e} of {scale:.1e}"
    return ""
