"""Attachments: a method at one site of a program, and the one form in which files hold it.

Region tags and the manifests of packages hold what :meth:`Attachment.to_dict` gives. :meth:`Attachment.from_dict` is
its inverse, also after a trip through JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from adaptc.passes.protocol.method import Method, Slot


@dataclass(frozen=True)
class Attachment:
    """A method at a site of a program: everything needed to inject, merge, save and describe it.

    ``key`` is the site's path in PEFT's files, and ``module``/``param`` its path in the model. ``consumers`` are the
    names of the nodes that read the weight. ``slots`` and ``scale_slot`` are the FQNs of its tensors once injected.
    ``form`` is "apply", "weight" or, for methods of the program, "program". It is "auto" until it was chosen, and
    ``why`` is the reason.

    ``entry`` is the target entry that chose the site. Per-module patterns (rank_pattern) are matched against ``name``.
    ``tied`` says that other nodes read the weight too. ``variant`` counts the attachments of related methods at one
    weight. ``reads`` maps the coefficients that its regions read to the names of their nodes, once injected.
    """

    key: str
    module: str
    param: str
    kind: str
    method: Method
    adapter: str = "default"
    form: str = "auto"
    consumers: tuple[str, ...] = ()
    slots: Mapping[str, str] = field(default_factory=dict[str, str])
    scale_slot: str | None = None
    entry: str = ""
    name: str = ""
    tied: bool = False
    variant: int = 0
    why: str = ""
    reads: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def fqn(self) -> str:
        """Return the FQN of the base parameter."""
        return f"{self.module}.{self.param}" if self.module else self.param

    @property
    def slot_path(self) -> str:
        """Return the path of the slots in the program: ``key``, unless that is the name of the parameter itself."""
        return self.key if self.key != self.fqn else f"{self.module}.adapted_{self.param}".removeprefix(".")

    @cached_property
    def id(self) -> str:
        """Return the attachment's unique name in a program, which region tags point to."""
        return f"{self.fqn}|{self.method.name}" + (f".{self.variant}" if self.variant else "")

    def slot_fqn(self, name: str, slot: Slot) -> str:
        """Return the FQN of a slot in the program's state dict."""
        return self.method.files.fqn("" if slot.shared else self.slot_path, name, self.adapter)

    @property
    def scale_fqn(self) -> str:
        """Return the FQN of the scale. It holds the method's name, since several methods may share one weight."""
        return self.method.files.fqn(self.slot_path, f"scaling.{self.method.name}", self.adapter)

    @property
    def tensor_names(self) -> list[str]:
        """Return the FQNs of its tensors once injected: its slots, then its scale if it has one."""
        return [*self.slots.values(), *([] if self.scale_slot is None else [self.scale_slot])]

    @property
    def input_names(self) -> list[str]:
        """Return the names of the slots and coefficients that the method's regions read last, but for the scale."""
        return [*self.slots, *self.reads]

    def file_key(self, name: str, slot: Slot) -> str:
        """Return the key of a slot in files, without the file's prefix."""
        return slot.key or (name if slot.shared or not self.key else f"{self.key}.{name}")

    def tag(self, role: str) -> dict[str, Any]:
        """Return the tag that every node of its regions carries; ``role`` is "out" for the result."""
        return {"method": self.method.name, "adapter": self.adapter, "site": self.id, "role": role}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, with the method as its name and its options."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "reads" or self.reads}
        return out | {
            "method": self.method.name,
            "options": self.method.options(),
            "consumers": list(self.consumers),
            "slots": dict(self.slots),
            **({"reads": dict(self.reads)} if self.reads else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], method_of: Callable[[Mapping[str, Any]], Method]) -> Attachment:
        """Return the attachment that :meth:`to_dict` described.

        ``method_of`` makes the method of the name and the options in ``data``.
        """
        plain = {f.name: data[f.name] for f in fields(cls) if f.name != "reads" or "reads" in data}
        options: dict[str, Any] = {**plain, "method": method_of(data), "consumers": tuple(data["consumers"])}
        return cls(**options)
