"""Define the options of how a program runs, which change no value beyond rounding. Setting one checks it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adaptc.errors import BackendError, ConfigError, short_repr

BACKENDS = ("eager", "inductor")
#: value of ``pack`` -> the dtype of the weights that are packed
PACK_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunOptions:
    """The options of a run; the properties of ``AdaptedProgram`` say what they mean.

    Raises BackendError for a backend that does not exist and for ``pack`` with inductor. Raises ConfigError for any
    other value without a meaning.
    """

    backend: str = "eager"
    hoist_limit: int | None = None
    #: whether siblings may share matmuls; a set of FQNs names the weights that may be moved for that
    fuse: bool | frozenset[str] = True
    kernels: bool | None = None
    #: how many repeated blocks of a module to train are recomputed at a time, "auto" for one; None keeps activations
    checkpoint: int | Literal["auto"] | None = None
    #: the dtype of the weights that calls may read packed copies of, a key of :data:`PACK_DTYPES`; None packs none
    pack: str | None = None
    #: free sizes of the program: calls in which all of them are 1 run compiled code of their own
    single_sizes: frozenset[str] = frozenset()
    #: whether calls on a GPU are recorded as CUDA graphs
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise BackendError(f"unknown backend {short_repr(self.backend)}; choose one of {', '.join(BACKENDS)}")
        check_byte_limit(self.hoist_limit)
        if not isinstance(self.fuse, bool):
            names = self.fuse if isinstance(self.fuse, Collection) and not isinstance(self.fuse, str) else [None]
            if not all(isinstance(n, str) for n in names):
                raise ConfigError(
                    f"fuse={short_repr(self.fuse)} is neither True nor False, nor a set of names of weights"
                )
            object.__setattr__(self, "fuse", frozenset(self.fuse))
        if self.kernels is not None and not isinstance(self.kernels, bool):
            raise ConfigError(
                f"kernels={short_repr(self.kernels)} must be True, False or None (where the base is on a GPU)"
            )
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs={short_repr(self.cuda_graphs)} must be True or False")
        object.__setattr__(self, "checkpoint", checkpoint_blocks(self.checkpoint))
        if self.pack is not None and (not isinstance(self.pack, str) or self.pack not in PACK_DTYPES):
            raise ConfigError(f"pack={short_repr(self.pack)} is not one of {', '.join(PACK_DTYPES)}, or None")
        if self.pack is not None and self.backend != "eager":
            raise BackendError(
                f"pack={self.pack!r} is for backend='eager': code for a compiler reads weights as they lie"
            )


def checkpoint_blocks(value: Any, name: str = "checkpoint") -> int | Literal["auto"] | None:
    """Return how many repeated blocks are recomputed at a time: "auto" for True, None for False.

    Raises ConfigError for any other value that is no whole number from 1. ``name`` is the option, for messages.
    """
    if value is None or value is False:
        return None
    if value is True or (isinstance(value, str) and value == "auto"):
        return "auto"
    if isinstance(value, int) and value > 0:
        return value
    raise ConfigError(
        f'{name}={short_repr(value)} is no number of blocks from 1; give "auto" for one at a time, or None to keep all'
    )


def check_byte_limit(value: Any, name: str = "hoist_limit") -> None:
    """Raise ConfigError where ``value`` is neither None (no limit) nor a number of bytes from 0."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(
            f"{name}={short_repr(value)} is no number of bytes; give None for no limit, or 0 for no memory at all"
        )
