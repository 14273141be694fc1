"""The kinds of banks: of a program and of its package, that is called, that generates, and that has an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.generation import test_bank_virtual_tokens as prompts
from tests.generation.models import case, generated, generator, prompt
from tests.generation.packaged import tokenizer
from tests.generation.test_encoder_decoders import said

ROWS: list[Any] = ["first", None, "second", {"first": 0.6, "second": -0.4}]
ALL = slice(None)
#: adapters that the packages have room for, and their largest rank
CAPACITY, ROOM = 3, 5
#: Tiny models say one token again and again, whatever the adapter; without that, each token tells the order of many.
FRESH_TOKENS = {"no_repeat_ngram_size": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@dataclass(frozen=True, eq=False)
class Kind:
    """A program or a generator ``source``, the two adapters of its banks, and how ``run(callable, rows)`` asks it.

    ``run`` gives one result for each of the four shared inputs, or for those in the slice ``rows``. A generator takes
    options of ``generate`` beside it, and another ``length`` and ``padding`` of its prompts.
    """

    way: str
    source: Any
    adapters: dict[str, Any]
    run: Callable[..., list[Tensor]]
    is_packaged: bool

    def bank(self, **options: Any) -> Any:
        if self.is_packaged:
            return adaptc.load_package(package_of(self))
        return self.source.bank(self.adapters, **{"capacity": CAPACITY, **options})

    def rows(self, bank: Any, names: list[Any] | None, rows: slice = ALL, **how: Any) -> list[Tensor]:
        return self.run(lambda **given: of_bank(bank, names, given), rows, **how)

    def alone(self, name: str | None, rows: slice = ALL, **how: Any) -> list[Tensor]:
        """What each row gets by a program with this adapter alone."""
        return self.of_one(self.source.base if name is None else self.source.bind(self.adapters[name]), rows, **how)

    def of_one(self, one: Any, rows: slice = ALL, **how: Any) -> list[Tensor]:
        return self.run(lambda **given: of_bank(one, None, given), rows, **how)


def of_bank(bank: Any, names: list[Any] | None, given: dict[str, Any]) -> Any:
    """What a bank, or something bound, gives: it is called, or generates where the inputs are those of generating."""
    more = {} if names is None else {"adapters": names}
    return bank.generate(**given, **more) if "max_new_tokens" in given else bank(**given, **more)


@cache
def _package_of(way: str) -> Path:
    kind, options = made_kind(way, False), {} if way == "call" else {"tokenizer": tokenizer()}
    return adaptc.package(kind.bank(), Path(mkdtemp()) / "bank.pt2", capacity=CAPACITY, max_rank=ROOM, **options)


def package_of(kind: Kind) -> Path:
    """The package of the kind's bank, which all tests of a process share."""
    return _package_of(kind.way)


@cache
def mixed_adapter(kind: Kind, first: float, second: float, rank: int | None = None) -> Path:
    """An adapter that is a sum of the two of a kind: exact, or cut to a rank."""
    pairs = [(kind.adapters["first"], first), (kind.adapters["second"], second)]
    cut: dict[str, Any] = {"method": "cat"} if rank is None else {"method": "svd", "svd_rank": rank}
    return Path(adaptc.save_adapter(adaptc.combine(pairs, **cut), Path(mkdtemp()) / "mixed"))


def third_adapter(kind: Kind) -> Path:
    """An adapter of a rank that none of the kind's two has."""
    return mixed_adapter(kind, 0.8, -0.7, 4)


def config(rank: int) -> adaptc.LoraConfig:
    return adaptc.LoraConfig(r=rank, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=False)


def tensors(rank: int) -> dict[str, Tensor]:
    """An adapter of the net that its rank seeds, with PEFT's keys."""
    g = torch.Generator().manual_seed(rank)
    sizes = {"up": (7, 13), "down": (13, 5)}
    a = {f"{n}.lora_A.weight": torch.randn(rank, i, generator=g) for n, (i, _) in sizes.items()}
    return a | {f"{n}.lora_B.weight": torch.randn(o, rank, generator=g) for n, (_, o) in sizes.items()}


@cache
def net() -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = adaptc.compile(Net().eval(), config(3), example_inputs=torch.randn(3, 4, 7))
    folder, adapters = Path(mkdtemp()), {}
    for name, rank in (("first", 3), ("second", 5)):
        adaptc.swap(program, tensors(rank), config=config(rank))
        adapters[name] = adaptc.save_adapter(program, folder / name)
    return program, adapters


def call(model: Callable[..., Any], rows: slice = ALL) -> list[Tensor]:
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(model(x=x[rows]))


class Generates:
    """A generator or a bank as the helpers of tests/generation call it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.generate = run


def _prompts(rows: slice, length: int, padding: tuple[int, ...]) -> dict[str, Tensor]:
    return {k: t[rows] for k, t in prompt(4, length, padding, seed=length).items()}


def write(
    model: Callable[..., Any], rows: slice = ALL, length: int = 6, padding: tuple[int, ...] = (0, 2), **how: Any
) -> list[Tensor]:
    given = _prompts(rows, length, padding)
    out = generated(Generates(model), given, **{**FRESH_TOKENS, "new": 4, **how})
    return list(out.unflatten(0, (len(given["input_ids"]), -1)))


def answer(
    model: Callable[..., Any], rows: slice = ALL, length: int = 6, padding: tuple[int, ...] = (0, 2), **how: Any
) -> list[Tensor]:
    given = _prompts(rows, length, padding)
    out = said(Generates(model), given, **{**FRESH_TOKENS, "new": 4, "eos_token_id": None, **how})
    return list(out.unflatten(0, (len(given["input_ids"]), -1)))


@cache
def made_kind(way: str, packaged: bool) -> Kind:
    if way == "call":
        return Kind(way, *net(), call, packaged)
    if way == "virtual tokens":
        adapters = {n: prompts.oracle("llama", prompts.PROMPT, k).path for n, k in (("first", 7), ("second", 2))}
        return Kind(way, prompts.generator("llama", prompts.PROMPT), adapters, write, packaged)
    family = "llama" if way == "generate" else "t5"
    run = write if way == "generate" else answer
    return Kind(way, generator(family), dict(case(family).adapters), run, packaged)


WAYS = ("call", "generate", "encoder-decoder")


def kinds(*ways: str, packaged: tuple[bool, ...] = (False, True)) -> Any:
    """The marker of a test with a parameter ``kind``: banks that are asked in these ways. Compiling the package of one
    that generates takes long; behind virtual tokens there is none."""
    points = [(w, p) for w in ways for p in packaged if not (p and w == "virtual tokens")]
    params = [
        pytest.param((w, p), id=f"{w}-{'package' if p else 'program'}", marks=[pytest.mark.long] * (p and w != "call"))
        for w, p in points
    ]
    return pytest.mark.parametrize("kind", params, indirect=True)


every_kind = kinds(*WAYS)
generating_kinds = kinds(*WAYS[1:])


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Each row is as expected: numbers but for rounding, tokens exactly."""
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=2e-5)


def chosen(kind: Kind, *names: str | None, **how: Any) -> list[Tensor]:
    """What rows with these adapters get by programs with one adapter."""
    return [kind.alone(name, **how)[row] for row, name in enumerate(names)]
