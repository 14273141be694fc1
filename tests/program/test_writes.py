"""What a write of a program or a package leaves on disk: the new file, or the old one and nothing else."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc import CheckpointError, LoraConfig
from adaptc.adapter_files import atomic_write, safe_torch_save

NET = """
import os, sys
sys.path.insert(0, {root!r})
import torch, adaptc
from torch import nn
torch.manual_seed({seed})
model, x = nn.Sequential(nn.Linear(300, 301), nn.Linear(301, 7)), torch.randn(2, 300)
program = torch.export.export(model, (x,))
"""


def net(seed: int = 0) -> adaptc.AdaptedProgram:
    torch.manual_seed(seed)
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    model = torch.nn.Sequential(torch.nn.Linear(300, 301), torch.nn.Linear(301, 7))
    return adaptc.compile(model, config, example_inputs=torch.randn(2, 300))


def content(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): (os.readlink(p) if p.is_symlink() else p.read_bytes(), p.stat().st_mode)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.parent.name.startswith(".")
    }


def run(code: str, seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", NET.format(root=os.getcwd(), seed=seed) + code], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{warm}
for limit in {limits}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for attempt in range(2):
        try:
            {call}
        except adaptc.CheckpointError as error:
            assert "File too large" in str(error) or "No space" in str(error), str(error)
        else:
            sys.exit(5)
"""


