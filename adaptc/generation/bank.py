"""Generation in which each prompt has adapters of its own.

Before: a step program with adapter sites, and adapters that fit. After: ``generate(..., adapters=[...])``, with one
entry for each prompt, which its beams and samples keep to the end. What a prompt gets is what it gets alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache import StepCache
from adaptc.program.bank import Bank
from adaptc.program.bound import Keeping
from adaptc.program.core import ProgramCore
from adaptc.program.divided_bank import DividedBank
from adaptc.rows.assignment import mixes_of
from adaptc.rows.report import BankReport


class GeneratorBank:
    """Made by :meth:`Generator.bank`; what is said of adapters in :class:`adaptc.program.bank.Bank` holds here."""

    def __init__(self, generator: Any, bank: Any) -> None:
        self._generator = generator
        #: the bank of the step program: a :class:`Bank`, or the package of one
        self.bank = bank

    def assigned(self, adapters: Any) -> Any:
        """A generator that keeps an assignment, with an entry for each prompt."""
        return self._made(self.bank.assigned(adapters))

    def carried(self, tokenizer: Any) -> dict[str, bytes]:
        """As :meth:`Generator.carried`."""
        return self._generator.carried(tokenizer)

    @property
    def tokenizer(self) -> Any:
        """As :attr:`Generator.tokenizer`."""
        return self._generator.tokenizer

    def _made(self, runs: Keeping) -> Any:
        return self._generator.with_runs(runs)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *, adapters: Any = ..., **kwargs: Any
    ) -> Any:
        """As :meth:`Generator.generate`. ``adapters``: for each prompt a name, None for the base, or a dict of names
        and weights. Raises AdaptcError for another number of entries than prompts, and as the bank does."""
        prompts = inputs
        for name in (self._generator.main_input_name, "inputs_embeds"):
            prompts = kwargs.get(name) if prompts is None else prompts
        check_count(adapters, prompts)
        return self.assigned(adapters).generate(inputs, generation_config, **kwargs)

    def prefill(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> StepCache:
        """As :meth:`Generator.prefill`, each row with its own adapters."""
        given = (kwargs.get(name) for name in (self._generator.main_input_name, "inputs"))
        check_count(adapters, args[0] if args else next((t for t in given if t is not None), None))
        return self.assigned(adapters).prefill(*args, **kwargs)

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        self.bank.add(name, adapter, **options)

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        self.bank.replace(name, adapter, **options)

    def remove(self, name: str) -> None:
        self.bank.remove(name)

    def warm(self, adapters: int | None = None) -> None:
        """As :meth:`Bank.warm`. A package is compiled as it is."""
        self.bank.warm(adapters)

    def report(self) -> BankReport:
        return self.bank.report()

    @property
    def capacity(self) -> int | None:
        """As :attr:`Bank.capacity`."""
        return self.bank.capacity

    @property
    def adapters(self) -> Mapping[str, Any]:
        """The adapters by name, as they are now."""
        return self.bank.adapters

    @property
    def nbytes(self) -> int:
        """As :attr:`Bank.nbytes`."""
        return self.bank.nbytes

    @property
    def held(self) -> int:
        """As :attr:`Bank.held`."""
        return self.bank.held

    def __getitem__(self, name: str) -> Any:
        """As of :class:`Bank`."""
        return self.bank[name]

    def __contains__(self, name: object) -> bool:
        return name in self.bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.bank)

    def __len__(self) -> int:
        return len(self.bank)

    def __copy__(self) -> Self:
        """As of :class:`Bank`: adapters go and come in each alone."""
        return type(self)(self._generator, copy.copy(self.bank))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self._generator, memo), copy.deepcopy(self.bank, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.bank.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"generates with {self.bank!r}"


def check_count(adapters: Any, prompts: Any) -> None:
    """Raises AdaptcError where there are not as many entries as prompts, before any adapter is loaded for them."""
    count = len(mixes_of(adapters))
    if isinstance(prompts, Tensor) and prompts.ndim and prompts.shape[0] != count:
        raise AdaptcError(
            f"adapters has {count} entries, and there are {prompts.shape[0]} prompts: give one for each, None for the "
            "base"
        )


def bank_of(generator: Any, adapters: Mapping[str, Any] | None, limits: Mapping[str, Any]) -> GeneratorBank:
    """Of what generates with a program. Raises ConfigError for a package, which was made for one adapter at a time."""
    program, parts, probes = generator.program, generator.divided(), generator.probes()
    if not isinstance(program, ProgramCore):
        raise ConfigError(
            "this package has room for one adapter at a time: package a bank instead, with "
            "adaptc.package(gen.bank({...}), path)"
        )
    if parts is None:
        return GeneratorBank(generator, Bank(program, adapters, probes=probes, **limits))
    return GeneratorBank(generator, DividedBank(program, parts, adapters, probes=probes, **limits))
