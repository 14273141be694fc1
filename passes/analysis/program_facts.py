"""Read facts off an exported program: the types of its modules, its mode, and which inputs can be filled in.

Takes any valid ``ExportedProgram`` in the training dialect, loaded from a file or not. Only
:func:`use_first_module_names` changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from adaptc.passes.graph.lifted import fqns_by_placeholder, user_inputs
from adaptc.passes.graph.module_paths import clean_path, program_module_paths
from adaptc.passes.graph.mutation import find_written_nodes
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.graph.train_eval import training_mode_of
from adaptc.torch_typing import named_modules, shape_of

_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def use_first_module_names(program: ExportedProgram, model: nn.Module) -> None:
    """Rename modules in the node metadata of ``program``, so that a module with several names goes by its first.

    It is one module with one adapter, whichever name a call goes by. PEFT finds and replaces modules in this way, too.
    """
    first_names: dict[int, str] = {}
    renames: dict[str, str] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        parent, _, attribute = name.rpartition(".")
        holder = first_names.get(id(model.get_submodule(parent)), parent)
        first_names.setdefault(id(module), name)
        if name and holder != parent:
            renames[name] = f"{holder}.{attribute}".removeprefix(".")
    if not renames:
        return
    module_paths = {name for name, _ in named_modules(model, remove_duplicate=False)}
    for node in all_nodes(program):
        stack = node.meta.get("nn_module_stack")
        if stack:
            renamed = {k: (renames.get(clean_path(path, module_paths), path), cls) for k, (path, cls) in stack.items()}
            node.meta["nn_module_stack"] = renamed


def module_types(program: ExportedProgram) -> dict[str, str]:
    """Return module path -> qualified class name for the modules that ran, read off the nodes of all graphs."""
    module_paths = program_module_paths(program)
    types: dict[str, str] = {}
    for node in all_nodes(program):
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        for path, cls in stack.values():
            types.setdefault(clean_path(path, module_paths), cls if isinstance(cls, str) else qualified_name(cls))
    return types


def all_module_types(program: ExportedProgram) -> dict[str, str]:
    """Return module path -> qualified class name for the modules that ran or hold tensors.

    A module that did not run counts as a plain ``torch.nn.Module``.
    """
    holders = dict.fromkeys(["", *program_module_paths(program)], "torch.nn.modules.module.Module")
    return {**holders, **module_types(program)}


def is_training(program: ExportedProgram, default: bool) -> bool:
    """Return whether the program is in training mode, by the nodes that depend on it; ``default`` where none does."""
    modes = [m for m in map(training_mode_of, all_nodes(program)) if m is not None]
    return any(modes) if modes else default


def all_nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """Yield the nodes of a program's graph, and of the graphs of its autocast, no_grad and control flow blocks."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def keyword_inputs(program: ExportedProgram) -> dict[str, Any]:
    """Return the keyword inputs by name, with the values that stand for them in the graph."""
    spec = program.call_spec.in_spec
    inputs = list(user_inputs(program).values())
    return {} if spec is None else dict(pytree.tree_unflatten(inputs, spec)[1])


def input_fills(program: ExportedProgram, encoder_decoder: bool) -> dict[str, tuple[str, str]]:
    """Return input name -> (kind of filling, input it is made from), for keyword inputs that a caller may leave out.

    The fillings mean what transformers models mean by an absent input: no padding, and no labels.
    """
    inputs = {name: value for name, value in keyword_inputs(program).items() if isinstance(value, Tensor)}
    default_fills: dict[str, tuple[str, str]] = {}
    for mask, ids in (("attention_mask", "input_ids"), ("decoder_attention_mask", "decoder_input_ids")):
        if mask in inputs and ids in inputs and inputs[mask].ndim == inputs[ids].ndim:
            default_fills[mask] = ("ones_like", ids)
    labels = inputs.get("labels")
    main = next((name for name in ("input_ids", "pixel_values", "input_features") if name in inputs), None)
    if labels is not None and main is not None and labels.dtype == torch.int64:
        if labels.ndim == 1:
            default_fills["labels"] = ("ignore_rows", main)
        elif main == "input_ids" and labels.ndim == inputs[main].ndim and not encoder_decoder:
            default_fills["labels"] = ("ignore_like", main)
    if labels is not None and main is not None and labels.is_floating_point():
        sizes = [n for n in shape_of(labels)[1:] if isinstance(n, int)]
        if len(sizes) == labels.ndim - 1:
            kind = str(labels.dtype).removeprefix("torch.")
            default_fills["labels"] = (f"nan_rows:{','.join(map(str, (kind, *sizes)))}", main)
    return default_fills


def written_tensors(program: ExportedProgram) -> list[Tensor]:
    """Return the parameters and buffers that calls of a program write to."""
    signature, dirty = program.graph_signature, {n.name for n in find_written_nodes(program.graph)[0]}
    names = [fqn for placeholder, fqn in fqns_by_placeholder(signature).items() if placeholder in dirty]
    names += [s.target for s in signature.output_specs if s.kind in _MUTATIONS and s.target is not None]
    tensors = {**program.constants, **program.state_dict}
    return [t for t in map(tensors.get, dict.fromkeys(names)) if isinstance(t, Tensor)]
