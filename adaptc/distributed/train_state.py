"""Save and load what training needs to go on, in any number of processes, with ``torch.distributed.checkpoint``.

A state holds the adapter and the optimizer's state by the names that parameters have in the whole program. So it does
not matter into which stages the program is split, or over how many processes FSDP2 shards it. Each process writes what
it has, and reads what it needs.

A state is written aside, and gets its name when all of it is there: a process that is killed leaves the states that
were there before. A training that has written a state holds the lock of the directory until its first process ends, so
that no second one writes there. What random numbers were drawn is not part of a state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch import distributed as dist

from adaptc.distributed.pipeline import TrainingPipeline
from adaptc.distributed.staged_module import StagedModule
from adaptc.errors import AdaptcError, CheckpointError, short_repr
from adaptc.training.program_module import ProgramModule
from adaptc.training.sharded_tensors import mesh_of, reshard

_STEP_NAME = re.compile(r"step-(\d+)")
_ADAPTER, _OPTIMIZER, _GROUP, _EXTRA = "adapter", "optimizer", "group", "extra"
#: directory -> the lock of its states, which this process holds until it ends
_held_locks: dict[Path, FileLock] = {}


def save_state(
    directory: str | os.PathLike[str],
    trained: TrainingPipeline | StagedModule | ProgramModule,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write the state of training after ``step`` steps into ``directory``; every process calls it.

    Args:
        directory: a directory that all processes see.
        trained: a pipeline, a staged module or the module of a program, sharded or not.
        optimizer: this process's optimizer of its trained parameters.
        step: the number of steps that were taken.
        extra: name -> further values that JSON can hold, such as the position in the data; the same in every process.
        keep: how many states to keep; older ones are deleted.

    Returns:
        the path of the state.

    Raises:
        CheckpointError: the state cannot be written, or another training writes its states to the directory; older
            states are as they were. Every process raises it.

    Example:
        >>> module = adaptc.compile(lm, LoraConfig(r=2), training=True).module()
        >>> optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        >>> path = adaptc.distributed.save_state("states", module, optimizer, 3, extra={"row": 7})
        >>> path.name
        'step-3'
    """
    from torch.distributed import checkpoint

    dcp: Any = checkpoint  # it does not say what it exports

    root = Path(directory)
    aside, path = root / f".step-{step}", root / f"step-{step}"
    state: dict[str, Any] = {}
    for name, p in _parameters(trained):
        state[f"{_ADAPTER}/{name}"] = p.detach()
        state |= {f"{_OPTIMIZER}/{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    names = {id(p): n for n, p in _parameters(trained)}
    for group in optimizer.param_groups:
        options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        state |= {f"{_GROUP}/{names[id(p)]}": json.dumps(options) for p in group["params"] if id(p) in names}
    state[_EXTRA] = json.dumps(dict(extra or {}))

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _lock(root)
        shutil.rmtree(aside, ignore_errors=True)

    def publish() -> None:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        for _, old in sorted(_states(root).items())[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    _in_first_process(begin, path)
    try:
        with no_single_process_warning():
            dcp.save(state, checkpoint_id=aside, no_dist=not _has_processes())
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(f"cannot write the state of training {path}: {failure_text(error)}") from error
    _in_first_process(publish, path)
    return path


def _lock(root: Path) -> None:
    """Take the lock of a directory, for as long as this process lives. Raises CheckpointError where another has it."""
    if root.resolve() in _held_locks:
        return
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            "another training writes its states there: give this one a directory of its own, or end the other"
        ) from None
    _held_locks[root.resolve()] = lock


def _in_first_process(work: Callable[[], None], path: Path) -> None:
    """Do ``work`` in the first process while the others wait. Raises CheckpointError in all where it fails."""
    outcome: list[str | None] = [None]
    failure: Exception | None = None
    if not _has_processes() or dist.get_rank() == 0:
        try:
            work()
        except (OSError, CheckpointError) as error:
            failure, outcome = error, [str(error)]
    if _has_processes():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(f"cannot write the state of training {path}: {outcome[0]}") from failure


def load_state(
    directory: str | os.PathLike[str],
    trained: TrainingPipeline | StagedModule | ProgramModule,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest whole state in ``directory``; every process calls it, however many there were when it was saved.

    States are files of ``torch.distributed.checkpoint``, which may hold code: load only what you saved.

    Args:
        directory: the directory that :func:`save_state` was given.
        trained: as for :func:`save_state`, of the same model and adapter.
        optimizer: a new optimizer of this process's trained parameters.

    Returns:
        the number of steps that were taken, and ``extra``; None where there is no state.

    Raises:
        CheckpointError: the state is damaged, or of another model or adapter. Nothing is loaded then.

    Example:
        >>> module = adaptc.compile(lm, LoraConfig(r=2), training=True).module()
        >>> optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        >>> print(adaptc.distributed.load_state("states", module, optimizer))
        None
    """
    from torch.distributed import checkpoint

    dcp: Any = checkpoint  # it does not say what it exports

    states = _states(Path(directory))
    if not states:
        return None
    step = max(states)
    try:
        metadata = dcp.FileSystemReader(states[step]).read_metadata().state_dict_metadata
        state = _blank_state(trained, metadata, states[step])
        with no_single_process_warning():
            dcp.load(state, checkpoint_id=states[step], no_dist=True)
    except CheckpointError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # torch has several types for damaged files
        raise CheckpointError(
            f"cannot read the state of training {states[step]}: {failure_text(error)}. Delete it to go on from the one "
            "before"
        ) from error
    groups: dict[str, Any] = {}
    with torch.no_grad():
        for name, p in _parameters(trained):
            p.copy_(state[f"{_ADAPTER}/{name}"])
            prefix = f"{_OPTIMIZER}/{name}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:
                optimizer.state[p] = own
            groups[name] = json.loads(state.get(f"{_GROUP}/{name}", "{}"))
    names = {id(p): n for n, p in _parameters(trained)}
    for group in optimizer.param_groups:
        options = next((groups[names[id(p)]] for p in group["params"] if id(p) in names), {})
        group |= {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()}
    return step, json.loads(state[_EXTRA])


def _blank_state(trained: Any, metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what this process reads of a state, with tensors to read it into."""
    state: dict[str, Any] = {_EXTRA: ""}
    for name, p in _parameters(trained):
        key = f"{_ADAPTER}/{name}"
        if key not in metadata:
            raise CheckpointError(f"{path} has no {name!r}, which is trained: it is of another model or adapter")
        if metadata[key].size != p.shape:
            raise CheckpointError(
                f"{path} has {name!r} in shape {tuple(metadata[key].size)}, and it is {tuple(p.shape)} here: the state "
                "is of an adapter of another rank"
            )
        state[key] = torch.empty_like(p, requires_grad=False)
        for stored, said in metadata.items():
            if stored.startswith(f"{_OPTIMIZER}/{name}/"):
                state[stored] = _blank_like(p, said)
        if f"{_GROUP}/{name}" in metadata:
            state[f"{_GROUP}/{name}"] = ""
    return state


def _blank_like(p: Tensor, said: Any) -> Any:
    """Return what an entry of the optimizer's state is read into: sharded as its parameter is, where it has its
    shape."""
    size = getattr(said, "size", None)
    if size is None:
        return 0
    dtype = said.properties.dtype
    if size == p.shape:
        return torch.empty_like(p, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _parameters(trained: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters of this process by their names in the whole program."""
    for module in modules_of(trained):
        if any(mesh_of(p) is not None for p in module.parameters()):
            reshard(module)
        yield from ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def modules_of(trained: Any) -> list[ProgramModule]:
    """Return the modules of programs that this process trains. Raises AdaptcError for anything that has none."""
    if isinstance(trained, TrainingPipeline):
        return list(trained.modules.values())
    found: Any = trained.stages if isinstance(trained, StagedModule) else [trained]
    if not all(isinstance(m, ProgramModule) for m in found):
        raise AdaptcError(
            f"expected a TrainingPipeline, a StagedModule or prog.module(), and found a {type(trained).__name__}; of "
            "what wraps a module, such as DistributedDataParallel, give what is inside"
        )
    return list(found)


def _states(directory: Path) -> dict[int, Path]:
    """Return step -> the state in ``directory``, for those that are whole."""
    try:
        found = {int(m[1]): p for p in directory.iterdir() if (m := _STEP_NAME.fullmatch(p.name))}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot look for states of training in {directory}: {error}") from error
    return {step: p for step, p in found.items() if (p / ".metadata").is_file()}


def failure_text(error: BaseException) -> str:
    """Return in one line why ``torch.distributed.checkpoint`` failed, of the first process in which it did."""
    failures: Any = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return short_repr(str(first) or type(first).__name__)


@contextmanager
def no_single_process_warning() -> Generator[None]:
    """Run the block without torch's warning that a process reads or writes by itself, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized()
