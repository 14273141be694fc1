"""Generate with different adapters for each prompt of a batch.

``generate(..., adapters=[...])`` takes one entry for each prompt. All beams and samples of a prompt keep its entry to
the end. Each prompt gets the tokens that it would get alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from adaptc.bank.bank import Bank
from adaptc.bank.bank_report import BankReport
from adaptc.bank.divided_bank import BankWithParts
from adaptc.bank.row_adapters import parse_row_adapters
from adaptc.errors import AdaptcError, ConfigError
from adaptc.generation.cache.step_cache import StepCache
from adaptc.state.bound import PinnedRunner
from adaptc.state.core import ProgramCore


class GeneratorBank:
    """A generator over a bank of adapters, made by :meth:`Generator.bank`.

    Names, mixes and limits of adapters are as for :class:`adaptc.bank.bank.Bank`.
    """

    def __init__(self, generator: Any, bank: Any) -> None:
        self._generator = generator
        #: the :class:`Bank` of the step program, or a packaged bank
        self.bank = bank

    def assigned(self, adapters: Any) -> Any:
        """Return a generator that keeps the selection ``adapters``, with an entry for each prompt."""
        return self._with_runner(self.bank.assigned(adapters))

    def package_files(self, tokenizer: Any) -> dict[str, bytes]:
        """Return the files that a package carries beside its code, by path. Raises ConfigError for a tokenizer that
        does not fit."""
        return self._generator.package_files(tokenizer)

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the package; None where there is none."""
        return self._generator.tokenizer

    def _with_runner(self, runner: PinnedRunner) -> Any:
        return self._generator.with_runner(runner)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *, adapters: Any = ..., **kwargs: Any
    ) -> Any:
        """Generate with adapters of its own for each prompt; all other arguments are those of
        :meth:`Generator.generate`.

        ``adapters`` has an entry for each prompt: a name, None for the base, or a dict of names and weights. Raises
        AdaptcError where the number of entries is not that of the prompts, and as the bank does.
        """
        prompts = inputs
        for name in (self._generator.main_input_name, "inputs_embeds"):
            prompts = kwargs.get(name) if prompts is None else prompts
        check_entry_count(adapters, prompts)
        return self.assigned(adapters).generate(inputs, generation_config, **kwargs)

    def prefill(self, *args: Any, adapters: Any = ..., **kwargs: Any) -> StepCache:
        """Return the cache of a batch of prompts, each read with its own ``adapters``; see :meth:`Generator.prefill`.

        Raises AdaptcError where the number of entries is not that of the prompts.
        """
        given = (kwargs.get(name) for name in (self._generator.main_input_name, "inputs"))
        check_entry_count(adapters, args[0] if args else next((t for t in given if t is not None), None))
        return self.assigned(adapters).prefill(*args, **kwargs)

    def add(self, name: str, adapter: Any, **options: Any) -> None:
        self.bank.add(name, adapter, **options)

    def replace(self, name: str, adapter: Any, **options: Any) -> None:
        self.bank.replace(name, adapter, **options)

    def remove(self, name: str) -> None:
        self.bank.remove(name)

    def warm(self, adapters: int | None = None) -> None:
        """Compile the code for up to ``adapters`` adapters in advance; see :meth:`Bank.warm`. A package is compiled
        already."""
        self.bank.warm(adapters)

    def report(self) -> BankReport:
        return self.bank.report()

    @property
    def capacity(self) -> int | None:
        """Return how many adapters the bank may hold; None for any number."""
        return self.bank.capacity

    @property
    def adapters(self) -> Mapping[str, Any]:
        """Return the adapters that the bank holds now, by name."""
        return self.bank.adapters

    @property
    def nbytes(self) -> int:
        """Return the bytes of all adapters; tensors that several share count once."""
        return self.bank.nbytes

    @property
    def held(self) -> int:
        """Return the bytes of the stacks of adapters that the bank keeps for its next calls."""
        return self.bank.held

    def __getitem__(self, name: str) -> Any:
        """Return the adapter called ``name``, bound to the program. Raises KeyError where there is none."""
        return self.bank[name]

    def __contains__(self, name: object) -> bool:
        return name in self.bank

    def __iter__(self) -> Iterator[str]:
        return iter(self.bank)

    def __len__(self) -> int:
        return len(self.bank)

    def __copy__(self) -> Self:
        """Return a bank with the same adapters; adding or removing one affects only the bank it is done on."""
        return type(self)(self._generator, copy.copy(self.bank))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self._generator, memo), copy.deepcopy(self.bank, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.bank.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"generates with {self.bank!r}"


def check_entry_count(adapters: Any, prompts: Any) -> None:
    """Raise AdaptcError where there are not as many entries as prompts, before any adapter is loaded for them."""
    count = len(parse_row_adapters(adapters))
    if isinstance(prompts, Tensor) and prompts.ndim and prompts.shape[0] != count:
        raise AdaptcError(
            f"adapters has {count} entries, and there are {prompts.shape[0]} prompts: give one for each, None for the "
            "base"
        )


def make_bank(generator: Any, adapters: Mapping[str, Any] | None, limits: Mapping[str, Any]) -> GeneratorBank:
    """Return the bank of ``generator``, with ``adapters`` by name and the ``limits`` of :class:`Bank`.

    Raises ConfigError for a package, whose code was compiled for one adapter at a time.
    """
    program, part_outputs, probes = generator.program, generator.part_outputs(), generator.probes()
    if not isinstance(program, ProgramCore):
        raise ConfigError(
            "this package has room for one adapter at a time: package a bank instead, with "
            "adaptc.package(gen.bank({...}), path)"
        )
    if part_outputs is None:
        return GeneratorBank(generator, Bank(program, adapters, probes=probes, **limits))
    return GeneratorBank(generator, BankWithParts(program, part_outputs, adapters, probes=probes, **limits))
