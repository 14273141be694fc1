"""Load the compiled code of a package, and call it, or one part of it, like the program that it was made from.

Calls take any adapter that was padded for the package. Their arguments are checked against the sizes that the code was
compiled for, and laid out in memory as it takes them.

Private torch use, with the public route that was tried:
- ``loader`` of the loaded package: calling the package itself parses its tree specs anew each time.
- ``load_pt2``: ``torch._inductor.aoti_load_package`` loads all models of a package, and gives one of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.archives.containers import check_registered, read_tree_spec
from adaptc.archives.refusal import UnsafeFile, printable_path
from adaptc.archives.transformers_ops import register_ops_of_transformers
from adaptc.errors import AdaptcError, BackendError
from adaptc.packages.constants import Constants, PackagedBinding
from adaptc.packages.manifest import SINGLE_MODEL, Input, Manifest, PackagedPart
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.pytree import pytree
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.calls.check_indices import check_index_bounds, check_not_transformed
from adaptc.runtime.strides import lay_out, write_back


class CompiledCode:
    """The compiled code of a program or of one part, with the checks of its arguments.

    ``loader`` is torch's, with its one set of constants. ``shapes`` has the shape and dtype of every constant of the
    package that adapters fill. ``constant_names`` are the FQNs of the constants that this code has. ``packaged`` is the
    adapter that it was compiled with. Raises BackendError for outputs or inputs of types that are not registered here.
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
        packaged: PackagedBinding | None,
    ) -> None:
        self.constant_names = frozenset(loader.get_constant_fqns())
        own_shapes = {fqn: shape for fqn, shape in shapes.items() if fqn in self.constant_names}
        self.constants, self._device, self._has_slots = (
            Constants(loader, own_shapes, device, packaged),
            device,
            bool(own_shapes),
        )
        specs = loader.get_call_spec()
        _check_tree_types(path, specs)
        spec = pytree.treespec_loads(specs[0])
        self._input_specs = inputs
        self._out_spec = pytree.treespec_loads(specs[1])
        self.inputs = _make_input_checker(spec, inputs, header, ranges, guards, self._out_spec)

    def run(self, adapter: PackagedBinding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call with an adapter that was padded for the package.

        Raises AdaptcError for arguments that do not fit, and BackendError for inputs whose derivatives are followed.
        """
        flat = self.inputs(args, kwargs)
        check_not_transformed(self.inputs.expected, flat, "Call the program that it was packaged from")
        tensors_and_specs = [(v, i) for v, i in zip(flat, self._input_specs, strict=True) if i.tensor is not None]
        for value, want in tensors_and_specs:
            if want.bounds is not None:
                check_index_bounds(want.name, value, want.bounds)
        arranged = [self._arrange(v, i) for v, i in tensors_and_specs]
        written_back = [
            (v, new, i) for (v, i), new in zip(tensors_and_specs, arranged, strict=True) if i.written and new is not v
        ]
        out = self.constants.run(adapter if self._has_slots else None, arranged)
        for value, new, want in written_back:
            write_back(value, new, repr(want.name))
        return self.inputs.call_names.convert_output(pytree.tree_unflatten(out, self._out_spec), args, kwargs)

    def _arrange(self, value: Tensor, spec: Input) -> Tensor:
        """Return an input in the memory layout of the example inputs, which the code relies on.

        Raises AdaptcError for an input on another device type.
        """
        if value.device.type != self._device.type:
            raise AdaptcError(f"input {spec.name!r} is on {value.device}, and the package runs on {self._device}")
        return lay_out(value, spec.order)


def load_models(path: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Return each compiled model of the package ``path``, by its name. Raises BackendError where it does not run
    here."""
    from torch._inductor import aoti_load_package
    from torch.export.pt2_archive._package import load_pt2

    def load(link: Path) -> Mapping[str, Any]:
        return load_pt2(str(link)).aoti_runners if manifest.parts else {SINGLE_MODEL: aoti_load_package(str(link))}

    try:
        with hold_graph_lock(), tempfile.TemporaryDirectory() as folder:
            # torch takes UTF-8 paths alone, and a folder above the file may have another name.
            link = Path(folder, "package.pt2")
            link.symlink_to(path.absolute())
            try:
                return load(link)
            except RuntimeError as error:
                if "transformers::" not in str(error):
                    raise
                register_ops_of_transformers()
                return load(link)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendError(
            f"{path} does not load here: {first}. It was compiled by torch {manifest.torch} for {manifest.device}, and "
            f"this is torch {torch.__version__}; package the program again on a machine like this one."
        ) from error


def divide_code(
    models: Mapping[str, Any],
    path: Path,
    manifest: Manifest,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    packaged: PackagedBinding | None,
) -> dict[str, CompiledCode]:
    """Return the code of each part of a package by name, from the ``models`` that :func:`load_models` gave.

    A package that is called as a whole is one part. Raises BackendError where no part has a constant of ``shapes``.
    """
    m = manifest
    parts = m.parts or {SINGLE_MODEL: PackagedPart(m.inputs, m.ranges, m.guards)}
    header: Mapping[str, Any] = {"fills": {}} if m.parts else m.header
    device = torch.device(m.device)
    code_by_part = {
        name: CompiledCode(
            path, models[name].loader, part.inputs, header, part.ranges, part.guards, shapes, device, packaged
        )
        for name, part in parts.items()
    }
    missing = sorted(shapes.keys() - {n for code in code_by_part.values() for n in code.constant_names})
    if missing:
        raise BackendError(f"{path}: the compiled code has no constant {missing[0]!r}; package it again")
    return code_by_part


def checker_of_whole(manifest: Manifest, code_by_part: Mapping[str, CompiledCode]) -> Inputs:
    """Return what checks the arguments of a call of all parts."""
    if not manifest.parts:
        return code_by_part[SINGLE_MODEL].inputs
    spec = pytree.tree_structure(((), {i.name: 0 for i in manifest.inputs}))
    return _make_input_checker(spec, manifest.inputs, manifest.header, manifest.ranges, manifest.guards)


def run_part(code: CompiledCode, adapter: PackagedBinding | None, **kwargs: Any) -> Any:
    """Return the outputs of one part, which takes its inputs by name."""
    return code.run(adapter, (), kwargs)


def _make_input_checker(
    spec: Any,
    inputs: Sequence[Input],
    header: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]],
    guards: Sequence[str],
    out_spec: Any = None,
) -> Inputs:
    """Return what flattens and checks arguments of the tree ``spec``; ``out_spec`` is the tree of the outputs if
    known."""
    expected = [(i.name, i.constant if i.tensor is None else i.tensor) for i in inputs]
    return Inputs(spec, header["fills"], expected, ranges, guards, header.get("takes", ()), out_spec)


def _check_tree_types(path: Path, specs: list[str]) -> None:
    """Import transformers' types in the trees of inputs and outputs, which registers them with torch.

    Raises BackendError for a tree that has other types.
    """
    try:
        check_registered({name for spec in specs for name in read_tree_spec(spec).types})
    except UnsafeFile as error:
        raise BackendError(f"{printable_path(path)}: {error}") from error
