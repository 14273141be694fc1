"""Find where a program looks its tokens up, and its other inputs with one entry per token.

A token embedding is a lookup whose indices are an input of the caller's, seen through views and casts. Its program
values (see ``passes.protocol.program_method``) are that input, every other input of the same length, and the output of
the lookup's module (some scale it). A program reads lengths off its inputs. So a method that makes these values longer
makes everything longer that is computed from them.

Takes an opened program and does not change it. Errors name what was looked for and what is there instead.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.errors import TargetError, listing
from adaptc.passes.analysis.cache_inputs import first_cache_input
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.module_paths import module_path, module_paths_of
from adaptc.passes.graph.mutation import is_metadata_assert
from adaptc.passes.graph.ops import CASTS, argument
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.program_method import PREFIX_FUNCTIONS, ProgramMethod, ProgramValue
from adaptc.passes.protocol.regions import region_tag
from adaptc.torch_typing import is_mapping

aten = torch.ops.aten

_EMBEDDING = aten.embedding.default
#: ops that give an input's values, or some of them, in another shape
VIEWS = (aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.unsqueeze.default, aten.clone.default)
#: input of transformers' models with one entry per token, apart from the tokens themselves -> the name of its value
PER_TOKEN_INPUTS = {
    "attention_mask": "attention_mask",
    "decoder_attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "decoder_position_ids": "position_ids",
    "token_type_ids": "token_type_ids",
    "labels": "labels",
}


@dataclass(frozen=True)
class Lookup:
    """An embedding lookup ``node``, whose indices are ``ids``, an input of the caller's."""

    node: fx.Node
    ids: fx.Node


def find_lookups(lifted: LiftedProgram) -> list[Lookup]:
    """Return all embedding lookups of a program whose indices are an integer input, in graph order."""
    found: list[Lookup] = []
    for node in lifted.graph.find_nodes(op="call_function", target=_EMBEDDING):
        ids = integer_input_of(lifted, argument(node, 1), VIEWS)
        if ids is not None:
            found.append(Lookup(node, ids))
    return found


