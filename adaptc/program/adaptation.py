"""What a program remembers of how it was adapted, and the header by which files remember it.

The header is the part that does not follow from the regions in the graph. It is written and read here alone; its format
has a number, and a file of another format is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from adaptc.binding.binding import Binding
from adaptc.capture.capture import Source
from adaptc.errors import CheckpointError
from adaptc.passes.ir.attachment import Attachment
from adaptc.passes.ir.regions import node_tag
from adaptc.pt2_files.forms import Each, Length, Maybe, Option, check
from adaptc.pt2_files.refusal import Refused, shown
from adaptc.runtime.call_inputs import Inputs

#: of the header and of region tags
FORMAT = 2

#: what Attachment.to_dict gives
ATTACHMENT: dict[str, Any] = {
    **dict.fromkeys(["key", "module", "param", "kind", "method", "adapter", "form", "entry", "name", "why"], str),
    "consumers": [str],
    "slots": Each(str),
    "scale_slot": Maybe(str),
    "tied": bool,
    "variant": Length,
    "options": dict,
    "reads": Option(Each(str)),
}
_PART = {"config": dict, "present": [str]}
_HEADER: dict[str, Any] = _PART | {
    "factors": Option(Each(float)),
    "format": Length,
    "residual": [str],
    "matches": Each([str]),
    "left_out": [[str]],
    "fills": Each([str]),
    "takes": Option([str]),
    "training": bool,
    "autocast": bool,
    "unread": Each(str),
    "carried": [str],
    "parts": Each(_PART),
    "trail": [[(str, int)]],
    "order": Option([str]),
}
_TAG: dict[str, Any] = dict.fromkeys(["method", "adapter", "site", "role"], str) | {
    "fused": Option(bool),
    "first_pass": Option(bool),
    "given": Option([str]),
}
_OUT = _TAG | {
    "region": str,
    "base": str,
    "node": str,
    "attachment": ATTACHMENT,
    "header": Option(dict),
}


@dataclass(frozen=True, eq=False)
class Adaptation:
    """``matches``: target entry -> the modules it selected; ``left_out``: (module, why). ``fills``: how keyword inputs
    that a caller leaves out are made. ``training``: captured for training. ``autocast``: adapters of half-precision
    bases are float32. ``trail``: the passes the program went through, with their counts."""

    attachments: Sequence[Attachment] = ()
    matches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Sequence[Sequence[str]] = ()
    fills: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: what the model's ``forward`` takes, in order; empty where that is not known
    takes: Sequence[str] = ()
    training: bool = False
    autocast: bool = True
    #: base parameters of which only the adapter's own version is known (a PiSSA program loaded from a file)
    residual: Sequence[str] = ()
    #: key -> FQN of tensors of modules trained as a whole that the program does not read, but files hold
    unread: Mapping[str, str] = field(default_factory=dict)
    trail: Sequence[tuple[str, int]] = ()
    #: the model it was captured from; files do not say
    source: Source | None = None

    def header(self, binding: Binding) -> dict[str, Any]:
        """Plain JSON values: the order of the attachments, and what of ``binding`` the tensors do not say."""
        return {
            "format": FORMAT,
            "config": binding.config.to_dict(),
            "present": list(binding.methods),
            "factors": dict(binding.factors),
            "residual": list({**dict.fromkeys(self.residual), **binding.base}),
            "matches": {k: list(v) for k, v in self.matches.items()},
            "left_out": [list(x) for x in self.left_out],
            "fills": {k: list(v) for k, v in self.fills.items()},
            "takes": list(self.takes),
            "training": self.training,
            "autocast": self.autocast,
            "unread": dict(self.unread),
            "carried": [k for k in binding.carried if k not in self.unread],
            "parts": {n: {"config": p.config.to_dict(), "present": list(p.methods)} for n, p in binding.parts.items()},
            "trail": [list(step) for step in self.trail],
            "order": [a.id for a in self.attachments],
        }

    @classmethod
    def from_header(cls, stored: Mapping[str, Any], attachments: Sequence[Attachment]) -> Adaptation:
        """Inverse of :meth:`header`, for these attachments, which come in the order that the header tells."""
        order = {site: i for i, site in enumerate(stored.get("order", ()))}
        attachments = sorted(attachments, key=lambda a: order.get(a.id, len(order)))
        kept = ("matches", "left_out", "fills", "training", "autocast", "residual", "unread", "trail")
        return cls(attachments, **{name: stored[name] for name in kept}, takes=stored.get("takes", ()))

    def inputs(self, program: ExportedProgram) -> Inputs:
        """How calls of ``program``, which has this adaptation, are read."""
        return Inputs.of(program, self.fills, self.takes)

    def bare(self) -> Adaptation:
        """That of the program without its adapters."""
        return Adaptation(fills=self.fills, takes=self.takes, trail=self.trail, source=self.source)


def check_format(stored: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError for a header that this adaptc does not read."""
    found = stored.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{source} was saved by another version of adaptc: its format is {found!r}, and this one reads {FORMAT}. "
            "Save the program again from the model and its adapter"
        )


def check_header(stored: Any, sites: Collection[str]) -> None:
    """Raises Refused where a header is not of the form that :meth:`Adaptation.header` gives, or speaks of sites that
    are not among these (ids of attachments)."""
    check(stored, _HEADER)
    for part in (stored, *stored["parts"].values()):
        if strange := [site for site in part["present"] if site not in sites]:
            raise Refused(f"the header speaks of the site {shown(strange[0])}, which the program has not")


def check_tags(graph: fx.Graph) -> None:
    """Raises Refused where the tags of regions, which files alone can have changed, are not of the form that injection
    gives, or name nodes that are not there."""
    names = {node.name for node in graph.nodes}
    inputs = {node.name for node in graph.find_nodes(op="placeholder")}
    for node in graph.nodes:
        tag = node_tag(node)
        if tag is None:
            continue
        try:
            out = isinstance(tag, dict) and tag.get("role") == "out"
            check(tag, _OUT if out else _TAG)
            if strange := [n for n in ((tag["base"], tag["node"]) if out else ()) if n not in names]:
                raise Refused(f"it stands in for the node {shown(strange[0])}, which the program has not")
            if strange := [n for n in tag.get("given", ()) if n not in inputs]:
                raise Refused(f"it was given the input {shown(strange[0])}, which the program has not")
        except Refused as error:
            raise error.inside(f"the tag of node {node.name!r}, ") from None
