"""Export programs to ONNX: with the adapter as a set of optional inputs, or merged into the weights.

An input with an initializer of the same name may be left out, in which case it has the initializer's value. Here that
is the value with which its site computes the base. So a session that is fed no adapter computes the base, and any
subset of sites may be fed, at any rank. The weights lie in one file beside the graph. What adapters need to know of the
inputs lies in the graph's metadata.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import fx
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import commit, explain_write_errors, open_stage
from adaptc.bank.bank import Bank
from adaptc.errors import BackendError
from adaptc.exporters.adapter_feeds import METADATA_KEY
from adaptc.exporters.prepare_export import PreparedExport, prepare_export
from adaptc.exporters.to_onnx.base_branch import add_base_branch
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.propagate import propagate_fakes
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def export_onnx(
    program: AdaptedProgram | Bank,
    path: str | os.PathLike[str],
    *,
    adapters: Literal["inputs", "merged", "rows"] = "inputs",
    base_branch: bool = True,
) -> Path:
    """Write a program as an ONNX file that takes any adapter in each call, or has the current one merged in.

    With "inputs", every tensor of an adapter is an input that may be left out. A session that is fed none of them
    computes the base. It takes any rank, and any subset of the sites. The inputs have the keys of PEFT's files, without
    ``base_model.model.``. :func:`save_onnx_adapter` writes adapters for the file, and :func:`onnx_session` runs it.

    With "rows", each row of a batch may have adapters of its own, as in a :class:`Bank`. A session takes
    ``adapters=["fr", None, {"fr": 0.5, "de": 0.5}]``. The adapters in a bank are not written: sessions load them.

    With "inputs", a call without an adapter takes a branch of the graph that has no node of an adapter. So it costs
    what the exported base costs. Methods whose base needs values, such as DoRA and IA3, have no such branch.

    The weights lie beside the graph, in a file with ``.data`` added to the name. Neither needs adaptc. Free sizes of
    the program stay free.

    Args:
        program: a program, for "merged" also one without an adapter, and for "rows" also a bank, whose ``max_rank``
            then limits the adapters. Methods whose adapters are computed one after the other need its ``capacity``.
        path: the file to write, whose name ends in ``.onnx``.
        adapters: "inputs", "merged" or "rows".
        base_branch: whether calls without an adapter get the branch. False is for tools that change one graph and not
            its branches, such as ``quantize_dynamic`` of ONNX Runtime.

    Returns:
        the path of the file.

    Raises:
        ConfigError: the program has no adapter, or several that act together; it writes to buffers; or it generates.
        MergeError: with "merged", what :func:`merge` raises.
        TargetError: with "rows", what ``program.bank`` raises.
        BackendError: onnx is not installed, or has no operator for one of the program's.
        CheckpointError: the file cannot be written. What was there before stays, here and above.

    Example:
        >>> path = adaptc.exporters.export_onnx(prog, "model.onnx")
        >>> session = adaptc.exporters.onnx_session(path)
        >>> y = session.run({"input": x.numpy()})["output"]
        >>> torch.allclose(torch.from_numpy(y), adaptc.unload(prog)(x), atol=1e-6)
        True
    """
    path = Path(path)
    return write_onnx(
        prepare_export(program, path, adapters, suffix=".onnx", kind="an ONNX file", takes_rows=True),
        path,
        base_branch=base_branch,
    )


def write_onnx(
    prepared: PreparedExport,
    path: Path,
    others: Mapping[str, bytes] = MappingProxyType({}),
    *,
    base_branch: bool = True,
) -> Path:
    """Write a program to ``path``, whose weights lie beside it in a file with ``.data`` added to the name.

    Its adapter's inputs may be left out by callers. The file keeps their description. ``others`` are further files
    beside it. ``base_branch`` is that of :func:`export_onnx`. Existing files stay as they are where an error is raised.

    Raises BackendError for a program that cannot be converted, and CheckpointError where the file cannot be written.
    """
    own, inputs = prepared.input_names, prepared.inputs
    program = with_contiguous_views(prepared.program)
    converted = _convert(program, [*own, *(i.name for i in inputs)], prepared.output_names)
    model: Any = converted.model
    converted.rename_axes(_axis_names(model, len(own)) | dict(prepared.size_names))
    add_defaults(model, prepared)
    if base_branch:
        add_base_branch(model, prepared)
    data = path.name + ".data"
    with explain_write_errors(path), stage(f"writing {path.name}"), open_stage(path.parent) as folder:
        converted.save(folder / path.name, external_data=True)
        (folder / data).touch()  # a model without weights has no file of weights
        for name, content in others.items():
            (folder / name).write_bytes(content)
        commit(folder, path.parent, weights_files=[data, *others], config_file=path.name, stale_files=())
    return path


def with_contiguous_views(program: ExportedProgram) -> ExportedProgram:
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


def add_defaults(model: Any, prepared: PreparedExport) -> None:
    """Give the adapter's inputs of an ``onnx_ir.Model`` initializers, which count where nothing is fed.

    They are the values of the base. The model also gets the description of the inputs.
    """
    import onnx_ir  # which onnxscript brings

    by_name = {v.name: v for v in model.graph.inputs}
    for name, base in prepared.base_values.items():
        value = by_name[name]
        value.const_value = onnx_ir.tensor(base.cpu().contiguous(), name=name)
        model.graph.initializers[name] = value
    model.metadata_props[METADATA_KEY] = prepared.description
