"""Packed copies of the base's weights: only where allowed and faster, exact, shared, and gone when they must be."""

from __future__ import annotations

import gc
import threading
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import BackendError, ConfigError, LoraConfig
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol import matmul_op as op
from adaptc.passes.protocol.matmul_op import LINEAR, onednn_supports
from adaptc.runtime import executor
from adaptc.tables import format_bytes
from adaptc.tuning import matmul_table as product_table
from adaptc.tuning import packed_weights
from adaptc.tuning.packed_weights import choose_packed, measure_packed, pack_weight
from tests.support.rounding import assert_close_to_rounding
from tests.support.sibling_nets import adapter, block, compile_block, random_rows

FLOAT, BFLOAT = torch.float32, torch.bfloat16
#: at up to 16 rows, and above 256
CHOICE = MatmulChoice("packed", (0, 1, 2, 4), "measured: faster than the weight as it lies", (0.5, 0.75, 0.9))
NAMES = {FLOAT: "float32", BFLOAT: "bf16"}


def packs(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What is packed where these are to be: nothing on a machine that cannot."""
    return list(shapes) if onednn_supports(dtype) else []


def _choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    return CHOICE if out > 6 else MatmulChoice(LINEAR, (), "too thin for a test")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(executor, "choose_matmul", lambda *_: MatmulChoice(LINEAR, (), "for a test"))
    monkeypatch.setattr(packed_weights, "choose_packed", _choose)
    monkeypatch.setattr(packed_weights, "_copies_by_memory", WeakValueDictionary())  # other tests' programs may live on


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are packed."""
    seen: list[tuple[int, ...]] = []

    def packed(weight: Tensor) -> Tensor:
        seen.append(tuple(weight.shape))
        return pack_weight(weight)

    monkeypatch.setattr(packed_weights, "pack_weight", packed)
    return seen


def close(found: Tensor, expected: Tensor) -> None:
    assert_close_to_rounding(found, expected, factor=16 if found.dtype == FLOAT else 1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("fuse", [True, False])
def test_it_computes_what_its_graph_says(fuse: bool, dtype: torch.dtype, made: list[Any]) -> None:
    program = compile_block(dtype=dtype, fuse=fuse, pack=NAMES[dtype])
    program(random_rows(7, dtype))  # 21 rows: in no class that is packed for
    assert made == []
    assert program.packed.count == 0
    for x in (
        *(random_rows(n, dtype) for n in (0, 1, 2, 5, 7, 100)),
        random_rows(9, dtype)[:, :1],
        random_rows(6, dtype).transpose(0, 1),
    ):
        close(program(x), program.module()(x))
    shape = (20, 7) if fuse else (10, 7)
    assert made == packs(dtype, shape)
    assert program.packed.nbytes == len(made) * shape[0] * 7 * dtype.itemsize
    adaptc.swap(program, {k: v.to(dtype) for k, v in adapter(5, 5).items()})
    close(program(random_rows(2, dtype)), program.module()(random_rows(2, dtype)))
    close(program.base(random_rows(2, dtype)), block(dtype)(random_rows(2, dtype)))
    assert len(made) == len(packs(dtype, shape))  # the base shares it


@pytest.mark.long
def test_the_report_and_what_frees_it() -> None:
    program = compile_block(dtype=FLOAT)
    program(random_rows(1, FLOAT))
    assert "packed" not in str(adaptc.report(program))
    program.pack = "float32"
    program(random_rows(1, FLOAT))
    report, count = adaptc.report(program), len(packs(FLOAT, (20, 7)))
    assert f"packed: a second copy of {count} weights ({format_bytes(560 * count)})" in str(report)
    why = "measured: faster than the weight as it lies, 0.50 to 0.90 of its time"
    assert f"packed for 1 layers at 1, 2 to 4, 5 to 16, more than 256 rows ({why})" in str(report)
    assert "not packed for 1 layers (too thin for a test)" in str(report)
    assert report.to_dict()["packed"] == {"count": count, "bytes": 560 * count}
    assert len(packed_weights._copies_by_memory) == count
    program.pack = None
    gc.collect()
    assert program.packed.count == 0
    program(random_rows(1, FLOAT))
    gc.collect()
    assert not len(packed_weights._copies_by_memory)


def test_writes_and_moves_are_followed(made: list[Any]) -> None:
    model = block(FLOAT)
    program = compile_block(model, dtype=FLOAT, fuse=False, pack="float32")
    x = random_rows(2, FLOAT)
    first = program(x)
    with torch.no_grad():
        model.v.weight.mul_(2)
    found = program(x)
    assert not torch.allclose(found, first)
    close(found, program.module()(x))
    weight = program.state_dict["v.weight"]
    weight.data = weight.data.clone() * 3
    program.resync_base_tensors()
    close(program(x), program.module()(x))
    assert made == packs(FLOAT, *[(10, 7)] * 3)
    assert program.packed.count == len(packs(FLOAT, (10, 7)))


def test_a_write_through_another_object_is_not_missed(made: list[Any]) -> None:
    """Programs share copies by where a weight lies, and another counter of writes may have counted."""
    model = block(FLOAT)
    first = compile_block(model, dtype=FLOAT, fuse=False, pack="float32")
    x = random_rows(2, FLOAT)
    first(x)
    with torch.no_grad():
        model.v.weight.data.mul_(2)  # which nobody counts
    second = compile_block(model, dtype=FLOAT, fuse=False, pack="float32")
    close(second(x), second.module()(x))
    assert made == packs(FLOAT, *[(10, 7)] * 2)


@pytest.mark.long
def test_bound_callables(made: list[Any]) -> None:
    program, x = compile_block(dtype=FLOAT, fuse=False, pack="float32"), random_rows(2, FLOAT)
    tensors = {k: v.float() for k, v in adapter(4, 6).items()}
    shared, own = program.bind(tensors), program.bind(tensors, form="weight")
    program(x)
    close(own(x), shared(x))
    # One of the program and all that share its base, one of its own weights.
    assert made == packs(FLOAT, (10, 7), (20, 7))
    del own
    gc.collect()
    close(shared(x), program.with_binding(shared.binding)(x))
    assert made == packs(FLOAT, (10, 7), (20, 7))


def test_all_threads_share_a_copy(made: list[Any]) -> None:
    program, x, found = compile_block(dtype=FLOAT, fuse=False, pack="float32"), random_rows(2, FLOAT), []
    expected = program.module()(x)
    threads = [threading.Thread(target=lambda: found.append(program(x))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for y in found:
        close(y, expected)
    assert len(found) == 6
    assert program.packed.count == len(packs(FLOAT, (10, 7)))


def test_gradients_and_a_machine_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compile_block(dtype=FLOAT, pack="float32")
    x = random_rows(2, FLOAT).requires_grad_()
    (found,) = torch.autograd.grad(program(x).square().sum(), x)
    (expected,) = torch.autograd.grad(program.module()(x).square().sum(), x)
    close(found, expected)
    expected = program(random_rows(2, FLOAT))
    monkeypatch.setattr(op, "_pointwise", None)
    close(program(random_rows(2, FLOAT)), expected)


def test_values_without_a_meaning() -> None:
    for bad in ("bfloat16", True, 16, ["bf16"]):
        with pytest.raises(ConfigError, match=r"pack=.* is not one of float32, bf16, or None"):
            compile_block(dtype=FLOAT, pack=bad)
    with pytest.raises(ConfigError, match=r"packs weights of torch\.bfloat16, and those of the base are"):
        compile_block(dtype=FLOAT, pack="bf16")
    with pytest.raises(ConfigError, match="is for inference"):
        compile_block(dtype=FLOAT, pack="float32", training=True)
    with pytest.raises(BackendError, match="is for backend='eager'"):
        compile_block(dtype=FLOAT, pack="float32", backend="inductor")
    program = compile_block(dtype=FLOAT, pack="float32")
    with pytest.raises(BackendError, match="is for backend='eager'"):
        program.backend = "inductor"
    assert (program.backend, program.pack) == ("eager", "float32")


def test_where_it_is_no_faster(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    monkeypatch.setattr(packed_weights, "choose_packed", choose_packed)
    monkeypatch.setattr(packed_weights, "MIN_SIZE", 1)
    monkeypatch.setattr(product_table, "MIN_SIZE", 1)
    monkeypatch.setattr(product_table, "_tables", {})
    monkeypatch.setattr(
        packed_weights, "matmul_table", lambda *_: product_table.MatmulTable({(256, 256, 0): (1.0, 0.97)})
    )
    program = compile_block(dtype=FLOAT, pack="float32")
    program(random_rows(1, FLOAT))
    assert made == []
    assert "not packed for 2 layers (measured: no faster here)" in str(adaptc.report(program))


@pytest.mark.long
def test_measuring_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn_supports(FLOAT):
        assert choose_packed(512, 512, FLOAT) == MatmulChoice(LINEAR, (), "nothing else was measured here")
        return
    monkeypatch.setattr(packed_weights.measure_times.__globals__["time"], "perf_counter", _Clock())
    times = measure_packed(FLOAT)
    assert times
    assert all(plain > 0 and packed > 0 for plain, packed in times.values())


class _Clock:
    """A clock that goes so slowly that there is time for all."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(7, 11, bias=False)
        self.two = nn.Linear(11, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.two(torch.tanh(self.one(x))), self.one.weight)


def test_a_weight_that_is_read_twice_is_packed_once(made: list[Any]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["two"], init_lora_weights=False)
    program = adaptc.compile(Tied(), config, example_inputs=random_rows(3, FLOAT), pack="float32")
    close(program(random_rows(2, FLOAT)), program.module()(random_rows(2, FLOAT)))
    assert sorted(made) == packs(FLOAT, (7, 11), (11, 7))
    assert program.packed.count == len(made)
