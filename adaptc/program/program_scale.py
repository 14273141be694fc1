"""Set how strongly the adapters of a program act, and which of them act, while it is called, swapped and trained.

Each change makes another binding the current one, in the way a swap does. Nothing is compiled, and calls that have
begun keep the binding they began with. A change that raises changes nothing. What two threads set at once are both set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_scale import (
    ActiveChoice,
    ModuleChoice,
    scale_adapter,
    turn_off,
    with_active,
    without_adapter,
)
from adaptc.errors import ConfigError, MergeError, listing, short_repr
from adaptc.program.add_adapter import with_added_adapter
from adaptc.public_names import warn_renamed
from adaptc.state.core import ProgramCore
from adaptc.state.overrides import Override, overriding, scaling
from adaptc.torch_modes import outside_modes


class AdapterScales(ABC):
    """The adapters of a program or a package by name, which can be scaled and turned on and off."""

    @property
    @abstractmethod
    def binding(self) -> Any:
        """Return the current binding. Raises AdaptcError where there is no adapter."""

    @abstractmethod
    def update_binding(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        """Install ``change`` of the current binding."""

    def turn_off_adapter(self, spec: BindingSpec, adapter: Binding) -> Binding:
        """Return one adapter with identity values, which keeps its active form. Raises SwapError where there is no
        base."""
        return turn_off(spec, adapter)

    def set_active(self, adapters: ActiveChoice, modules: ModuleChoice = None) -> None:
        """Let these adapters of the program act, by name, and no others; a dict also says how strongly each acts.

        A factor multiplies the scale that its adapter was made with (LoRA's alpha / r, and its like). The last call
        counts, so that 0.5 twice is 0.5, and 1 gives back, to the bit, what the adapter was made with. 0 takes away all
        that is added to a weight. What an adapter trains as it is (``modules_to_save``, biases, tokens) has no scale,
        and stays.

        The layers of the adapters that are left out compute what they would without them. These adapters keep their
        tensors and factors.

        ``adaptc.merge`` and ``adaptc.save`` see the factors. ``adaptc.save_adapter`` writes the adapter as it was made,
        and warns. Callables that were bound before, and modules that were made, keep the scale that they have.

        Args:
            adapters: a name, a list of names, or a dict of names and factors. A name without a factor, or with None,
                keeps the factor that it has. An empty list leaves the base. The only adapter of a program is called
                "default" where it was given no name.
            modules: the modules that the factors hold for, None for all; all other modules keep theirs. It is a list of
                names of modules, or of their beginnings or endings ("layers.0" is all of that layer). A single string
                is one of these, or a regular expression for whole names.

        Raises:
            ConfigError: a name is unknown, ``modules`` chooses nothing, or a factor is not a finite number. The same
                for methods without a factor on what they change (IA3, OFT, ...), where PEFT warns or says nothing.
            SwapError: the program has no base.

        Example:
            >>> prog.set_active({"default": 0.5})
            >>> prog.set_active({"default": 1})
        """
        self.update_binding(lambda spec, now: with_active(spec, now, adapters, modules, self.turn_off_adapter))

    def set_scale(self, scale: float, adapter: str | None = None, modules: ModuleChoice = None) -> None:
        """Multiply the scale that one adapter was made with, whether it acts or not. Deprecated: use
        :meth:`set_active`."""
        warn_renamed("program.set_scale", "program.set_active({name: factor}, modules=...)")
        self.update_binding(lambda spec, now: scale_adapter(spec, now, scale, adapter, modules))

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
        return overriding(self, Override(is_disabled=True))

    def scaled(self, scale: float | Mapping[str, float | None]) -> AbstractContextManager[None]:
        """Run the block with other scales, for the calls that :meth:`disabled` would turn to the base.

        A program remembers the last few of these scales, each with its hoisted values.

        Args:
            scale: a factor, which multiplies all scales that hold when a call begins. Or a dict of names and factors:
                calls compute what they would after :meth:`set_active` with it. Numbers of nested blocks multiply; of
                dicts the innermost counts.

        Returns:
            a context manager.

        Raises:
            ConfigError: a factor is not a finite number, a name is unknown, or no method has a scale.

        Example:
            >>> with prog.scaled(0.5):
            ...     prog(x).shape
            torch.Size([2, 3])
        """
        return scaling(self, scale, self.turn_off_adapter)

    # -- the verbs of PEFT and diffusers -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let these adapters act, by name, and no others, as PEFT's ``set_adapter`` does; see :meth:`set_active`.

        Unlike PEFT's, it does not change which tensors require gradients.

        Args:
            adapter_name: a name or a list of names.
        """
        self.set_active(adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
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


class ScalableProgram(ProgramCore, AdapterScales):
    """A program whose adapters can be scaled, turned on and off, added and deleted."""

    def disabled(self) -> AbstractContextManager[None]:
        """Run the block with calls that compute the base; see :meth:`AdapterScales.disabled`.

        Returns:
            a context manager.

        Raises:
            MergeError: the adapter is merged into the weights.
        """
        if self.merge_report is not None:
            raise MergeError(
                "the adapter is merged into the weights, so calls cannot leave it out: adaptc.unmerge(program) gives "
                "the program that it was merged from, and that one's disabled() calls compute the base"
            )
        return super().disabled()

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
        self.update_binding(lambda spec, now: without_adapter(spec, now, name))

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

    def update_binding(self, change: Callable[[BindingSpec, Binding], Binding]) -> None:
        """Install ``change`` of the current binding. It is made again where another thread installed a binding
        meanwhile."""
        old, new = None, None
        while old is None or new is None or not self.compare_and_swap(old, new):
            old = self.binding
            with outside_modes():
                new = self.binding_plans.remember_fitting(change(self.spec(), old))


def weighted_adapters(names: str | Sequence[str], weights: float | Sequence[float | None] | None) -> dict[str, float]:
    """Return name -> factor. ``weights``: a number for all ``names``, or one for each; None stands for 1 in both.

    Raises ConfigError where there are not as many weights as names, or a name is given twice.
    """
    given: Any = names  # callers may give anything
    if not isinstance(given, Iterable):
        raise ConfigError(f"adapter_names={short_repr(names)} must be a name or a list of names")
    names = [names] if isinstance(names, str) else list(names)
    if not isinstance(weights, Sequence):
        weights = [1.0 if weights is None else weights] * len(names)
    if len(weights) != len(names):
        raise ConfigError(
            f"there are {len(names)} adapter names and {len(weights)} adapter_weights: give one for each name"
        )
    if len({*names}) < len(names):
        raise ConfigError(f"an adapter is named twice: {listing(names)}; give each name once, with its weight")
    return dict(zip(names, [1.0 if w is None else w for w in weights], strict=True))
