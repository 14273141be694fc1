"""Warn where a trainer is about to load or copy a second model as the reference of the one it trains.

PEFT's models turn their adapter off for that. Trainers do not take a program's module for a PEFT model, but accept the
base's module, which shares the weights. A trainer calls no hook before it loads a reference, but reads the ``dtype`` of
the model that it trains. So that property looks at who reads it. TRL's trainers ask the model for nothing else at that
point.
"""

from __future__ import annotations

import inspect
import warnings
from types import FrameType
from typing import Any

from adaptc.errors import AdaptcWarning

#: trainers that take a reference model
_TAKE_REFERENCE = ("DPOTrainer", "KTOTrainer")
#: trainers that make their own reference model unless beta is 0
_MAKE_REFERENCE = ("GRPOTrainer", "RLOOTrainer")
_ADVICE = "prog.base.module() is the same reference, on the weights that are there"


def warn_of_second_model(module: Any) -> None:
    """Warn where a trainer that is about to load a reference for ``module`` is the caller of the property that calls
    this."""
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    if caller is None or caller.f_code.co_name != "__init__":
        return
    trainer = caller.f_locals.get("self")
    names = {c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")}
    if getattr(trainer, "model", None) is not module:
        return
    if names & {*_TAKE_REFERENCE} and caller.f_locals.get("ref_model") is None:
        warnings.warn(
            f"{type(trainer).__name__} is about to load a second model as the reference. {_ADVICE}: give it as "
            "ref_model=prog.base.module()",
            AdaptcWarning,
            stacklevel=_stacklevel(caller),
        )
    elif names & {*_MAKE_REFERENCE}:
        warnings.warn(
            f"{type(trainer).__name__} is about to load a second model as the reference, for beta is not 0. {_ADVICE}: "
            "make the trainer with beta=0.0, and give it both as examples/training.md shows",
            AdaptcWarning,
            stacklevel=_stacklevel(caller),
        )


def warn_of_copied_model() -> None:
    """Warn where the ``copy.deepcopy`` that calls this is to make a reference model."""
    frame = inspect.currentframe()
    for _ in range(4):
        frame = None if frame is None else frame.f_back
        if frame is not None and frame.f_code.co_name.endswith("create_reference_model"):
            warnings.warn(
                f"a trainer is about to copy the whole model as the reference, with its adapter as it is. {_ADVICE}, "
                "without an adapter: give it as ref_model=prog.base.module()",
                AdaptcWarning,
                stacklevel=_stacklevel(frame),
            )
            return


def _stacklevel(frame: FrameType) -> int:
    """Return the ``stacklevel`` by which a warning of this file points to the caller of ``frame``."""
    here, depth = inspect.currentframe(), 0
    while here is not None and here is not frame:
        here, depth = here.f_back, depth + 1
    return depth + 1
