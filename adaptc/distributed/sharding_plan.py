"""Decide which tensors of a program are sharded in tensor parallelism, and along which axis.

A plan names linear layers. Of a layer that is "colwise" each process computes a part of the outputs. Of one that is
"rowwise" each process reads a part of the inputs. Adapters follow their layers, as in PEFT: of LoRA at a colwise
layer ``lora_B`` is sharded, and at a rowwise layer ``lora_A``. Every other tensor is whole in each process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import ConfigError, did_you_mean, listing, short_repr
from adaptc.passes.graph.lifted import fqns_by_placeholder
from adaptc.passes.graph.ops import CASTS, LAYER_OPS
from adaptc.passes.protocol.regions import node_tag
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.patterns import compile_pattern, limit_pattern_time
from adaptc.program.adapted_program import AdaptedProgram

#: the axis of a linear layer's weight that each style shards
WEIGHT_AXES = {"colwise": 0, "rowwise": 1}
#: styles of transformers' plans -> what they are here. What is gathered, and when, follows from the graph.
_THEIR_STYLES = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output"), "colwise"),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input"), "rowwise"),
}
#: styles of transformers' plans under which tensors are whole in each process, or may as well be
_WHOLE = {
    "embedding_rowwise",
    "embedding_colwise",
    "replicate",
    "replicated_with_grad_allreduce",
    "sequence_parallel",
    "mla_kv_a_proj",
}


def resolve_plan(program: AdaptedProgram, plan: Any) -> dict[str, str]:
    """Return module path -> "colwise" or "rowwise" for the linear layers that ``plan`` names.

    ``plan``: "auto" for the one that transformers has for the model, or name -> style. A name is the end of a module
    path from a dot on, and ``*`` in it stands for any component. The first name that fits a layer counts.

    Raises ConfigError for a plan that names no linear layer, for an unknown style, and where two names disagree.
    """
    given: Mapping[str, str] | None = None if plan == "auto" else plan
    if given is not None and (not isinstance(given, Mapping) or not given):
        raise ConfigError(f'plan={short_repr(plan)} is neither "auto" nor a dict of module names and styles')
    entries = _plan_of_model(program) if given is None else dict(given)
    for name, style in entries.items():
        if style not in WEIGHT_AXES:
            raise ConfigError(f"plan: {name!r} is {short_repr(style)}, and a layer is one of 'colwise' and 'rowwise'")
    linear, others = _linear_layers(program), _base_modules(program)
    found: dict[str, str] = {}
    with limit_pattern_time():
        for name, style in entries.items():
            pattern = _pattern_of(name)
            fits = [path for path in linear if pattern.fullmatch(path)]
            wrong = {p: linear[p] for p in fits if linear[p]}
            if given is not None:
                if wrong:
                    raise ConfigError(f"plan: {name!r} names {next(iter(wrong))!r}, {next(iter(wrong.values()))}")
                if not fits:
                    other = next((p for p in others if pattern.fullmatch(p)), None)
                    said = "no module" if other is None else f"{other!r}, which is no linear layer"
                    raise ConfigError(f"plan: {name!r} names {said}{did_you_mean(name, linear)}")
            for path in fits:
                if path not in wrong and found.setdefault(path, style) != style:
                    raise ConfigError(f"plan: {path!r} is both {found[path]!r} and, by {name!r}, {style!r}")
    if not found:
        raise ConfigError("the plan that transformers has for the model names no linear layer of it: give plan={...}")
    return found


def tensor_axes(program: AdaptedProgram, layers: Mapping[str, str], size: int) -> dict[str, int]:
    """Return FQN -> axis of the tensors that are divided among ``size`` processes.

    ``layers``: what :func:`resolve_plan` gave. Raises ConfigError for a quantised weight, and for an axis that does not
    divide.
    """
    axes: dict[str, int] = {}
    tensors = program.base_tensors
    for path, style in layers.items():
        name, axis = f"{path}.weight".removeprefix("."), WEIGHT_AXES[style]
        weight = tensors[name]
        if weight.shape[axis] % size:
            what = ("outputs", "inputs")[axis]
            raise ConfigError(
                f"{path!r} has {weight.shape[axis]} {what}, which {size} processes cannot divide: leave it out of the "
                "plan"
            )
        axes[name] = axis
        bias = f"{path}.bias".removeprefix(".")
        if style == "colwise" and bias in tensors:
            axes[bias] = 0
    for a in program.adaptation.attachments:
        style = layers.get(a.module)
        if style is None or a.param != "weight":
            continue
        sharded = "lora_B" if style == "colwise" else "lora_A"
        axes |= {fqn: WEIGHT_AXES[style] for n, fqn in a.slots.items() if n.partition(".")[0] == sharded}
    return axes


def check_not_quantized(program: AdaptedProgram) -> None:
    """Raise ConfigError where a weight of the base is quantised."""
    for name, t in program.base_tensors.items():
        if isinstance(t, QuantizedTensor):
            raise ConfigError(
                f"{name!r} is quantised as {t.scheme}, and quantised weights are not sharded: compile the model "
                "without adaptc.quantize, or train it in stages (adaptc.split)"
            )


def _plan_of_model(program: AdaptedProgram) -> dict[str, str]:
    source = program.adaptation.source
    config = None if source is None else source.config
    theirs: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    if not theirs:
        raise ConfigError(
            "transformers has no plan of tensor parallelism for this model: give plan={'q_proj': 'colwise', 'o_proj': "
            "'rowwise', ...}"
        )
    theirs |= getattr(None if source is None else source.model_class, "_tp_plan", None) or {}
    if odd := {n: s for n, s in theirs.items() if s not in _THEIR_STYLES and s not in _WHOLE}:
        raise ConfigError(
            f"transformers' plan for this model has {listing(f'{n} as {s}' for n, s in odd.items())}, which adaptc "
            "does not shard so: give plan={...} with the model's linear layers"
        )
    return {n: _THEIR_STYLES[s] for n, s in theirs.items() if s in _THEIR_STYLES}


def _pattern_of(name: str) -> Any:
    text = r"[^.]+".join(map(_escaped, name.split("*")))
    return compile_pattern("plan", rf"(?:.*\.)?{text}", name)


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\{c}" for c in text)


def _linear_layers(program: AdaptedProgram) -> dict[str, str]:
    """Return the paths of linear layers, with why one cannot be sharded; '' for those that can."""
    names = fqns_by_placeholder(program.graph_signature)
    found: dict[str, str] = {}
    base: Mapping[str, Tensor] = program.base_tensors
    shared: dict[int, list[str]] = {}
    for fqn, t in base.items():
        shared.setdefault(id(t), []).append(fqn)
    for node in program.graph.nodes:
        if node.op != "placeholder" or (fqn := names.get(node.name, "")) not in base or not fqn.endswith(".weight"):
            continue
        # An adapter may stand between a weight and its layer, which it then names.
        readers = [*_layer_ops(node), *(a.kind for a in program.adaptation.attachments if a.fqn == fqn)]
        if not any(kind == "linear" for kind in readers):
            continue
        aliases = [n for n in shared[id(base[fqn])] if n != fqn]
        why = "" if all(kind == "linear" for kind in readers) else "whose weight other kinds of layers read, too"
        found[fqn.removesuffix(".weight")] = f"whose weight is tied to {aliases[0]!r}" if aliases else why
    return found


def _layer_ops(node: fx.Node) -> Iterator[str]:
    """Yield the kinds of the layers that read a weight, but for those of an adapter."""
    for user in node.users:
        if node_tag(user) is not None:
            continue
        layer: Any = LAYER_OPS.get(user.target)
        if layer is not None and user.args[layer[2]] is node:
            yield layer[0]
        elif user.target in CASTS:
            yield from _layer_ops(user)


def _base_modules(program: AdaptedProgram) -> list[str]:
    return sorted({n.rpartition(".")[0] for n, t in program.base_tensors.items() if isinstance(t, torch.Tensor)})
