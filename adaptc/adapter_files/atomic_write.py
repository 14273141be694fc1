"""Write files so that either the new or the old ones are there: make them in a stage beside their place, then rename.

An exception leaves the place as it was, with nothing left behind. A killed process leaves its stage, which the next
write to the place removes.

A stage is a hidden directory with a lock (``flock``) that its writer holds. The lock ends with the process, so a stage
whose lock can be taken belongs to nobody. Locks of other machines may be invisible here, so a stage's name begins with
an id of the boot it was made under. A stage of another boot counts as dead when nothing in it has changed for a day.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from adaptc.errors import CheckpointError

try:
    import fcntl
except ImportError:  # absent on Windows, where stages are removed only after a day
    fcntl = None

STAGE_PREFIX = ".adaptc-write-"
#: the prefix of a stage's name until it is locked
_UNLOCKED = ".adaptc-begin-"
#: the directory in a stage to which a commit moves the files that it replaces
OLD = "old"
_DAY = 24 * 3600.0
#: the paths that writes of the current block may make but not replace
_only_new: ContextVar[tuple[Path, ...]] = ContextVar("only_new", default=())


class Stranded(CheckpointError):
    """An error of a commit that failed and could not put the old files back. They are in the stage, which stays."""


@contextmanager
def staging(near: Path) -> Iterator[Path]:
    """Run the block with a stage inside ``near``, and remove the stage afterwards.

    The stage lies inside ``near`` and not beside it, since an adapter directory may be a mount point and renames must
    stay on one filesystem. Missing directories down to ``near`` are made, and removed again when the block raises.
    """
    made: list[Path] = []
    stage, lock = near / f"{STAGE_PREFIX}{_boot()}-{uuid.uuid4().hex}", -1
    try:
        for p in reversed([near, *near.parents]):
            if not p.exists():
                made.append(p)
                p.mkdir(exist_ok=True)
        remove_abandoned(near)
        lock = _begin(stage)
        yield stage
    except Stranded:
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for p in reversed(made):
            with suppress(OSError):
                p.rmdir()
        raise
    else:
        shutil.rmtree(stage, ignore_errors=True)
    finally:
        if lock >= 0:
            os.close(lock)


def _begin(stage: Path) -> int:
    """Make a stage and return the descriptor of its lock, or -1 where there are no locks.

    The stage gets its name only once it is locked.
    """
    begun = stage.with_name(_UNLOCKED + stage.name.removeprefix(STAGE_PREFIX))
    lock = -1
    try:
        begun.mkdir()
        if fcntl is not None:
            lock = os.open(begun, os.O_RDONLY)
            with suppress(OSError):  # some network filesystems have no locks, for cleaners neither
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(begun, stage)
    except BaseException:
        if lock >= 0:
            os.close(lock)
        with suppress(OSError):
            begun.rmdir()
        raise
    return lock


@contextmanager
def replacing(path: Path, name: str = "new") -> Iterator[Path]:
    """Run the block with the path of a new file called ``name``, which then becomes the file ``path``.

    A symbolic link stays one, and its target is written. An existing file's permissions are kept; a new file follows
    the umask. Raises CheckpointError where ``path`` is no place for a file. Errors of the block and of the OS pass
    through.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot save to {path}: the directory {target.parent} does not exist")
    if target.exists() and not target.is_file():
        raise CheckpointError(f"cannot save to {path}: it is not a file. Choose another name.")
    with staging(target.parent) as stage:
        new = stage / name
        yield new
        sync(new)
        place(new, target)
        sync_names(target.parent)


@contextmanager
def only_new(path: Path) -> Iterator[None]:
    """Run the block so that its writes may make ``path``, a file or a directory, but replace nothing there.

    Writes raise CheckpointError where another process has made ``path`` by then.
    """
    before = _only_new.get()
    token = _only_new.set((*before, Path(os.path.realpath(path))))
    try:
        yield
    finally:
        _only_new.reset(token)


def must_be_new(target: Path) -> bool:
    """Return whether a write must not replace ``target`` (see :func:`only_new`)."""
    real = Path(os.path.realpath(target))
    return any(path == real or path in real.parents for path in _only_new.get())


def check_new(target: Path) -> None:
    """Raise CheckpointError where something is at ``target`` that must not be replaced."""
    if must_be_new(target) and os.path.lexists(target):
        raise _taken(target)


def _taken(target: Path) -> CheckpointError:
    return CheckpointError(f"{target} was made by somebody else in the meantime, and stays. Choose another name.")


