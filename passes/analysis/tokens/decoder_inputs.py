"""Find the program values of a decoder: its values with one entry per token, apart from those of its encoder.

A decoder looks up the caller's ``decoder_input_ids``, or the labels shifted right by one behind a start token. Models
write the shift in many ways, so it is recognised by running it on made-up labels.

Takes an opened program with an encoder and a decoder, and does not change it. Errors name what was looked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.nn import functional as F

from adaptc.errors import TargetError
from adaptc.passes.analysis.cache_inputs import first_cache_input
from adaptc.passes.analysis.tokens.token_inputs import Lookup, module_output_of, ordinary_token_id, value_readers
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.mutation import writers_by_node
from adaptc.passes.graph.ops import argument
from adaptc.passes.protocol.program_method import ProgramMethod, ProgramValue

aten = torch.ops.aten

IDS, MASK, LABELS = "decoder_input_ids", "decoder_attention_mask", "labels"
_TRIAL_LABELS = (5, 7, 4, 6)


def find_decoder_lookup(lifted: LiftedProgram) -> tuple[Lookup | None, str]:
    """Return the lookup of a decoder's tokens and ''; or None and what was found instead.

    The lookup reads the decoder's token ids, or the labels shifted right by one. A program without a decoder gives
    None and ''.
    """
    ids, labels = (lifted.nodes.get(n) if n in lifted.input_specs else None for n in (IDS, LABELS))
    input_node = labels if ids is None else ids
    if input_node is None:
        return None, ""
    found = lifted.graph.find_nodes(op="call_function", target=aten.embedding.default)
    matching = [n for n in found if _looks_up(lifted, n, input_node, shifted=ids is None)]
    if len(matching) == 1:
        return Lookup(matching[0], input_node), ""
    how = "token ids as they are" if ids is not None else "labels moved one on, behind a first token"
    return None, f"{len(matching)} lookups by {input_node.name!r} were found: looked for one by {how}"


def find_decoder_values(lifted: LiftedProgram, method: ProgramMethod) -> list[ProgramValue]:
    """Return the decoder's program values that ``method`` changes; [] for a program without a decoder.

    A decoder that continues from a cache has none either: generation puts no virtual tokens before a decoder, as in
    PEFT. Raises TargetError where the decoder's own lookup is not found, or where the start token depends on how many
    labels there are.
    """
    if first_cache_input(lifted) is not None:
        return []
    lookup, reason = find_decoder_lookup(lifted)
    if reason:
        raise TargetError(
            f"{method.name} puts tokens in front of a decoder's, and {reason}. Say num_transformer_submodules=1, and "
            "only the encoder has tokens in front"
        )
    if lookup is None:
        return []
    ids, mask, labels = (lifted.nodes.get(n) if n in lifted.input_specs else None for n in (IDS, MASK, LABELS))
    if ids is None and not _shifts_ignored_labels(lifted, lookup):
        raise TargetError(
            f"{method.name} puts tokens in front of a decoder's, and of {LABELS!r} that are longer in front the model "
            f"makes another first token: capture it with {IDS}, or say num_transformer_submodules=1"
        )
    out: list[ProgramValue] = []
    if ids is not None:
        out.append(ProgramValue("decoder_tokens", ids, value_readers(ids), {"plain": ordinary_token_id(lifted, ids)}))
    if mask is not None:
        out.append(ProgramValue("decoder_attention_mask", mask, value_readers(mask)))
    if labels is not None:
        out.append(ProgramValue("decoder_labels", labels, value_readers(labels)))
    if ids is None:
        shifted = argument(lookup.node, 1)
        out.append(ProgramValue("decoder_shifted", shifted, _readers_after_writes(lifted, shifted)))
    last = module_output_of(lifted, lookup.node)
    return [*out, ProgramValue("decoder_inputs_embeds", last, tuple(last.users))]


def _readers_after_writes(lifted: LiftedProgram, node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the readers of ``node`` that come after the last in-place write to it."""
    position = {n: i for i, n in enumerate(lifted.graph.nodes)}
    last = max((position[w] for w in writers_by_node(lifted.graph).get(node, ())), default=-1)
    return tuple(u for u in value_readers(node) if position[u] > last)


def _looks_up(lifted: LiftedProgram, lookup: fx.Node, input_node: fx.Node, shifted: bool) -> bool:
    """Return whether a lookup's index is the input ``input_node``, or with ``shifted`` that input shifted right by
    one."""
    trial = torch.tensor([_TRIAL_LABELS])
    indices = _computed_index(lifted, lookup, input_node, trial)
    if indices is None or indices.shape != trial.shape:
        return False
    return torch.equal(indices[:, 1:], trial[:, :-1]) if shifted else torch.equal(indices, trial)


def _shifts_ignored_labels(lifted: LiftedProgram, lookup: Lookup) -> bool:
    """Return whether ignored labels (-100) in front of others are shifted with them, behind the same start token."""
    some = torch.tensor([_TRIAL_LABELS])
    plain, longer = (
        _computed_index(lifted, lookup.node, lookup.ids, t) for t in (some, F.pad(some, (2, 0), value=-100))
    )
    if plain is None or longer is None:
        return False
    return torch.equal(longer[:, :1], plain[:, :1]) and torch.equal(longer[:, 3:], plain[:, 1:])


def _computed_index(lifted: LiftedProgram, lookup: fx.Node, input_node: fx.Node, value: Tensor) -> Tensor | None:
    """Return the index of a lookup when the input ``input_node`` has this value; None where it depends on parameters.

    All nodes before the lookup that can be computed are run, in-place ops included.
    """
    values: dict[fx.Node, Any] = {}
    for node in lifted.graph.nodes:
        if node is lookup:
            break
        if node.op == "placeholder":
            spec, like = lifted.input_specs[node.name], node.meta.get("val")
            if node is input_node:
                values[node] = value
            elif spec.kind == InputKind.USER_INPUT and isinstance(like, Tensor) and like.ndim == 2:
                values[node] = torch.ones(value.shape, dtype=like.dtype)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                values[node] = lifted.constants[str(spec.target)].clone()
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            if isinstance(like := node.meta.get("val"), Tensor) and like.is_floating_point():
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = node.target(*args, **{**kwargs, **_on_cpu(kwargs)})
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue  # the op refuses the tried values, so its result is unknown, and all that follows from it
    found = values.get(argument(lookup, 1))
    return found if isinstance(found, Tensor) else None


def _on_cpu(kwargs: Any) -> dict[str, Any]:
    return {"device": "cpu"} if "device" in kwargs else {}
