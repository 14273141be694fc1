"""PEFT's AdaMSS where scikit-learn is not installed, which PEFT needs for it.

PEFT then gets the clusters of rows from adaptc's own function, whose tests have clusters of scikit-learn's.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from adaptc.methods.sparse.row_clusters import cluster_rows

HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None


class KMeans:
    """scikit-learn's class, as far as PEFT calls it."""

    def __init__(self, n_clusters: int, init: str, n_init: int, max_iter: int, random_state: int) -> None:
        assert (init, n_init, random_state) == ("random", 1, 123456789)
        self.count, self.steps = n_clusters, max_iter

    def fit_predict(self, rows: Any) -> Any:
        return cluster_rows(torch.from_numpy(rows), self.count, self.steps).numpy()


@pytest.fixture
def clusters_for_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_SKLEARN:
        return
    package, cluster = ModuleType("sklearn"), ModuleType("sklearn.cluster")
    package.__spec__, cluster.__spec__ = ModuleSpec("sklearn", None), ModuleSpec("sklearn.cluster", None)
    vars(package).update(cluster=cluster)
    vars(cluster).update(KMeans=KMeans)
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)
