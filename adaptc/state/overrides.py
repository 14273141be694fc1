"""Let the calls of one thread see a program with its adapters off, or with other scales, while a block lasts.

Inside of :func:`overriding`, calls that begin in this thread, or in this task of asyncio, compute what the block says.
The program and the calls of all others do not change. After the block nothing is left of it, whatever was raised.
Blocks may be nested, of one program and of several.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import TurnOff, parse_factor, with_active, with_scale, with_scales_multiplied
from adaptc.errors import AdaptcError, SwapError
from adaptc.public_names import warn_renamed
from adaptc.torch_typing import is_mapping

#: the deprecated keyword of calls that scales the adapters
SCALE_KEYWORD = "adapter_scale"
#: the number of bindings with other scales that are remembered beside the current one; each may keep hoisted values
MAX_SCALED_BINDINGS = 4


@dataclass(frozen=True)
class Override:
    """A view of a program.

    ``is_disabled``: calls compute the base. ``factor``: the number by which all scales are multiplied. ``chosen``:
    names of the only adapters that act, each with the factor that takes the place of its own, None for its own. A
    single number takes the place of the factors of all adapters that act.
    """

    is_disabled: bool = False
    factor: float = 1.0
    chosen: tuple[tuple[str, float | None], ...] | float | None = None


NO_OVERRIDE = Override()
_overrides: ContextVar[tuple[tuple[Any, Override], ...]] = ContextVar("adaptc_views", default=())
#: the views of this thread or task, innermost last
active_overrides = _overrides.get


def override_of(program: Any) -> Override:
    """Return the view of ``program`` that this thread or task has."""
    return next((view for seen, view in reversed(active_overrides()) if seen is program), NO_OVERRIDE)


@contextmanager
def overriding(program: Any, added: Override) -> Generator[None]:
    """Run the block with a view of ``program`` for this thread or task. It adds to the views of blocks around it:
    factors multiply, adapters that are off stay off, and the innermost choice counts."""
    before, around = active_overrides(), override_of(program)
    chosen = around.chosen if added.chosen is None else added.chosen
    view = Override(around.is_disabled or added.is_disabled, around.factor * added.factor, chosen)
    try:
        _overrides.set((*before, (program, view)))
        yield
    finally:
        _overrides.set(before)


def scaling(
    program: Any, scale: float | Mapping[str, float | None], off: TurnOff | None = None
) -> AbstractContextManager[None]:
    """Return the block of ``program.scaled(scale)``.

    ``off`` turns an adapter of the program off; see :func:`with_active`. Raises ConfigError for what calls in the block
    would be the first to refuse.
    """
    if isinstance(scale, Mapping):
        with_active(program.spec(), program.binding, scale, off=off)
        return overriding(program, Override(chosen=_parse_choice(scale, "scale")))
    factor = parse_factor(scale)
    with_scales_multiplied(program.spec(), program.binding, factor)
    return overriding(program, Override(factor=factor))


def scaling_of_call(program: Any, scale: Any, call: str) -> AbstractContextManager[None]:
    """Return the block that a call with the deprecated ``adapter_scale=scale`` runs in, and warn.

    ``call`` is the code of such a call. Raises ConfigError for factors that are not finite numbers. Raises SwapError
    where there is no adapter.
    """
    if is_mapping(scale):
        chosen: Any = _parse_choice(scale, SCALE_KEYWORD)
    else:
        chosen = None if scale is None else parse_factor(scale, SCALE_KEYWORD)
    if scale is not None and program.current is None:
        raise SwapError(f"{SCALE_KEYWORD}={scale!r}: the program has no adapter; it was merged or unloaded")
    owner = call.partition(".")[0].partition("(")[0]
    warn_renamed(f"{call}(..., {SCALE_KEYWORD}=scale)", f"with {owner}.scaled(scale): {call}(...)")
    return overriding(program, Override(chosen=chosen))


def _parse_choice(scale: Mapping[str, Any], option: str) -> tuple[tuple[str, float | None], ...]:
    return tuple((n, None if f is None else parse_factor(f, f"{option}[{n!r}]")) for n, f in scale.items())


def check_no_override(program: Any, name: str) -> None:
    """Raise AdaptcError inside of a block that only calls see, for the function ``name`` that would not see it."""
    view = override_of(program)
    if view != NO_OVERRIDE:
        raise AdaptcError(
            f"{name} is called inside of program.{'disabled()' if view.is_disabled else 'scaled(...)'}, which only "
            "calls of the program see: leave the block first, and say with set_active what is to hold for the program "
            "itself"
        )


def apply_override(spec: BindingSpec, binding: Binding, override: Override, off: TurnOff | None = None) -> Binding:
    """Return ``binding`` as a call with this view reads it.

    ``off`` turns an adapter off; see :func:`with_active`. Raises ConfigError for names that are no adapter, and for
    methods without a scale.
    """
    if override.is_disabled:
        return with_active(spec, binding, [], off=off)
    chosen = override.chosen
    if isinstance(chosen, tuple):
        binding = with_active(spec, binding, dict(chosen), off=off)
    elif chosen is not None:
        active = [n for n, part in binding.adapters_by_name.items() if part.active_form is None]
        binding = with_scale(spec, binding, chosen, active)
    return binding if override.factor == 1 else with_scales_multiplied(spec, binding, override.factor)
