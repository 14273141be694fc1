"""How calls of one thread see a program: its adapters off, or their scales multiplied, while a block lasts.

Before: any program. Inside ``seen``: calls that begin in this thread, or in this task of asyncio, compute what the
block says; the program is as it was, and so are the calls of all others. After, whatever was raised: nothing is left.
Blocks may be nested, of one program and of several.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.strength import activated, factor_of, multiplied, with_strength_of
from adaptc.errors import AdaptcError

#: the option of calls that says how strongly adapters act
SCALE = "adapter_scale"
#: bindings with other scales that are remembered beside the current one; each may hold what is computed once for it
MOST = 4


@dataclass(frozen=True)
class View:
    """``off``: the base is computed; ``factor``: what all scales are multiplied by."""

    off: bool = False
    factor: float = 1.0


_PLAIN = View()
_views: ContextVar[tuple[tuple[Any, View], ...]] = ContextVar("adaptc_views", default=())
#: the views of this thread or task, innermost last
views = _views.get


def view_of(program: Any) -> View:
    """How this thread sees ``program``."""
    return next((view for seen, view in reversed(views()) if seen is program), _PLAIN)


@contextmanager
def seen(program: Any, off: bool = False, factor: float = 1.0) -> Iterator[None]:
    """A block in which this thread sees ``program`` so; what is around it holds as well."""
    before, around = views(), view_of(program)
    _views.set((*before, (program, View(around.off or off, around.factor * factor))))
    try:
        yield
    finally:
        _views.set(before)


def check_unseen(program: Any, name: str) -> None:
    """Raises AdaptcError, in the name of a function, inside of a block that only calls see."""
    view = view_of(program)
    if view != _PLAIN:
        block = "program.disabled()" if view.off else f"a block that multiplies its scales by {view.factor:g}"
        raise AdaptcError(
            f"{name} is called inside of {block}, which only calls of the program see: leave the block first, and say "
            "with set_scale or set_active what is to hold for the program itself"
        )


def key_of(program: Any, scale: Any) -> Hashable:
    """What a call asks for, by its view and its ``adapter_scale``; None for the program as it is. Raises ConfigError
    for factors that are none."""
    view = view_of(program)
    if scale is None and view == _PLAIN:
        return None
    if isinstance(scale, Mapping):
        return view, tuple((n, factor_of(f, f"{SCALE}[{n!r}]")) for n, f in scale.items())
    return view, None if scale is None else factor_of(scale, SCALE)


def as_seen(spec: BindingSpec, binding: Binding, view: View, scale: Any) -> Binding:
    """``binding`` as a call takes it. Raises ConfigError for names and methods that the scale is not for."""
    if view.off:
        return activated(spec, binding, [])
    if isinstance(scale, Mapping):
        binding = activated(spec, binding, scale)
    elif scale is not None:
        binding = with_strength_of(spec, binding, scale, [n for n, part in binding.named.items() if part.idle is None])
    return binding if view.factor == 1 else multiplied(spec, binding, view.factor)
