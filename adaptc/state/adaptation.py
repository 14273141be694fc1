"""Record how a program was adapted, and write and read the header by which files remember it.

The header is the part that does not follow from the regions in the graph, and only this file writes and reads it. Its
format has a number. A file of another format is refused with an error that names the file.

``check_options`` checks whether a program can run with its options, each of which was checked on its own before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.archives.json_schema import DictOf, Nullable, OptionalField, Size, check_json
from adaptc.archives.refusal import UnsafeFile, short_repr
from adaptc.binding.binding import Binding
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.capture.capture import PretrainedFacts
from adaptc.errors import BackendError, CheckpointError, ConfigError
from adaptc.passes.adapt.choose_forms import with_compilable_form
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import node_tag
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.calls.cuda_recorder import recorder_for
from adaptc.runtime.options import PACK_DTYPES, RunOptions
from adaptc.torch_typing import is_dict


@dataclass(frozen=True)
class ModuleGenerate:
    """The functions that generate with the module of a program, as ``generate`` and ``generate_batch`` do.

    Each takes the module, and the arguments of the method of that name.
    """

    generate: Callable[..., Any]
    generate_batch: Callable[..., Any]


#: number of the format of the header and of region tags
FORMAT = 2

#: form of the dicts that Attachment.to_dict gives
ATTACHMENT_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(["key", "module", "param", "kind", "method", "adapter", "form", "entry", "name", "why"], str),
    "consumers": [str],
    "slots": DictOf(str),
    "scale_slot": Nullable(str),
    "tied": bool,
    "variant": Size,
    "options": dict,
    "reads": OptionalField(DictOf(str)),
}
_PART_SCHEMA = {"config": dict, "present": [str]}
_HEADER_SCHEMA: dict[str, Any] = _PART_SCHEMA | {
    "factors": OptionalField(DictOf(float)),
    "format": Size,
    "residual": [str],
    "matches": DictOf([str]),
    "left_out": [[str]],
    "fills": DictOf([str]),
    "takes": OptionalField([str]),
    "training": bool,
    "autocast": bool,
    "unread": DictOf(str),
    "carried": [str],
    "parts": DictOf(_PART_SCHEMA),
    "trail": [[(str, int)]],
    "order": OptionalField([str]),
}
_TAG_SCHEMA: dict[str, Any] = dict.fromkeys(["method", "adapter", "site", "role"], str) | {
    "fused": OptionalField(bool),
    "first_pass": OptionalField(bool),
    "given": OptionalField([str]),
}
_OUT_TAG_SCHEMA = _TAG_SCHEMA | {
    "region": str,
    "base": str,
    "node": str,
    "attachment": ATTACHMENT_SCHEMA,
    "header": OptionalField(dict),
}


@dataclass(frozen=True, eq=False)
class Adaptation:
    """A record of how a program was adapted.

    ``matches``: target entry -> the modules it selected. ``left_out``: (module, why). ``fills``: keyword input -> how
    it is made where a caller leaves it out. ``training``: the program was captured for training. ``autocast``: adapters
    of half-precision bases are float32. ``trail``: the passes that the program went through, with their counts.
    """

    attachments: Sequence[Attachment] = ()
    matches: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    left_out: Sequence[Sequence[str]] = ()
    fills: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    #: names of the inputs that the model's ``forward`` takes, in order; empty where they are not known
    forward_arg_names: Sequence[str] = ()
    training: bool = False
    autocast: bool = True
    #: FQNs of base parameters of which only the adapter's own version is known (a PiSSA program loaded from a file)
    residual: Sequence[str] = ()
    #: key -> FQN of tensors that the program does not read, but files hold, as parts of modules trained as a whole
    unread: Mapping[str, str] = field(default_factory=dict[str, str])
    trail: Sequence[tuple[str, int]] = ()
    #: the model that the program was captured from; None where a file was loaded, since files do not say
    source: PretrainedFacts | None = None
    #: what modules of the program generate with, handed down by ``adaptc.compile``; None where they do not generate
    generate: ModuleGenerate | None = None
    #: the adapters by name in the file that the program was loaded from
    stored: StoredAdapters = field(default_factory=StoredAdapters)

    def header(self, binding: Binding) -> dict[str, Any]:
        """Return the header as plain JSON values: this record, the order of its attachments, and what the tensors do
        not say of ``binding``."""
        return {
            "format": FORMAT,
            "config": binding.config.to_dict(),
            "present": list(binding.methods),
            "factors": dict(binding.scale_factors),
            "residual": list({**dict.fromkeys(self.residual), **binding.changed_base}),
            "matches": {k: list(v) for k, v in self.matches.items()},
            "left_out": [list(x) for x in self.left_out],
            "fills": {k: list(v) for k, v in self.fills.items()},
            "takes": list(self.forward_arg_names),
            "training": self.training,
            "autocast": self.autocast,
            "unread": dict(self.unread),
            "carried": [k for k in binding.extra_tensors if k not in self.unread],
            "parts": {
                n: {"config": p.config.to_dict(), "present": list(p.methods)} for n, p in binding.joint_adapters.items()
            },
            "trail": [list(step) for step in self.trail],
            "order": [a.id for a in self.attachments],
        }

    @classmethod
    def from_header(cls, stored: Mapping[str, Any], attachments: Sequence[Attachment]) -> Adaptation:
        """Return the record that a header holds, with these attachments in the order that the header tells. Inverse of
        :meth:`header`."""
        order = {site: i for i, site in enumerate(stored.get("order", ()))}
        attachments = sorted(attachments, key=lambda a: order.get(a.id, len(order)))
        kept = ("matches", "left_out", "fills", "training", "autocast", "residual", "unread", "trail")
        return cls(attachments, **{name: stored[name] for name in kept}, forward_arg_names=stored.get("takes", ()))

    def inputs(self, program: ExportedProgram) -> Inputs:
        """Return what reads the arguments of calls of ``program``, which has this adaptation."""
        return Inputs.from_program(program, self.fills, self.forward_arg_names)

    def without_adapters(self) -> Adaptation:
        """Return the adaptation of the program without its adapters."""
        return Adaptation(
            fills=self.fills, forward_arg_names=self.forward_arg_names, trail=self.trail, source=self.source
        )


def check_format(stored: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError for a header of another format than this adaptc reads."""
    found = stored.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{source} was saved by another version of adaptc: its format is {found!r}, and this one reads {FORMAT}. "
            "Save the program again from the model and its adapter"
        )


