"""The sites of a program as a file beside its code holds them, for whoever binds adapters without the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from adaptc.archives.json_schema import Nullable, OptionalField, Size
from adaptc.methods import method_from_dict
from adaptc.passes.graph.ops import LAYER_OPS, Op
from adaptc.passes.protocol.attachment import Attachment
from adaptc.state.adaptation import ATTACHMENT_SCHEMA

#: the form of a site in JSON
SITE_SCHEMA: dict[str, Any] = {
    "attachment": ATTACHMENT_SCHEMA,
    "op": {
        "kind": str,
        "shape": [Size],
        "target": Nullable(str),
        "rest": list,
        "bound": OptionalField([str]),
        "bias": OptionalField(bool),
    },
    "shape": [Size],
    "dtype": str,
}


@dataclass(frozen=True)
class StoredSite:
    """A site: its attachment, its op, and the shape and dtype of the base weight as it is stored."""

    attachment: Attachment
    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype


def site_data(site: StoredSite) -> dict[str, Any]:
    op = site.op
    return {
        "attachment": site.attachment.to_dict(),
        "op": {"kind": op.kind, "shape": op.shape, "target": op.target and str(op.target), "rest": op.other_args}
        | ({} if op.max_norm is None else {"bound": [str(v) for v in op.max_norm]})
        | ({} if op.has_bias else {"bias": False}),
        "shape": site.shape,
        "dtype": str(site.dtype),
    }


def parse_site(data: Mapping[str, Any]) -> StoredSite:
    a = Attachment.from_dict(data["attachment"], method_from_dict)
    op = data["op"]
    target = None if op["target"] is None else _TARGET_BY_NAME[op["target"]]
    bound = tuple(map(float, op["bound"])) if "bound" in op else None
    op = Op(op["kind"], tuple(op["shape"]), target, _lists_to_tuples(op["rest"]), bound, op.get("bias", True))  # type: ignore[arg-type]
    return StoredSite(a, op, tuple(data["shape"]), parse_dtype(data["dtype"]))


_TARGET_BY_NAME = {str(target): target for target in LAYER_OPS}


def _lists_to_tuples(value: Any) -> Any:
    return tuple(_lists_to_tuples(v) for v in cast("list[Any]", value)) if isinstance(value, list) else value


def parse_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
