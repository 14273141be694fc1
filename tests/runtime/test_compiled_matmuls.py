"""Chosen products in code that inductor compiles: equal outputs, calls of torch's op, one compilation, pure files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adaptc
from adaptc import LoraConfig
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol import matmul_op as op
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN, onednn_supports
from adaptc.runtime import executor
from adaptc.tuning import compiled_matmuls as compiled_products
from adaptc.tuning import matmul_table as product_table
from tests.support.rounding import assert_close_to_rounding
from tests.support.sibling_nets import LAYERS, adapter, block, compile_block, random_rows

FLOAT, BFLOAT = torch.float32, torch.bfloat16
CHOICE = MatmulChoice(ONEDNN, ALL_ROW_CLASSES, "measured: faster here, at no rows slower", (0.5, 0.6, 0.75, 1.0))


def _choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    compiled_products.register_lowerings()
    return CHOICE if out > 4 else MatmulChoice(LINEAR, (), "too thin for a test")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(executor, "choose_compiled", _choose)


class Ops(TorchDispatchMode):
    """How often oneDNN's product was called."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.onednn += str(func) == "mkldnn._linear_pointwise.default"
        return func(*args, **(kwargs or {}))


def close(found: Tensor, expected: Tensor) -> None:
    assert_close_to_rounding(found, expected, factor=16 if found.dtype == FLOAT else 1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_every_size_and_adapter_runs_the_same_code(dtype: torch.dtype) -> None:
    program = compile_block(dtype=dtype, backend="inductor")
    program(random_rows(2, dtype))
    layouts = [
        random_rows(9, dtype)[:, :1],
        random_rows(5, dtype).transpose(0, 1).contiguous().transpose(0, 1),
        random_rows(1, dtype),
    ]
    with adaptc.debug.assert_no_recompiles():
        for rank in (3, 1, 5):
            adaptc.swap(program, {k: v.to(dtype) for k, v in adapter(rank, rank).items()})
            with Ops() as ops:
                for x in (*(random_rows(n, dtype) for n in (1, 2, 7, 100)), *layouts):
                    close(program(x), program.module()(x))
            # q, v and out, and no op of Python in between; where a processor cannot, the op, which then is linear.
            assert ops.onednn == (3 * 7 if onednn_supports(dtype) else 0)
    assert dict(program.passes["plain"])["choose_matmuls"] == 3


@pytest.mark.long
def test_the_report_says_what_was_chosen_and_why() -> None:
    program = compile_block(dtype=FLOAT, backend="inductor")
    assert not program.products.choices
    program(random_rows(7, FLOAT))
    text = str(adaptc.report(program))
    rows_of_all = "1, 2 to 4, 5 to 16, 17 to 256, more than 256 rows"
    assert f"matmuls: 3 by onednn at {rows_of_all} (measured: faster here, at no rows slower, 0.50 to 1.00 of" in text
    assert "matmuls: 1 by linear (too thin for a test)" in text


def test_graphs_and_files_stay_plain(tmp_path: Path) -> None:
    program, x = compile_block(dtype=FLOAT, backend="inductor"), random_rows(7, FLOAT)
    expected = program(x)
    adaptc.save(program, tmp_path / "p.pt2")
    loaded = adaptc.load(tmp_path / "p.pt2")
    for p in (program, loaded):
        assert not any(w in str(n.target) for n in p.graph.nodes for w in ("adaptc.product", "mkldnn"))
    close(loaded(x), expected)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["plain", "hidden", "untaught", "training", "float64"])
def test_where_it_computes_as_before(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "choose_compiled", compiled_products.choose_compiled)
    monkeypatch.setattr(product_table, "MIN_SIZE", 1)
    monkeypatch.setattr(product_table, "_tables", {})
    if how == "plain":
        monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    elif how == "hidden":
        monkeypatch.setattr(op, "_pointwise", None)
    elif how == "untaught":
        monkeypatch.setattr(compiled_products, "register_lowerings", lambda: False)
    dtype = torch.float64 if how == "float64" else FLOAT
    program = compile_block(dtype=dtype, backend="inductor", training=how == "training")
    program(random_rows(2, dtype))
    with Ops() as ops:
        close(program(random_rows(7, dtype)), program.module()(random_rows(7, dtype)))
    assert ops.onednn == 0
    assert {c.kind for c in program.products.choices} <= {LINEAR}


def test_a_choice_for_some_rows_alone_is_an_op_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "choose_compiled", lambda *_: MatmulChoice(ONEDNN, (0, 2), columns=(1,)))
    compiled_products.register_lowerings()
    program = compile_block(dtype=FLOAT, backend="inductor")
    program(random_rows(2, FLOAT))
    called, looked_at = [], op._class_of
    monkeypatch.setattr(op, "_class_of", lambda x, *rest: called.append(x.shape) or looked_at(x, *rest))
    for n in (1, 7):
        close(program(random_rows(n, FLOAT)), program.module()(random_rows(n, FLOAT)))
    assert len(called) == 8


def test_columns_are_an_op_of_python_where_they_save_more_than_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    call = compiled_products.PYTHON_OP_SECONDS
    times = {(256, 256, 0): (9 * call, 8 * call, 6.5 * call), (256, 256, 3): (1.0, 0.5)}
    table = product_table.MatmulTable(times)
    monkeypatch.setattr(product_table, "matmul_table", lambda *_: table)
    monkeypatch.setattr(compiled_products, "onednn_supports", lambda dtype: True)
    monkeypatch.setattr(compiled_products, "register_lowerings", lambda: True)
    whole = table.choose_by_class(256, 256)
    assert (whole.classes, whole.columns) == ((3,), (0,))
    for size, choice in (((256, 256), whole), ((128, 256), table.choose_for_all_rows(256, 256))):
        assert compiled_products.choose_compiled(*size, FLOAT) == choice
        # A package runs where there is no Python.
        assert compiled_products.choose_packaged(*size, FLOAT) == table.choose_for_all_rows(256, 256)


class Turned(nn.Module):
    """A weight that lies column by column, a vector as input of a layer, and one layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 11, bias=False), nn.Linear(11, 13)
        self.one.weight = nn.Parameter(torch.randn(7, 11).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)).sum((0, 1)))


@pytest.mark.long
def test_a_weight_that_lies_otherwise_is_left_alone() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["two"], init_lora_weights=False)
    program = adaptc.compile(Turned(), config, example_inputs=random_rows(3, FLOAT), backend="inductor")
    program(random_rows(2, FLOAT))
    with Ops() as ops:
        close(program(random_rows(5, FLOAT)), program.module()(random_rows(5, FLOAT)))
    assert ops.onednn == 0  # the other layer's input is one row in every call, which is a sum
    assert sorted(c.reason for c in program.products.choices)[1] == "the weight does not lie row by row"


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True])
def test_bound_callables_and_the_base(own: bool) -> None:
    program, x = compile_block(dtype=FLOAT, backend="inductor"), random_rows(7, FLOAT)
    program(x)
    tensors = {k: v.float() for k, v in adapter(4, 6, LAYERS).items()}
    bound = program.bind(tensors, form="weight" if own else "apply")
    found, base = bound(x), program.base(x)
    close(base, block(FLOAT)(x))
    adaptc.swap(program, tensors)
    close(found, program.module()(x))
