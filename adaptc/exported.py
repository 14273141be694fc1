"""Facts read off an exported program: the types of its modules, its mode, and which inputs can be filled in.

Before: any valid ``ExportedProgram`` in the training dialect, loaded from a file or not. After: it is unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree  # there is no public pytree that knows what torch.export has registered

from adaptc.passes._lifted import called_again


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def call_by_first_name(program: ExportedProgram, model: nn.Module) -> None:
    """Where a module is held under several names, call the modules inside it by the first one, in ``program``'s nodes.

    They are one module with one adapter, whichever name a call goes by; that is how PEFT, too, finds and replaces them.
    """
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = name.rpartition(".")
        holder = first.get(id(model.get_submodule(parent)), parent)
        first.setdefault(id(module), name)
        if name and holder != parent:
            names[name] = f"{holder}.{attribute}".removeprefix(".")
    if not names:
        return
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack")
            if stack:
                renamed = {k: (names.get(called_again.sub("", path), path), cls) for k, (path, cls) in stack.items()}
                node.meta["nn_module_stack"] = renamed


def module_types_of(program: ExportedProgram) -> dict[str, str]:
    """Types of all modules an export names: those its nodes were traced in, and the owners of its parameters."""
    types: dict[str, str] = {}
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            for path, cls in (node.meta.get("nn_module_stack") or {}).values():
                # A second call of a module is written `path@1`.
                name = ".".join(part.split("@")[0] for part in path.removeprefix("L['self']").strip(".").split("."))
                types.setdefault(name, cls if isinstance(cls, str) else qualified(cls))
    for fqn in (*program.state_dict, *program.constants):
        parts = fqn.split(".")[:-1]
        for i in range(len(parts) + 1):
            types.setdefault(".".join(parts[:i]), "torch.nn.modules.module.Module")
    return types


def mode_of(program: ExportedProgram, default: bool) -> bool:
    """Train or eval mode, as the nodes that depend on it say; ``default`` when there is none."""
    aten = torch.ops.aten
    flags: list[bool] = []
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            packet = getattr(node.target, "overloadpacket", None)
            if packet in (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout):
                flags.append(bool(node.args[2]))
            elif packet in (aten.batch_norm, aten.instance_norm) and node.args[3] is not None:
                flags.append(bool(node.args[5]))
            elif packet is aten.scaled_dot_product_attention:
                rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
                flags += [True] if rate else []
    return any(flags) if flags else default


def keyword_inputs(program: ExportedProgram) -> dict[str, Any]:
    """Keyword inputs by name, as traced."""
    spec = program.call_spec.in_spec
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [values.get(s.arg.name) for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    _, kwargs = pytree.tree_unflatten(inputs, spec) if spec is not None else ((), {})
    return dict(kwargs)


def fills_of(program: ExportedProgram, encoder_decoder: bool) -> dict[str, tuple[str, str]]:
    """What transformers models take for absent keyword inputs: no padding, and no labels."""
    inputs = {name: value for name, value in keyword_inputs(program).items() if isinstance(value, Tensor)}
    fills: dict[str, tuple[str, str]] = {}
    for mask, ids in (("attention_mask", "input_ids"), ("decoder_attention_mask", "decoder_input_ids")):
        if mask in inputs and ids in inputs and inputs[mask].ndim == inputs[ids].ndim:
            fills[mask] = ("ones_like", ids)
    labels = inputs.get("labels")
    main = next((name for name in ("input_ids", "pixel_values", "input_features") if name in inputs), None)
    if labels is not None and main is not None and labels.dtype == torch.int64:
        if labels.ndim == 1:
            fills["labels"] = ("ignore_rows", main)
        elif main == "input_ids" and labels.ndim == inputs[main].ndim and not encoder_decoder:
            fills["labels"] = ("ignore_like", main)
    return fills
