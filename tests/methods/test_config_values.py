"""Odd values in every field of every config, as an object, as a dict and as a file: refused by name, or equal in all
three, and what is accepted compiles or is refused in an AdaptcError."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods import config_class
from adaptc.methods._registry import CONFIGS

DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


class Speechless:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


#: values with names, so that a test's id says which it was
ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "7": 7,
    "10**15": 10**15,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "0.5": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e39": 1e39,
    "empty": "",
    "x": "x",
    "open": "(",
    "surrogate": "\udc80",
    "bytes": b"x",
    "[]": [],
    "[[]]": [[]],
    "[None]": [None],
    "[7]": [7],
    "[nan]": [float("nan")],
    "['up']": ["up"],
    "{}": {},
    "{1: 2}": {1: 2},
    "{'up': nan}": {"up": float("nan")},
    "{'up': '7'}": {"up": "7"},
    "{'up': 10**15}": {"up": 10**15},
    "{'(': 7}": {"(": 7},
    "deep": DEEP,
    "{'up': deep}": {"up": DEEP},
    "object": object(),
    "speechless": Speechless(),
    "complex": 1 + 2j,
    "sympy": sympy.Symbol("r"),
    "tensor": torch.tensor([1.0, 2.0]),
    "numpy": np.arange(3),
    "type": int,
}
#: what can be written to a file
JSON = {
    n: v
    for n, v in ODD.items()
    if n not in ("10**5000", "bytes", "{1: 2}")
    and "deep" not in n
    and (v is None or isinstance(v, (bool, int, float, str, list, dict)))
}
KINDS = sorted(CONFIGS)


def least(cls: Any) -> dict[str, Any]:
    """The fields without which a config cannot be made."""
    return {"target_modules": ["up"], **dict(getattr(cls, "samples", ({},))[0])}


def outcome(make: Any) -> Any:
    """The fields of a config, or the words it was refused with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adaptc.errors.AdaptcWarning)
        try:
            config = make()
        except ConfigError as error:
            return str(error)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def raised(call: Any) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_odd_values_of_every_field_mean_the_same_by_every_route(kind, tmp_path):
    cls: Any = config_class(kind)
    for field in [f.name for f in dataclasses.fields(cls)]:
        for name, value in ODD.items():
            options = {**least(cls), field: value}
            extra = {"oft_block_size": options.get("oft_block_size", 32)} if kind == "OFT" else {}
            data = {"peft_type": kind, **extra, **options}
            by_object = outcome(lambda options=options: cls(**options))
            found = [outcome(lambda data=data: cls.from_dict(data))]
            if name in JSON:
                found.append(outcome(lambda data=data: cls.from_dict(json.loads(json.dumps(data)))))
            assert all(repr(other) == repr(by_object) for other in found), (field, name, by_object, found)
            if isinstance(by_object, str):
                assert field in by_object, f"{field}={name} is not named: {by_object}"
                assert len(by_object) < 2000


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


#: values each of which some field takes, and that may be too much for a layer
FOR_LAYERS = ("-1", "0", "7", "10**15", "0.5", "x", "(", "[]", "['up']", "{}", "{'up': 10**15}", "{'(': 7}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_a_config_takes_compiles_or_is_refused(kind):
    exported = torch.export.export(Tiny(), (torch.randn(3, 6),))
    cls: Any = config_class(kind)
    for f in dataclasses.fields(cls):
        for name in FOR_LAYERS:
            if name not in ODD:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = {**least(cls), f.name: ODD[name]}
                found = raised(lambda options=options: adaptc.compile(exported, cls(**options)))
                assert found is None or (issubclass(found, AdaptcError) and found is not adaptc.PassError), (
                    f.name,
                    name,
                )
