"""Compute the keys and values that the base of a program makes of a text, for an adapter that is a KV prefix.

The adapter's method says which attentions the prefix stands in front of. The base runs without any adapter, once and
eagerly, and only the nodes that these keys and values depend on run. The program does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError
from adaptc.passes.analysis.attention.attention_for_prefixes import find_self_attentions, keys_and_values
from adaptc.passes.analysis.tokens.token_inputs import PER_TOKEN_INPUTS, Lookup, find_lookups
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, fqns_by_placeholder, user_inputs
from adaptc.passes.graph.subprogram import reduce_graph_to
from adaptc.passes.protocol.attachment import Attachment
from adaptc.program.adapted_program import AdaptedProgram


@torch.no_grad()
def compute_text_kv(program: AdaptedProgram, attachment: Attachment, ids: Tensor) -> list[Tensor]:
    """Return the keys and values of a text at each attention: key, value, key, value, ..., each (1, heads, tokens, head
    width).

    ``attachment``: the attachment of the KV prefix. ``ids``: the token ids of the text, (1, tokens), int64. The base
    computes as in inference, without dropout and gradients.

    Raises AdaptcError for more tokens than the program takes, and for ids outside the vocabulary. Raises AdaptcError,
    too, for an input whose value for a text is not known, and MergeError where the program does not know its base.
    """
    base = program.base
    with hold_graph_lock():
        opened = LiftedProgram(base.snapshot())
        weight = opened.placeholders[attachment.fqn]
        lookup = next(x for x in find_lookups(opened) if weight in x.node.all_input_nodes)
        nodes = keys_and_values(find_self_attentions(opened, lookup, attachment.method.name))
        _check_text(opened, lookup, ids)
        reduce_graph_to(opened.graph, [n for n, _ in nodes])
        inputs = _inputs_for_text(opened, lookup, ids.to(base.device))
        module = fx.GraphModule(base.graph_module, opened.graph)
        order = [n.name for n in opened.graph.find_nodes(op="placeholder")]
    lifted = {name: opened.tensor(f) for name, f in fqns_by_placeholder(base.graph_signature).items()}
    try:
        found = module.forward(*({**lifted, **inputs}[n] for n in order))
    except (RuntimeError, IndexError) as error:
        if "index out of" not in str(error):
            raise
        raise AdaptcError(
            f"the text has {ids.shape[1]} tokens, which is more than the model has positions for: give fewer, or "
            "max_length"
        ) from error
    return [(t.mT if turned else t)[:1] for t, (_, turned) in zip(found, nodes, strict=True)]


def _check_text(lifted_program: LiftedProgram, lookup: Lookup, ids: Tensor) -> None:
    length = lookup.ids.meta["val"].shape[1]
    known = {str(k): v.upper for k, v in lifted_program.program.range_constraints.items()}
    most = length if isinstance(length, int) else known.get(str(length))
    if most is not None and ids.shape[1] > most:
        raise AdaptcError(
            f"the text has {ids.shape[1]} tokens, and the program takes {most}: give fewer, or max_length={most}"
        )
    there = lookup.node.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    if not 0 <= int(ids.min()) <= int(ids.max()) < there:
        raise AdaptcError(f"the text has ids from {int(ids.min())} to {int(ids.max())}, and there are {there} tokens")


def _inputs_for_text(lifted_program: LiftedProgram, lookup: Lookup, ids: Tensor) -> Mapping[str, Any]:
    """Return the program's inputs by name, for the text ``ids`` (1, tokens) or copies of it where the batch size is
    fixed. Inputs that no node reads are None."""
    rows = lookup.ids.meta["val"].shape[0]
    ids = ids.expand(rows if isinstance(rows, int) else 1, -1)
    inputs: dict[str, Any] = {}
    for name, want in user_inputs(lifted_program.program).items():
        token_input_role, node = PER_TOKEN_INPUTS.get(name), lifted_program.nodes[name]
        if node is lookup.ids:
            value = ids.to(want.dtype)
        elif not node.users:
            value = None
        elif not isinstance(want, Tensor):
            value = want
        elif token_input_role == "attention_mask":
            value = torch.ones_like(ids, dtype=want.dtype)
        elif token_input_role == "position_ids":
            value = torch.arange(ids.shape[1], dtype=want.dtype, device=ids.device).expand(want.shape[0], -1)
        elif token_input_role == "token_type_ids":
            value = torch.zeros_like(ids, dtype=want.dtype)
        else:
            raise AdaptcError(
                f"the program reads {name!r} beside its tokens, and what that is for a text is not known: run the "
                "model itself, and give adaptc.prefixes.initialize_kv_prefix_from_past_key_values its cache"
            )
        inputs[name] = value
    return inputs
