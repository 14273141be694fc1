"""A bank's rows by grouped kernels, interpreted: the operator against its definition in float64, and whole programs.
See :func:`tests.kernels.run_cases`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc.kernels import grouped_rows, grouped_rows_in_place
from adaptc.kernels._launch import INTERPRETED, runs_kernels
from adaptc.passes.protocol.bank_method import RANK_STARTS
from tests.kernels.grouped_lora_cases import ROUNDING, bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fewer = settings(max_examples=settings().max_examples // 2)


@dataclass(frozen=True)
class Case:
    x: Tensor
    y: Tensor
    A: Tensor
    B: Tensor
    starts: Tensor
    scale: Tensor
    c: Tensor

    def run(self) -> Tensor:
        return grouped_rows(self.x, self.y, self.A, self.B, self.starts, self.scale, self.c)


def make_case(
    ranks: list[int],
    mixes: list[dict[int, float]],
    each: tuple[int, ...] = (3,),
    K: int = 7,
    N: int = 5,
    of: torch.dtype = torch.float32,
    adapters: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """``each``: positions of a row. What fills the smaller ranks up is NaN, which nothing may read."""
    g = torch.Generator().manual_seed(len(mixes) + sum(ranks))

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    count, R, rows = len(ranks), max(ranks), len(mixes)
    A, B = random(count, R, K, dtype=adapters), random(count, R, N, dtype=adapters)
    for k, rank in enumerate(ranks):
        A[k, rank:] = B[k, rank:] = torch.nan
    edges = [place for k, rank in enumerate(ranks) for place in (k * R, k * R + rank)]
    starts = torch.tensor([*edges, count * R], dtype=torch.int32)
    scale = torch.stack([random(count, dtype=torch.float32), torch.zeros(count)], 1).flatten()
    c = torch.zeros(rows, count)
    for row, mix in enumerate(mixes):
        for k, weight in mix.items():
            c[row, k] = weight
    first, *rest = each
    x, y = random(rows * first, *rest, K, dtype=of), random(rows * first, *rest, N, dtype=of)
    x, y, A, B, starts, scale, c = (t.to(device) for t in (x, y, A, B, starts, scale, c))
    return Case(x, y, A, B.transpose(1, 2), starts, scale, c)


def check(case: Case) -> None:
    """Rows of adapters are close to the definition in float64, and those of the base the same bit by bit."""
    out = case.run()
    assert (out.dtype, out.shape) == (case.y.dtype, case.y.shape)
    rows, count = case.c.shape
    each, ranks = case.x.shape[0] // rows if rows else 0, torch.diff(case.starts)[::2].tolist()
    for row in range(rows):
        own = slice(row * each, (row + 1) * each)
        exact, size = case.y[own].double(), case.y[own].double().abs()
        for k in range(count):
            weight = float(case.c[row, k]) * float(case.scale[2 * k])
            A, B = case.A[k, : ranks[k]].double(), case.B[k, :, : ranks[k]].double()
            if float(case.c[row, k]):
                exact = exact + weight * (case.x[own].double() @ A.T) @ B.T
                size = size + abs(weight) * (case.x[own].double().abs() @ A.abs().T) @ B.abs().T
        if not any(ranks[k] for k in range(count) if float(case.c[row, k])):
            assert torch.equal(bits(out[own].contiguous()), bits(case.y[own].contiguous()))
        allowed = (ROUNDING[out.dtype] + (case.x.shape[-1] + 128 + 5) * ROUNDING[torch.float32] + 2.0**-16) * size
        assert ((out[own].double() - exact).abs() <= allowed + 1e-30).all(), (row, case.c[row])


def check_in_place(case: Case) -> None:
    """The same bits as the op's, in the memory of y where one pass is enough and kernels run."""
    expected, y = case.run(), case.y.clone()
    found = grouped_rows_in_place(case.x, y, *list(vars(case).values())[2:])
    assert torch.equal(bits(found.contiguous()), bits(expected.contiguous()))
    one = ((case.c != 0).sum(1).max() == 1) and runs_kernels(y)
    assert (found is y) == bool(one)
    if not one:
        assert torch.equal(bits(y), bits(case.y))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.lists(st.sampled_from([1, 2, 3, 8, 13, 16, 17, 33, 64]), min_size=1, max_size=4))
    ranks = draw(st.sampled_from([ranks, [*ranks, 0]]))
    mix = st.dictionaries(st.integers(0, len(ranks) - 1), st.sampled_from([1.0, 1.0, 0.5, -2.0]), max_size=3)
    return make_case(
        ranks,
        draw(st.lists(mix, min_size=1, max_size=5)),
        draw(st.sampled_from([(1,), (1, 1), (1, 7), (3,), (13,)])),
        draw(st.sampled_from([1, 7, 31, 67])),
        draw(st.sampled_from([1, 5, 64, 131])),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 7), nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.table(ids))))