def check_header(stored: Any, sites: Collection[str]) -> None:
    """Raise UnsafeFile where a header does not have the form that :meth:`Adaptation.header` gives, or names a site
    that is not in ``sites`` (ids of attachments)."""
    check_json(stored, _HEADER_SCHEMA)
    for part in (stored, *stored["parts"].values()):
        if strange := [site for site in part["present"] if site not in sites]:
            raise UnsafeFile(f"the header speaks of the site {short_repr(strange[0])}, which the program has not")


def check_tags(graph: fx.Graph) -> None:
    """Raise UnsafeFile where the tags of regions do not have the form that injection gives, or name nodes that are not
    there.

    Only a file can have such tags.
    """
    names = {node.name for node in graph.nodes}
    inputs = {node.name for node in graph.find_nodes(op="placeholder")}
    for node in graph.nodes:
        tag: Any = node_tag(node)  # of a file, which may have anything there
        if tag is None:
            continue
        try:
            out = is_dict(tag) and tag.get("role") == "out"
            check_json(tag, _OUT_TAG_SCHEMA if out else _TAG_SCHEMA)
            if strange := [n for n in ((tag["base"], tag["node"]) if out else ()) if n not in names]:
                raise UnsafeFile(f"it stands in for the node {short_repr(strange[0])}, which the program has not")
            if strange := [n for n in tag.get("given", ()) if n not in inputs]:
                raise UnsafeFile(f"it was given the input {short_repr(strange[0])}, which the program has not")
        except UnsafeFile as error:
            raise error.prepend_location(f"the tag of node {node.name!r}, ") from None


def check_options(options: RunOptions, adaptation: Adaptation, base: Iterable[Any]) -> None:
    """Raise BackendError for a form that the backend cannot compile, ConfigError for weights that cannot be packed as
    asked. CUDA graphs need a base on a CUDA device, and a program for inference.

    ``base``: the base tensors of the program. Nothing is changed.
    """
    for a in adaptation.attachments:
        if with_compilable_form(a, options.backend) != a:
            raise BackendError(
                f"site {a.fqn!r} has its adapter around a convolution, whose rank inductor would fix: make the "
                f"program for it, with compile(..., backend={options.backend!r}), or save it and "
                f"load(path, backend={options.backend!r})"
            )
    base = list(base)
    if options.cuda_graphs and adaptation.training:
        raise ConfigError("cuda_graphs=True is for inference, and the program is captured for training")
    if options.cuda_graphs and recorder_for(base) is None:
        devices = ", ".join(sorted({str(t.device) for t in base if isinstance(t, Tensor)}))
        raise BackendError(f"cuda_graphs=True needs a base on one CUDA device, and this one is on {devices}")
    if options.pack is None:
        return
    if adaptation.training:
        raise ConfigError(f"pack={options.pack!r} is for inference, and the program is captured for training")
    tensors = [t for t in base if isinstance(t, Tensor) and t.ndim == 2 and t.device.type == "cpu"]
    if tensors and all(t.dtype != PACK_DTYPES[options.pack] for t in tensors):
        found = ", ".join(sorted({f"{t.dtype}" for t in tensors}))
        raise ConfigError(
            f"pack={options.pack!r} packs weights of {PACK_DTYPES[options.pack]}, and those of the base are {found}: "
            "nothing is rounded to be packed"
        )
