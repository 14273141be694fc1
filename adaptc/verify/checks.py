"""Run programs for a verification, and report every error in a check as a failed check.

After each run, buffers that it wrote to are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from adaptc.capture.inputs.random_inputs import DrawnCall
from adaptc.capture.model_state import preserve_state
from adaptc.passes.protocol.attachment import Attachment
from adaptc.progress import stage
from adaptc.verify.compare import Leaves, copied_tree, leaves
from adaptc.verify.preserve_state import Buffers
from adaptc.verify.report import Check


def added(attachments: Iterable[Attachment]) -> set[str]:
    """Return the names of the keyword inputs that adapters added to a program, and that its base does not take."""
    return {n for a in attachments for m in a.method.extras() for n in (m, a.reads.get(m, m))}


class Claims:
    """A base class of verifications, which compare several callables on the same runs."""

    def __init__(self, runs: list[DrawnCall], atol: float | None, seed: int, buffers: Buffers) -> None:
        self.runs, self.atol, self.seed, self.buffers = runs, atol, seed, buffers

    def tried(self, name: str, check: Callable[[str], Check]) -> Check:
        try:
            with stage(f"verifying: {name}"):
                return check(name)
        except Exception as error:  # whatever goes wrong inside is what the report is for
            first = (str(error).strip() or "no message").splitlines()[0]
            return Check(name, False, note=f"{type(error).__name__}: {first}")

    def outputs(self, call: Callable[..., Any], without: Collection[str] = ()) -> list[Leaves]:
        """Return the outputs of ``call`` in every run. ``without``: keyword inputs that ``call`` does not take."""
        found = []
        for run in self.runs:
            kwargs = {k: v for k, v in run.kwargs.items() if k not in without}
            with preserve_state(call):
                found.append(leaves(call(*copied_tree(run.args), **copied_tree(kwargs))))
            self.buffers.restore()
        return found
