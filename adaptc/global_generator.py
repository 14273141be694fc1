"""Seed torch's global generator for functions of torch that take no other, such as ``svd_lowrank``, and put it back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextlib import AbstractContextManager

import torch


@contextlib.contextmanager
def seeded_global_generator(seed: int, device: torch.device) -> Generator[None]:
    """Run the block with the global generator of ``device`` seeded, and restore its state after."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every other device as well
            yield
        return
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type):
        with module.device(device):
            module.manual_seed(seed)
        yield


def global_generator_of(generator: torch.Generator | None, device: torch.device) -> AbstractContextManager[None]:
    """Return a block with the global generator of ``device`` seeded from ``generator``; None leaves it as it is."""
    if generator is None:
        return contextlib.nullcontext()
    return seeded_global_generator(int(torch.randint(2**31, (), generator=generator, device=generator.device)), device)
