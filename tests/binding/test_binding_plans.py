"""Bindings made by recipe are those made the long way, and what a recipe may not decide is never left to one."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.adapter_files import safetensors_reader as _layouts
from adaptc.adapter_files.stable_read import OpenedFile
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding_plan_cache import MAX_STRUCTURES
from adaptc.errors import CheckpointError, SwapError
from tests.support.custom_models import UpDown
from tests.support.method_table import ENTRIES
from tests.support.subject import FILE, save_random_adapter, subject

LONG = "adaptc.binding.bind._match_sites"


def same(found: Any, expected: Any) -> None:
    """Two bindings that no caller could tell apart."""
    assert list(found.values) == list(expected.values)
    for fqn, t in expected.values.items():
        f = found.values[fqn]
        assert (type(f), f.dtype, f.requires_grad) == (type(t), t.dtype, t.requires_grad), fqn
        assert torch.equal(f, t), fqn
    assert (found.methods, found.name, found.config.to_dict()) == (
        expected.methods,
        expected.name,
        expected.config.to_dict(),
    )
    assert (found.changed_base, found.extra_tensors, found.joint_adapters) == (
        expected.changed_base,
        expected.extra_tensors,
        expected.joint_adapters,
    )


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("not by recipe")


@pytest.mark.few(12)
@pytest.mark.parametrize("entry", [e.name for e in ENTRIES])
def test_every_method(entry: str, tmp_path: Path) -> None:
    s = subject(entry, "linear")
    paths = [save_random_adapter(s, s.config(), tmp_path / str(i), seed=i) for i in range(3)]
    program, fresh = s.compile(s.config()), [s.compile(s.config()) for _ in paths]
    for path, other in zip(paths, fresh, strict=True):
        same(bind_adapter(program, path), bind_adapter(other, path))
        state = dict(load_file(path / FILE))
        same(bind_adapter(program, state), bind_adapter(other, state))
    adaptc.swap(program, paths[2])
    torch.testing.assert_close(program(*s.args(5)), s.compile(paths[2])(*s.args(5)), rtol=1e-13, atol=1e-14)


def compiled(dtype: torch.dtype = torch.float32, **options: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **options})
    return adaptc.compile(UpDown().to(dtype), config, example_inputs=torch.randn(3, 7, dtype=dtype))


def written(path: Path, seed: int = 0, **options: Any) -> Path:
    program = compiled(**options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for v in program.binding.values.values():
            if v.requires_grad:
                v.normal_()
    return adaptc.save_adapter(program, path)


def state(seed: int, rank: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {"up": (5, 7), "down": (3, 5)}
    a = {f"{n}.lora_A.weight": torch.randn(rank, i, generator=g) for n, (_, i) in sizes.items()}
    return a | {f"{n}.lora_B.weight": torch.randn(o, rank, generator=g) for n, (o, _) in sizes.items()}


@pytest.mark.long
def test_the_next_adapter_of_a_structure_goes_by_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = compiled(), torch.randn(4, 7)
    paths = [written(tmp_path / str(i), i) for i in range(2)]
    expected = [compiled().bind(p)(x) for p in paths]
    adaptc.swap(program, paths[0])
    adaptc.swap(program, state(1))
    monkeypatch.setattr(LONG, never)
    for path, out in zip(paths, expected, strict=True):
        assert str(path) in str(adaptc.swap(program, path))
        assert torch.equal(program(x), out)
    adaptc.swap(program, state(2))
    monkeypatch.undo()
    assert torch.equal(program(x), compiled().bind(state(2))(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_are_copied_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    program, copies, clone = compiled(dtype), [], Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **kw: copies.append(t) or clone(t, **kw))
    for seed in (1, 2, 3):  # the long way, then by recipe
        tensors = state(seed)
        sums = sorted(float(t.double().sum()) for t in tensors.values())
        copies.clear()
        binding = bind_adapter(program, tensors)
        if seed > 1:
            assert len(copies) == (0 if dtype == torch.float64 else 4)  # to float64 the cast is the copy
        for t in tensors.values():
            t.zero_()
        assert sorted(float(v.double().sum()) for v in binding.values.values() if v.ndim) == sums


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_depends_on_values_is_checked_for_each(tmp_path: Path, bad: float) -> None:
    program = compiled()
    path = written(tmp_path / "a")
    for _ in range(2):
        adaptc.swap(program, path)
        adaptc.swap(program, state(1))
    current, x = program.binding, torch.randn(2, 7)
    expected = program(x)
    broken = state(3)
    broken["down.lora_B.weight"][1, 1] = bad
    with pytest.raises(CheckpointError, match=r"down\.lora_B\.weight"):
        adaptc.swap(program, broken)
    tensors = load_file(path / FILE)
    key = next(k for k in tensors if "up.lora_A" in k)
    tensors[key][0, 3] = bad
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up\.lora_A\.weight"):
        adaptc.swap(program, path)
    assert program.binding is current
    assert torch.equal(program(x), expected)


def test_large_finite_values_are_no_error() -> None:
    # Their sum overflows, which is how infinity is looked for first.
    program = compiled()
    for _ in range(2):
        adaptc.swap(program, {k: torch.full_like(t, 3e38) for k, t in state(1).items()})


@pytest.mark.long
def test_whatever_else_decides_is_part_of_the_structure(tmp_path: Path) -> None:
    x = torch.randn(4, 7)
    program = compiled()
    seen: list[tuple[Any, ...]] = [
        (written(tmp_path / "a"), None),
        (written(tmp_path / "alpha", lora_alpha=5), None),
        (written(tmp_path / "rank", r=5), None),
        (written(tmp_path / "rslora", r=5, use_rslora=True), None),
        (written(tmp_path / "pattern", alpha_pattern={"up": 3}), None),
        (written(tmp_path / "one", target_modules=["up"]), None),
        (state(1), None),
        (state(1, rank=4), None),
        (state(1, rank=4), LoraConfig(r=4, lora_alpha=3)),
        ({k: v for k, v in state(1).items() if "up" in k}, None),
        ({f"base_model.model.{k}": v for k, v in state(1).items()}, None),
        ({k: v.bfloat16() for k, v in state(1).items()}, None),
    ]
    expected = [compiled().bind(a, config=c)(x) for a, c in seen]
    for _ in range(2):
        for (adapter, config), out in zip(seen, expected, strict=True):
            assert torch.equal(program.bind(adapter, config=config)(x), out)


def test_what_does_not_fit_is_refused_as_ever() -> None:
    program = compiled()
    adaptc.swap(program, state(1))
    for _ in range(2):
        with pytest.raises(SwapError, match="no slot"):
            adaptc.swap(program, state(1) | {"head.lora_A.weight": torch.ones(2, 7)})
        with pytest.raises(CheckpointError, match="shape"):
            adaptc.swap(program, state(1) | {"up.lora_A.weight": torch.ones(2, 6)})
        with pytest.raises(CheckpointError, match="missing"):
            adaptc.swap(program, {k: v for k, v in state(1).items() if k != "up.lora_A.weight"})


def test_training_takes_tensors_of_its_own(tmp_path: Path) -> None:
    program = compiled()
    tensors = state(1)
    adaptc.swap(program, tensors)
    binding = bind_adapter(program, tensors, trainable=True)
    memory = {t.data_ptr() for t in tensors.values()}
    assert all(v.requires_grad and v.data_ptr() not in memory for v in binding.values.values() if v.ndim)


def test_few_are_kept() -> None:
    program = compiled()
    for rank in range(1, MAX_STRUCTURES + 4):
        adaptc.swap(program, state(1, rank))
    known = program.binding_plans.plans
    assert len(known) == MAX_STRUCTURES
    assert all(known.values())


def test_a_binding_of_another_program_is_refused() -> None:
    other = compiled(target_modules=["up"])
    with pytest.raises(SwapError, match="other sites"):
        adaptc.swap(compiled(), other.binding)


# -- files that are read by a layout that is known


def loaded(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    with OpenedFile(path) as file:
        return _layouts.load_tensors(file)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for k, t in expected.items():
        assert (found[k].dtype, found[k].shape) == (t.dtype, t.shape)
        assert torch.equal(found[k], t)


def mixed(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {f"half.{i}": torch.randn(3, i + 1, generator=g).bfloat16() for i in range(3)}
    out |= {f"full.{i}": torch.randn(i + 2, 5, generator=g) for i in range(3)}
    return out | {"ids": torch.randint(9, (4,), generator=g), "flag": torch.tensor([True, False])}


def test_files_of_one_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file(mixed(i), file)
    equal(loaded(files[0])[0], load_file(files[0]))
    monkeypatch.setattr(_layouts, "_parse_layout", never)
    for file in files:
        found, runs = loaded(file)
        equal(found, load_file(file))
        floats = sum(t.numel() for t in found.values() if t.is_floating_point())
        assert sum(t.numel() for t in runs) == floats
        assert len(runs) <= 2
        assert {t.dtype for t in runs} == {torch.bfloat16, torch.float32}


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(mixed(1), file)
    for _ in range(2):
        found, _ = loaded(file)
        found["full.0"].zero_()
        found["half.1"].fill_(7)
    equal(load_file(file), mixed(1))


def test_a_file_that_was_replaced_keeps_what_was_read(tmp_path: Path) -> None:
    file, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(mixed(1), file)
    loaded(file)
    first, _ = loaded(file)
    expected = {k: copy.deepcopy(t) for k, t in first.items()}
    save_file(mixed(2), new)
    os.replace(new, file)
    second, _ = loaded(file)
    equal(first, expected)
    equal(second, load_file(file))
    assert not torch.equal(first["full.0"], second["full.0"])


def test_damaged_files_are_refused_whatever_is_known(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(mixed(1), file)
    loaded(file)
    whole = file.read_bytes()
    for content in (whole[:-3], whole + b"abc", whole[:40], b"", b"\0" * 8, whole[:8] + b"{" * 30 + whole[38:]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            loaded(file)
    file.write_bytes(whole)
    equal(loaded(file)[0], load_file(file))


def raw(path: Path, header: dict[str, Any], data: bytes, pad: int = 0) -> Path:
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_data_is_aligned_in_memory_or_left_to_the_library(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    data = struct.pack("<2f", 1.5, -2.5)
    for pad in range(4):
        file = raw(tmp_path / f"{pad}.safetensors", header, data, pad)
        for _ in range(2):
            found, runs = loaded(file)
            assert found["a"].tolist() == [1.5, -2.5]
            assert found["a"].data_ptr() % 64 == 0
            assert len(runs) == 1
    header = {"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}} | {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    }
    for _ in range(2):
        found, runs = loaded(raw(tmp_path / "odd.safetensors", header, b"\7" + data))
        assert (found["a"].tolist(), found["b"].tolist(), runs) == ([7], [1.5, -2.5], [])
