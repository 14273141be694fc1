"""Functions that two or more processes run together, as ``torchrun`` would start them.

:func:`together`, in a test, starts this file as one process. It imports once what all need, and makes of itself, one
function after the other, the processes of a new group: what one function left behind is on disk alone.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.training import first_values

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.ecosystem.two_processes"
JOBS = "tests.ecosystem.distributed_jobs"
#: seconds that one function may take, of which a process that hangs is killed
LIMIT = 120


def together(folder: Path, *names: str, jobs: str = JOBS, processes: int = 2, ends_well: bool = True) -> dict[str, Any]:
    """What each function of the module ``jobs`` gives in the first process. They are called with ``folder``.

    ``jobs.prepare``, where there is one, runs before, in the process that all others are copies of. A name may end in
    a number of processes of its own: "job:3". Without ``ends_well`` a process fails, and nothing is given.
    """
    command = [sys.executable, "-W", "ignore", "-m", MODULE, str(folder), jobs, str(processes), *names]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) is ends_well, done.stderr[-5000:]
    return {name: torch.load(folder / f"{name}.pt") for name in (n.partition(":")[0] for n in names if ends_well)}


def main(folder: Path, module: str, processes: int, names: list[str]) -> int:
    torch.set_num_threads(1)
    jobs = importlib.import_module(module)
    getattr(jobs, "prepare", first_values)()
    split = [name.partition(":") for name in names]
    return max([run_in_group(getattr(jobs, name), folder, int(own or processes)) for name, _, own in split])


def run_in_group(job: Callable[[Path], Any], folder: Path, processes: int) -> int:
    """Run a function in new processes; returns 0 where all end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started: list[int] = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _one(job, folder, rank, processes, port)
        started.append(pid)
    left, bad, end = set(started), 0, time.monotonic() + LIMIT
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        left.discard(pid)
        bad |= status
        if (bad or time.monotonic() > end) and left:
            # A process whose neighbour is gone waits for it.
            time.sleep(0.5)
            for other in left:
                os.kill(other, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)
    return int(bad != 0)


def _one(job: Callable[[Path], Any], folder: Path, rank: int, processes: int, port: int) -> None:
    code = 1
    try:
        here = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        here |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), processes)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in here.items()}}
        dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
        found = job(folder)
        if rank == 0:
            torch.save(found, folder / f"{job.__name__}.pt")
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the usual way out: a group that is thrown away waits, with the interpreter's lock, for a thread of its own
        # that may be waiting for that lock.
        os._exit(code)


if __name__ == "__main__":
    # As the module that others import, so that there is one of it.
    sys.exit(importlib.import_module(MODULE).main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
