"""The benchmarks of the kernels: which sizes, and for each the candidates that compute the same.

Beside our ops stand the base alone, PEFT's formula as PEFT's layers write it, and that formula under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.kernels.dora_linear import dora_norm
from adaptc.kernels.grouped_lora import cut_into_chunks, grouped_lora, rows_per_chunk
from adaptc.kernels.grouped_rows import grouped_rows
from adaptc.kernels.merge_weight import merge_
from adaptc.kernels.packed_lora import packed_factors, packed_lora_direct, sibling_table
from adaptc.passes.protocol.low_rank_rows import stacked_matmul
from tests.gpu.roofline import Work, adapter_work, length_work, linear_work, lora_work, merge_work, norm_work

Output = Tensor | Sequence[Tensor]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
SCALE = 0.5
BASE, OURS, PEFT, COMPILED = "base alone", "adaptc", "PEFT's formula", "PEFT's formula, compiled"


@dataclass(frozen=True)
class Candidate:
    """``whole``: it computes the adapter too, and so the same as the others."""

    name: str
    run: Callable[[], Output]
    work: Work
    whole: bool = True


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: str
    build: Callable[[], list[Candidate]]


@dataclass(frozen=True)
class Sizes:
    """``fewer_rows``: for the cases of more than one adapter, which take longer to compile.

    ``mixed``: the dtype of adapters that stay wider than their base, as PEFT's do. ``long``: (K, N) of a layer of which
    K is the larger.
    """

    dtype: torch.dtype
    K: int
    rows: tuple[int, ...]
    fewer_rows: tuple[int, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    siblings: dict[str, tuple[int, ...]]
    grouped: int
    adapters: int
    weights: tuple[tuple[int, int], ...]
    mixed: torch.dtype
    long: tuple[int, int]


#: the layers of Llama-3-8B
FULL = Sizes(
    dtype=torch.bfloat16,
    K=4096,
    rows=(1, 8, 16, 512, 4096),
    fewer_rows=(1, 16, 512, 4096),
    ranks=(8, 16, 64),
    widths=(1024, 4096, 14336),
    siblings={"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)},
    grouped=4096,
    adapters=32,
    weights=((4096, 4096), (14336, 4096)),
    mixed=torch.float32,
    long=(14336, 4096),
)

#: the same cases, small enough for a CPU, and exact enough to tell a wrong factor
TINY = Sizes(
    dtype=torch.float32,
    K=48,
    rows=(1, 3, 20),
    fewer_rows=(1, 20),
    ranks=(2, 8),
    widths=(16, 67),
    siblings={"q, k, v": (64, 16, 16), "gate, up": (67, 67)},
    grouped=40,
    adapters=4,
    weights=((24, 48),),
    mixed=torch.float64,
    long=(67, 24),
)


def peft_layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    y = F.linear(x, W)
    return (y + F.linear(F.linear(x.to(A.dtype), A), B) * SCALE).to(y.dtype)


def peft_siblings(x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return [peft_layer(x, *layer) for layer in layers]


def peft_grouped(x: Tensor, W: Tensor, groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    y = F.linear(x, W)
    for rows, A, B in groups:
        y[rows] += F.linear(F.linear(x[rows], A), B) * SCALE
    return y


def peft_norm(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.linalg.norm(W + SCALE * (B @ A), dim=1)


def peft_merge(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    W += (B @ A) * SCALE
    return W


class Maker:
    """Makes the cases of some sizes on a device; ``compiled`` is how PEFT's formula is compiled."""

    def __init__(self, sizes: Sizes, device: torch.device, compiled: Compile) -> None:
        self.sizes, self.device, self.compiled = sizes, device, compiled
        self.bytes = sizes.dtype.itemsize
        self.generator = torch.Generator(device).manual_seed(0)
        self.scale = torch.tensor(SCALE, device=device)

    def random(self, rows: int, cols: int) -> Tensor:
        """Such that a product over ``cols`` is of the size of its other factor."""
        values = torch.randn(rows, cols, generator=self.generator, device=self.device) / cols**0.5
        return values.to(self.sizes.dtype)

    def layer(
        self, rows: int, N: int, rank: int, K: int | None = None, adapter: torch.dtype | None = None
    ) -> list[Candidate]:
        K = K or self.sizes.K
        x, W, A, B = (self.random(*shape) for shape in ((rows, K), (N, K), (rank, K), (N, rank)))
        A, B = (t.to(adapter or t.dtype) for t in (A, B))
        work = linear_work(rows, K, N, self.bytes) + adapter_work(rows, K, N, rank, A.itemsize)
        compiled = self.compiled(peft_layer)
        packed = A, packed_factors([B]), None, self.scale.reshape(1), [N]
        return [
            self._base(x, W),
            Candidate(OURS, lambda: packed_lora_direct(x, W, None, *packed), work),
            Candidate(PEFT, lambda: peft_layer(x, W, A, B), work),
            Candidate(COMPILED, lambda: compiled(x, W, A, B), work),
        ]

    def siblings(self, rows: int, widths: tuple[int, ...], rank: int) -> list[Candidate]:
        K = self.sizes.K
        x, W, A = self.random(rows, K), self.random(sum(widths), K), self.random(rank * len(widths), K)
        Bs = [self.random(N, rank) for N in widths]
        layers = list(zip(W.split(widths), A.split(rank), Bs, strict=True))
        ranks = [rank] * len(widths)
        factors, table = packed_factors(Bs), sibling_table(widths, ranks, self.device)
        scales = torch.full((len(widths),), SCALE, device=self.device)
        work = lora_work(rows, K, widths, rank, self.bytes)
        compiled = self.compiled(peft_siblings)

        def ours() -> Output:
            return packed_lora_direct(x, W, None, A, factors, table, scales, widths).split(widths, 1)

        return [
            self._base(x, W),
            Candidate(OURS, ours, work),
            Candidate(PEFT, lambda: peft_siblings(x, layers), work),
            Candidate(COMPILED, lambda: compiled(x, layers), work),
        ]

    def grouped(self, rows: int, rank: int) -> list[Candidate]:
        K, N, n = self.sizes.K, self.sizes.grouped, self.sizes.adapters
        x, W, A, B = self.random(rows, K), self.random(N, K), self.random(n * rank, K), self.random(n * rank, N)
        index = torch.arange(rows, device=self.device) * 7 % n
        starts = torch.arange(n + 1, device=self.device, dtype=torch.int32) * rank
        chunk, scales = rows_per_chunk(rows), torch.full((n,), SCALE, device=self.device)
        # Layers of one batch share it.
        table = cut_into_chunks(index, n, chunk)
        own = [slice(i * rank, (i + 1) * rank) for i in range(n)]
        used = sorted(set(index.tolist()))
        groups = [((index == i).nonzero()[:, 0], A[own[i]], B[own[i]].T.contiguous()) for i in used]
        work = linear_work(rows, K, N, self.bytes) + adapter_work(rows, K, N, rank, self.bytes, len(used))

        def ours() -> Output:
            return grouped_lora(x, F.linear(x, W), A, B, starts, scales, table, max_rank=rank, chunk=chunk)

        peft = Candidate(PEFT, lambda: peft_grouped(x, W, groups), work)
        found = [self._base(x, W), Candidate(OURS, ours, work), peft]
        if rank == self.sizes.ranks[-2]:
            # For one rank only: a loop over the adapters takes long to compile.
            compiled = self.compiled(peft_grouped)
            found.append(Candidate(COMPILED, lambda: compiled(x, W, groups), work))
        return found

    def bank(self, rows: int, each: int) -> list[Candidate]:
        """Rows of ``each`` positions, every fourth of the base, on four adapters of several ranks."""
        K, N, ranks = self.sizes.K, self.sizes.grouped, (4, 16, 33, 64)
        n, R = len(ranks), max(ranks)
        x, W = self.random(rows * each, K), self.random(N, K)
        A, B = self.random(n * R, K).view(n, R, K), self.random(n * R, N).view(n, R, N).transpose(1, 2)
        for k, rank in enumerate(ranks):
            A[k, rank:] = B[k, :, rank:] = 0
        edges = [place for k, rank in enumerate(ranks) for place in (k * R, k * R + rank)]
        starts = torch.tensor([*edges, n * R], dtype=torch.int32, device=self.device)
        scale = torch.tensor([SCALE, 0.0] * n, device=self.device)
        own = [None if row % 4 == 3 else row * 5 % n for row in range(rows)]
        c = torch.zeros(rows, n, device=self.device)
        groups = []
        for k, rank in enumerate(ranks):
            mine = [row for row, of in enumerate(own) if of == k]
            c[mine, k] = 1
            places = torch.tensor([row * each + i for row in mine for i in range(each)], device=self.device)
            if mine:
                groups.append((places, A[k, :rank], B[k, :, :rank].contiguous()))
        flat = B.contiguous()
        # Of all adapters in use their own factors, and of each row its own rank.
        work = linear_work(rows * each, K, N, self.bytes)
        for places, down, _ in groups:
            work += adapter_work(len(places), K, N, len(down), self.bytes)

        def ours() -> Output:
            return grouped_rows(x, F.linear(x, W), A, B, starts, scale, c)

        def stacked() -> Output:
            return stacked_matmul(x, F.linear(x, W), A, flat, scale[::2], c)

        return [
            self._base(x, W),
            Candidate(OURS, ours, work),
            Candidate("all factors in one product", stacked, work),
            Candidate(PEFT, lambda: peft_grouped(x, W, groups), work),
        ]

    def norm(self, N: int, K: int, rank: int) -> list[Candidate]:
        W, A, B = self.random(N, K), self.random(rank, K), self.random(N, rank)
        work = norm_work(N, K, rank, self.bytes)
        lengths = length_work(N, K, self.bytes)
        compiled = self.compiled(peft_norm)
        return [
            Candidate(BASE, lambda: torch.linalg.vector_norm(W, dim=1, dtype=torch.float32), lengths, whole=False),
            Candidate(OURS, lambda: dora_norm(W, A, B, self.scale), work),
            Candidate(PEFT, lambda: peft_norm(W, A, B), work),
            Candidate(COMPILED, lambda: compiled(W, A, B), work),
        ]

    def merge(self, N: int, K: int, rank: int) -> list[Candidate]:
        W, A, B = self.random(N, K), self.random(rank, K), self.random(N, rank)
        # Each changes a weight of its own, and so begins with the same.
        own = [W.clone() for _ in range(4)]
        work = merge_work(N, K, rank, self.bytes)
        compiled = self.compiled(peft_merge)

        def ours() -> Tensor:
            merge_(own[1], A, B, self.scale)
            return own[1]

        return [
            Candidate("addmm_", lambda: own[0].addmm_(B, A, alpha=SCALE), work),
            Candidate(OURS, ours, work),
            Candidate(PEFT, lambda: peft_merge(own[2], A, B), work),
            Candidate(COMPILED, lambda: compiled(own[3], A, B), work),
        ]

    def _base(self, x: Tensor, W: Tensor) -> Candidate:
        work = linear_work(x.shape[0], W.shape[1], W.shape[0], self.bytes)
        return Candidate(BASE, lambda: F.linear(x, W), work, whole=False)

    def cases(self) -> Iterator[Case]:
        s = self.sizes
        for N in s.widths:
            for M, r in product(s.rows, s.ranks):
                yield Case("lora_linear", f"M={M} K={s.K} N={N} r={r}", lambda M=M, N=N, r=r: self.layer(M, N, r))
        wider, (length, width) = str(s.mixed).removeprefix("torch."), s.long
        for M in s.fewer_rows:
            r, N = s.ranks[-1], s.widths[1]
            yield Case(
                "lora_linear", f"M={M} K={length} N={width} r={r}", lambda M=M, r=r: self.layer(M, width, r, length)
            )
            yield Case(
                "lora_linear", f"{wider} adapter: M={M} K={s.K} N={N} r={r}",
                lambda M=M, r=r, N=N: self.layer(M, N, r, adapter=s.mixed),
            )  # fmt: skip
        for name, widths in s.siblings.items():
            for M, r in product(s.fewer_rows, s.ranks[-2:]):
                shape = f"{name}: M={M} K={s.K} N={'+'.join(map(str, widths))} r={r}"
                yield Case("siblings", shape, lambda M=M, r=r, widths=widths: self.siblings(M, widths, r))
        for M, r in product(s.fewer_rows, s.ranks[-2:]):
            shape = f"{s.adapters} adapters: M={M} K={s.K} N={s.grouped} r={r}"
            yield Case("grouped_lora", shape, lambda M=M, r=r: self.grouped(M, r))
        for M, each in ((8, 1), (8, 64), (64, 1)):
            shape = f"4 adapters of ranks 4 to 64: {M} rows of {each} K={s.K} N={s.grouped}"
            yield Case("grouped_rows", shape, lambda M=M, each=each: self.bank(M, each))
        for kernel, build in (("dora_norm", self.norm), ("merge_", self.merge)):
            for (N, K), r in product(s.weights, s.ranks[-2:]):
                yield Case(kernel, f"{N}x{K} r={r}", lambda b=build, N=N, K=K, r=r: b(N, K, r))
