"""Settings that every test runs under: one thread per process, no network, and small hypothesis runs.

Nothing here is about adaptc itself, so that a test can be read without it.
"""

from __future__ import annotations

import os

# Before transformers and huggingface_hub are imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Equal computations are compared bit for bit, and MKL's products otherwise depend on where in memory a tensor lies.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Processes that tests start compute as they do themselves: with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# inductor would start a pool of compiler processes in each of the test processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# Tests run in several processes, so more threads in each only get in one another's way.
torch.set_num_threads(1)

# Tracing and exporting take seconds when first called, so a deadline or the slow-input check would fail at random.
settings.register_profile(
    "default",
    max_examples=20,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
