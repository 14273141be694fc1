"""Settings that every test runs under: one thread per process, no network, and which of the tests run.

``--full`` runs all of them with more examples of each property; without it ``tests.support.cover`` chooses, and
``--long`` runs what takes long of those, where else the others run. Nothing here is about adaptc itself, so that a test
can be read without it.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

# Before transformers and huggingface_hub are imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Equal computations are compared bit for bit, and MKL's products otherwise depend on where in memory a tensor lies.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Processes that tests start compute as they do themselves: with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# inductor would start a pool of compiler processes in each of the test processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nothing is measured, and what is computed does not depend on the machine.
os.environ.setdefault("ADAPTC_PRODUCTS", "plain")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.fx import config as fx_config

from tests.support.cover import EXAMPLES, cover, parse_part, part

# Tests run in several processes, so more threads in each only get in one another's way.
torch.set_num_threads(1)
# The line of the model that each node came from takes a tenth of an export; tests that read it switch it on.
fx_config.do_not_emit_stack_traces = True

# Tracing and exporting take seconds when first called, so a deadline or the slow-input check would fail at random.
settings.register_profile(
    "full",
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("quick", parent=settings.get_profile("full"), max_examples=EXAMPLES * 3 // 10)
settings.register_profile("thorough", parent=settings.get_profile("full"), max_examples=EXAMPLES * 15)


#: tells pytest in processes that tests start
FULL = "ADAPTC_FULL_TESTS"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        default=os.environ.get(FULL) == "1",
        help="every combination of parameters, and the slow lanes",
    )
    parser.addoption("--long", action="store_true", help="tests with the marker long, and nothing else")
    parser.addoption("--part", type=parse_part, metavar="K/N", help="of these the K-th of N parts, by their files")


def pytest_configure(config: pytest.Config) -> None:
    default = "quick"
    if config.getoption("--full"):
        default, os.environ[FULL] = "full", "1"
    settings.load_profile(os.environ.setdefault("HYPOTHESIS_PROFILE", default))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("::" in str(a) for a in config.args):
        return
    if not config.getoption("--full"):
        long = config.getoption("--long")
        marked = [item.get_closest_marker("long") is not None for item in items]
        _keep(config, items, [kept and m == long for m, kept in zip(marked, cover(items), strict=True)])
    if chosen := config.getoption("--part"):
        _keep(config, items, part(items, *chosen))


def _keep(config: pytest.Config, items: list[pytest.Item], keep: list[bool]) -> None:
    config.hook.pytest_deselected(items=[i for i, kept in zip(items, keep, strict=True) if not kept])
    items[:] = [i for i, kept in zip(items, keep, strict=True) if kept]


def pytest_collection_finish() -> None:
    # A full collection takes most of a second to look through what torch and the tests are made of, for nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's and Python's generators, so that what a test draws does not depend on the tests before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def stack_traces() -> Iterator[None]:
    """Keep the line of the model that each node came from, for modules that ask for it with ``usefixtures``."""
    fx_config.do_not_emit_stack_traces = False
    yield
    fx_config.do_not_emit_stack_traces = True


@pytest.fixture(scope="module")
def no_progress_bars() -> Iterator[None]:
    """Switch off transformers' progress bars, for modules that ask for it with ``usefixtures``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
