"""The table of product times: measured once, kept as a file, never trusted blindly, and never in the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.errors import ConfigError
from adaptc.passes.lower.choose_products import MatmulChoice, MatmulChoices
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN
from adaptc.tuning import matmul_table as module
from adaptc.tuning import matmul_times as product_times
from adaptc.tuning.matmul_table import (
    MatmulTable,
    cache_folder,
    choose_for_gradient,
    choose_matmul,
    chooses_matmuls,
    matmul_table,
    read_times,
    table_identity,
)
from adaptc.tuning.matmul_times import TRANSPOSED, Times, is_complete, measure_times, measure_transposed
from tests.support.hurried import time_limit

KEYS = [(*size, rows) for size, rows, _ in product_times._table_entries()]
TIMES: Times = {key: (2.0, 1.0 if key[2] < 2 else 1.95) for key in KEYS}


class Measuring:
    """Stands for a measurement, and counts."""

    def __init__(self, times: Times = TIMES) -> None:
        self.times, self.count = times, 0

    def __call__(self, dtype: torch.dtype) -> Times:
        self.count += 1
        return dict(self.times)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTC_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(module, "_tables", {})
    monkeypatch.setattr(module, "onednn_supports", lambda dtype: dtype == torch.float32)
    return tmp_path / "kept"


def again() -> None:
    """As a new process."""
    module._tables.clear()


def test_a_choice_is_read_off_the_nearest_weight() -> None:
    times: Times = {(256, 256, 0): (1.0, 2.0), (2048, 2048, 0): (1.0, 0.5), (2048, 2048, 1): (1.0, 0.94)}
    table = MatmulTable({**times, (256, 256, 3): (1.0, 0.96)})
    assert table.choose_by_class(300, 270) == MatmulChoice(ONEDNN, (1,), "measured: faster here", (0.94,))
    assert table.choose_by_class(49152, 576) == MatmulChoice(ONEDNN, (0, 1), "measured: faster here", (0.5, 0.94))
    assert (
        MatmulTable({(256, 256, 3): (1.0, 0.96)}).choose_by_class(300, 270).kind == LINEAR
    )  # four percent are no gain
    assert MatmulTable({}).choose_by_class(300, 270) == MatmulChoice(LINEAR, (), "nothing else was measured here")


def test_columns_are_chosen_where_they_are_the_fastest() -> None:
    times: Times = {(256, 256, 0): (1.0, 0.8), (256, 256, 1): (1.0, 0.7, 0.5), (256, 256, 2): (1.0, 0.9)}
    found = MatmulTable(times).choose_by_class(300, 270)
    assert found == MatmulChoice(ONEDNN, (0, 2), "measured: faster here", (0.8, 0.9), (1,), (0.5,))
    told = str(MatmulChoices((found, found)))
    assert "matmuls: 2 by onednn at 1, 5 to 16 rows (measured: faster here, 0.80 to 0.90 of linear's time)" in told
    assert "matmuls: 2 by columns at 2 to 4 rows (measured: faster here, 0.50 to 0.50 of linear's time)" in told
    slower = MatmulTable({**times, (256, 256, 1): (1.0, 0.5, 0.49)}).choose_by_class(300, 270)
    assert (slower.classes, slower.columns) == ((0, 1, 2), ())
    # Code for any number of rows has one kind.
    alone = MatmulTable({(256, 256, 1): (1.0, 2.0, 0.5)})
    assert str(MatmulChoices((alone.choose_by_class(300, 270),))).startswith("matmuls: 1 by columns at 2 to 4 rows")
    assert alone.choose_for_all_rows(300, 270).kind == LINEAR


@given(st.integers(1, 10**5), st.integers(1, 127), st.booleans())
def test_thin_products_are_linear(out: int, thin: int, turned: bool) -> None:
    shape = (thin, out) if turned else (out, thin)
    assert MatmulTable(TIMES).choose_by_class(*shape).kind == LINEAR


def test_thin_products_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_table", None)
    assert choose_matmul(127, 5000, torch.float32).reason == "fewer than 128 rows or columns"


def test_it_is_measured_once(place: Path) -> None:
    first, second = Measuring(), Measuring({})
    assert matmul_table(torch.float32, first).times == TIMES
    assert matmul_table(torch.float32, first).times == TIMES
    again()
    assert matmul_table(torch.float32, second).times == TIMES
    assert (first.count, second.count) == (1, 0)
    (file,) = place.iterdir()  # nothing is left beside it
    assert json.loads(file.read_text())["torch"] == torch.__version__
    assert matmul_table(torch.float16, first) == MatmulTable({})


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    measuring = Measuring()
    matmul_table(torch.float32, measuring)
    monkeypatch.setattr(module, "_processor_name", lambda: "another")
    matmul_table(torch.float32, measuring)
    assert measuring.count == 2
    assert len(list(place.iterdir())) == 2


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _with(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: "[1]",
        lambda text: " " * (1 << 20) + text,
        _with(torch="1.0"),
        _with(format=0),
        _with(times=[]),
        _with(times=None),
        _with(times=[[*k, 1.0, -1.0] for k in KEYS]),
        _with(times=[[*k, 1.0, float("nan")] for k in KEYS]),
        _with(times=[[*k, 1.0, float("inf")] for k in KEYS]),
        _with(times=[[*k, "a", 1.0] for k in KEYS]),
        _with(times=[[*k, 1.0] for k in KEYS]),
        _with(times=[[[1], *k[1:], 1.0, 1.0] for k in KEYS]),
        _with(times=[[7, 7, 0, 1.0, 1.0]]),
        _with(times=[[*k, 1.0, 1.0] for k in KEYS[1:]]),
    ],
)
def test_damaged_and_foreign_files_are_made_anew(damage: Callable[[str], str], place: Path) -> None:
    matmul_table(torch.float32, Measuring())
    (file,) = place.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    again()
    measuring = Measuring()
    assert matmul_table(torch.float32, measuring).times == TIMES
    assert measuring.count == 1
    assert file.read_text() == whole


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nothing", "not to be read"])
def test_what_is_no_plain_file_is_not_waited_for(kind: str, place: Path) -> None:
    matmul_table(torch.float32, Measuring())
    (file,) = place.iterdir()
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "not to be read":
        file.write_text("[]")
        file.chmod(0)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    again()
    measuring = Measuring()
    with time_limit():
        assert matmul_table(torch.float32, measuring).times == TIMES
    assert measuring.count == 1
    assert len(list(place.iterdir())) == 1


def test_where_nothing_can_be_written_each_process_measures(place: Path) -> None:
    place.write_text("a file, and no folder")
    measuring = Measuring()
    for _ in range(2):
        assert matmul_table(torch.float32, measuring).times == TIMES
        again()
    assert measuring.count == 2


def test_a_half_measured_table_is_not_kept(place: Path) -> None:
    half = dict(list(TIMES.items())[:4])
    assert matmul_table(torch.float32, Measuring(half)).times == half
    assert not place.exists()


def test_the_folder_is_the_platforms_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADAPTC_CACHE")
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "adaptc"


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not chooses_matmuls()  # as all tests run
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    assert chooses_matmuls()
    monkeypatch.setenv("ADAPTC_PRODUCTS", "fast")
    with pytest.raises(ConfigError, match="ADAPTC_PRODUCTS='fast' in the environment has no meaning"):
        chooses_matmuls()


def test_measuring_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "SIZES", ((33, 31), (17, 61)))
    monkeypatch.setattr(product_times, "BUDGET_SECONDS", 60.0)
    with torch.autocast("cpu", torch.bfloat16):
        times = measure_times(torch.float32)
    assert set(times) == {(o, w, c) for o, w in product_times.SIZES for c in ALL_ROW_CLASSES}
    assert is_complete(times)
    assert all(0 < t < 60 for pair in times.values() for t in pair)
    monkeypatch.setattr(product_times, "BUDGET_SECONDS", 0.0)
    assert measure_times(torch.float32) == {}


def test_in_a_transform_nothing_is_measured() -> None:
    seen: list[Times] = []
    torch.func.vmap(lambda x: (seen.append(measure_times(torch.float32)), x)[1])(torch.zeros(2))
    assert seen == [{}]


def test_under_fake_tensors_nothing_is_measured() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert measure_times(torch.float32) == {}


def test_a_missing_file_is_none(place: Path) -> None:
    assert read_times(place / "none.json", {}) is None


def test_gradients_have_a_table_of_their_own(place: Path) -> None:
    asked: list[str] = []

    def tables() -> tuple[MatmulTable, MatmulTable]:
        def measuring(of: str) -> Callable[[torch.dtype], Times]:
            return lambda dtype: (
                asked.append(of) or {(*s, c): (2.0, 1.0) for s, c, _ in product_times._table_entries(of)}
            )

        return matmul_table(torch.float32, measuring("")), matmul_table(
            torch.float32, measuring(TRANSPOSED), TRANSPOSED
        )

    for _ in range(2):
        forward, back = tables()
        again()
    assert asked == ["", TRANSPOSED]
    assert len(list(place.iterdir())) == 2
    # Who trains has more rows than a few; the shape is that of the turned weight.
    assert forward.choose_by_class(300, 270).classes == ALL_ROW_CLASSES
    assert back.choose_by_class(300, 270).classes == (3, 4)
    # Neither is taken for the other, nor a file that does not say what it is.
    for file in place.iterdir():
        data = json.loads(file.read_text())
        assert read_times(file, table_identity(torch.float32, "" if data.get("of") else TRANSPOSED)) is None
        file.write_text(json.dumps({**data, "format": 0}))
    assert tables() == (forward, back)
    assert asked == ["", TRANSPOSED, "", TRANSPOSED]


def test_the_gradients_product_is_of_the_turned_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Times = {(256, 1024, 2): (1.0, 0.5), (1024, 256, 2): (1.0, 2.0)}
    monkeypatch.setattr(
        module, "matmul_table", lambda dtype, measuring, of: MatmulTable(times if of == TRANSPOSED else {})
    )
    assert choose_for_gradient(1024, 256, torch.float32).classes == (2,)
    assert choose_for_gradient(256, 1024, torch.float32).kind == LINEAR
    assert choose_for_gradient(127, 5000, torch.float32).reason == "fewer than 128 rows or columns"


def test_gradients_are_measured_at_turned_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "SIZES", ((33, 31), (17, 61)))
    monkeypatch.setattr(product_times, "BUDGET_SECONDS", 60.0)
    weights: list[torch.Tensor] = []
    real = product_times.linear_matmul
    monkeypatch.setattr(product_times, "linear_matmul", lambda x, w, *rest: (weights.append(w), real(x, w, *rest))[1])
    times = measure_transposed(torch.float32)
    assert set(times) == {
        (o, w, c) for o, w in product_times.SIZES for c in ALL_ROW_CLASSES[product_times.FIRST_GRADIENT_CLASS :]
    }
    assert is_complete(times, TRANSPOSED)
    assert not is_complete(times)
    assert {tuple(w.shape) for w in weights} == {(33, 31), (17, 61)}
    assert all(w.t().is_contiguous() for w in weights)
