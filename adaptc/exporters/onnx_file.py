"""Write exported programs as ONNX files, with the adapter as a set of optional inputs.

An input with an initializer of the same name may be left out, in which case it has the initializer's value. Here that
is the value with which its site computes the base. So a session that is fed no adapter computes the base, and any
subset of sites may be fed, at any rank. The weights lie in one file beside the graph. What adapters need to know of the
inputs lies in the graph's metadata.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from adaptc.adapter_files.atomic_write import commit, open_stage
from adaptc.errors import BackendError, CheckpointError, ConfigError
from adaptc.exporters.slot_program import SlotInput
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, user_inputs
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.passes.graph.pytree import named_leaves, pytree
from adaptc.progress import stage
from adaptc.runtime.mutated_buffers import written_placeholders

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def check_onnx_path(path: Path) -> None:
    """Raise CheckpointError for a path where no ONNX file can be written."""
    if path.suffix != ".onnx" or not path.parent.is_dir() or path.is_dir():
        raise CheckpointError(f"cannot export to {path}: the name must end in .onnx and its directory must exist")


def write_onnx(
    program: ExportedProgram,
    path: Path,
    inputs: Sequence[SlotInput] = (),
    size_names: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``program`` to ``path``, whose weights lie beside it in a file with ``.data`` added to the name.

    ``inputs`` are its last inputs, in their order, which may be left out. ``size_names`` maps symbols of sizes to their
    names. ``metadata`` are texts that the file keeps by key. Existing files stay as they are where an error is raised.

    Raises ConfigError for a program that writes to buffers, BackendError where it cannot be converted, and
    CheckpointError where the file cannot be written.
    """
    _check_pure(program)
    names = [n for n, value in user_inputs(program).items() if hasattr(value, "shape")]
    own = names[: len(names) - len(inputs)]
    taken = {i.name for i in inputs} & set(own)
    if taken:
        raise ConfigError(f"the model has an input called {min(taken)!r}, and the adapter has another of that name")
    converted = _convert(_with_contiguous_views(program), [*own, *(i.name for i in inputs)], output_names(program))
    model: Any = converted.model
    converted.rename_axes(_axis_names(model, len(own)) | dict(size_names or {}))
    _add_defaults(model, inputs)
    model.metadata_props.update(metadata or {})
    data = path.name + ".data"
    try:
        with stage(f"writing {path.name}"), open_stage(path.parent) as folder:
            converted.save(folder / path.name, external_data=True)
            (folder / data).touch()  # a model without weights has no file of weights
            commit(folder, path.parent, weights_files=[data], config_file=path.name, stale_files=())
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}. What was there before is unchanged.") from error
    return path


def output_names(program: ExportedProgram) -> list[str]:
    """Return names for the outputs that are tensors: the fields of the model's output, or "output" and numbers."""
    spec: Any = program.call_spec.out_spec
    leaves = named_leaves(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    found: list[str] = []
    kinds = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for (path, _), output in zip(leaves, kinds, strict=True):
        if type(output.arg).__name__ != "TensorArgument":
            continue
        parts = re.findall(r"\w+", path)
        name = "_".join(parts)
        found.append(f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name)
    return ["output"] if found in (["output_0"], ["output"]) else found


def _check_pure(program: ExportedProgram) -> None:
    signature = program.graph_signature
    written = [s.target for s in signature.output_specs if s.kind in _MUTATIONS]
    targets = {s.arg.name: s.target or s.arg.name for s in signature.input_specs}
    written += [targets[n] for n in written_placeholders(program.graph)]
    if written:
        raise ConfigError(
            f"the program writes to {written[0]!r} in each call, and an ONNX file keeps nothing between calls: capture "
            "the model with that state as an input and an output"
        )


def _with_contiguous_views(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with a copy in front of each reshape, which a converter leaves out again.

    torch decides by strides whether a reshape is a view, and then computes attention by operators that give others.
    """
    lifted = LiftedProgram(program)
    copies: set[fx.Node] = set()
    for node in [n for n in lifted.graph.nodes if n.target in _RESHAPES]:
        with lifted.graph.inserting_before(node):
            copy = lifted.graph.call_function(aten.clone.default, (node.args[0],), _CONTIGUOUS)
        node.update_arg(0, copy)
        copies.add(copy)
    propagate_fakes(lifted.graph, copies, program.graph_module)
    return lifted.finish()


def _convert(program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> Any:
    try:
        import onnxscript  # of which torch's own message would not say how it is installed
    except ImportError as error:
        raise BackendError(
            f"exporting to ONNX needs onnx and onnxscript: pip install 'adaptc[onnx]' ({error})"
        ) from error
    assert onnxscript
    untyped: Any = torch.onnx
    export = untyped.export
    try:
        with stage("converting the program to ONNX"), hold_graph_lock(), warnings.catch_warnings():
            # torch copies its own tree specs by a class that it has deprecated.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            return export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(input_names),
                output_names=list(output_names),
            )
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # the first error says which operator it is
            cause = cause.__cause__  # type: ignore[assignment]
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise BackendError(f"torch could not convert the program to ONNX: {first}") from error


def _axis_names(model: Any, count: int) -> dict[str, str]:
    """Return names for the symbols of the first ``count`` inputs: that of an input, and the number of the axis."""
    found: dict[str, str] = {}
    for value in model.graph.inputs[:count]:
        for axis, size in enumerate(value.shape or ()):
            symbol = getattr(size, "value", size)
            if isinstance(symbol, str) and symbol.isidentifier():
                found.setdefault(symbol, f"{value.name}_{axis}")
    return found


def _add_defaults(model: Any, inputs: Sequence[SlotInput]) -> None:
    """Give the model's inputs initializers: identity values, which count where nothing is fed."""
    import onnx_ir  # which onnxscript brings

    by_name = {v.name: v for v in model.graph.inputs}
    for i in inputs:
        value = by_name[i.name]
        value.const_value = onnx_ir.tensor(i.identity.cpu().contiguous(), name=i.name)
        model.graph.initializers[i.name] = value