def bank_of(
    folder: Path, device: torch.device | str = "cpu", kernels: bool | None = True
) -> tuple[adaptc.AdaptedProgram, Any, Any]:
    """(a program, its bank as plain operators, its bank as kernels) of adapters of several ranks and sites."""
    torch.manual_seed(0)
    model, ids = Net().eval().to(device), torch.randint(0, 11, (3, 4)).to(device)
    sites = {"a": (3, ["table", "up", "down"]), "b": (17, ["up", "down"]), "c": (1, ["up"])}
    dirs = {}
    for name, (rank, targets) in sites.items():
        config = adaptc.LoraConfig(r=rank, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        dirs[name] = adaptc.save_adapter(adaptc.compile(model, config, example_inputs=ids), folder / name)
    config = adaptc.LoraConfig(r=2, target_modules=["table", "up", "down"])
    program = adaptc.compile(model, config, example_inputs=ids)
    program.kernels = False
    plain = program.bank(dirs)
    program.kernels = kernels
    return program, plain, program.bank(dirs)


CHOSEN: list[Any] = ["a", None, "b", {"a": 0.5, "c": -2.0, "b": 1.0}, "c"]


def check_bank(program: adaptc.AdaptedProgram, plain: Any, grouped: Any, device: torch.device | str = "cpu") -> None:
    """Long rows and short ones; beams; an adapter that is replaced, and one that comes."""
    assert {i.partition(".")[0] for i in grouped.placement.kernel_sites} == {"up", "down"}
    assert not plain.placement.kernel_sites
    for length in (1, 9, 40):
        ids = torch.randint(0, 11, (5, length), generator=torch.Generator().manual_seed(length)).to(device)
        out = grouped(ids, adapters=CHOSEN)
        torch.testing.assert_close(out, plain(ids, adapters=CHOSEN), rtol=1e-5, atol=2e-6)
        assert torch.equal(out[1], grouped(ids, adapters=["b", None, "b", "a", "c"])[1])
        beams = ids.repeat_interleave(2, 0)
        torch.testing.assert_close(grouped.select(CHOSEN)(beams)[::2], out, rtol=1e-5, atol=2e-6)
    fewer: list[Any] = [{"a": 0.5}, None, "a", None, {"a": -1.0}]
    torch.testing.assert_close(grouped(ids, adapters=fewer), plain(ids, adapters=fewer), rtol=1e-5, atol=2e-6)
    assert len(grouped.placement.code_cache.executors) == 1  # for any number of adapters
    for one in (plain, grouped):
        one.replace("a", one["b"])
    torch.testing.assert_close(grouped(ids, adapters=CHOSEN), plain(ids, adapters=CHOSEN), rtol=1e-5, atol=2e-6)
    assert not torch.equal(grouped(ids, adapters=CHOSEN)[0], out[0])
    (stack,) = (s for s in grouped.placement.table.contents.placed.stacks if s.names == ("a", "b", "c"))
    found = {f.split(".")[0]: torch.diff(t)[::2].tolist() for f, t in stack.binding.values.items() if RANK_STARTS in f}
    assert found == {"up": [17, 17, 1], "down": [17, 17, 0]}
    used = {str(n.target) for code in grouped.placement.code_cache.executors for n in code.module.graph.nodes}
    assert "adaptc.grouped_rows.default" in used
    (code,) = grouped.placement.code_cache.executors
    variants = [code.variants.get(kind) for kind in code.variants.trails]
    called = [n.target for v in variants for n in v.code.graph.nodes]
    assert grouped_rows_in_place in called
    assert torch.ops.adaptc.grouped_rows.default not in called


def test_kernels_are_interpreted() -> None:
    assert INTERPRETED


@fewer
@given(cases())
def test_definition(case: Case) -> None:
    check(case)
    check_in_place(case)


def test_in_place_the_rows_of_the_base_keep_their_bits() -> None:
    case = make_case([3, 2], [{0: 1.0}, {}, {1: 1.0}, {}], (20,), 31, 67)
    untouched = [slice(20, 40), slice(60, 80)]
    expected = case.run()
    for rows in untouched:
        case.x[rows] = case.y[rows] = torch.nan
    y = grouped_rows_in_place(case.x, case.y, *list(vars(case).values())[2:])
    assert y is case.y
    assert all(y[rows].isnan().all() for rows in untouched)
    assert torch.equal(y[:20], expected[:20])
    assert torch.equal(y[40:60], expected[40:60])


@pytest.mark.parametrize("adapters", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
def test_all_types(of: torch.dtype, adapters: torch.dtype) -> None:
    mixes: list[dict[int, float]] = [{1: 1.0}, {}, {0: 1.0}, {2: 1.0, 1: 0.25}, {0: -0.5}]
    check(make_case([17, 3, 8], mixes, (4,), 67, 131, of, adapters))


def test_banks(tmp_path: Path) -> None:
    check_bank(*bank_of(tmp_path))