def integer_input_of(lifted: LiftedProgram, node: Any, views: Collection[Any]) -> fx.Node | None:
    """Return the integer (or bool) input that ``node`` shows; None where it is computed.

    It is seen through ``views``, casts, and adapters that put virtual tokens before it.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        tag = region_tag(node)
        if tag is not None and tag["region"] == "tokens":
            node = lifted.nodes[tag["base"]]
        elif node.target in views or node.target in CASTS:
            node = node.args[0]
        else:
            return None
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    value = node.meta.get("val")
    is_user_input = lifted.input_specs[node.name].kind == InputKind.USER_INPUT
    return node if is_user_input and isinstance(value, Tensor) and not value.is_floating_point() else None


def find_program_values(lifted: LiftedProgram, method: ProgramMethod, lookup: Lookup) -> list[ProgramValue]:
    """Return the program values of a lookup that ``method`` changes.

    In a program that takes a cache there are none, since the method acts on the beginning of the cache alone. Raises
    TargetError where the program has a value that the method does not handle, or where it says nothing for a cache.
    """
    if cache_of_lookup(lifted, lookup) is not None:
        if not method.opening():
            raise TargetError(
                f"{method.name} does not say what a cache begins with, and the tokens of {lookup.ids.name!r} go into "
                f"one: it needs a function called {' or '.join(PREFIX_FUNCTIONS)}"
            )
        return []
    out = per_token_values(lifted, method, lookup)
    if not method.changes("past_key_values"):
        last = module_output_of(lifted, lookup.node)
        out.append(ProgramValue("inputs_embeds", last, tuple(last.users)))
        if method.changes("loss") and (found := _loss_value(lifted)) is not None:
            out.append(found)
    missing = [p for p in out if not method.changes(p.name)]
    if missing:
        raise TargetError(
            f"{method.name} does not say what it makes of {missing[0].name!r}, which is {missing[0].node.name!r} of "
            "this program: capture the model without that input."
        )
    return out


def cache_of_lookup(lifted: LiftedProgram, lookup: Lookup) -> fx.Node | None:
    """Return the first input of the cache that the tokens of a lookup are written to; None where there is none."""
    first = first_cache_input(lifted)
    if first is None:
        return None
    stack, seen = list(first.users), set(first.users)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is lookup.node:
                return first
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return None


def per_token_values(lifted: LiftedProgram, method: ProgramMethod, lookup: Lookup) -> list[ProgramValue]:
    """Return the program values that are inputs with one entry per token, the tokens first.

    A method with a KV prefix leaves the tokens as they are, so labels are no program value then. Raises TargetError for
    an input of the tokens' length whose meaning is unknown.
    """
    length = _token_length(lookup.ids)
    out = [
        ProgramValue("tokens", lookup.ids, value_readers(lookup.ids), {"plain": ordinary_token_id(lifted, lookup.ids)})
    ]
    for name, spec in lifted.input_specs.items():
        node = lifted.nodes[name]
        value = node.meta.get("val")
        if spec.kind != InputKind.USER_INPUT or node is lookup.ids or not isinstance(value, Tensor):
            continue
        if length not in map(str, value.shape):
            continue
        value_name = PER_TOKEN_INPUTS.get(name)
        if value_name is None or value.ndim != 2 or str(value.shape[1]) != length:
            raise TargetError(
                f"{method.name}: the input {name!r} of shape {tuple(map(str, value.shape))} is as long as the tokens "
                f"of {lookup.ids.name!r}, and it is not known what it has for tokens that are put in front of them. "
                f"Known are inputs of two axes called {listing(PER_TOKEN_INPUTS)}: capture the model without {name!r}."
            )
        if value_name != "labels" or not method.changes("past_key_values"):
            out.append(ProgramValue(value_name, node, value_readers(node)))
    return out


def _token_length(ids: fx.Node) -> str:
    shape = ids.meta["val"].shape
    if len(shape) != 2:
        raise TargetError(
            f"the tokens of {ids.name!r} have {len(shape)} axes, and two are needed (batch, length) to put others in "
            "front of them"
        )
    if isinstance(shape[1], int):
        raise TargetError(
            f"the program was captured for exactly {shape[1]} tokens in {ids.name!r}, so none can be put in front of "
            "them: capture it with dynamic_shapes that leave axis 1 free (of at least two tokens)"
        )
    return str(shape[1])


def value_readers(node: fx.Node) -> tuple[fx.Node, ...]:
    # Checks of an input go on reading the input itself, and not what a method makes of it.
    return tuple(u for u in node.users if not is_metadata_assert(u))


def _loss_value(lifted: LiftedProgram) -> ProgramValue | None:
    """Return the program value of the loss, which reads logits and labels; None where a program gives no loss or
    logits."""
    labels, spec = lifted.nodes.get("labels"), lifted.program.call_spec.out_spec
    values: Any = lifted.graph.output_node().args[0]
    users = [v for v, s in zip(values, lifted.output_specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
    outputs: Any = pytree.tree_unflatten(users, spec) if spec is not None else None
    loss, logits = (outputs.get(n) if is_mapping(outputs) else None for n in ("loss", "logits"))
    if not all(isinstance(n, fx.Node) for n in (labels, loss, logits)):
        return None
    return ProgramValue("loss", loss, (lifted.graph.output_node(),), read_nodes=(logits, labels))  # type: ignore[arg-type]


def ordinary_token_id(lifted: LiftedProgram, ids: fx.Node) -> int:
    """Return the least token id that the program does not compare ids with.

    Models find padding, or the end, by comparing ids, so such an id means nothing special.
    """
    special: set[Any] = set()
    stack = [ids, *(n for n in lifted.graph.nodes if (t := region_tag(n)) and t["region"] == "tokens")]
    while stack:
        for user in stack.pop().users:
            if user.target in (aten.eq.Scalar, aten.ne.Scalar):
                special.add(argument(user, 1))
            elif user.target in (*VIEWS, *CASTS):
                stack.append(user)
    return next(i for i in range(len(special) + 1) if i not in special)


def module_output_of(lifted: LiftedProgram, lookup: fx.Node) -> fx.Node:
    """Return the output of the module of a lookup: the lookup itself, or the last node of the module (a scale)."""
    module_paths = module_paths_of([*lifted.state_dict, *lifted.constants])
    region_outputs: dict[str, fx.Node] = {tag["base"]: n for n in lifted.graph.nodes if (tag := region_tag(n))}
    lookup_module, node = module_path(lookup, module_paths), lookup
    while True:
        while node.name in region_outputs:  # adapters of the lookup stand in for it
            node = region_outputs[node.name]
        readers: list[fx.Node] = [u for u in node.users if not is_metadata_assert(u)]
        if (
            not lookup_module
            or len(readers) != 1
            or module_path(readers[0], module_paths) != lookup_module
            or readers[0].op == "output"
        ):
            break
        node = readers[0]
    return node


def no_lookup_error(name: str, found_paths: Collection[str], expected_path: str | None) -> TargetError:
    """Return the error for a program without a token embedding.

    ``name`` is the method, ``found_paths`` has the paths of the lookups found, and ``expected_path`` that of the
    model's input embedding, if known.
    """
    sought = (
        f"{expected_path!r}, the model's input embedding"
        if expected_path
        else "one lookup by an input of whole numbers"
    )
    return TargetError(
        f"{name} puts tokens in front of those that a program looks up, and no token embedding was found: looked for "
        f"{sought}, whose indices are an input as the caller gives it. "
        + (
            f"There are lookups at {listing(found_paths)}. "
            if found_paths
            else "The program has no lookup by an input. "
        )
        + "Capture the model with its token ids (input_ids) as an input, not with inputs_embeds."
    )
