"""Damaged, forged and hostile adapter files, and what a read may cost: tensors or a CheckpointError, nothing else."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from adaptc.adapter_files.directory import check_finite, file_key, read_adapter, read_config, write_adapter
from adaptc.errors import CheckpointError
from tests.support.adapter_files import BIN, CONFIG, LORA, SAFE, some_tensors, tensors_are_equal
from tests.support.cover import examples

# --- damage and attacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", LORA, some_tensors())


def header(tensors: dict, pad: int = 0) -> bytes:
    text = json.dumps(tensors).encode() if isinstance(tensors, dict) else tensors
    return struct.pack("<Q", len(text)) + text + b"\0" * pad


F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ATTACKS = {
    "empty": (b"", "0 bytes long"),
    "seven-bytes": (b"\x01" * 7, "too short"),
    "length-bomb": (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
    "length-100M": (struct.pack("<Q", 99_000_000) + b"{}", "claims 99000000"),
    "no-json": (header(b"{{{{"), "safetensors"),  # pyright: ignore
    "json-list": (header(b"[1, 2]"), "safetensors"),  # pyright: ignore
    "deep-json": (header(b"[" * 100_000), "safetensors"),  # pyright: ignore
    "past-the-end": (header({"a": F32}, 8), "safetensors"),
    "size-lie": (header({"a": F32 | {"shape": [2**40, 2**40]}}, 24), "safetensors"),
    "overlap": (header({"a": F32, "b": F32}, 24), "safetensors"),
    "backwards": (header({"a": F32 | {"data_offsets": [24, 0]}}, 24), "safetensors"),
    "negative": (header({"a": F32 | {"shape": [-2, -3]}}, 24), "safetensors"),
    "hole": (header({"a": F32 | {"data_offsets": [8, 32]}}, 32), "safetensors"),
    "dtype": (header({"a": F32 | {"dtype": "F7"}}, 24), "safetensors"),
    "html": (b"<!doctype html><p>404 Not Found</p>" * 9, "another format"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    "pickle": (pickle.dumps({"a": 1}) * 3, "another format"),
    "no-tensors": (header({}), "no tensors"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_safetensors(attack: str, good: Path) -> None:
    data, match = ATTACKS[attack]
    (good / SAFE).write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as info:
        read_adapter(good)
    assert str(good / SAFE) in str(info.value)


def test_truncation_anywhere(good: Path) -> None:
    whole = (good / SAFE).read_bytes()
    for n in {0, 1, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        (good / SAFE).write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=SAFE):
            read_adapter(good)


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), safe=st.booleans())
def test_flipped_bytes_never_escape(data: st.DataObject, safe: bool, tmp_path: Path) -> None:
    """Whatever byte flips do to a file, the answer is tensors or a CheckpointError, nothing else."""
    where, name = tmp_path / str(safe), SAFE if safe else BIN
    if not (where / "first").exists():
        write_adapter(where, LORA, some_tensors(), safe_serialization=safe)
        (where / name).rename(where / "first")
    raw = bytearray(whole := (where / "first").read_bytes())
    for at in data.draw(st.lists(st.integers(0, min(len(raw), 900) - 1), max_size=3)):
        raw[at] = data.draw(st.integers(0, 255))
    (where / name).write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_adapter(where).tensors
        except CheckpointError as error:
            assert str(where) in str(error)  # noqa: PT017
            assert raw != whole
        else:
            assert found
            assert all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in found.items())
            assert raw != whole or tensors_are_equal(found, some_tensors())


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(zipped: bool, good: Path, tmp_path: Path) -> None:
    (good / SAFE).unlink()
    bomb = {"base_model.model.a.b": torch.ones(2, 3), "x": Bomb(str(tmp_path / "ran"))}
    torch.save(bomb, good / BIN, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin was refused.*mkdir.*safetensors"):
        read_adapter(good)
    assert not (tmp_path / "ran").exists()
    (good / BIN).write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="was refused"):
        read_adapter(good)
    assert not (tmp_path / "ran").exists()


def test_old_torch_format_is_read(good: Path) -> None:
    (good / SAFE).unlink()
    stored = {file_key(k, "LORA"): nn.Parameter(t) for k, t in some_tensors(6).items()}
    torch.save(stored, good / BIN, _use_new_zipfile_serialization=False)
    got = read_adapter(good).tensors
    assert tensors_are_equal(got, some_tensors(6))
    assert not any(t.requires_grad for t in got.values())


def test_bad_bin_files(good: Path) -> None:
    (good / SAFE).unlink()
    key = "base_model.model.a.b"
    for value, match in [
        ([torch.ones(2)], "holds a list"),
        ({"state_dict": {key: torch.ones(2)}}, "'state_dict' is str -> dict"),
        ({3: torch.ones(2)}, "3 is int -> Tensor"),
        ({key: torch.ones(1).expand(2**20, 2**20)}, "not a plain dense tensor"),
        ({key: torch.eye(3).to_sparse()}, "not a plain dense tensor|was refused"),
    ]:
        torch.save(value, good / BIN)
        with pytest.raises(CheckpointError, match=match) as info:
            read_adapter(good)
        assert str(good / BIN) in str(info.value)
    torch.save({key: torch.zeros(1000)}, good / BIN)
    whole = (good / BIN).read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 30):
        (good / BIN).write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="was refused"):
            read_adapter(good)
    (good / BIN).write_bytes(whole)
    with zipfile.ZipFile(good / BIN) as z:
        parts = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(good / BIN, "w", zipfile.ZIP_DEFLATED) as z:
        for name, part in parts.items():
            z.writestr(name, part)
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_adapter(good)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b'{"peft_type": "LORA",', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'["LORA"]', "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"r": 8}', "'peft_type' must name the method.*found None"),
        (b'{"peft_typ": "LORA"}', "Is 'peft_typ' a misspelling"),
        (b'{"peft_type": 5}', "found 5"),
        (b" " * (16 << 20) + b"{}", "never that large"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_bad_configs(text: bytes, match: str, good: Path) -> None:
    (good / CONFIG).write_bytes(text)
    for read in (read_config, read_adapter):
        with pytest.raises(CheckpointError, match=match) as info:
            read(good)
        assert str(good / CONFIG) in str(info.value)


def test_missing_files_are_listed(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Close names in .*: adapter"):
        read_adapter(tmp_path / "adaptor")
    with pytest.raises(CheckpointError, match=r"no adapter directory.*contains: adapter/.*snapshot_download"):
        read_adapter(tmp_path / "org" / "zzz")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        read_adapter(good / SAFE)
    with pytest.raises(CheckpointError):
        read_adapter(tmp_path / ("n" * 5000))
    (good / SAFE).rename(good / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither.*model\.safetensors"):
        read_adapter(good)
    (good / CONFIG).rename(good / "config.json")
    with pytest.raises(CheckpointError, match=r"holds no adapter.*config\.json, model\.safetensors"):
        read_config(good)
    (good / "model.safetensors").rename(good / SAFE)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(good)


def test_prefers_safetensors(good: Path) -> None:
    torch.save({"base_model.model.other.w": torch.ones(2)}, good / BIN)
    assert tensors_are_equal(read_adapter(good).tensors, some_tensors())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", [SAFE, BIN])
def test_a_read_copies_once_and_maps_nothing(name: str, tmp_path: Path) -> None:
    """In a fresh process, whose peak memory is only this read's: 200 MB of tensors take little more than that."""
    write_adapter(tmp_path, LORA, {"l1.lora_A.weight": torch.ones(50, 1_000_003)}, safe_serialization=name == SAFE)
    code = f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
from adaptc.adapter_files.directory import read_adapter, torch
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
torch.ones(2, 3).sum()
before = peak()
a = read_adapter({str(tmp_path)!r})
assert a.nbytes == 200_000_600 and peak() - before < 240_000_000, peak() - before
assert a.tensors["l1.lora_A.weight"][49, 1_000_002] == 1
assert {str(tmp_path)!r} not in open("/proc/self/maps").read()
assert not [f for f in os.listdir("/proc/self/fd") if {str(tmp_path)!r} in os.path.realpath("/proc/self/fd/" + f)]
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finite(dtype: torch.dtype, value: float) -> None:
    fine = {
        "a.x": torch.ones(3, 5).to(dtype),
        "a.n": torch.tensor([2**62]),
        "a.z": torch.empty(0, 3),
        "a.s": torch.tensor(1.0),
    }
    check_finite(fine)
    bad = torch.ones(3, 5)
    bad[1, 4] = value
    with pytest.raises(CheckpointError, match=r"some/file: 'a\.y' \(3, 5\) holds 1 .*\(1, 4\)"):
        check_finite(fine | {"a.y": bad.to(dtype)}, "some/file")
