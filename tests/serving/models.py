"""Tiny models that serve, and what each request must get by itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

import adaptc
from tests.generation.models import case, generated, generator
from tests.support.families import VOCAB

#: the sizes of a pool of 192 positions, and batches in which long prompts are read in chunks
SIZES = {"max_batch_tokens": 16, "num_blocks": 48, "page_size": 4}


@cache
def serving(family: str = "llama", backend: str = "eager") -> Any:
    """One that the tests of a process share, with the adapters "first" and "second" in its bank."""
    found = case(family)
    return adaptc.compile_for_serving(
        found.model, found.adapters["first"], adapters=found.adapters, backend=backend, **SIZES
    )


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def greedy(serving: Any, new: int = 7, **options: Any) -> Any:
    """A generation config of greedy tokens that end nowhere."""
    made = copy.deepcopy(serving.generation_config)
    made.update(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **options)
    return made


def served(serving: Any, texts: Sequence[Sequence[int]], adapters: Any, new: int = 7, **batching: Any) -> list[Any]:
    """The outputs of all requests at once, in their order."""
    options = {"page_size": 4, "num_blocks": 48, "max_batch_tokens": 16, **batching}
    out = serving.generate_batch(
        texts,
        adapters=adapters,
        generation_config=greedy(serving, new),
        continuous_batching_config=ContinuousBatchingConfig(**options),
    )
    return [*out.values()]


def expected_tokens(family: str, text: Sequence[int], adapter: Any, new: int = 7) -> list[int]:
    """What a request gets by itself: from PEFT for one adapter or none, from a bank of prompts for a mix."""
    ids = torch.tensor([[*text]])
    if isinstance(adapter, dict):
        found: Tensor = generated(_bank(family), ids, new=new, adapters=[adapter])
    else:
        found = case(family).expected(adapter, ids, new=new)
    return found[0, len(text) :].tolist()


@cache
def _bank(family: str) -> Any:
    return generator(family).bank(case(family).adapters)


@contextmanager
def running(serving: Any, new: int = 7, **batching: Any) -> Iterator[Any]:
    """A manager that runs, and is stopped afterwards."""
    options = {"page_size": 4, "num_blocks": 48, "max_batch_tokens": 16, **batching}
    manager = serving.init_continuous_batching(greedy(serving, new), ContinuousBatchingConfig(**options))
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, timeout=30)
        manager.destroy()


def results(manager: Any, ids: Sequence[str], seconds: float = 60) -> dict[str, Any]:
    """The finished outputs of requests, by their ids. Fails where they do not end."""
    import time

    found: dict[str, Any] = {}
    end = time.monotonic() + seconds
    while not {*ids} <= found.keys():
        assert time.monotonic() < end, f"requests {sorted({*ids} - found.keys())} do not end"
        out = manager.get_result(timeout=0.2)
        if out is not None and out.is_finished():
            found[out.request_id] = out
        assert out is not None or manager.is_running(), manager.background_thread_status.fatal_error
    return found


def free_blocks(manager: Any) -> bool:
    """Whether no request has a block of the pool."""
    return all(not a.block_table for a in manager.batch_processor.cache.cache_allocators.values())
