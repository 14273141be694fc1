"""Cluster the rows of a matrix by k-means, with the clusters that scikit-learn's ``KMeans`` finds.

AdaMSS needs them, and no file holds them. PEFT calls scikit-learn, with one random start and a fixed seed. Here the
same generator draws the start, and the steps are those of scikit-learn's Lloyd algorithm. Files therefore mean the same
in both. Only a row that is nearly as far from two centres may fall to another one by rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

#: NumPy's types differ from one release to the next
Array = Any

#: the seed of PEFT's call, and scikit-learn's bound on how far centres move in the last step
SEED, TOLERANCE = 123456789, 1e-4


def cluster_rows(matrix: Tensor, count: int, max_steps: int = 10) -> Tensor:
    """Return the cluster of each row of ``matrix`` (rows, n), float32 on the CPU: (rows,), int64.

    ``count``: the number of clusters, at most that of the rows. A cluster may have no row, where rows are equal.
    """
    points: Array = matrix.numpy()
    rows = points.shape[0]
    tolerance = float(np.mean(np.var(points, axis=0))) * TOLERANCE
    points = points - points.mean(axis=0)
    shares = np.ones(rows, np.float32) / np.float32(rows)
    centres = points[np.random.RandomState(SEED).choice(rows, size=count, replace=False, p=shares)]
    labels = np.full(rows, -1)
    for _ in range(max_steps):
        before, labels = labels, _nearest(points, centres)
        new = _means(points, centres, labels)
        moved = float(np.square(new - centres).sum())
        centres = new
        if np.array_equal(labels, before):
            return torch.from_numpy(labels)
        if moved <= tolerance:
            break
    return torch.from_numpy(_nearest(points, centres))


def _nearest(points: Array, centres: Array) -> Array:
    lengths = np.einsum("ij,ij->i", centres, centres)
    return (lengths + np.float32(-2) * (points @ centres.T)).argmin(axis=1)


def _means(points: Array, centres: Array, labels: Array) -> Array:
    """Return the means of the clusters; a cluster without rows takes one of the rows farthest from their centres."""
    count = centres.shape[0]
    sums = np.zeros_like(centres)
    np.add.at(sums, labels, points)
    sizes = np.bincount(labels, minlength=count).astype(np.float32)
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
        distances = np.square(points - centres[labels]).sum(axis=1)
        farthest = np.argpartition(distances, -empty.size)[: -empty.size - 1 : -1]
        for cluster, row in zip(empty, farthest, strict=True):
            old = labels[row]
            sums[old] -= points[row]
            sums[cluster] = points[row]
            sizes[old] -= 1
            sizes[cluster] = 1
    return sums * (1 / np.maximum(sizes, 1))[:, None]
