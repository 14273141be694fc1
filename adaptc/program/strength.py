"""How strongly the adapters of a program act, and which of them do, while it is called, swapped and trained.

Before: a program, and any threads that call it. After: another binding is the current one, put in place as a swap puts
it there: nothing is compiled, calls that have begun keep what they began with, and a call that raised changed nothing.
What two threads set at once are both set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.strength import activated, factor_of, multiplied, scaled, without
from adaptc.program.add import Compiling, added
from adaptc.program.core import ProgramCore
from adaptc.program.views import seen
from adaptc.torch_modes import plainly


class Strengths(ProgramCore):
    """See the module docstring."""

    #: set by who compiles programs
    compiling: ClassVar[Compiling | None] = None

    def set_scale(self, scale: float, adapter: str | None = None, modules: str | Iterable[str] | None = None) -> None:
        """Multiply the scale that an adapter was made with (LoRA's alpha / r, and its like) by ``scale``.

        The last call counts, so that 0.5 twice is 0.5, and 1 gives back, to the bit, what the adapter was made with. 0
        takes away all that is added to a weight. ``adapter``: its name, which may be left out where there is one.
        ``modules``: where, None for everywhere; a list of names of modules, or of their beginnings or endings
        ("layers.0" is all of that layer), or a string: one of these, or a regular expression for whole names.

        What the adapter trains as it is (``modules_to_save``, biases, tokens) has no scale, and stays. Raises
        ConfigError for names that choose nothing, for what is no finite number, and for methods that have no factor on
        what they change (IA3, OFT, ...), where PEFT warns or says nothing. ``adaptc.merge`` and ``adaptc.save`` see it;
        ``adaptc.save_adapter`` writes the adapter as it was made, and warns. What was bound before, and modules that
        were made, keep the scale that they have.
        """
        self._set(lambda spec, now: scaled(spec, now, scale, adapter, modules))

    def set_active(self, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
        """Let these adapters act, of those that the program has by name, and no others, whose layers compute what they
        would without them. None of their tensors is lost.

        A dict of factors is as a list of its names, and :meth:`set_scale` of each. An empty list leaves the base.
        Raises ConfigError for a name that is none, and as :meth:`set_scale`; SwapError where the program has no base.
        """
        self._set(lambda spec, now: activated(spec, now, adapters))

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        return [n for n, part in self.binding.named.items() if part.idle is None]

    @property
    def available_adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self.binding.named)

    def disabled(self) -> AbstractContextManager[None]:
        """A block in which calls compute the base: those that this thread, or this task of asyncio, begins in it.

        Other threads, and what is bound, stay as they are, so that one request may ask for the base while others go on.
        Nothing is compiled for it. :attr:`AdaptedProgram.base` is a program of the base, which is faster still.
        """
        return seen(self, off=True)

    def rescaled(self, multiplier: float) -> AbstractContextManager[None]:
        """A block in which calls have the scales of all adapters, as they are then, multiplied, as in :meth:`disabled`.
        Raises ConfigError for what is no finite number, and where no method has a scale.
        """
        factor = factor_of(multiplier, "multiplier")
        multiplied(self.spec(), self.binding, factor)  # or it would be refused where a call needs it
        return seen(self, factor=factor)

    def delete_adapter(self, name: str) -> None:
        """Take one of several adapters out: its name is gone, its tensors are let go, and its layers compute what they
        would without it. Files that are written from now on are without it. Raises ConfigError for a name that is none,
        and SwapError for the only adapter."""
        self._set(lambda spec, now: without(spec, now, name))

    def add_adapter(self, name: str, adapter: Any, *, recompile: bool = False) -> Self:
        """Give the program one more adapter, which acts together with those that it has: a config, a directory, a file
        or a state dict, as ``adaptc.compile`` takes them. Returns the program that has it.

        An adapter of a name that was deleted takes the sites that were left, and the program is this one. Any other
        needs sites of its own: SwapError names them. With ``recompile`` the result is another program then, of all the
        adapters, with the same tensors, factors and base; this one, and what is bound to it, stay. That needs the base:
        MergeError where a file held only what an adapter made of it. Raises ConfigError for a name that is there, and
        whatever ``adaptc.compile`` raises.
        """
        assert self.compiling is not None
        with plainly():
            return added(self, name, adapter, recompile, self.compiling)

    def _set(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        """Again, of the binding that is current then, where another thread was first."""
        old, new = None, None
        while old is None or new is None or not self.exchange(old, new):
            old = self.binding
            with plainly():
                new = self.recipes.note(change(self.spec(), old))
