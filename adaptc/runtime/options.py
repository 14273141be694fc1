"""How a program runs: options that change no value beyond rounding. They are checked whenever they are set."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adaptc.errors import BackendError, ConfigError, shown

BACKENDS = ("eager", "inductor")
#: what ``pack`` may be -> the type of the weights that are packed
PACKS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunOptions:
    """See the properties of ``AdaptedProgram`` for what they mean. Raises BackendError for a backend that does not
    exist, ConfigError for any other value without a meaning."""

    backend: str = "eager"
    hoist_limit: int | None = None
    #: a set names the weights that may be moved
    fuse: bool | frozenset[str] = True
    kernels: bool | None = None
    #: of modules to train
    checkpoint: int | Literal["auto"] | None = None
    #: the type of the weights that calls may read packed copies of
    pack: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise BackendError(f"unknown backend {shown(self.backend)}; choose one of {', '.join(BACKENDS)}")
        check_limit(self.hoist_limit)
        if not isinstance(self.fuse, bool):
            names = self.fuse if isinstance(self.fuse, Collection) and not isinstance(self.fuse, str) else [None]
            if not all(isinstance(n, str) for n in names):
                raise ConfigError(f"fuse={shown(self.fuse)} is neither True nor False, nor a set of names of weights")
            object.__setattr__(self, "fuse", frozenset(self.fuse))
        if self.kernels is not None and not isinstance(self.kernels, bool):
            raise ConfigError(f"kernels={shown(self.kernels)} must be True, False or None (where the base is on a GPU)")
        object.__setattr__(self, "checkpoint", blocks_at_a_time(self.checkpoint))
        if self.pack is not None and (not isinstance(self.pack, str) or self.pack not in PACKS):
            raise ConfigError(f"pack={shown(self.pack)} is not one of {', '.join(PACKS)}, or None")
        if self.pack is not None and self.backend != "eager":
            raise BackendError(
                f"pack={self.pack!r} is for backend='eager': code for a compiler reads weights as they lie"
            )


def blocks_at_a_time(value: Any, name: str = "checkpoint") -> int | Literal["auto"] | None:
    """How many repeated blocks are computed again at a time: "auto" for True, None for False. Raises ConfigError for
    what is neither of these nor a number from 1."""
    if value is None or value is False:
        return None
    if value is True or (isinstance(value, str) and value == "auto"):
        return "auto"
    if isinstance(value, int) and value > 0:
        return value
    raise ConfigError(
        f'{name}={shown(value)} is no number of blocks from 1; give "auto" for one at a time, or None to keep all'
    )


def check_limit(value: Any, name: str = "hoist_limit") -> None:
    """Raises ConfigError for what is no limit."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(
            f"{name}={shown(value)} is no number of bytes; give None for no limit, or 0 for no memory at all"
        )
