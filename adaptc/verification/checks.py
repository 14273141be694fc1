"""Run programs for a verification, and report every error in a check as a failed check.

After each run, buffers that it wrote to are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from adaptc.capture.inputs.random_inputs import CallInputs
from adaptc.capture.model_state import preserve_state
from adaptc.passes.protocol.attachment import Attachment
from adaptc.progress import stage
from adaptc.verification.compare import Leaves, clone_tensors, output_leaves
from adaptc.verification.preserve_state import BufferSnapshot
from adaptc.verification.report import Check


def adapter_input_names(attachments: Iterable[Attachment]) -> set[str]:
    """Return the names of the keyword inputs that adapters added to a program, and that its base does not take."""
    return {n for a in attachments for m in a.method.extra_inputs.extras() for n in (m, a.reads.get(m, m))}


class Verifier:
    """A base class of verifications, which compare several callables on the same runs."""

    def __init__(self, runs: list[CallInputs], atol: float | None, seed: int, buffers: BufferSnapshot) -> None:
        self.runs, self.atol, self.seed, self.buffers = runs, atol, seed, buffers

    def run_check(self, name: str, check: Callable[[str], Check]) -> Check:
        try:
            with stage(f"verifying: {name}"):
                return check(name)
        except Exception as error:  # whatever goes wrong inside is what the report is for
            first = (str(error).strip() or "no message").splitlines()[0]
            return Check(name, False, note=f"{type(error).__name__}: {first}")

    def run_all(self, call: Callable[..., Any], excluded: Collection[str] = ()) -> list[Leaves]:
        """Return the outputs of ``call`` in every run. ``excluded``: keyword inputs that ``call`` does not take."""
        outputs = []
        for run in self.runs:
            kwargs = {k: v for k, v in run.kwargs.items() if k not in excluded}
            with preserve_state(call):
                outputs.append(output_leaves(call(*clone_tensors(run.args), **clone_tensors(kwargs))))
            self.buffers.restore()
        return outputs
