"""The places of a decoder, beside those of its encoder: what it has one of per token.

A decoder looks up token ids of the caller's, or what the program makes of labels: these moved one on, behind a first
token. That it does is tried on labels of no model, since it is written in many ways.

Before: an opened program with an encoder and a decoder. After: it is unchanged. Errors name what was looked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from adaptc.errors import TargetError
from adaptc.passes.analysis.cache_inputs import first_of_cache
from adaptc.passes.analysis.token_places import Lookup, exit_of, plain_id, read_by
from adaptc.passes.ir.lifted import Lifted
from adaptc.passes.ir.ops import argument
from adaptc.passes.ir.program_method import Place, ProgramMethod

aten = torch.ops.aten

IDS, MASK, LABELS = "decoder_input_ids", "decoder_attention_mask", "labels"
_TRIED = (5, 7, 4, 6)


def decoder_places(lifted: Lifted, method: ProgramMethod, lookup: Lookup) -> list[Place]:
    """``lookup``: the encoder's. None of a program that has no decoder, or whose decoder goes on from a cache: what
    generates does so without them, as in PEFT. Raises TargetError where the decoder's own lookup is not found."""
    ids, mask, labels = (lifted.nodes.get(n) if n in lifted.specs else None for n in (IDS, MASK, LABELS))
    given = labels if ids is None else ids
    if given is None or first_of_cache(lifted) is not None:
        return []
    found = [
        n for n in lifted.graph.find_nodes(op="call_function", target=aten.embedding.default) if n is not lookup.node
    ]
    own = [n for n in found if _reads(lifted, argument(n, 1), given, shifted=ids is None)]
    if len(own) != 1:
        how = "token ids as they are" if ids is not None else "labels moved one on, behind a first token"
        raise TargetError(
            f"{method.name} puts tokens in front of a decoder's, and {len(own)} lookups by {given.name!r} were found: "
            f"looked for one by {how}. Say num_transformer_submodules=1, and only the encoder has tokens in front"
        )
    out = []
    if ids is not None:
        out.append(Place("decoder_tokens", ids, read_by(ids), {"plain": plain_id(lifted, ids)}))
    if mask is not None:
        out.append(Place("decoder_attended", mask, read_by(mask)))
    if labels is not None:
        out.append(Place("decoder_labels", labels, read_by(labels)))
    if ids is None:
        shifted = argument(own[0], 1)
        out.append(Place("decoder_shifted", shifted, read_by(shifted)))
    last = exit_of(lifted, own[0])
    return [*out, Place("decoder_embedded", last, tuple(last.users))]


def _reads(lifted: Lifted, index: Any, given: fx.Node, shifted: bool) -> bool:
    """Whether an index is what is given, or that moved one on."""
    wanted = torch.tensor([_TRIED])
    found = _tried(lifted, index, given, wanted)
    if found is None or found.shape != wanted.shape:
        return False
    return torch.equal(found[:, 1:], wanted[:, :-1]) if shifted else torch.equal(found, wanted)


def _tried(lifted: Lifted, index: Any, given: fx.Node, value: Tensor) -> Tensor | None:
    """What an index is for a value of ``given``; None where it follows from parameters. In-place ops are run, too."""
    known: dict[fx.Node, Any] = {}
    for node in lifted.graph.nodes:
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
                continue  # it does not take what is tried, and nothing that follows from it is known
        if node is index:
            break
    found = known.get(index)
    return found if isinstance(found, Tensor) else None


def _here(kwargs: Any) -> dict[str, Any]:
    return {"device": "cpu"} if "device" in kwargs else {}
