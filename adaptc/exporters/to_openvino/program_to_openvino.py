"""Export programs to OpenVINO: with the adapter as inputs, or merged into the weights.

OpenVINO has no inputs that may be left out. So the values that compute the base lie beside the model, by the names of
the inputs. The description of the inputs lies in the model's runtime information.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.adapter_files.atomic_write import commit, explain_write_errors, open_stage
from adaptc.bank.bank import Bank
from adaptc.errors import BackendError
from adaptc.exporters.file_seal import add_seal
from adaptc.exporters.prepare_export import PreparedExport, prepare_export
from adaptc.exporters.runtime_session import runtime_error
from adaptc.exporters.to_openvino.adapter_tensors import write_tensors
from adaptc.exporters.to_openvino.openvino_model import RT_INFO_PATH, base_path, import_openvino, weights_path
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import user_inputs
from adaptc.passes.lower.masked_rows import KeepMaskedRowsFinite
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.torch_typing import shape_of


def export_openvino(
    program: AdaptedProgram | Bank,
    path: str | os.PathLike[str],
    *,
    adapters: Literal["inputs", "merged", "rows"] = "inputs",
) -> Path:
    """Write a program as an OpenVINO model that takes any adapter in each call, or has the current one merged in.

    With "inputs", every tensor of an adapter is an input, of any rank. The inputs have the keys of PEFT's files,
    without ``base_model.model.``. OpenVINO needs a value for each input. Those of the base lie in a file beside the
    model, with ``.base.safetensors`` in place of ``.xml``. :func:`openvino_model` runs the model, and feeds what a call
    leaves out.

    With "rows", each row of a batch may have adapters of its own, as :func:`export_onnx` says.

    The weights lie in a file that ends in ``.bin``. They keep their dtypes. None of the files needs adaptc. Free sizes
    of the program stay free.

    Args:
        program: a program, for "merged" also one without an adapter, and for "rows" also a bank.
        path: the file to write, whose name ends in ``.xml``.
        adapters: "inputs", "merged" or "rows".

    Returns:
        the path of the file.

    Raises:
        ConfigError: the program has no adapter, or several that act together; it writes to buffers; or it generates.
        MergeError: with "merged", what :func:`merge` raises.
        BackendError: OpenVINO is not installed, or has no operator for one of the program's.
        CheckpointError: the file cannot be written. What was there before stays, here and above.

    Example:
        >>> path = adaptc.exporters.export_openvino(prog, "model.xml")
        >>> model = adaptc.exporters.openvino_model(path)
        >>> y = model.run({"input": x.numpy()})["output"]
        >>> torch.allclose(torch.from_numpy(y), adaptc.unload(prog)(x), atol=1e-6)
        True
    """
    path = Path(path)
    prepared = prepare_export(program, path, adapters, suffix=".xml", kind="an OpenVINO model", takes_rows=True)
    ov = import_openvino()
    model = _convert(ov, prepared)
    weights, base = weights_path(path).name, base_path(path).name
    with explain_write_errors(path, RuntimeError), stage(f"writing {path.name}"), open_stage(path.parent) as folder:
        ov.save_model(model, str(folder / path.name), compress_to_fp16=False)
        (folder / weights).touch()  # a model without weights has no file of weights
        written = [weights]
        if prepared.inputs:
            write_tensors(prepared.base_values, folder / base, json.loads(prepared.description)["fingerprint"])
            written.append(base)
        add_seal(folder / path.name, [folder / n for n in written])
        stale = [] if base in written else [base]
        commit(folder, path.parent, weights_files=written, config_file=path.name, stale_files=stale)
    return path


def _convert(ov: Any, prepared: PreparedExport) -> Any:
    """Return the ``openvino.Model`` of a program, whose inputs and outputs have their names and shapes."""
    names = [*prepared.input_names, *(i.name for i in prepared.inputs), *prepared.output_names]
    try:
        with stage("converting the program to OpenVINO"), hold_graph_lock():
            untyped: Any = KeepMaskedRowsFinite()(prepared.program).program
            model = ov.convert_model(untyped.run_decompositions(_decompositions()))
            _remove_constants(model, prepared)
            # The converter leaves all sizes free. OpenVINO computes faster where it knows some.
            model.reshape(_shapes(ov, prepared))
            _name(model, names)
            _check_convolutions(model)
    except Exception as error:
        raise BackendError(f"OpenVINO could not convert the program: {_reason(error)}") from error
    model.set_rt_info(prepared.description, list(RT_INFO_PATH))
    return model


def _remove_constants(model: Any, prepared: PreparedExport) -> None:
    """Remove the inputs that the program was captured with as constants, which nothing reads."""
    values = list(user_inputs(prepared.program).values())
    if len(values) == len(model.inputs):
        for port, value in [*zip(model.inputs, values, strict=True)]:
            if not isinstance(value, (Tensor, torch.SymInt)):
                model.remove_parameter(port.get_node())


def _reason(error: Exception) -> str:
    """Return what an error of the converter says: the operator that it lacks, where that is why."""
    missing = re.search(r"No conversion rule found for operations: ([^\n]*)", str(error))
    return f"it has no operator for {missing[1].strip()}" if missing else runtime_error(error)


def _shapes(ov: Any, prepared: PreparedExport) -> dict[int, Any]:
    """Return the shape of each input by its number, in which free sizes are dynamic."""
    values = [v for v in user_inputs(prepared.program).values() if isinstance(v, Tensor)]
    return {
        at: ov.PartialShape([n if isinstance(n, int) else -1 for n in shape_of(value)])
        for at, value in enumerate(values)
    }


def _name(model: Any, names: Sequence[str]) -> None:
    """Give the inputs and then the outputs of a model ``names``, and take all other names from its tensors.

    OpenVINO leaves out steps that change nothing, and then gives the names of their results to what they read.
    """
    ports = [*model.inputs, *model.outputs]
    if len(ports) != len(names):
        raise ValueError(f"it has {len(ports)} inputs and outputs, expected {list(names)}")
    for node in model.get_ops():
        for output in node.outputs():
            output.get_tensor().set_names(set())
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().add_names({name})  # two outputs may be one tensor


def _check_convolutions(model: Any) -> None:
    """Raise ValueError for a convolution whose weight follows from an input, which OpenVINO cannot compile on CPUs."""
    for node in model.get_ops():
        if not node.get_type_name().endswith(("Convolution", "ConvolutionBackpropData")):
            continue
        seen: set[str] = set()
        sources = [node.input_value(1).get_node()]
        while sources:
            source = sources.pop()
            if source.get_type_name() == "Parameter":
                raise ValueError(
                    f"it computes no convolution whose weight is an input, as that of {node.get_friendly_name()!r} is: "
                    "merge the adapter, convert it with adaptc.convert_to_lora, or compile the program for other layers"
                )
            if source.get_name() not in seen:
                seen.add(source.get_name())
                sources += [value.get_node() for value in source.input_values()]


def _decompositions() -> dict[Any, Any]:
    """Return operators that OpenVINO's converter reads wrongly, each with what is equal to it."""
    aten = torch.ops.aten
    table: Any = torch.export.default_decompositions()
    return {aten.index_add.default: table[aten.index_add.default], aten.linalg_vector_norm.default: _vector_norm}


def _vector_norm(
    x: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if order != 2 or dtype is not None:
        return NotImplemented
    return (x * x).sum(list(range(x.ndim)) if dim is None else list(dim), keepdim).sqrt()
