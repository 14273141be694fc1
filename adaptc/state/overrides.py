"""Let the calls of one thread see a program with its adapters off, or their scales multiplied, while a block lasts.

Inside of :func:`seen`, calls that begin in this thread, or in this task of asyncio, compute what the block says. The
program and the calls of all others do not change. After the block nothing is left of it, whatever was raised. Blocks
may be nested, of one program and of several.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import parse_factor, with_active, with_scale, with_scales_multiplied
from adaptc.errors import AdaptcError

#: the keyword of calls that scales the adapters
SCALE_KEYWORD = "adapter_scale"
#: the number of bindings with other scales that are remembered beside the current one; each may keep hoisted values
MAX_SCALED_BINDINGS = 4


@dataclass(frozen=True)
class Override:
    """A view of a program. ``is_disabled``: calls compute the base. ``factor``: the number by which all scales are
    multiplied."""

    is_disabled: bool = False
    factor: float = 1.0


_NO_OVERRIDE = Override()
_overrides: ContextVar[tuple[tuple[Any, Override], ...]] = ContextVar("adaptc_views", default=())
#: the views of this thread or task, innermost last
active_overrides = _overrides.get


def override_of(program: Any) -> Override:
    """Return the view of ``program`` that this thread or task has."""
    return next((view for seen, view in reversed(active_overrides()) if seen is program), _NO_OVERRIDE)


@contextmanager
def overriding(program: Any, off: bool = False, factor: float = 1.0) -> Iterator[None]:
    """Run the block with a view of ``program`` for this thread or task. It adds to the views of blocks around it:
    factors multiply, and adapters that are off stay off."""
    before, around = active_overrides(), override_of(program)
    _overrides.set((*before, (program, Override(around.is_disabled or off, around.factor * factor))))
    try:
        yield
    finally:
        _overrides.set(before)


def check_no_override(program: Any, name: str) -> None:
    """Raise AdaptcError inside of a block that only calls see, for the function ``name`` that would not see it."""
    view = override_of(program)
    if view != _NO_OVERRIDE:
        block = "program.disabled()" if view.is_disabled else f"a block that multiplies its scales by {view.factor:g}"
        raise AdaptcError(
            f"{name} is called inside of {block}, which only calls of the program see: leave the block first, and say "
            "with set_scale or set_active what is to hold for the program itself"
        )


def override_key(program: Any, scale: Any) -> Hashable:
    """Return a key for what a call asks for, by its view and its ``adapter_scale``; None for the program as it is.
    Raises ConfigError for factors that are not finite numbers."""
    view = override_of(program)
    if scale is None and view == _NO_OVERRIDE:
        return None
    if isinstance(scale, Mapping):
        return view, tuple((n, parse_factor(f, f"{SCALE_KEYWORD}[{n!r}]")) for n, f in scale.items())
    return view, None if scale is None else parse_factor(scale, SCALE_KEYWORD)


def apply_override(spec: BindingSpec, binding: Binding, override: Override, scale: Any) -> Binding:
    """Return ``binding`` as a call with this view and ``adapter_scale`` reads it. Raises ConfigError for names that are
    no adapter, and for methods without a scale."""
    if override.is_disabled:
        return with_active(spec, binding, [])
    if isinstance(scale, Mapping):
        binding = with_active(spec, binding, scale)
    elif scale is not None:
        binding = with_scale(
            spec, binding, scale, [n for n, part in binding.adapters_by_name.items() if part.active_form is None]
        )
    return binding if override.factor == 1 else with_scales_multiplied(spec, binding, override.factor)
