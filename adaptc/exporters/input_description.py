"""Describe the inputs of an exported program that have an adapter, as JSON that lies in its file.

The description is all that is needed to bind an adapter to the file without the program: where each input belongs, the
sites with their methods, and the config. Its fingerprint tells one base from another. An adapter's file is written for
one description, and names it by this fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from adaptc.archives.json_schema import Nullable, OptionalField, Size, check_json
from adaptc.archives.names import parse_json
from adaptc.archives.refusal import UnsafeFile, describe_error, short_repr
from adaptc.errors import AdaptcError, CheckpointError
from adaptc.exporters.adapter_feeds import MERGED_KEY
from adaptc.exporters.row_stacks import ROWS_SCHEMA
from adaptc.exporters.slot_program import SlotProgram
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.program.files.stored_sites import SITE_SCHEMA, StoredSite, parse_site, site_data
from adaptc.state.adaptation import check_header
from adaptc.torch_typing import is_dict

FORMAT = 1
#: how many elements of each base weight the fingerprint is made of
SAMPLED_ELEMENTS = 1024

_INPUT_SCHEMA: dict[str, Any] = {
    "name": str,
    "fqn": str,
    "site": str,
    "slot": str,
    "shape": [(Size, str)],
    "dtype": str,
    "key": Nullable(str),
    "identity": {"shape": [Size], "value": Nullable((int, float, bool, str))},
}
_SCHEMA: dict[str, Any] = {
    "format": Size,
    "torch": str,
    "fingerprint": str,
    "header": dict,  # see adaptc.state.adaptation
    "sites": [SITE_SCHEMA],
    "inputs": [_INPUT_SCHEMA],
    "rows": OptionalField(ROWS_SCHEMA),
}


class _NoInputs(Exception):
    """A description says that its file has no inputs for adapters."""


@dataclass(frozen=True)
class DescribedInput:
    """An input that has a tensor of an adapter; the fields are those of :class:`~adaptc.exporters.SlotInput`.

    ``identity_shape`` is the shape of the value that computes the base. Where all of its elements are one number, that
    is ``identity_value``.
    """

    name: str
    fqn: str
    site: str
    slot: str
    shape: tuple[int | str, ...]
    dtype: str
    key: str | None
    identity_shape: tuple[int, ...]
    identity_value: float | None


@dataclass(frozen=True, eq=False)
class InputDescription:
    """The description of a file's adapter inputs: its sites, the record of its program, and its fingerprint.

    ``has_rows`` says that each row of a call may have adapters of its own.
    """

    fingerprint: str
    header: Mapping[str, Any]
    sites: Sequence[StoredSite]
    inputs: Sequence[DescribedInput]
    has_rows: bool = False


def describe(made: SlotProgram) -> dict[str, Any]:
    """Return the description of a program whose adapter is an input, as plain JSON values."""
    inputs: list[dict[str, Any]] = []
    for i in made.inputs:
        flat = i.identity.flatten()
        uniform = not flat.numel() or bool((flat == flat[0]).all())
        value = (flat[0].item() if flat.numel() else 0.0) if uniform else None
        if isinstance(value, float) and not isfinite(value):
            value = str(value)  # JSON has no infinity, which is the identity of DoRA's magnitude
        fields = {n: getattr(i, n) for n in _INPUT_SCHEMA if n != "identity"}
        identity = {"shape": list(i.identity.shape), "value": value}
        inputs.append({**fields, "shape": list(i.shape), "identity": identity})
    plain = {
        "format": FORMAT,
        "torch": torch.__version__,
        "fingerprint": _fingerprint(made),
        "header": made.header,
        "sites": [site_data(s) for s in made.sites],
        "inputs": inputs,
    } | ({} if made.rows is None else {"rows": made.rows})
    return json.loads(json.dumps(plain))


def describe_merged() -> dict[str, Any]:
    """Return the description of a file that has no inputs for adapters, as plain JSON values."""
    return {"format": FORMAT, "torch": torch.__version__, MERGED_KEY: True}


def parse_description(text: str, source: str) -> InputDescription:
    """Return the description that a file holds as JSON.

    Raises CheckpointError, with ``source``, for any other text, and for a file that has no inputs for adapters.
    """
    try:
        data: Any = parse_json(text.encode(), allow_nan=False)
        if is_dict(data) and data.get(MERGED_KEY) is True:
            raise _NoInputs
        found = data.get("format") if is_dict(data) else data
        if found != FORMAT:
            raise UnsafeFile(f"its format is {short_repr(found)}, and this adaptc reads {FORMAT}")
        check_json(data, _SCHEMA)
        sites = [parse_site(s) for s in data["sites"]]
        check_header(data["header"], [s.attachment.id for s in sites])
        inputs = [_parse_input(i) for i in data["inputs"]]
        slots = {f for s in sites for f in s.attachment.tensor_names}
        if strange := [i.fqn for i in inputs if i.fqn not in slots and i.slot != "base"]:
            raise UnsafeFile(f"the input {short_repr(strange[0])} is of no site")
        return InputDescription(data["fingerprint"], data["header"], sites, inputs, "rows" in data)
    except _NoInputs:
        raise CheckpointError(
            f"{source} has no inputs for adapters, for its adapter was merged when it was exported: export the program "
            "with adapters='inputs'"
        ) from None
    except Exception as error:  # a forged text can break any reader of its fields
        why = str(error) if isinstance(error, (UnsafeFile, AdaptcError)) else describe_error(error)
        raise CheckpointError(
            f"{source}: the description of its adapter inputs is damaged: {why}. Export the program again"
        ) from error


def _parse_input(data: Mapping[str, Any]) -> DescribedInput:
    texts = {n: data[n] for n in ("name", "fqn", "site", "slot", "dtype", "key")}
    identity = data["identity"]
    value = identity["value"]
    return DescribedInput(
        **texts,
        shape=tuple(data["shape"]),
        identity_shape=tuple(identity["shape"]),
        identity_value=float(value) if isinstance(value, str) else value,
    )


def _fingerprint(made: SlotProgram) -> str:
    """Return a hash of the sites, of the inputs, and of some elements of each base weight."""
    hashed = hashlib.sha256()
    for i in made.inputs:
        hashed.update(f"{i.name} {i.shape} {i.dtype}\n".encode())
    for fqn, weight in made.base_weights.items():
        hashed.update(f"{fqn} {tuple(weight.shape)} {weight.dtype}\n".encode())
        stored = list(weight.stored.values()) if isinstance(weight, QuantizedTensor) else [weight]
        for tensor in stored:
            hashed.update(_sampled_bytes(tensor))
    return hashed.hexdigest()


def _sampled_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    step = max(flat.numel() // SAMPLED_ELEMENTS, 1)
    return flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
