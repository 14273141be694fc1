"""Recorded calls of every method: adapters of several ranks share a recording, and give what plain calls give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.runtime import executor as executor_module
from adaptc.runtime.rank_padding import pad_to_buckets
from adaptc.state import adaptation
from tests.support.method_table import ENTRIES
from tests.support.recorded_ops import OpRecorder
from tests.support.several_layers import at_several_layers
from tests.support.subject import assert_close, quiet, save_random_adapter, subject

CASES = [(e.name, "linear") for e in ENTRIES if "linear" in e.layers()]
CASES += [(n, "conv2d") for n in ("lora", "loha", "hra", "vera")]
CASES += [("lora", "conv2d_groups"), ("lora", "embedding"), ("lora", "experts"), ("lokr", "experts")]


@pytest.fixture(autouse=True)
def _record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "recorder_for", lambda _: OpRecorder(torch.device("cpu")))
    monkeypatch.setattr(adaptation, "recorder_for", lambda _: OpRecorder(torch.device("cpu")))


#: entries whose two adapters differ in sizes that are no rank, such as a number of tokens, and so have two recordings
TWO_RECORDINGS = {"osf_wide", "gralora_hybrid", "tinylora_drawn", "adamss", "trainable_tokens"}


@pytest.mark.few(6)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_swaps(entry: str, layer: str, tmp_path: Path) -> None:
    s = subject(entry, layer)
    with quiet():
        other = save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9)
        program, plain = s.compile(cuda_graphs=True), s.compile(other)
    args = s.args(5)
    for _ in range(3):
        assert_close(program(*args), s.expected(5), s.tolerance)
    for adapter in (other, s.directory, other):
        adaptc.swap(program, adapter)
        for _ in range(2):
            assert_close(program(*args), plain(*args) if adapter is other else s.expected(5), s.tolerance)
    assert not program.recorded.reasons
    assert program.recorded.count == 1 + (entry in TWO_RECORDINGS)


@pytest.mark.few(6)
@pytest.mark.parametrize("entry", [n for n, layer in CASES if layer == "linear"])
def test_swaps_at_several_layers(entry: str, tmp_path: Path) -> None:
    s = subject(entry, "linear")
    (recorded, _), x = at_several_layers(s, cuda_graphs=True)
    paths = [adaptc.save_adapter(p, tmp_path / str(i)) for i, p in enumerate(at_several_layers(s)[0])]
    with quiet():
        plain = {path: adaptc.compile(recorded.base, path) for path in paths}
    for path, p in [*plain.items()] * 3:
        adaptc.swap(recorded, path)
        for _ in range(2):
            assert_close(recorded(x), p(x), max(s.tolerance, 1e-8))
    assert not recorded.recorded.reasons
    assert recorded.recorded.count == 1 + (entry in TWO_RECORDINGS)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_groups", "embedding", "experts"])
def test_ranks_are_padded_to_few(kind: str) -> None:
    s = subject("lora", kind)
    (a,), op = s.program.adaptation.attachments, s.program.ops[s.attachment.id]
    found: dict[int, list[int]] = {}
    for rank in range(1, 34):
        method = dataclasses.replace(a.method, r=rank * op.groups)
        specs = method.slots(op)
        values = {a.slots[n]: torch.randn(spec.shape) for n, spec in specs.items()}
        padded = dict(zip(values, pad_to_buckets(list(values.values()), list(values), [a], {a.id: op}), strict=True))
        W, scale = torch.randn(op.shape), torch.tensor(0.7)
        expected, got = (a.method.weight(op, W, {n: v[a.slots[n]] for n in specs}, scale) for v in (values, padded))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        found[rank] = [padded[a.slots[n]].shape[spec.free[0]] for n, spec in specs.items() if spec.free]
    if op.groups == 1:
        each = max(op.experts, 1)
        assert [found[r] for r in (1, 8, 9, 16, 17, 32, 33)] == [[each * n] * 2 for n in (8, 8, 16, 16, 32, 32, 64)]
    assert len({tuple(sizes) for sizes in found.values()}) <= 5


@pytest.mark.parametrize("rank", [0, 16])
def test_what_has_a_bucket_s_rank_is_not_copied(rank: int) -> None:
    s = subject("lora", "linear")
    (a,), op = s.program.adaptation.attachments, s.program.ops[s.attachment.id]
    specs = dataclasses.replace(a.method, r=rank).slots(op)
    values = {a.slots[n]: torch.randn(spec.shape) for n, spec in specs.items()}
    padded = pad_to_buckets(list(values.values()), list(values), [a], {a.id: op})
    assert all(new is old for new, old in zip(padded, values.values(), strict=True))