@pytest.mark.long
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    adaptc.save(net(), tmp_path / "a.pt2")
    before = content(tmp_path)
    call = f"adaptc.save(program, {str(tmp_path)!r} + ['/a.pt2', '/new.pt2'][attempt])"
    run(FULL.format(warm="", limits=[0, 30, 4_000, 100_000, 360_000], call=call), seed=1)
    assert content(tmp_path) == before
    assert next(iter(os.walk(tmp_path)))[1] == []


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_a_package(tmp_path: Path) -> None:
    adaptc.package(net(), tmp_path / "a.pt2")
    before = content(tmp_path)
    made = "config = adaptc.LoraConfig(r=3, target_modules=['0']); "
    made += "program = adaptc.compile(model, config, example_inputs=x); "
    call = f"adaptc.package(program, {str(tmp_path)!r} + ['/a.pt2', '/new.pt2'][attempt])"
    warm = made + f"adaptc.package(program, {str(tmp_path)!r} + '/warm.pt2')"
    run(FULL.format(warm=warm, limits=[100_000, 10_000], call=call), seed=1)
    (tmp_path / "warm.pt2").unlink()
    assert content(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_a_write_raises_comes_after_torch_is_done(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = net()
    adaptc.save(program, tmp_path / "a.pt2")
    before, write = content(tmp_path), os.write
    for count in (1, 2, 7, 30):
        left = [count]

        def failing(fd: int, data: Any, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise error
            return write(fd, data)

        monkeypatch.setattr(safe_torch_save.os, "write", failing)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            adaptc.save(net(1), tmp_path / "a.pt2")
        monkeypatch.undo()
        assert content(tmp_path) == before


SIGNALS = """
import itertools, signal
from adaptc.adapter_files import safe_torch_save
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background processes ignore it
folder = {folder!r}
path = os.path.join(folder, "a.pt2")
old = open(path, "rb").read()
raised = []
for stop in itertools.count({first}, {step}):
    left = stop

    def trace(frame, event, arg):
        return line if frame.f_code.co_filename == safe_torch_save.__file__ else None

    def line(frame, event, arg):
        global left
        left -= event == "line"
        if event == "line" and left == 0:
            signal.raise_signal(signal.{signal})
        return line

    sys.settrace(trace)
    try:
        adaptc.save(program, path)
    except KeyboardInterrupt:
        raised.append(stop)
    finally:
        sys.settrace(None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, stop
    assert os.listdir(folder) == ["a.pt2"], stop
    if left > 0:
        break
    assert (open(path, "rb").read() == old) == (raised[-1:] == [stop]), stop
print(len(raised))
"""


@pytest.mark.long
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 23], ids=str)
def test_signals_wait_until_torch_is_done(step: int, tmp_path: Path) -> None:
    adaptc.save(net(), tmp_path / "a.pt2")
    done = run(SIGNALS.format(folder=str(tmp_path), first=1, step=step, signal="SIGINT"), seed=1)
    assert int(done) > 400 // step


@pytest.mark.long
def test_handlers_that_do_not_raise_let_a_save_end(tmp_path: Path) -> None:
    adaptc.save(net(), tmp_path / "a.pt2")
    code = "import signal\ncame = []\nsignal.signal(signal.SIGTERM, lambda n, f: came.append(n))\n"
    code += SIGNALS.format(folder=str(tmp_path), first=5, step=41, signal="SIGTERM").replace(
        "old = ", "old = b'no' or "
    )
    done = run(code + "print(len(came)); adaptc.load(path)", seed=1)
    raised, came = map(int, done.split())
    assert raised == 0
    assert came > 8


STEPS: list[tuple[Any, str]] = [
    (os, "mkdir"),
    (os, "rename"),
    (os, "open"),
    (os, "write"),
    (os, "fsync"),
    (os, "replace"),
    (os, "chmod"),
    (torch.export, "save"),
]


def failing_at(count: int, real: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise OSError(errno.EIO, "disk gone")
        return real(*args, **kwargs)

    return call


@pytest.mark.few(4)
@pytest.mark.parametrize("step", range(len(STEPS)), ids=[n for _, n in STEPS])
def test_an_exception_at_any_step_changes_nothing(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, (place, name) = net(), STEPS[step]
    adaptc.save(program, tmp_path / "a.pt2")
    (tmp_path / "a.pt2").chmod(0o640)
    other = net(1)
    for path in (tmp_path / "a.pt2", tmp_path / "b.pt2"):
        for count in (*range(1, 12), *range(20, 300, 20)):
            before, calls = content(tmp_path), []
            with monkeypatch.context() as m:
                m.setattr(place, name, failing_at(count, getattr(place, name), calls))
                try:
                    adaptc.save(other, path)
                except CheckpointError:
                    assert content(tmp_path) == before
                else:
                    assert path.exists()
            # Where the removal of the stage was what failed, the next save removes it.
            assert name == "open" or not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
            if len(calls) < count:
                break
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert stat.S_IMODE((tmp_path / "a.pt2").stat().st_mode) == 0o640
    assert torch.equal(adaptc.load(tmp_path / "a.pt2")(torch.ones(2, 300)), other(torch.ones(2, 300)))


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    program = net()
    (tmp_path / "far").mkdir()
    adaptc.save(program, tmp_path / "far" / "real.pt2")
    (tmp_path / "far" / "real.pt2").chmod(0o604)
    (tmp_path / "link.pt2").symlink_to(Path("far") / "real.pt2")
    (tmp_path / "dangling.pt2").symlink_to(Path("far") / "new.pt2")
    other = net(1)
    for name in ("link.pt2", "dangling.pt2"):
        assert adaptc.save(other, tmp_path / name) == tmp_path / name
        assert (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"far", "link.pt2", "dangling.pt2"}
    assert {p.name for p in (tmp_path / "far").iterdir()} == {"real.pt2", "new.pt2"}
    assert stat.S_IMODE((tmp_path / "far" / "real.pt2").stat().st_mode) == 0o604
    x = torch.ones(2, 300)
    assert all(torch.equal(adaptc.load(tmp_path / n)(x), other(x)) for n in ("link.pt2", "dangling.pt2"))
    # A pipe stands for devices: no test may come near a real one, which root could replace.
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "far", tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="not a file"):
            adaptc.save(other, special)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_directory_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    program = net()
    path = adaptc.save(program, folder / os.fsdecode(b"\xff.pt2"))
    assert os.listdir(os.fsencode(folder)) == [b"\xff.pt2"]
    assert path.stat().st_size > 360_000
    (tmp_path / "copy.pt2").write_bytes(path.read_bytes())
    assert torch.equal(adaptc.load(tmp_path / "copy.pt2")(torch.ones(2, 300)), program(torch.ones(2, 300)))
    for safe in (True, False):
        adaptc.save_adapter(program, folder / "adapter", safe_serialization=safe)
        adaptc.swap(program, folder / "adapter")


KILLED = """
at = {path!r}
adaptc.save(program, at)
open(at + ".ready", "w").close()
while True:
    adaptc.save(program, at)
"""


def killed(tmp_path: Path, kills: int) -> None:
    """A process that saves all the time, killed at random moments: the file is always complete."""
    path, x = tmp_path / "a.pt2", torch.ones(2, 300)
    code = NET.format(root=os.getcwd(), seed=1) + KILLED.format(path=str(path))
    rng = random.Random(3)
    expected: Any = None
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            while not (tmp_path / "a.pt2.ready").exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            process.send_signal(signal.SIGKILL)
        (tmp_path / "a.pt2.ready").unlink()
        found = adaptc.load(path)(x)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    adaptc.save(net(), path)
    # A process that is killed before it has locked its stage leaves an empty directory, which goes after a day.
    begun = [p for p in tmp_path.iterdir() if p.name.startswith(atomic_write._UNLOCKED_PREFIX)]
    assert all(not any(p.iterdir()) for p in begun)
    assert [p.name for p in tmp_path.iterdir() if p not in begun] == ["a.pt2"]


@pytest.mark.long
def test_killed_saves(tmp_path: Path) -> None:
    killed(tmp_path, 1)


@pytest.mark.slow
def test_many_killed_saves(tmp_path: Path) -> None:
    killed(tmp_path, 24)


def test_leftovers_go_and_what_is_alive_stays(tmp_path: Path) -> None:
    dead = tmp_path / f"{atomic_write.STAGE_PREFIX}{atomic_write._boot_id()}-0"
    strange = tmp_path / f"{atomic_write.STAGE_PREFIX}0123456789ab-0"  # of another machine, a moment ago
    old = tmp_path / f"{atomic_write.STAGE_PREFIX}0123456789ab-1"
    commit = tmp_path / f"{atomic_write.STAGE_PREFIX}{atomic_write._boot_id()}-1"  # with the only copy of an adapter
    for p in (dead, strange, old, commit / atomic_write.OLD_FILES_DIR):
        p.mkdir(parents=True)
        (p / "half").write_bytes(b"x")
    for p in (old / "half", old):
        os.utime(p, (1e9, 1e9))
    program = net()
    with atomic_write.open_stage(tmp_path) as alive:
        (alive / "mine").write_bytes(b"y")
        adaptc.save(program, tmp_path / "a.pt2")
        assert {p.name for p in tmp_path.iterdir()} == {"a.pt2", strange.name, alive.name, commit.name}
        adaptc.save_adapter(program, tmp_path)
        assert not commit.exists()
        assert (alive / "mine").read_bytes() == b"y"


def test_programs_are_saved_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    programs = [net(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            list(pool.map(lambda i: adaptc.save(programs[i], tmp_path / f"{i}.pt2"), range(3)))
            list(pool.map(lambda i: adaptc.save_adapter(programs[i], tmp_path / str(i)), range(3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "0.pt2", "1", "1.pt2", "2", "2.pt2"]
    x = torch.ones(2, 300)
    for i, program in enumerate(programs):
        assert torch.equal(adaptc.load(tmp_path / f"{i}.pt2")(x), program(x))
