"""Compute the changes that an adapter of a program makes to weights, by the definition of its method.

A change is ``weight(W) - W`` in float32, or float64 for float64 weights. W is the model's own weight, whatever base the
adapter was trained on. The program is unchanged, and one weight at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptc.binding.bind import file_tensors
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.errors import ConfigError
from adaptc.methods import TargetedConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """The change of one weight and its bias.

    ``matrix`` (blocks, rows, columns) is as in :class:`~adaptc.passes.protocol.parts.low_rank.LowRank`. ``bias`` is
    (out,), None where no bias changes.
    """

    matrix: Tensor
    bias: Tensor | None


class AdapterDeltas:
    """The changes of one adapter: its attachments by weight, and its other tensors as files have them.

    Making one raises ConfigError for a method that changes no weights by matrices.
    """

    def __init__(self, spec: BindingSpec, binding: Binding) -> None:
        config = binding.config
        if not isinstance(config, TargetedConfig) or config.target_unit != "matrices":
            how = (
                "trains tensors of the model as they are" if isinstance(config, TargetedConfig) else "changes no weight"
            )
            raise ConfigError(f"{binding.source}: {config.peft_type} {how}, which is no change of low rank")
        self.spec, self.binding, self.config = spec, binding, config
        self.sites: dict[str, list[Attachment]] = {}
        others = {}
        for a in spec.attachments:
            if a.id not in binding.methods:
                continue
            inner, _ = a.method.unwrap(spec.ops[a.id])
            if inner.is_variant_of(config.method(a.name or a.module, a.kind)):
                self.sites.setdefault(a.fqn, []).append(a)
            else:
                others[a.id] = binding.methods[a.id]
        rest = replace(binding, methods=others, config=config, changed_base={}, joint_adapters={})
        self.saved_tensors: Mapping[str, Tensor] = file_tensors(spec, rest)

    def weight_of(self, fqn: str) -> Tensor:
        """Return the model's own weight called ``fqn`` in the form of its changes, (blocks, rows, columns)."""
        op, stored = self.spec.ops[self.sites[fqn][0].id], self.spec.weights[fqn].detach()
        wide = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)
        return _to_blocks(op, _to_dense(op, op.canonical(wide)))

    @torch.no_grad()
    def delta_of(self, fqn: str) -> WeightDelta:
        """Return the change of the weight called ``fqn``.

        Raises ConfigError where the method acts on activations, the weight is no real matrix, or LoRA has no tensor for
        the bias.
        """
        spec, attachments = self.spec, self.sites[fqn]
        stored = spec.weights[fqn].detach()
        if stored.ndim < 2 or not stored.is_floating_point():
            raise ConfigError(f"{fqn!r} is {stored.dtype} {tuple(stored.shape)}; LoRA is for real matrices")
        precision = torch.float64 if stored.dtype == torch.float64 else torch.float32
        base = self.binding.changed_base.get(fqn, stored).detach().to(precision)
        value, bias, first_bias = base, None, None
        for a in attachments:
            op, method = spec.ops[a.id], a.method.evaluated()
            if not method.has_weight():
                raise ConfigError(f"{fqn!r}: {method.name} acts on activations, and not on the weight as LoRA does")
            slots = {n: _to_precision(self.binding.values[f], precision) for n, f in a.slots.items()}
            scale = None if a.scale_slot is None else self.binding.values[a.scale_slot].to(precision)
            made = method.weight_over(op, op.canonical(base), op.canonical(_check_shape(op, value, base)), slots, scale)
            value = op.stored(made)
            if method.has_bias():
                bias_name = f"{a.module}.{a.param.removesuffix('weight')}bias".removeprefix(".")
                own = spec.weights.get(bias_name)
                if bias is None and own is not None:
                    bias = first_bias = own.detach().to(precision)
                bias = method.bias_over(op, op.canonical(base), first_bias, bias, slots, scale)
        op = spec.ops[attachments[0].id]
        change = _to_dense(op, op.canonical(value)) - _to_dense(op, op.canonical(stored.to(precision)))
        moved = bias is not None and (first_bias is None or not torch.equal(bias, first_bias))
        if moved and (not op.callable or op.kind == "embedding"):
            raise ConfigError(
                f"{fqn!r}: {attachments[0].method.name} changes a bias there, which LoRA has no tensor for"
            )
        added = None if not moved or bias is None else (bias if first_bias is None else bias - first_bias)
        return WeightDelta(_to_blocks(op, change), added)


def _to_precision(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype) if t.is_floating_point() else t.detach()


def _check_shape(op: Op, value: Tensor, base: Tensor) -> Tensor:
    if value.shape != base.shape:
        raise ConfigError("several adapters at one grouped convolution have no form that another could change")
    return value


def _to_dense(op: Op, canonical: Tensor) -> Tensor:
    return op.dense(canonical) if canonical.shape == op.shape else canonical


def _to_blocks(op: Op, canonical: Tensor) -> Tensor:
    """Return the change as LoRA has it: a matrix for each expert, or for each group of outputs, which read all
    inputs."""
    if op.experts:
        return canonical
    return canonical.reshape(op.groups, canonical.shape[0] // op.groups, -1)
