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
from collections.abc import Generator, Sequence
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
_UNLOCKED_PREFIX = ".adaptc-begin-"
#: the directory in a stage to which a commit moves the files that it replaces
OLD_FILES_DIR = "old"
_DAY_SECONDS = 24 * 3600.0
#: the paths that writes of the current block may make but not replace
_protected_paths: ContextVar[tuple[Path, ...]] = ContextVar("only_new", default=())


class RollbackError(CheckpointError):
    """An error of a commit that failed and could not put the old files back. They are in the stage, which stays."""


@contextmanager
def open_stage(parent: Path) -> Generator[Path]:
    """Run the block with a stage inside ``parent``, and remove the stage afterwards.

    The stage lies inside ``parent`` and not beside it, since an adapter directory may be a mount point and renames must
    stay on one filesystem. Missing directories down to ``parent`` are made, and removed again when the block raises.
    """
    new_directories: list[Path] = []
    stage, lock = parent / f"{STAGE_PREFIX}{_boot_id()}-{uuid.uuid4().hex}", -1
    try:
        for p in reversed([parent, *parent.parents]):
            if not p.exists():
                new_directories.append(p)
                p.mkdir(exist_ok=True)
        remove_abandoned(parent)
        lock = _make_stage(stage)
        yield stage
    except RollbackError:
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for p in reversed(new_directories):
            with suppress(OSError):
                p.rmdir()
        raise
    else:
        shutil.rmtree(stage, ignore_errors=True)
    finally:
        if lock >= 0:
            os.close(lock)


def _make_stage(stage: Path) -> int:
    """Make a stage and return the descriptor of its lock, or -1 where there are no locks.

    The stage gets its name only once it is locked.
    """
    unlocked = stage.with_name(_UNLOCKED_PREFIX + stage.name.removeprefix(STAGE_PREFIX))
    lock = -1
    try:
        unlocked.mkdir()
        if fcntl is not None:
            lock = os.open(unlocked, os.O_RDONLY)
            with suppress(OSError):  # some network filesystems have no locks, for cleaners neither
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unlocked, stage)
    except BaseException:
        if lock >= 0:
            os.close(lock)
        with suppress(OSError):
            unlocked.rmdir()
        raise
    return lock


@contextmanager
def atomic_replace(path: Path, name: str = "new") -> Generator[Path]:
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
    with open_stage(target.parent) as stage:
        new = stage / name
        yield new
        fsync_file(new)
        move_keeping_mode(new, target)
        fsync_directory(target.parent)


@contextmanager
def explain_write_errors(path: Path, *errors: type[Exception]) -> Generator[None]:
    """Run the block, which writes to ``path`` or leaves it as it was.

    Raises CheckpointError for its OSErrors, and for ``errors``, which libraries in C++ raise for a full disk.
    """
    try:
        yield
    except (OSError, *errors) as error:
        raise CheckpointError(f"could not write {path}: {error}. What was there before is unchanged.") from error


@contextmanager
def forbid_overwrite(path: Path) -> Generator[None]:
    """Run the block so that its writes may make ``path``, a file or a directory, but replace nothing there.

    Writes raise CheckpointError where another process has made ``path`` by then.
    """
    before = _protected_paths.get()
    token = _protected_paths.set((*before, Path(os.path.realpath(path))))
    try:
        yield
    finally:
        _protected_paths.reset(token)


def is_protected(target: Path) -> bool:
    """Return whether a write must not replace ``target`` (see :func:`forbid_overwrite`)."""
    real = Path(os.path.realpath(target))
    return any(path == real or path in real.parents for path in _protected_paths.get())


def check_overwrite(target: Path) -> None:
    """Raise CheckpointError where something is at ``target`` that must not be replaced."""
    if is_protected(target) and os.path.lexists(target):
        raise _taken_error(target)


def _taken_error(target: Path) -> CheckpointError:
    return CheckpointError(f"{target} was made by somebody else in the meantime, and stays. Choose another name.")


