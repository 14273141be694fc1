"""Programs whose base products are chosen: equal outputs and gradients, no new code for other sizes, pure files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adaptc
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol import matmul_op as op
from adaptc.passes.protocol.matmul_op import LINEAR, ONEDNN
from adaptc.runtime import executor
from adaptc.tuning import matmul_table as product_table
from tests.support.sibling_nets import LAYERS, adapter, block, compile_block, random_rows

#: at one row, and from 17 to 256
CHOICE = MatmulChoice(ONEDNN, (0, 3), "measured: faster here", (0.5, 0.75))
FLOAT = torch.float32


def _choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    return CHOICE if out > 6 else MatmulChoice(LINEAR, (), "too thin for a test")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(executor, "choose_matmul", _choose)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that oneDNN is given, or what stands for it where torch has none."""
    seen: list[int] = []
    real = op._pointwise or (lambda x, weight, bias, *_: F.linear(x, weight, bias))

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return real(x, *rest)

    monkeypatch.setattr(op, "_pointwise", counted)
    return seen


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("fuse", [True, False])
def test_it_computes_what_its_graph_says(fuse: bool, calls: list[int]) -> None:
    program = compile_block(dtype=FLOAT, fuse=fuse)
    for n in (1, 2, 7, 100):
        close(program(random_rows(n, FLOAT)), program.module()(random_rows(n, FLOAT)))
    # Of single layers v alone is no thin one here; the product of three has its own size.
    assert calls == [21]
    assert dict(program.passes["stacked" if fuse else "plain"])["choose_matmuls"] == 1


def test_a_few_rows_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = op.transposed_matmul
    monkeypatch.setattr(
        op, "transposed_matmul", lambda x, *rest: (made.append(x.numel() // x.shape[-1]), real(x, *rest))[1]
    )
    few = MatmulChoice(ONEDNN, (2,), "measured: faster here", (0.5,), (0, 1), (0.3, 0.4))
    monkeypatch.setattr(executor, "choose_matmul", lambda out, *_: few if out > 6 else MatmulChoice(LINEAR, (), "thin"))
    program = compile_block(dtype=FLOAT)
    for x in (random_rows(1, FLOAT)[:, :1], *(random_rows(n, FLOAT) for n in (1, 2, 3))):  # of three rows each
        close(program(x), program.module()(x))
    assert made == ([1, 3] if op.onednn_supports(FLOAT) else [])
    assert "matmuls: 1 by columns at 1, 2 to 4 rows" in str(adaptc.report(program))


def test_one_row_and_none(calls: list[int]) -> None:
    program = compile_block(dtype=FLOAT)
    for x in (random_rows(0, FLOAT), random_rows(9, FLOAT)[:, :1], random_rows(1, FLOAT)[:, :1]):
        close(program(x), program.module()(x))


def test_swaps_the_base_and_merges_too(calls: list[int]) -> None:
    program, x = compile_block(dtype=FLOAT), random_rows(8, FLOAT)
    program(x)
    with adaptc.debug.assert_no_recompiles(), torch.no_grad():
        for rank in (1, 5):
            tensors = {k: v.float() for k, v in adapter(rank, rank).items()}
            adaptc.swap(program, tensors)
            close(program(x), program.module()(x))
        close(program.base(x), block(FLOAT)(x))
    assert len(calls) == 4
    merged = adaptc.merge(program)
    close(merged(x), program(x))
    assert len(calls) > 5


def test_inputs_get_their_gradients() -> None:
    program = compile_block(dtype=FLOAT)
    x = random_rows(7, FLOAT).requires_grad_()
    weights = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad((program(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((program.module()(x) * weights).sum(), x)
    close(found, expected)


def test_graphs_and_files_stay_plain(tmp_path: Path) -> None:
    program, x = compile_block(dtype=FLOAT), random_rows(7, FLOAT)
    expected = program(x)
    adaptc.save(program, tmp_path / "p.pt2")
    loaded = adaptc.load(tmp_path / "p.pt2")
    for p in (program, loaded):
        assert not any("adaptc.product" in str(n.target) for n in p.graph.nodes)
    close(loaded(x), expected)


def test_a_machine_without_the_op_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = compile_block(dtype=FLOAT), random_rows(7, FLOAT)
    expected = program.module()(x)
    program(x)
    monkeypatch.setattr(op, "_pointwise", None)
    close(program(x), expected)


def test_the_report_says_what_was_chosen_and_why() -> None:
    program = compile_block(dtype=FLOAT)
    assert "matmuls:" not in str(adaptc.report(program))
    program(random_rows(7, FLOAT))
    report = adaptc.report(program)
    text = str(report)
    assert "matmuls: 1 by onednn at 1, 17 to 256 rows (measured: faster here, 0.50 to 0.75 of linear's time)" in text
    assert "matmuls: 1 by linear (too thin for a test)" in text
    assert {"kind": "linear", "rows": "", "why": "too thin for a test", "count": 1} in report.to_dict()["products"]
    merged = adaptc.merge(program)
    merged(random_rows(7, FLOAT))
    assert "by onednn" in str(adaptc.report(merged))


@pytest.mark.parametrize("training", [False, True])
def test_where_nothing_is_chosen(training: bool, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    program = compile_block(dtype=FLOAT, training=training)
    program(random_rows(7, FLOAT))
    assert calls == []
    assert not program.products.choices


def test_measuring_is_no_part_of_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "choose_matmul", product_table.choose_matmul)
    monkeypatch.setattr(product_table, "MIN_SIZE", 1)
    monkeypatch.setattr(product_table, "_tables", {})
    asked = []

    def table(dtype: torch.dtype) -> product_table.MatmulTable:
        asked.append(dtype)
        return product_table.MatmulTable({(256, 256, c): (1.0, 0.5) for c in (0, 2)})

    monkeypatch.setattr(product_table, "matmul_table", table)
    program = compile_block(dtype=FLOAT)
    program(random_rows(7, FLOAT))
    assert asked
    assert set(asked) == {FLOAT}
    asked.clear()
    for n in (7, 1, 9):
        program(random_rows(n, FLOAT))
    adaptc.swap(program, {k: v.float() for k, v in adapter(2, 3, LAYERS).items()})
    program(random_rows(7, FLOAT))
    assert asked == []
