"""List the schemes: by the names that users write, and by the text that programs, files and ops name them by.

The text is JSON with the key "scheme" and the options that differ from their defaults.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from typing import Any

from adaptc.errors import ConfigError, did_you_mean, short_repr
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.planar_scheme import PlanarScheme
from adaptc.passes.quantized.scheme import Scheme
from adaptc.passes.quantized.table_scheme import TableScheme

SCHEMES: dict[str, type[Scheme]] = {s.name: s for s in (IntegerScheme, PlanarScheme, TableScheme)}

#: names of schemes that weights can be stored in
SCHEME_NAMES = ("int8", "int8_dynamic", "int4", "nf4", "fp4")
#: the number of columns that share a scale where the caller names none
INT4_GROUP, TABLE_BLOCK = 32, 64
#: the number of blocks of NF4 and FP4 whose scales share a unit
SCALE_BLOCK = 256


@lru_cache(maxsize=256)
def scheme_text(scheme: Scheme) -> str:
    """Return ``scheme`` as text."""
    changed = {f.name: v for f in fields(scheme) if (v := getattr(scheme, f.name)) != f.default}
    return json.dumps({"scheme": scheme.name, **changed}, sort_keys=True)


@lru_cache(maxsize=256)
def scheme_from_text(text: str) -> Scheme:
    """Return the scheme that ``text`` names. Raises ConfigError for an unknown scheme or option, or a wrong value."""
    try:
        options: dict[str, Any] = json.loads(text)
        kind = SCHEMES[options.pop("scheme")]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{text!r} names no scheme: one of {', '.join(SCHEMES)}") from error
    types: dict[str, type] = {f.name: type(f.default) for f in fields(kind)}
    for name, value in options.items():
        if name not in types or type(value) is not types[name]:
            raise ConfigError(f"{kind.name} has no option {name}={value!r}; its options are {', '.join(types)}")
    return kind(**options)


def choose_scheme(name: str, group_size: int | None, columns: int) -> Scheme:
    """Return the scheme called ``name`` for a weight of so many ``columns``.

    ``group_size`` is the number of columns that share a scale. None takes the scheme's own: a row for int8, 64 elements
    for nf4 and fp4, and for int4 the largest divisor of the columns up to 32.

    Raises ConfigError for an unknown name, and for a group_size that the scheme does not have.
    """
    if name not in SCHEME_NAMES:
        raise ConfigError(
            f"scheme={short_repr(name)} is not one of {', '.join(SCHEME_NAMES)}{did_you_mean(str(name), SCHEME_NAMES)}"
        )
    if group_size is not None and (isinstance(group_size, bool) or group_size < 1):
        raise ConfigError(f"group_size={short_repr(group_size)}: a positive number of columns that share a scale")
    if name in ("nf4", "fp4"):
        return TableScheme(name, group_size or TABLE_BLOCK, SCALE_BLOCK)
    if name == "int8_dynamic":
        if group_size is not None:
            raise ConfigError("group_size goes with int8, int4, nf4 and fp4: int8_dynamic has one scale for each row")
        return IntegerScheme(activations="int8")
    if name == "int8":
        return IntegerScheme(group_size=group_size or 0)
    size = group_size or next(d for d in range(min(INT4_GROUP, columns), 0, -1) if columns % d == 0)
    return IntegerScheme(bits=4, group_size=size, scale_dtype="bfloat16", zero_dtype="uint8")