def put(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``.

    Raises CheckpointError, with both left as they were, where a file is there that must not be replaced.
    """
    if not must_be_new(target):
        os.replace(new, target)
        return
    try:
        os.link(new, target)  # a link, unlike a rename, fails where there is a file
        new.unlink()
    except FileExistsError:
        raise _taken(target) from None
    except OSError:  # a filesystem without links: an empty file holds the name for as long as the rename takes
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise _taken(target) from None
        os.replace(new, target)


def commit(stage: Path, target: Path, *, bodies: Sequence[str], head: str, stale: Sequence[str]) -> None:
    """Move the files ``bodies`` (weights) and ``head`` (config) of ``stage`` into ``target`` as one change.

    The files ``stale`` of ``target`` are dropped. The head makes the directory readable, so a head and bodies of
    different writes must never be seen together. When the head does not change, there is one body and nothing is stale,
    one rename is the whole change. Otherwise the old head leaves first and the new one arrives last. An exception puts
    everything back. A process killed in between leaves a directory without a head, which every reader refuses. Links
    stay links.
    """
    old = stage / OLD
    # For a link its target is replaced, so that the link stays; stale links themselves are removed.
    places = {n: Path(os.path.realpath(target / n)) for n in (head, *bodies)}
    gone = {n: target / n for n in stale if os.path.lexists(target / n)}
    for name, path in places.items():
        check_new(path)
        keep_mode(path, stage / name)
    same = places[head].is_file() and places[head].read_bytes() == (stage / head).read_bytes()
    if same and not gone and len(bodies) == 1:
        os.replace(stage / bodies[0], places[bodies[0]])
    else:
        old.mkdir()
        try:
            for name, path in (places | gone).items():
                if os.path.lexists(path):
                    os.replace(path, old / name)
            for name in (*bodies, head):
                put(stage / name, places[name])
        except BaseException as exc:
            try:
                # The new head leaves first, since it must not be seen with old bodies.
                for name, path in places.items():
                    if not (stage / name).exists():
                        os.replace(path, stage / name)
                for name in (*bodies, *gone, head):
                    if os.path.lexists(old / name):
                        os.replace(old / name, (places | gone)[name])
            except OSError as again:
                raise Stranded(
                    f"could not write to {target} ({exc}), nor put the old files back ({again}): they are in {old}."
                ) from exc
            raise
    sync_names(target)


def remove_abandoned(near: Path, *, with_old_files: bool = False) -> None:
    """Remove stages in ``near`` whose writers are dead.

    The stage of an interrupted commit holds the only copy of the files that it was to replace. It stays unless
    ``with_old_files`` says that these have a successor.
    """
    with suppress(OSError):
        for stage in stages(near):
            if abandoned(stage) and (with_old_files or not (stage / OLD).is_dir()):
                shutil.rmtree(stage, ignore_errors=True)
        for begun in near.glob(_UNLOCKED + "*"):
            if time.time() - begun.stat().st_mtime > _DAY:
                begun.rmdir()


def stages(near: Path) -> list[Path]:
    return [p for p in near.iterdir() if p.name.startswith(STAGE_PREFIX)]


def abandoned(stage: Path) -> bool:
    """Return whether the writer of a stage is surely dead."""
    try:
        if fcntl is None or stage.name.removeprefix(STAGE_PREFIX).partition("-")[0] != _boot():
            newest = max(p.lstat().st_mtime for p in (stage, *stage.rglob("*")))
            return time.time() - newest > _DAY
        lock = os.open(stage, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(lock)
    except OSError:
        return False
    return True


@cache
def _boot() -> str:
    """Return an id of the running boot of this machine, or of the machine where the boot has no id."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    return f"{uuid.getnode():012x}"


def place(new: Path, target: Path) -> None:
    """Rename a staged file to ``target``, or to what that links to, with the permissions of what was there."""
    target = Path(os.path.realpath(target))
    keep_mode(target, new)
    put(new, target)


def keep_mode(old: Path, new: Path) -> None:
    """Give ``new`` the permissions of the file ``old`` that it replaces, where there is one."""
    with suppress(FileNotFoundError):
        new.chmod(stat.S_IMODE(old.stat().st_mode) & 0o777)


def sync(path: Path) -> None:
    """Flush a file's content to the disk, so that a rename never becomes durable before the content."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_names(directory: Path) -> None:
    """Flush a directory's renames to the disk. An error is ignored, since the renames have already happened."""
    if os.name == "posix":
        with suppress(OSError):
            sync(directory)
