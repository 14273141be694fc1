"""Hold the values of adapters: bindings, and the specs that say what a binding must have.

A :class:`Binding` is one full set of slot values for the sites of a program. It is immutable, and has a value of the
right dtype and a legal shape for every slot. It never writes to the program; the runtime passes it along with each
call. A :class:`BindingSpec` is what a program, or a package of one, asks of a binding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptc.adapter_files.adapter_data import PEFT_ORIGIN, AdapterData, FileOrigin
from adaptc.methods import AdapterConfig
from adaptc.passes.adapt.move import usable_device
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method

#: an adapter for one model: its config, and tensors under PEFT's keys
ResolvedAdapter = AdapterData[AdapterConfig]


@dataclass(frozen=True, eq=False)
class Binding:
    """The slot values of an adapter, or of several that act together, for all sites of a program.

    Attributes:
        values: FQN of a slot or scale -> its tensor.
        methods: attachment id -> the method with this adapter's own options, for the sites that the adapter has.
        config: the adapter's config.
        changed_base: FQN -> the base weights that this adapter replaces (PiSSA's residual).
        name: the adapter's name.
        source: the adapter's name in messages.
        extra_tensors: key -> other tensors of its file: tensors that the program does not read, and changed base
            weights.
        idle_tensors: key -> tensors of layers that the program never calls. They act on nothing, and are written with
            the adapter.
        joint_adapters: name -> each of several adapters that act together; their values are in ``values``.
        base_fingerprints: FQN of each base weight in ``changed_base`` ->
            :func:`~adaptc.binding.check_binding.fingerprint` of the original.
        origin: the format of the file it was made from, and what it left out of that file.
        scale_factors: attachment id -> the factor on the original scale, where that is not 1; ``values`` has the
            multiplied scale.
        active_form: the active form of an adapter that is turned off, whose own values are identity values; None for an
            active adapter.

    Example:
        >>> binding = prog.binding
        >>> report = adaptc.swap(prog, lora_weights(seed=1)[1])
        >>> report = adaptc.swap(prog, binding)
    """

    values: Mapping[str, Tensor]
    methods: Mapping[str, Method]
    config: AdapterConfig
    changed_base: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    name: str = "default"
    source: str = ""
    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    joint_adapters: Mapping[str, Binding] = field(default_factory=dict[str, Any])
    base_fingerprints: Mapping[str, str] = field(default_factory=dict[str, str])
    origin: FileOrigin = PEFT_ORIGIN
    scale_factors: Mapping[str, float] = field(default_factory=dict[str, float])
    active_form: Binding | None = None
    idle_tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def adapters_by_name(self) -> Mapping[str, Binding]:
        """Return the binding's adapters by name: its parts, or itself."""
        return self.joint_adapters or {self.name: self}

    def scale_tensor(self, fqn: str) -> Tensor | None:
        """Return the scale ``fqn`` as calls read it; None where calls read none."""
        return self.values.get(fqn)

    def with_scale_tensors(self, scales: Mapping[str, Tensor], factors: Mapping[str, float]) -> Self:
        """Return a binding with these scales, by FQN, and these ``scale_factors``; it shares all other tensors."""
        return replace(self, values={**self.values, **scales}, scale_factors=factors)

    @property
    def inactive_names(self) -> list[str]:
        """Return the names of the adapters that are turned off."""
        return [n for n, part in self.adapters_by_name.items() if part.active_form is not None]

    def describe_scales(self) -> str:
        """Return in words which adapters are off or scaled; '' where all act with their original scale."""
        phrases: list[str] = []
        for name, part in self.adapters_by_name.items():
            if part.active_form is not None:
                phrases.append(f"{name!r} is off")
                continue
            counts: dict[float, int] = {}
            for factor in part.scale_factors.values():
                counts[factor] = counts.get(factor, 0) + 1
            phrases += [f"{name!r} is scaled by {f:g} at {n} site{'s' if n > 1 else ''}" for f, n in counts.items()]
        return ", ".join(phrases)

    def summary(self, site_count: int = 0) -> str:
        """Return a text of its methods, source, ranks and number of sites, out of the program's ``site_count`` sites if
        that is more."""
        parts = self.adapters_by_name
        kinds = " + ".join(dict.fromkeys(p.config.peft_type or "no" for p in parts.values()))
        ranks = sorted({r for m in self.methods.values() if (r := m.sizes.rank()) is not None})
        rank = f", rank {', '.join(map(str, ranks))}" if ranks else ""
        source = f" from {self.source!r}" if self.source else ""
        of = f" of {site_count}" if site_count > len(self.methods) else ""
        said = f"; {strength}" if (strength := self.describe_scales()) else ""
        return f"{kinds} adapter {', '.join(map(repr, parts))}{source}{rank}, at {len(self.methods)}{of} sites{said}"

    def __repr__(self) -> str:
        return f"<Binding: {self.summary()}>"

    def without_changed_base(self, names: Collection[str]) -> Self:
        """Return this binding without its own version of the base weights ``names``, which its program now has."""

        def rest(values: Mapping[str, Any]) -> dict[str, Any]:
            return {n: v for n, v in values.items() if n not in names}

        return replace(
            self,
            changed_base=rest(self.changed_base),
            base_fingerprints=rest(self.base_fingerprints),
            joint_adapters={n: b.without_changed_base(names) for n, b in self.joint_adapters.items()},
            active_form=None if self.active_form is None else self.active_form.without_changed_base(names),
        )

    @classmethod
    def empty(cls) -> Binding:
        """Return the empty binding, of a program without adapters."""
        return cls({}, {}, AdapterConfig())

    def to(self, device: torch.device | str) -> Binding:
        """Return a binding with the same values on ``device``. A tensor under several names stays one tensor.

        Args:
            device: the device.

        Returns:
            the binding there.

        Raises:
            BackendError: there is no such device.
        """
        device = usable_device(device)
        moved: dict[int, Tensor] = {}

        def move(t: Tensor) -> Tensor:
            if t.device == device:
                return t
            if id(t) not in moved:
                new = t.detach().to(device)
                moved[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
            return moved[id(t)]

        def move_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: move(t) for name, t in tensors.items()}

        def move_binding(b: Binding) -> Binding:
            fields = ("values", "changed_base", "extra_tensors", "idle_tensors")
            own: dict[str, Any] = {n: move_all(getattr(b, n)) for n in fields}
            own["joint_adapters"] = {name: move_binding(p) for name, p in b.joint_adapters.items()}
            return replace(b, **own, active_form=None if b.active_form is None else move_binding(b.active_form))

        return move_binding(self)


@dataclass(frozen=True, eq=False)
class BindingSpec:
    """The attachments that a binding must have values for, their ops and base weights, and the dtype rule for adapters.

    ``weights`` holds all base weights by FQN. ``unread`` maps a file key to the FQN of a base weight that the program
    does not read, but that files of whole modules hold. ``residual`` lists base weights of which only the adapter's own
    version is known, as in a PiSSA program that was loaded from a file. ``max_norms`` maps FQN to the limit on an
    embedding's row norms (``Op.max_norm_of``); adapted embeddings may be left out. ``find_idle``
    returns the FQNs of weights that the program never reads, since the model never calls their layers.
    """

    attachments: Sequence[Attachment]
    ops: Mapping[str, Op]
    weights: Mapping[str, Tensor]
    autocast_adapter_dtype: bool = True
    trainable: bool = False
    unread: Mapping[str, str] = field(default_factory=dict[str, str])
    residual: Sequence[str] = ()
    max_norms: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    find_idle: Callable[[], frozenset[str]] = frozenset

    def is_of_idle_layer(self, key: str) -> bool:
        """Return whether a file's ``key`` is of a layer that the program never calls.

        A layer with a site is none: its adapter may have a weight of its own, in the place of the one that is not read.
        """
        path = key
        while path:
            path = path.rpartition(".")[0]
            if f"{path}.weight" in self.weights:
                has_site = any(f"{n}.".startswith(f"{path}.") for a in self.attachments for n in (a.fqn, a.module))
                return not has_site and f"{path}.weight" in self.find_idle()
        return False

    def max_norm_of(self, fqn: str) -> tuple[float, float] | None:
        """Return the limit on the row norms of a base weight, or None where it has none."""
        own = (self.ops[a.id].max_norm for a in self.attachments if a.fqn == fqn)
        return next((b for b in own if b is not None), self.max_norms.get(fqn))

    def __repr__(self) -> str:
        return f"<BindingSpec: {len(self.attachments)} sites of a program with {len(self.weights)} base tensors>"

    def adapter_dtype(self, a: Attachment) -> torch.dtype:
        """Return the adapter dtype at a site: float32 for half-precision weights with autocast, as in PEFT, else the
        weight's."""
        base = self.weights[a.fqn].dtype
        return torch.float32 if self.autocast_adapter_dtype and base in (torch.float16, torch.bfloat16) else base

    def canonical_weight(self, a: Attachment) -> Tensor:
        """Return the base weight of a site in the layout that methods see."""
        weight = self.weights[a.fqn].detach()
        return self.ops[a.id].canonical(weight) if weight.ndim > 1 else weight

    def layer_bias(self, a: Attachment) -> Tensor | None:
        """Return the base's bias of the layer whose weight is adapted; None for a layer without one."""
        module, _, param = a.fqn.rpartition(".")
        bias = self.weights.get(f"{module}.bias".removeprefix(".")) if param == "weight" else None
        return None if bias is None else bias.detach()
