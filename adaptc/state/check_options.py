"""Check whether a program can run with its options, each of which was checked on its own before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from adaptc.errors import BackendError, ConfigError
from adaptc.passes.adapt.choose_forms import with_compilable_form
from adaptc.runtime.options import PACK_DTYPES, RunOptions
from adaptc.state.adaptation import Adaptation


def check_options(options: RunOptions, adaptation: Adaptation, base: Iterable[Any]) -> None:
    """Raise BackendError for a form that the backend cannot compile, ConfigError for weights that cannot be packed as
    asked.

    ``base``: the base tensors of the program. Nothing is changed.
    """
    for a in adaptation.attachments:
        if with_compilable_form(a, options.backend) != a:
            raise BackendError(
                f"site {a.fqn!r} has its adapter around a convolution, whose rank inductor would fix: make the "
                f"program for it, with compile(..., backend={options.backend!r}), or save it and "
                f"load(path, backend={options.backend!r})"
            )
    if options.pack is None:
        return
    if adaptation.training:
        raise ConfigError(f"pack={options.pack!r} is for inference, and the program is captured for training")
    tensors = [t for t in base if isinstance(t, Tensor) and t.ndim == 2 and t.device.type == "cpu"]
    if tensors and all(t.dtype != PACK_DTYPES[options.pack] for t in tensors):
        found = ", ".join(sorted({f"{t.dtype}" for t in tensors}))
        raise ConfigError(
            f"pack={options.pack!r} packs weights of {PACK_DTYPES[options.pack]}, and those of the base are {found}: "
            "nothing is rounded to be packed"
        )
