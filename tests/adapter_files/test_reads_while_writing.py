"""Reads of adapters that somebody writes to: bound adapters keep their values, and what is read is of one write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc import CheckpointError
from adaptc.adapter_files import stable_read
from adaptc.adapter_files.directory import read_adapter, write_adapter
from tests.support.adapter_files import BIN, CONFIG, LORA, SAFE, some_tensors, tensors_are_equal
from tests.support.custom_models import UpDown
from tests.support.turns import Turns

CONFIG_OF = adaptc.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)


def program(seed: int = 0) -> adaptc.AdaptedProgram:
    torch.manual_seed(seed)
    return adaptc.compile(UpDown(), CONFIG_OF, example_inputs=torch.randn(3, 7))


OVERWRITTEN = """
import os, sys
sys.path.insert(0, {root!r})
import torch, adaptc
from tests.support.custom_models import UpDown
torch.manual_seed(0)
x, where = torch.randn(3, 7), {path!r}
config = adaptc.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
for fuse in (True, False):
    for safe in (True, False):
        first = adaptc.compile(UpDown(), config, example_inputs=x, fuse=fuse)
        adaptc.save_adapter(first, where, safe_serialization=safe)
        again = adaptc.compile(UpDown(), where, example_inputs=x, fuse=fuse)
        for _ in range(3):
            adaptc.swap(first, where)
        bound = first.bind(where)
        programs = (first, again, bound)
        expected = [p(x) for p in programs]
        file = next(os.path.join(where, n) for n in os.listdir(where) if n.startswith("adapter_model"))
        before = [open(file, "rb").read(), os.stat(file).st_size]
        with open(file, "r+b") as f:
            f.seek(before[1] // 2)
            f.write(b"\\x41" * (before[1] - before[1] // 2))
        assert all(torch.equal(p(x), e) for p, e in zip(programs, expected))
        os.truncate(file, 9)
        assert all(torch.equal(p(x), e) for p, e in zip(programs, expected))
        merged = adaptc.merge(first)
        torch.testing.assert_close(merged(x), expected[0])
        assert file not in open("/proc/self/maps").read()
        os.unlink(file)
"""


@pytest.mark.long
def test_what_becomes_of_a_file_does_not_reach_what_was_bound(tmp_path: Path) -> None:
    code = OVERWRITTEN.format(root=os.getcwd(), path=str(tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])


@pytest.mark.parametrize("form", ["swap", "bind", "adapter file", "trained"])
def test_tensors_that_were_bound_may_be_edited(form: str, tmp_path: Path) -> None:
    x, p = torch.randn(4, 7), program()
    tensors = {k: t.clone() for k, t in load_file(adaptc.save_adapter(p, tmp_path) / SAFE).items()}
    for _ in range(3):
        given: Any = read_adapter(tmp_path) if form == "adapter file" else tensors
        bound = p
        if form == "bind":
            bound = p.bind(given)
        elif form == "trained":
            torch.manual_seed(0)
            bound = adaptc.compile(UpDown(), CONFIG_OF, example_inputs=torch.randn(3, 7), training=True)
            adaptc.swap(bound, given)
        else:
            adaptc.swap(p, given)
        expected = bound(x).detach()
        for t in (given.tensors if form == "adapter file" else given).values():
            t.mul_(3)
        assert torch.equal(bound(x), expected)
        if bound is p:
            # To the rounding of the largest: each round makes the numbers nine times as large.
            torch.testing.assert_close(adaptc.merge(p)(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -- torn reads --------------------------------------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
    """``act`` happens when the file that is opened ``at`` th has been opened."""
    real, opened = stable_read.os.open, []

    def opens(path: Any, flags: int, *more: Any, **kw: Any) -> int:
        fd = real(path, flags, *more, **kw)
        if str(path).endswith((CONFIG, SAFE, BIN)) and flags == stable_read._OPEN_FLAGS:
            opened.append(path)
            if len(opened) == at:
                act()
        return fd

    monkeypatch.setattr(stable_read.os, "open", opens)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_that_is_replaced_under_a_read(
    at: int, safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    between(monkeypatch, at, lambda: write_adapter(tmp_path, LORA | {"r": 9}, some_tensors(2), safe_serialization=safe))
    got = read_adapter(tmp_path)
    assert got.config["r"] == 9
    assert tensors_are_equal(got.tensors, some_tensors(2))


@pytest.mark.parametrize("name", [SAFE, BIN])
def test_a_file_that_is_cut_short_under_a_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1), safe_serialization=name == SAFE)
    size = (tmp_path / name).stat().st_size
    between(monkeypatch, 2, lambda: os.truncate(tmp_path / name, size - 20))
    with pytest.raises(CheckpointError, match=name):
        read_adapter(tmp_path)


def test_a_file_that_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    monkeypatch.setattr(stable_read, "RETRY_DELAYS", (0.001, 0.001))
    real = stable_read.OpenedFile.check_unchanged

    def check(self: stable_read.OpenedFile) -> None:
        self.path.write_bytes(self.path.read_bytes() + b" ")
        real(self)

    monkeypatch.setattr(stable_read.OpenedFile, "check_unchanged", check)
    with pytest.raises(CheckpointError, match="kept changing while it was read"):
        read_adapter(tmp_path)


def test_no_other_adapter_is_taken_for_one_that_a_write_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    write_adapter(tmp_path, LORA, some_tensors(3), adapter_name="other")
    real, seen, said = os.replace, [], []

    def replace(src: Any, dst: Any) -> None:
        real(src, dst)
        try:
            seen.append(read_adapter(tmp_path).config["r"])
        except CheckpointError as error:
            said.append(str(error))

    monkeypatch.setattr(stable_read, "RETRY_DELAYS", (0.001,))
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        write_adapter(tmp_path, LORA | {"r": 9}, some_tensors(2))
    assert said
    assert all("is being written to" in s for s in said)
    assert seen == [9, 9]  # when the config had come, and the model card


WRITER = """
import sys
sys.path.insert(0, {root!r})
import torch
from safetensors.torch import load_file
from adaptc.adapter_files.directory import read_adapter, write_adapter
a, b = (read_adapter({path!r} + n) for n in ("/a", "/b"))
n = 0
while True:
    for one in (a, b):
        write_adapter({path!r} + "/hot", one.config, one.tensors, safe_serialization=n % 5 != 4)
        n += 1
"""


def inode(path: Path) -> int | None:
    """None where there is no such file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def hot(tmp_path: Path, seconds: float, least: int) -> int:
    """Swaps from a directory that another process writes two adapters to; each must be one of the two."""
    p, x, out = program(), torch.randn(4, 7), {}
    for name, alpha in (("a", 4), ("b", 12)):
        torch.manual_seed(alpha)
        one = adaptc.compile(UpDown(), CONFIG_OF.replace(lora_alpha=alpha), example_inputs=x)
        where = adaptc.save_adapter(one, tmp_path / name)
        adaptc.swap(p, where)
        out[name] = p(x)
    adaptc.save_adapter(p, tmp_path / "hot")
    code, accepted, refused = WRITER.format(root=os.getcwd(), path=str(tmp_path)), 0, []
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        try:
            first = inode(tmp_path / "hot" / SAFE)
            while writer.poll() is None and inode(tmp_path / "hot" / SAFE) == first:
                pass
            turns = Turns(seconds, lambda: accepted > least)
            while turns.go_on():
                assert writer.poll() is None
                try:
                    adaptc.swap(p, tmp_path / "hot")
                except CheckpointError as error:
                    refused.append(str(error))
                    continue
                accepted += 1
                found = p(x)
                assert any(torch.equal(found, o) for o in out.values()), accepted
        finally:
            writer.kill()
    assert all("kept changing" in r or "is being written to" in r for r in refused), refused
    assert accepted > 3 * len(refused)
    return accepted


@pytest.mark.long
def test_a_hot_reload_is_never_torn(tmp_path: Path) -> None:
    assert hot(tmp_path, 2.0, least=0) > 0


@pytest.mark.slow
def test_long_hot_reloads_are_never_torn(tmp_path: Path) -> None:
    assert hot(tmp_path, 60.0, least=100) > 100


def test_links_and_permissions_of_an_adapter_stay(tmp_path: Path) -> None:
    far = tmp_path / "far"
    write_adapter(far, LORA, some_tensors(1))
    (far / SAFE).chmod(0o604)
    here = tmp_path / "here"
    here.mkdir()
    for name in (CONFIG, SAFE):
        (here / name).symlink_to(far / name)
    (tmp_path / "dir").symlink_to(here)
    for config in (LORA, LORA | {"r": 9}):
        for where in (here, tmp_path / "dir"):
            write_adapter(where, config, some_tensors(2))
            assert (here / CONFIG).is_symlink()
            assert (here / SAFE).is_symlink()
            assert (tmp_path / "dir").is_symlink()
            for place in (here, far, tmp_path / "dir"):
                assert tensors_are_equal(read_adapter(place).tensors, some_tensors(2))
                assert read_adapter(place).config["r"] == config["r"]
    assert (far / SAFE).stat().st_mode & 0o777 == 0o604
