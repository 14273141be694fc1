"""Set how strongly the adapters of a program act, and which of them act, while it is called, swapped and trained.

Each change makes another binding the current one, in the way a swap does. Nothing is compiled, and calls that have
begun keep the binding they began with. A change that raises changes nothing. What two threads set at once are both set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import (
    parse_factor,
    scale_adapter,
    with_active,
    with_scales_multiplied,
    without_adapter,
)
from adaptc.errors import ConfigError, listing
from adaptc.program.add_adapter import with_added_adapter
from adaptc.public_names import warn_renamed
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import overriding
from adaptc.torch_modes import outside_modes


class ScalableProgram(ProgramCore):
    """A program whose adapters can be scaled, turned on and off, added and deleted."""

    def set_scale(self, scale: float, adapter: str | None = None, modules: str | Iterable[str] | None = None) -> None:
        """Multiply the scale that an adapter was made with (LoRA's alpha / r, and its like) by ``scale``.

        The last call counts, so that 0.5 twice is 0.5, and 1 gives back, to the bit, what the adapter was made with. 0
        takes away all that is added to a weight. What the adapter trains as it is (``modules_to_save``, biases, tokens)
        has no scale, and stays.

        ``adaptc.merge`` and ``adaptc.save`` see the scale. ``adaptc.save_adapter`` writes the adapter as it was made,
        and warns. Callables that were bound before, and modules that were made, keep the scale that they have.

        Args:
            scale: the factor.
            adapter: the name of the adapter, which may be left out where there is one.
            modules: the modules to scale, None for all. It is a list of names of modules, or of their beginnings or
                endings ("layers.0" is all of that layer). A single string is one of these, or a regular expression for
                whole names.

        Raises:
            ConfigError: the names choose nothing, or the scale is not a finite number. The same for methods without a
                factor on what they change (IA3, OFT, ...), where PEFT warns or says nothing.
        """
        self._update_binding(lambda spec, now: scale_adapter(spec, now, scale, adapter, modules))

    def set_active(self, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
        """Let these adapters of the program act, by name, and no others.

        The layers of the others compute what they would without them, and their tensors are kept.

        Args:
            adapters: a name or a list of names. A dict of factors stands for a list of its names, and :meth:`set_scale`
                of each. An empty list leaves the base.

        Raises:
            ConfigError: a name is unknown, or a factor is none that :meth:`set_scale` takes.
            SwapError: the program has no base.
        """
        self._update_binding(lambda spec, now: with_active(spec, now, adapters))

    @property
    def active_adapters(self) -> list[str]:
        """Return the names of the adapters that act."""
        return [n for n, part in self.binding.adapters_by_name.items() if part.active_form is None]

    @property
    def available_adapters(self) -> list[str]:
        """Return the names of all adapters."""
        return list(self.binding.adapters_by_name)

    def disabled(self) -> AbstractContextManager[None]:
        """Run the block with calls that compute the base: those that this thread, or this task of asyncio, begins in
        it.

        Other threads, and what is bound, stay as they are, so that one request may ask for the base while others go on.
        Nothing is compiled for it. :attr:`AdaptedProgram.base` is a program of the base, which is faster still.

        Returns:
            a context manager.
        """
        return overriding(self, off=True)

    def scaled(self, multiplier: float) -> AbstractContextManager[None]:
        """Run the block with the scales of all adapters multiplied, for the calls that :meth:`disabled` would turn to
        the base.

        The factor is on the scales that hold when a call begins.

        Args:
            multiplier: the factor.

        Returns:
            a context manager.

        Raises:
            ConfigError: the multiplier is not a finite number, or no method has a scale.
        """
        factor = parse_factor(multiplier, "multiplier")
        with_scales_multiplied(
            self.spec(), self.binding, factor
        )  # tried now, or a call in the block would be the first to raise
        return overriding(self, factor=factor)

    # -- the verbs of PEFT and diffusers -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let these adapters act, by name, and no others, as PEFT's ``set_adapter`` does; see :meth:`set_active`.

        Unlike PEFT's, it does not change which tensors require gradients.

        Args:
            adapter_name: a name or a list of names.
        """
        self.set_active(adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Let these adapters act with these factors, as ``set_adapters`` of a diffusers pipeline does.

        Args:
            adapter_names: a name or a list of names.
            adapter_weights: a number for all of them, or one for each; None stands for 1.

        Raises:
            ConfigError: there are not as many weights as names; also what :meth:`set_active` raises.
        """
        self.set_active(weighted_adapters(adapter_names, adapter_weights))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Run the block with calls that compute the base, as PEFT's ``disable_adapter`` does; see :meth:`disabled`.

        Returns:
            a context manager.
        """
        return self.disabled()

    def rescaled(self, multiplier: float) -> AbstractContextManager[None]:
        """Return :meth:`scaled`, which this is called now."""
        warn_renamed("program.rescaled", "program.scaled")
        return self.scaled(multiplier)

    def delete_adapter(self, name: str) -> None:
        """Take one of several adapters out.

        Its name is gone, its tensors are let go, and its layers compute what they would without it. Files that are
        written from now on are without it.

        Args:
            name: the name of the adapter.

        Raises:
            ConfigError: the name is unknown.
            SwapError: it is the only adapter.
        """
        self._update_binding(lambda spec, now: without_adapter(spec, now, name))

    def add_adapter(self, name: str, adapter: Any, *, recompile: bool = False) -> Self:
        """Give the program one more adapter, which acts together with those that it has.

        An adapter of a name that was deleted takes the sites that were left. Any other adapter needs sites of its own.

        Args:
            name: the name of the adapter.
            adapter: a config, a directory, a file or a state dict, as ``adaptc.compile`` takes them.
            recompile: whether an adapter that needs other sites gets another program. That program has all the
                adapters, with the same tensors, factors and base. This one, and what is bound to it, stay.

        Returns:
            the program that has the adapter: this one, or with ``recompile`` perhaps another one.

        Raises:
            SwapError: the sites that the adapter needs are missing; they are named.
            ConfigError: the name is there already.
            MergeError: another program needs the base, and a file held only what an adapter made of it.
            AdaptcError: what ``adaptc.compile`` raises.
        """
        with outside_modes():
            return with_added_adapter(self, name, adapter, recompile)

    def _update_binding(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        """Install ``change`` of the current binding. It is made again where another thread installed a binding
        meanwhile."""
        old, new = None, None
        while old is None or new is None or not self.compare_and_swap(old, new):
            old = self.binding
            with outside_modes():
                new = self.binding_plans.remember_fitting(change(self.spec(), old))


def weighted_adapters(names: str | Sequence[str], weights: float | Sequence[float] | None) -> dict[str, float]:
    """Return name -> factor. ``weights``: a number for all ``names``, or one for each; None stands for 1.

    Raises ConfigError where there are not as many weights as names, or a name is given twice.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not isinstance(weights, Sequence):
        weights = [1.0 if weights is None else weights] * len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"there are {len(names)} adapter names and {len(weights)} adapter_weights: give one for each name"
        )
    if len({*names}) < len(names):
        raise ConfigError(f"an adapter is named twice: {listing(names)}; give each name once, with its weight")
    return dict(zip(names, weights, strict=True))
