"""What of tests/gpu needs no GPU: counts of bytes and operations, the roofline, tables, and all of it in a dry run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from adaptc.runtime.calls.recorded_calls import CudaGraphs
from tests.gpu import __main__ as command
from tests.gpu import bench, modelled, roofline, suite, timing, whole_model
from tests.gpu.roofline import Peaks, Row, Work
from tests.gpu.suite import TINY, Maker
from tests.kernels import ROOT

CPU = torch.device("cpu")
CANDIDATES = ["base alone", "adaptc", "PEFT's formula", "PEFT's formula, compiled"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # 4 bytes each of 2 x 3 inputs, 5 x 3 weights and 2 x 5 outputs; two operations for each of 2 x 5 x 3 products.
        (roofline.linear_work(2, 3, 5, 4), Work(124, 60)),
        # A of 2 x 3 and B of 5 x 2, for each of three adapters; each row goes through one of them.
        (roofline.adapter_work(2, 3, 5, 2, 4, adapters=3), Work(192, 64)),
        # Six columns in all, 144 bytes and 72 operations; and the adapters of five columns and of one.
        (roofline.lora_work(2, 3, [5, 1], 2, 4), Work(144 + 64 + 32, 72 + 64 + 32)),
        # Fifteen weights of 2 bytes, five results of 4; a square and a sum for each weight.
        (roofline.length_work(5, 3, 2), Work(50, 30)),
        # And factors of 2 x 3 and 5 x 2; a product over two ranks, a multiple and a sum for each weight.
        (roofline.norm_work(5, 3, 2, 2), Work(82, 120)),
        # The weights twice.
        (roofline.merge_work(5, 3, 2, 2), Work(92, 90)),
    ],
)
def test_work_is_counted_by_hand(found, expected) -> None:
    assert found == expected


def test_the_roofline_is_the_slower_of_traffic_and_arithmetic() -> None:
    assert roofline.roofline(Work(100, 1000), Peaks(50, 2000)) == 2.0
    assert roofline.roofline(Work(100, 8000), Peaks(50, 2000)) == 4.0


@pytest.mark.parametrize(
    ("name", "bandwidth", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
        ("NVIDIA H100 PCIe", 2.0e12, 756e12),
        ("NVIDIA H200", 4.8e12, 989e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12, 312e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12, 312e12),
        ("NVIDIA L40S", 0.864e12, 362e12),
        ("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(name, bandwidth, flops) -> None:
    assert roofline.known_peaks(name) == Peaks(bandwidth, flops)


def test_a_device_that_is_not_in_the_table_has_no_known_peaks() -> None:
    assert roofline.known_peaks("NVIDIA A10") is None


def test_no_entry_of_the_table_hides_a_later_one() -> None:
    names = [name for name, _ in roofline.TABLE]
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_table() -> None:
    # In 2 microseconds 3 MB are 1500 GB/s, half of the peak, and 80 MFLOP 40 TFLOP/s, a tenth.
    row = Row("merge_", "8x8", "adaptc", Work(3_000_000, 80_000_000), 2.0, 31.25)
    other = replace(row, candidate="PEFT's formula", device_us=4.0, call_us=40.0)
    assert roofline.markdown([row, other], Peaks(3e12, 400e12)).splitlines()[2:] == [
        "| merge_ | 8x8 | adaptc | 2.0 | 31.2 | 1500 | 40.0 | 50% |",
        "|  |  | PEFT's formula | 4.0 | 40.0 | 750 | 20.0 | 25% |",
    ]


@pytest.mark.long
def test_every_case_appears_in_a_dry_run(capsys) -> None:
    assert command.main(["--dry", "--only", "kernels"]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    rows = [cells for cells in lines if len(cells) == 8 and cells[2] != "candidate"]
    kernels = Counter(cells[0] for cells in rows if cells[0])
    # Rows of x, ranks and widths of TINY, a long layer and a mixed one; two groups of siblings; one weight.
    assert kernels == {
        "lora_linear": 3 * 2 * 2 + 2 * 2,
        "siblings": 2 * 2 * 2,
        "grouped_lora": 2 * 2,
        "grouped_rows": 3,
        "dora_norm": 2,
        "merge_": 2,
    }
    assert len({cells[1] for cells in rows if cells[1]}) == 12 + 4 + 8 + 4 + 3 + 2
    # A loop over adapters is compiled for one rank; merging has a product that adds instead of a base.
    found = Counter(cells[2] for cells in rows)
    counts = dict(zip([*CANDIDATES, "addmm_"], (33, 35, 35, 30, 2), strict=True))
    assert found == counts | {"all factors in one product": 3}
    assert all(re.fullmatch(r"\d+%", cells[7]) for cells in rows)


@pytest.mark.slow
def test_a_whole_model_appears_in_a_dry_run(capsys) -> None:
    assert command.main(["--dry", "--only", "model"]) == 0
    out = capsys.readouterr().out
    ours = ["adaptc, eager", "adaptc, inductor", "adaptc, eager, cuda_graphs=True"]
    candidates = ["transformers base", "PEFT", "PEFT, compiled", *ours]
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in out.splitlines() if line.startswith("| ")]
    assert [name for _, name in cells if name != "candidate"] == candidates * 6
    works = [work for work, _ in cells if work and work != "work"]
    assert works == ["decode 1x1", "prefill 1x9", "decode 1x1", "decode 16x1", "prefill 1x9", "prefill 8x9"]
    swaps = re.findall(r"[\d.]+ ms to rank (\d+)", out)
    assert swaps == ["16", "8", "32", "64"] * 2


def test_cases_are_left_out_and_told_when_the_time_is_over(capsys) -> None:
    rows, failures = bench.run(_cases("dora_norm"), CPU, TINY.dtype, seconds=-1)
    assert not rows
    assert failures == [f"dora_norm, 24x48 r={r}: left out, as the time was over" for r in (2, 8)]
    assert command.main(["--dry", "--only", "model", "--minutes", "0"]) == 1
    assert "FAILED a tiny llama: left out, as the time was over" in capsys.readouterr().err


def test_a_graph_has_so_many_copies_that_l2_cannot_hold_their_weights() -> None:
    for size in (2**20, 8 * 2**20, 117 * 2**20):
        count = timing.copies_beyond_cache(size)
        assert count * size > timing.LARGEST_CACHE or count == timing.MOST_COPIES
        assert count >= 2
    assert timing.copies_beyond_cache(117 * 2**20) == 2


def _cases(kernel: str):
    return [case for case in Maker(TINY, CPU, lambda f: f).cases() if case.kernel == kernel]


@pytest.mark.parametrize("factor", [1.001, torch.nan])
def test_a_candidate_that_computes_something_else_is_no_row_but_a_failure(monkeypatch, factor) -> None:
    right = suite.dora_norm
    monkeypatch.setattr(suite, "dora_norm", lambda *args: factor * right(*args))
    rows, failures = bench.run(_cases("dora_norm"), CPU, TINY.dtype)
    assert not rows
    assert [text.partition(":")[0] for text in failures] == ["dora_norm, 24x48 r=2", "dora_norm, 24x48 r=8"]
    assert "PEFT's formula differs from adaptc by" in failures[0]


@pytest.mark.long
def test_a_failure_is_told_and_leaves_the_other_cases_their_rows(monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(suite, "merge_", broken)
    assert command.main(["--dry", "--only", "kernels"]) == 1
    out, err = capsys.readouterr()
    assert "| merge_ |" not in out
    assert "| dora_norm | 24x48 r=8 | base alone |" in out
    assert err.count("FAILED merge_, 24x48") == err.count("RuntimeError: no such kernel") == 2


def test_models_with_other_outputs_are_not_timed() -> None:
    class Model:
        def __init__(self, logits: float) -> None:
            self.logits = torch.full((2, 3), logits)

        def __call__(self, **_: object) -> Model:
            return self

    same = {whole_model.BASE: Model(7.0), "PEFT": Model(1.0), "adaptc": Model(1.0)}
    whole_model.check(same, {}, 1e-4)
    for wrong in (1.01, float("nan")):
        with pytest.raises(AssertionError, match="adaptc: logits differ from PEFT's"):
            whole_model.check(same | {"adaptc": Model(wrong)}, {}, 1e-4)


def test_recorded_calls_that_are_plain_calls_are_told() -> None:
    whole_model.check_recorded(CudaGraphs(1, {"gradients": 2}))
    with pytest.raises(AssertionError, match=r"no call was replayed: .*\n.*2 calls: gradients"):
        whole_model.check_recorded(CudaGraphs(0, {"gradients": 2}))


def test_the_modelled_times_are_those_of_the_model() -> None:
    readme = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    assert modelled.markdown() in readme.partition("## On a GPU: modelled, not measured")[2]


def test_a_modelled_kernel_takes_as_long_as_the_slowest_that_it_does() -> None:
    gpu = modelled.Gpu(memory=2.0, cache=4.0, matmul=8.0, start=1.0)
    assert gpu.seconds(6.0) == gpu.seconds(6.0, 12.0) == gpu.seconds(6.0, 4.0, 24.0) == 4.0
    assert gpu.seconds(6.0, 16.0) == gpu.seconds(0.0, 0.0, 32.0) == 5.0
    for rows in (1, 16, 512):
        base = modelled.base_seconds(rows)
        few, more = (modelled.adapted_seconds(rows, rank, 2) for rank in (8, 64))
        assert base * 0.95 < few < more < 1.5 * base


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tests_for_a_gpu_hold_of_the_references() -> None:
    """In a process of its own, as they set what torch does everywhere."""
    files = [f"tests/gpu/test_{name}.py" for name in ("lora", "grouped", "dora_merge")]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"ADAPTC_GPU_TESTS_ON": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--full", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d{3} passed", done.stdout)
