"""What is measured of the products of adapters is what decides which form they take, and a machine that says nothing
leaves it to the pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc import LoraConfig
from adaptc.passes.optimize.sibling_cost import DISPATCH, FLOAT32_SPEED, HALF_SPEED, MatmulSpeed
from adaptc.runtime import executor
from adaptc.tuning import adapter_speeds
from adaptc.tuning import matmul_table as product_table
from adaptc.tuning import matmul_times as product_times
from adaptc.tuning.adapter_speeds import OPERATION_SECONDS, adapter_speed, fit_speed, measure_adapters
from adaptc.tuning.matmul_times import ADAPTERS, FACTOR_CLASSES, FACTORS, Times
from tests.support.sibling_nets import block, random_rows


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTC_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(product_table, "_tables", {})
    return tmp_path / "kept"


def times_of(fixed: float, read: float, work: float) -> Times:
    """Times, as a machine would take them that is as fast as this, in seconds."""
    rows = dict(zip(product_table.ALL_ROW_CLASSES, product_times.ROWS_OF_CLASS, strict=True))
    return {
        (n, rank, c): 2 * (fixed + n * rank * (read + 2 * work * (0 if c == FACTOR_CLASSES[0] else rows[c])),)
        for n, rank in FACTORS
        for c in FACTOR_CLASSES
    }


@given(st.floats(1e-7, 1e-4), st.floats(0, 1e-9), st.floats(1e-13, 1e-9))
def test_times_say_how_fast_products_are(fixed: float, read: float, work: float) -> None:
    found = fit_speed(times_of(fixed, read, work))
    assert found is not None
    assert found.fixed_cost * OPERATION_SECONDS == pytest.approx(fixed, rel=1e-3)
    assert found.operation_cost * OPERATION_SECONDS == pytest.approx(work, rel=1e-2, abs=1e-15)
    assert found.read_cost * OPERATION_SECONDS == pytest.approx(read, rel=1e-2, abs=1e-12)
    assert pytest.approx(4e-6) == OPERATION_SECONDS * DISPATCH


def test_times_that_cannot_be_say_nothing() -> None:
    assert fit_speed({}) is None
    good = times_of(1e-6, 1e-10, 1e-12)
    assert fit_speed(dict(list(good.items())[1:])) is None
    assert fit_speed(dict.fromkeys(good, (1e-06, 1e-06))) is None  # more work takes no time
    turned = {k: t if k[1] < 20 else (1e-7, 1e-7) for k, t in good.items()}
    assert fit_speed(turned) is None


def test_what_is_measured_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure_adapters(torch.float32)
    assert set(measured) == {(*f, c) for f in FACTORS for c in FACTOR_CLASSES}
    assert all(len(t) == 2 and min(t) > 0 for t in measured.values())
    monkeypatch.setattr(adapter_speeds, "measure_adapters", lambda dtype: times_of(2e-6, 1e-10, 1e-12))
    monkeypatch.setattr(product_table, "onednn_supports", lambda dtype: dtype == torch.float32)
    first = adapter_speed(torch.float32)
    assert first.dispatches == pytest.approx(0.5, rel=1e-3)
    product_table._tables.clear()
    monkeypatch.setattr(adapter_speeds, "measure_adapters", None)
    assert adapter_speed(torch.float32) == first
    (file,) = place.iterdir()
    file.write_text(file.read_text().replace(f'"of": "{ADAPTERS}"', '"of": ""'))
    product_table._tables.clear()
    monkeypatch.setattr(adapter_speeds, "measure_adapters", lambda dtype: {})
    assert adapter_speed(torch.float32) == FLOAT32_SPEED
    assert adapter_speed(torch.bfloat16) == HALF_SPEED  # nothing is measured of what the processor does not multiply


def test_nothing_is_measured_where_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    monkeypatch.setattr(adapter_speeds, "matmul_table", None)
    assert adapter_speed(torch.float32) == FLOAT32_SPEED


@pytest.mark.parametrize(
    ("speed", "form"),
    [(MatmulSpeed(1, 1e-3), "stacked"), (MatmulSpeed(1, 1e5), "apart"), (MatmulSpeed(1, 1e-3, 1e7), "apart")],
    ids=["slow to start", "slow to multiply", "slow to read"],
)
def test_it_decides_the_form(speed: MatmulSpeed, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "adapter_speed", lambda dtype: speed)
    monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k", "v"], init_lora_weights=False, inference_mode=True)
    torch.manual_seed(2)
    program = adaptc.compile(block(), config, example_inputs=random_rows(2))
    torch.testing.assert_close(program(random_rows(7)), program.module()(random_rows(7)), rtol=1e-5, atol=1e-6)
    assert set(program.executor().variants.trails) == {form}
    assert ("each on its own" in str(program.fusion)) == (form == "apart")
