"""Count the virtual tokens that adapters put in front of a caller's inputs.

A lifted graph and its attachments give the free sizes that are lengthened, and by how much in each binding. Then a
call's sizes are checked, virtual tokens included, against the sizes the program was captured for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from adaptc.errors import AdaptcError
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.program_method import CACHE_PREFIX, DECODER_TOKEN_VALUES, ProgramMethod
from adaptc.passes.protocol.regions import region_tag


@dataclass(frozen=True)
class VirtualTokenLengths:
    """The attachments that lengthen inputs, as pairs of a free size and the attachment that adds to it."""

    lengthening: Sequence[tuple[str, Attachment]] = ()
    #: the attachments at layers whose method added inputs to the program
    reading_inputs: Sequence[Attachment] = ()

    @classmethod
    def from_graph(cls, graph: fx.Graph, attachments: Sequence[Attachment]) -> VirtualTokenLengths:
        by_id = {a.id: a for a in attachments if isinstance(a.method, ProgramMethod)}
        names = {n.name: n for n in graph.nodes} if by_id else {}
        found: dict[tuple[str, str], tuple[str, Attachment]] = {}
        for node in graph.nodes if by_id else ():
            tag = region_tag(node)
            if tag is None or tag["region"] == CACHE_PREFIX:  # a KV prefix in a cache, which the cache's owner counts
                continue
            if tag["site"] in by_id:
                own = (
                    names[tag["base"]]
                    if tag["region"] in DECODER_TOKEN_VALUES
                    else _find_token_input(names[tag["node"]], names)
                )
                size = str(own.meta["val"].shape[1])
                found.setdefault((tag["site"], size), (size, by_id[tag["site"]]))
        reading = [a for a in attachments if a.id not in by_id and a.method.extra_inputs.extras()]
        return cls(list(found.values()), reading)

    def token_counts(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """Return free size -> how many virtual tokens are added to it, for the slot values of a binding (by FQN)."""
        out: dict[str, int] = {}
        for size, a in self.lengthening:
            assert isinstance(a.method, ProgramMethod)
            out[size] = out.get(size, 0) + a.method.virtual_token_count({n: values[f] for n, f in a.slots.items()})
        return out

    def checks(self, values: Mapping[str, Tensor], names: Sequence[str]) -> list[Callable[[Sequence[Any]], None]]:
        """Return the checks that methods with inputs of their own make of a call's flat inputs, called ``names``.

        A check raises AdaptcError for values of these inputs that do not fit the slot ``values``.
        """
        checks: dict[Any, _Check] = {}
        for a in (*(a for _, a in self.lengthening), *self.reading_inputs):
            at = {n: names.index(m) for n in a.method.extra_inputs.extras() if (m := a.reads.get(n, n)) in names}
            slots = {n: values[f] for n, f in a.slots.items()}
            if at:  # all layers of an adapter make the same check, so it is kept once
                sizes = [t.shape[0] for t in slots.values() if t.ndim]
                checks[a.method.name, *at.items(), *sizes] = _Check(a.method, slots, at)
        return list(checks.values())


@dataclass(frozen=True)
class _Check:
    method: Method
    slots: Mapping[str, Tensor]
    input_positions: Mapping[str, int]

    def __call__(self, flat: Sequence[Any]) -> None:
        given = {n: flat[i] for n, i in self.input_positions.items()}
        # Values on other devices are not checked: reading them would wait for the device, which raises itself.
        on_cpu = all(t.device.type == "cpu" for t in given.values())
        if on_cpu and (why := self.method.extra_inputs.check_inputs(self.slots, given)):
            raise AdaptcError(why)


def lookup_error(added_tokens: Mapping[str, int], shapes: str) -> AdaptcError:
    """Return the error for a lookup beyond a table's rows, in a call with inputs of these ``shapes``."""
    return AdaptcError(
        f"a lookup went beyond the rows of its table: the adapter puts {max(added_tokens.values())} tokens in front of "
        f"those of the call ({shapes}), which may be more than the model has positions for, or the vocabulary lacks a "
        "token. Give fewer tokens, or an adapter of fewer"
    )


def _find_token_input(lookup: fx.Node, names: Mapping[str, fx.Node]) -> fx.Node:
    """Return the placeholder of the caller's input that a lookup reads, behind views, casts and adapters' regions."""
    node: Any = lookup.args[1]
    while node.op != "placeholder":
        tag = region_tag(node)
        node = node.args[0] if tag is None else names[tag["base"]]
    return node