def move_file(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``.

    Raises CheckpointError, with both left as they were, where a file is there that must not be replaced.
    """
    if not is_protected(target):
        os.replace(new, target)
        return
    try:
        os.link(new, target)  # a link, unlike a rename, fails where there is a file
        new.unlink()
    except FileExistsError:
        raise _taken_error(target) from None
    except OSError:  # a filesystem without links: an empty file holds the name for as long as the rename takes
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise _taken_error(target) from None
        os.replace(new, target)


def commit(
    stage: Path, target: Path, *, weights_files: Sequence[str], config_file: str, stale_files: Sequence[str]
) -> None:
    """Move the files ``weights_files`` (weights) and ``config_file`` (config) of ``stage`` into ``target`` as one
    change.

    The files ``stale_files`` of ``target`` are dropped. The config makes the directory readable, so a config and
    weights of different writes must never be seen together. When the config does not change, there is one file of
    weights and nothing is stale, one rename is the whole change. Otherwise the old config leaves first and the new one
    arrives last. An exception puts everything back. A process killed in between leaves a directory without a config,
    which every reader refuses. Links stay links.
    """
    old_directory = stage / OLD_FILES_DIR
    # For a link its target is replaced, so that the link stays; stale links themselves are removed.
    targets = {n: Path(os.path.realpath(target / n)) for n in (config_file, *weights_files)}
    removed = {n: target / n for n in stale_files if os.path.lexists(target / n)}
    for path in (targets | removed).values():
        check_overwrite(path)
    for name, path in targets.items():
        copy_mode(path, stage / name)
    config = targets[config_file]
    same = config.is_file() and config.read_bytes() == (stage / config_file).read_bytes() and not is_protected(config)
    if same and not removed and len(weights_files) == 1:
        os.replace(stage / weights_files[0], targets[weights_files[0]])
    else:
        old_directory.mkdir()
        try:
            for name, path in (targets | removed).items():
                # A protected file that appeared since the check above is another writer's: ``move_file`` refuses there.
                if os.path.lexists(path) and not is_protected(path):
                    os.replace(path, old_directory / name)
            for name in (*weights_files, config_file):
                move_file(stage / name, targets[name])
        except BaseException as exc:
            try:
                # The new config leaves first, since it must not be seen with old weights.
                for name, path in targets.items():
                    if not (stage / name).exists():
                        os.replace(path, stage / name)
                for name in (*weights_files, *removed, config_file):
                    if os.path.lexists(old_directory / name):
                        os.replace(old_directory / name, (targets | removed)[name])
            except OSError as again:
                raise RollbackError(
                    f"could not write to {target} ({exc}), nor put the old files back ({again}): they are in "
                    f"{old_directory}."
                ) from exc
            raise
    fsync_directory(target)


def remove_abandoned(parent: Path, *, with_old_files: bool = False) -> None:
    """Remove stages in ``parent`` whose writers are dead.

    The stage of an interrupted commit holds the only copy of the files that it was to replace. It stays unless
    ``with_old_files`` says that these have a successor.
    """
    with suppress(OSError):
        for stage in list_stages(parent):
            if is_abandoned(stage) and (with_old_files or not (stage / OLD_FILES_DIR).is_dir()):
                shutil.rmtree(stage, ignore_errors=True)
        for begun in parent.glob(_UNLOCKED_PREFIX + "*"):
            if time.time() - begun.stat().st_mtime > _DAY_SECONDS:
                begun.rmdir()


def list_stages(parent: Path) -> list[Path]:
    return [p for p in parent.iterdir() if p.name.startswith(STAGE_PREFIX)]


def is_abandoned(stage: Path) -> bool:
    """Return whether the writer of a stage is surely dead."""
    try:
        if fcntl is None or stage.name.removeprefix(STAGE_PREFIX).partition("-")[0] != _boot_id():
            newest = max(p.lstat().st_mtime for p in (stage, *stage.rglob("*")))
            return time.time() - newest > _DAY_SECONDS
        lock = os.open(stage, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(lock)
    except OSError:
        return False
    return True


@cache
def _boot_id() -> str:
    """Return an id of the running boot of this machine, or of the machine where the boot has no id."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    return f"{uuid.getnode():012x}"


def move_keeping_mode(new: Path, target: Path) -> None:
    """Rename a staged file to ``target``, or to what that links to, with the permissions of what was there."""
    target = Path(os.path.realpath(target))
    copy_mode(target, new)
    move_file(new, target)


def copy_mode(old: Path, new: Path) -> None:
    """Give ``new`` the permissions of the file ``old`` that it replaces, where there is one."""
    with suppress(FileNotFoundError):
        new.chmod(stat.S_IMODE(old.stat().st_mode) & 0o777)


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk, so that a rename never becomes durable before the content."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    """Flush a directory's renames to the disk. An error is ignored, since the renames have already happened."""
    if os.name == "posix":
        with suppress(OSError):
            fsync_file(directory)
