"""Find the places of a decoder: its values with one entry per token, apart from those of its encoder.

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
from adaptc.passes.analysis.cache_inputs import first_of_cache
from adaptc.passes.analysis.tokens.token_inputs import Lookup, exit_of, plain_id, read_by
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.mutation import writers
from adaptc.passes.graph.ops import argument
from adaptc.passes.protocol.program_method import ProgramMethod, ProgramPlace

aten = torch.ops.aten

IDS, MASK, LABELS = "decoder_input_ids", "decoder_attention_mask", "labels"
_TRIED = (5, 7, 4, 6)


def decoder_lookup(lifted: Lifted) -> tuple[Lookup | None, str]:
    """Return the lookup of a decoder's tokens and ''; or None and what was found instead.

    The lookup reads the decoder's token ids, or the labels shifted right by one. A program without a decoder gives
    None and ''.
    """
    ids, labels = (lifted.nodes.get(n) if n in lifted.specs else None for n in (IDS, LABELS))
    given = labels if ids is None else ids
    if given is None:
        return None, ""
    found = lifted.graph.find_nodes(op="call_function", target=aten.embedding.default)
    own = [n for n in found if _reads(lifted, n, given, shifted=ids is None)]
    if len(own) == 1:
        return Lookup(own[0], given), ""
    how = "token ids as they are" if ids is not None else "labels moved one on, behind a first token"
    return None, f"{len(own)} lookups by {given.name!r} were found: looked for one by {how}"


def decoder_places(lifted: Lifted, method: ProgramMethod) -> list[ProgramPlace]:
    """Return the decoder's places that ``method`` changes; [] for a program without a decoder.

    A decoder that continues from a cache has none either: generation puts no virtual tokens before a decoder, as in
    PEFT. Raises TargetError where the decoder's own lookup is not found, or where the start token depends on how many
    labels there are.
    """
    if first_of_cache(lifted) is not None:
        return []
    lookup, instead = decoder_lookup(lifted)
    if instead:
        raise TargetError(
            f"{method.name} puts tokens in front of a decoder's, and {instead}. Say num_transformer_submodules=1, and "
            "only the encoder has tokens in front"
        )
    if lookup is None:
        return []
    ids, mask, labels = (lifted.nodes.get(n) if n in lifted.specs else None for n in (IDS, MASK, LABELS))
    if ids is None and not _begins_alike(lifted, lookup):
        raise TargetError(
            f"{method.name} puts tokens in front of a decoder's, and of {LABELS!r} that are longer in front the model "
            f"makes another first token: capture it with {IDS}, or say num_transformer_submodules=1"
        )
    out = []
    if ids is not None:
        out.append(ProgramPlace("decoder_tokens", ids, read_by(ids), {"plain": plain_id(lifted, ids)}))
    if mask is not None:
        out.append(ProgramPlace("decoder_attended", mask, read_by(mask)))
    if labels is not None:
        out.append(ProgramPlace("decoder_labels", labels, read_by(labels)))
    if ids is None:
        shifted = argument(lookup.node, 1)
        out.append(ProgramPlace("decoder_shifted", shifted, _read_at_last(lifted, shifted)))
    last = exit_of(lifted, lookup.node)
    return [*out, ProgramPlace("decoder_embedded", last, tuple(last.users))]


def _read_at_last(lifted: Lifted, node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the readers of ``node`` that come after the last in-place write to it."""
    place = {n: i for i, n in enumerate(lifted.graph.nodes)}
    last = max((place[w] for w in writers(lifted.graph).get(node, ())), default=-1)
    return tuple(u for u in read_by(node) if place[u] > last)


def _reads(lifted: Lifted, lookup: fx.Node, given: fx.Node, shifted: bool) -> bool:
    """Return whether a lookup's index is the input ``given``, or with ``shifted`` that input shifted right by one."""
    wanted = torch.tensor([_TRIED])
    found = _tried(lifted, lookup, given, wanted)
    if found is None or found.shape != wanted.shape:
        return False
    return torch.equal(found[:, 1:], wanted[:, :-1]) if shifted else torch.equal(found, wanted)


def _begins_alike(lifted: Lifted, lookup: Lookup) -> bool:
    """Return whether ignored labels (-100) in front of others are shifted with them, behind the same start token."""
    some = torch.tensor([_TRIED])
    plain, longer = (_tried(lifted, lookup.node, lookup.ids, t) for t in (some, F.pad(some, (2, 0), value=-100)))
    if plain is None or longer is None:
        return False
    return torch.equal(longer[:, :1], plain[:, :1]) and torch.equal(longer[:, 3:], plain[:, 1:])


def _tried(lifted: Lifted, lookup: fx.Node, given: fx.Node, value: Tensor) -> Tensor | None:
    """Return the index of a lookup when the input ``given`` has this value; None where it depends on parameters.

    All nodes before the lookup that can be computed are run, in-place ops included.
    """
    known: dict[fx.Node, Any] = {}
    for node in lifted.graph.nodes:
        if node is lookup:
            break
        if node.op == "placeholder":
            spec, like = lifted.specs[node.name], node.meta.get("val")
            if node is given:
                known[node] = value
            elif spec.kind == InputKind.USER_INPUT and isinstance(like, Tensor) and like.ndim == 2:
                known[node] = torch.ones(value.shape, dtype=like.dtype)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                known[node] = lifted.constants[str(spec.target)].clone()
        elif node.op == "call_function" and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            if isinstance(like := node.meta.get("val"), Tensor) and like.is_floating_point():
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            try:
                known[node] = node.target(*args, **{**kwargs, **_here(kwargs)})
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue  # the op refuses the tried values, so its result is unknown, and all that follows from it
    found = known.get(argument(lookup, 1))
    return found if isinstance(found, Tensor) else None


def _here(kwargs: Any) -> dict[str, Any]:
    return {"device": "cpu"} if "device" in kwargs else {}
