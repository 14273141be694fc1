"""List the schemes, and write one as text and back: programs, files and ops name a scheme by its text.

The text is JSON with the key "scheme" and the options that differ from their defaults.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from typing import Any

from adaptc.errors import ConfigError
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.scheme import Scheme
from adaptc.passes.quantized.table_scheme import TableScheme

SCHEMES: dict[str, type[Scheme]] = {s.name: s for s in (IntegerScheme, TableScheme)}


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
