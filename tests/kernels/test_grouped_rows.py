"""A bank's rows by grouped kernels: interpreted in a process of their own, and by references where no kernel runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

import adaptc
from adaptc.errors import BackendError
from adaptc.kernels import grouped_rows
from tests.kernels import run_cases
from tests.kernels.grouped_rows_cases import CHOSEN, Case, Net, bank_of, cases, check, check_bank, make_case


@pytest.mark.long
def test_kernels_interpreted() -> None:
    run_cases("grouped_rows")


@given(cases())
def test_off_the_gpu(case: Case) -> None:
    check(case)


@pytest.mark.long
def test_banks_off_the_gpu(tmp_path: Path) -> None:
    check_bank(*bank_of(tmp_path))


@pytest.mark.long
def test_kernels_are_for_a_gpu_unless_they_are_asked_for(tmp_path: Path) -> None:
    """Nowhere else does a bank take them by itself; nor for an export, nor where it is compiled."""
    program, _, grouped = bank_of(tmp_path, kernels=None)
    assert not grouped.placement.kernel_sites
    program.kernels = True
    asked = program.bank(grouped.adapters)
    assert asked.placement.kernel_sites
    targets = {str(n.target) for n in asked.exported().graph.nodes}
    assert not [t for t in targets if t.startswith("adaptc")]
    ids = torch.randint(0, 11, (5, 3))
    c = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0.5, 1, -2], [0, 0, 1]])
    out = asked.exported().module()(ids, adapter_coefficients=c)
    torch.testing.assert_close(out, asked(ids, adapters=CHOSEN), rtol=1e-5, atol=2e-6)


def test_what_rows_go_together_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers of a call, and anew where coefficients changed, were it in place."""
    rows = importlib.import_module("adaptc.kernels.grouped_rows")
    made: list[int] = []
    real = rows._make_passes
    monkeypatch.setattr(rows, "_make_passes", lambda c, T: (made.append(T), real(c, T))[1])
    case = make_case([3, 2], [{0: 1.0}, {}, {1: 1.0}])
    first = case.run()
    case.run()
    assert made == [9]
    case.c.copy_(case.c.flip(1))
    assert not torch.equal(case.run(), first)
    check(case)
    assert made[:2] == [9, 9]


def test_no_rows_and_rows_of_the_base() -> None:
    none = make_case([3, 2], [{}, {}])
    assert torch.equal(none.run(), none.y)
    assert none.run().data_ptr() != none.y.data_ptr()
    empty = Case(none.x[:0], none.y[:0], none.A, none.B, none.starts, none.scale, none.c[:0])
    assert empty.run().shape == (0, 5)


def test_the_op_is_what_its_schema_says() -> None:
    case = make_case([3, 2], [{0: 1.0}, {1: 0.5, 0: 1.0}])
    tensors = case.x, case.y, case.A, case.B, case.starts, case.scale, case.c
    torch.library.opcheck(torch.ops.adaptc.grouped_rows, tensors, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("wrong", ["starts", "rows"])
def test_refused(wrong: str) -> None:
    case = make_case([3, 2], [{0: 1.0}, {1: 0.5}])
    given: dict[str, Any] = dict(vars(case))
    given |= {"starts": case.starts[:-1]} if wrong == "starts" else {"x": case.x[:-1], "y": case.y[:-1]}
    with pytest.raises(BackendError, match="starts of 5" if wrong == "starts" else "as many for each of 2 rows"):
        grouped_rows(**given)


@pytest.mark.long
def test_methods_without_kernels_stay_as_they_are() -> None:
    """DoRA has none for rows, nor has LoRA with a bias."""
    ids = torch.randint(0, 11, (3, 4))
    for more in ({"use_dora": True}, {"lora_bias": True}):
        config = adaptc.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False, **more)
        program = adaptc.compile(Net().eval(), config, example_inputs=ids)
        plain = program.bank({"a": program.binding})(ids, adapters=["a", None, {"a": 0.5}])
        program.kernels = True
        bank = program.bank({"a": program.binding})
        assert not bank.placement.kernel_sites
        torch.testing.assert_close(bank(ids, adapters=["a", None, {"a": 0.5}]), plain)
