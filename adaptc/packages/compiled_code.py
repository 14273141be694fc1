"""Call the compiled code of a package, or of one part of it, like the program that it was made from.

Calls take any adapter that was fitted to the package. Their arguments are checked against the sizes that the code was
compiled for, and laid out in memory as it takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, BackendError
from adaptc.packages.constants import Constants, Fitted
from adaptc.packages.manifest import Input
from adaptc.passes.graph.pytree import pytree
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.calls.check_indices import check_bounds, check_followed
from adaptc.runtime.strides import laid, write_back
from adaptc.safe_pt2.containers import check_registered, read_tree
from adaptc.safe_pt2.refusal import UnsafeFile, shown_path


class Code:
    """The compiled code of a program or of one part, with the checks of its arguments.

    ``loader`` is torch's, with its one set of constants. ``shapes`` has the shape and dtype of every constant of the
    package that adapters fill. ``names`` are the FQNs of the constants that this code has. ``first`` is the adapter
    that it was compiled with. Raises BackendError for outputs or inputs of types that are not registered here.
    """

    def __init__(
        self,
        path: Path,
        loader: Any,
        inputs: Sequence[Input],
        header: Mapping[str, Any],
        ranges: Mapping[str, tuple[float, float]],
        guards: Sequence[str],
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        first: Fitted | None,
    ) -> None:
        self.names = frozenset(loader.get_constant_fqns())
        own = {fqn: shape for fqn, shape in shapes.items() if fqn in self.names}
        self.constants, self._device, self._adapted = Constants(loader, own, device, first), device, bool(own)
        specs = loader.get_call_spec()
        _check_specs(path, specs)
        spec = pytree.treespec_loads(specs[0])
        self._inputs = inputs
        self._out_spec = pytree.treespec_loads(specs[1])
        self.inputs = checker(spec, inputs, header, ranges, guards, self._out_spec)

    def run(self, adapter: Fitted | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call with an adapter that was fitted to the package.

        Raises AdaptcError for arguments that do not fit, and BackendError for inputs whose derivatives are followed.
        """
        flat = self.inputs(args, kwargs)
        check_followed(self.inputs.expected, flat, "Call the program that it was packaged from")
        given = [(v, i) for v, i in zip(flat, self._inputs, strict=True) if i.tensor is not None]
        for value, want in given:
            if want.bounds is not None:
                check_bounds(want.name, value, want.bounds)
        taken = [self._arranged(v, i) for v, i in given]
        written = [(v, new, i) for (v, i), new in zip(given, taken, strict=True) if i.written and new is not v]
        out = self.constants.run(adapter if self._adapted else None, taken)
        for value, new, want in written:
            write_back(value, new, repr(want.name))
        return self.inputs.calls.as_asked(pytree.tree_unflatten(out, self._out_spec), args, kwargs)

    def _arranged(self, value: Tensor, want: Input) -> Tensor:
        """Return an input in the memory layout of the example inputs, which the code relies on.

        Raises AdaptcError for an input on another device type.
        """
        if value.device.type != self._device.type:
            raise AdaptcError(f"input {want.name!r} is on {value.device}, and the package runs on {self._device}")
        return laid(value, want.order)


def checker(
    spec: Any,
    inputs: Sequence[Input],
    header: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]],
    guards: Sequence[str],
    gives: Any = None,
) -> Inputs:
    """Return what flattens and checks arguments of the tree ``spec``; ``gives`` is the tree of the outputs if known."""
    expected = [(i.name, i.constant if i.tensor is None else i.tensor) for i in inputs]
    return Inputs(spec, header["fills"], expected, ranges, guards, header.get("takes", ()), gives)


def _check_specs(path: Path, specs: list[str]) -> None:
    """Import transformers' types in the trees of inputs and outputs, which registers them with torch.

    Raises BackendError for a tree that has other types.
    """
    try:
        check_registered({name for spec in specs for name in read_tree(spec).types})
    except UnsafeFile as error:
        raise BackendError(f"{shown_path(path)}: {error}") from error
