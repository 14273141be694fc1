"""Examines rows in a process of its own, so that a crash or a row that takes too long loses no other row.

The worker reads a row from each line of its input and writes its result as a line. :class:`Worker` is its other end.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from tests.coverage.rows import Row

#: seconds that a row may take
LIMIT = 180
#: rows after which a new process starts, since captures leave memory behind
ROWS = 60


class Worker:
    """A process that examines rows one after another, and is started again where it ended or was too slow."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._done = 0

    def examine(self, row: Row) -> dict[str, Any]:
        """Return the result of a row as a dict, also where the process crashes or exceeds :data:`LIMIT`."""
        if self._process is None or self._done >= ROWS:
            self.close()
            self._process = self._start()
        self._done += 1
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(row)).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        line = process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.close()
        if not ready:
            return {**asdict(row), "status": "too slow", "reason": f"takes more than {LIMIT} seconds"}
        return {**asdict(row), "status": "crash", "reason": f"the process ended with {process.returncode}"}

    def _start(self) -> subprocess.Popen[bytes]:
        self._done = 0
        return subprocess.Popen(
            [sys.executable, "-m", "tests.coverage.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def main() -> None:
    """Examine the rows of the input, until it ends."""
    # What libraries print must not lie between the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers

    from tests.coverage.examine import examine
    from tests.coverage.small_values import reason

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        row = Row(**json.loads(line))
        try:
            result = asdict(examine(row))
        except Exception as error:
            result = {**asdict(row), "status": "crash", "reason": f"in the examination itself: {reason(error)}"}
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
