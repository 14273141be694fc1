"""Export programs to ExecuTorch: with the adapter as inputs, or merged into the weights.

ExecuTorch takes inputs by position, and plans memory for the largest sizes. The program has two methods more that say
what it is given: ``adaptc`` returns a text in JSON, and ``adaptc_base`` the adapter inputs that compute the base.
"""

from __future__ import annotations

import builtins
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.errors import BackendError, ConfigError, short_repr
from adaptc.exporters.adapter_feeds import AdapterInputs
from adaptc.exporters.described_model import facts_of
from adaptc.exporters.file_seal import add_seal
from adaptc.exporters.prepare_export import PreparedExport, prepare_export
from adaptc.exporters.runtime_session import runtime_error
from adaptc.exporters.to_executorch.executorch_model import BASE_METHOD, TEXT_METHOD
from adaptc.exporters.to_executorch.flat_tensors import import_executorch
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import fake_mode_of, user_inputs
from adaptc.passes.graph.symbolic_fakes import limited_sizes
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.progress import stage
from adaptc.torch_typing import shape_of, symbolic_expression

BACKENDS = ("xnnpack", "portable")
#: configs of XNNPACK's partitioner for layers whose weights are constants. Others take a weight that is computed in the
#: call, such as a dequantised one, for the parameter behind it, or fail on sizes that are free.
_CONFIGS = ("LinearConfig", "ConvolutionConfig")


def export_executorch(
    program: AdaptedProgram,
    path: str | os.PathLike[str],
    *,
    adapters: Literal["inputs", "merged"] = "inputs",
    max_rank: int = 64,
    max_size: int | None = None,
    backend: Literal["xnnpack", "portable"] = "xnnpack",
) -> Path:
    """Write a program for ExecuTorch that takes any adapter in each call, or has the current one merged in.

    With "inputs", every tensor of an adapter is an input behind the model's own. An adapter may have any rank from 1 to
    ``max_rank``, and needs no padding. ExecuTorch needs a value for each input. Those of the base are what the method
    ``adaptc_base`` of the file returns. :func:`executorch_model` runs the file, and feeds what a call leaves out.

    Memory is planned for the largest sizes. So every free size of the program needs a largest value: its own, as
    ``Dim("batch", max=8)`` has, or ``max_size``. The file needs no adaptc.

    Args:
        program: a program, for "merged" also one without an adapter.
        path: the file to write, whose name ends in ``.pte``.
        adapters: "inputs" or "merged".
        max_rank: the largest rank that adapters may have, or number of entries of methods without a rank.
        max_size: the largest value of the program's free sizes that have none of their own, such as a text's length.
        backend: "xnnpack" gives linear and convolution layers of the base to XNNPACK's kernels. "portable" gives none.

    Returns:
        the path of the file.

    Raises:
        ConfigError: the program has no adapter, or several that act together; it writes to buffers; it generates; or a
            size has no largest value, here or in the program. Or an input has a name of Python, such as "input".
        SwapError: the program's adapter has a larger rank than ``max_rank``.
        MergeError: with "merged", what :func:`merge` raises.
        BackendError: ExecuTorch is not installed, or has no operator for one of the program's.
        CheckpointError: the file cannot be written. What was there before stays, here and above.

    Example:
        >>> prog = adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> path = adaptc.exporters.export_executorch(prog, "model.pte", max_size=8)
        >>> model = adaptc.exporters.executorch_model(path)
        >>> logits = model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
        >>> logits.shape
        torch.Size([2, 7, 97])
    """
    path = Path(path)
    numbers: dict[str, Any] = {"max_rank": max_rank, "max_size": 2 if max_size is None else max_size}
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 2:
            raise ConfigError(f"{name}={short_repr(number)} is no number from 2 on")
    given_backend: Any = backend  # callers may give anything
    if given_backend not in BACKENDS:
        raise ConfigError(f"backend={short_repr(given_backend)} is not one of {', '.join(BACKENDS)}")
    prepared = prepare_export(
        program, path, adapters, suffix=".pte", kind="an ExecuTorch program", max_rank=max_rank, identity="minimal"
    )
    if prepared.inputs:
        facts = {n: facts_of(t) for n, t in prepared.current.items()}
        AdapterInputs.parse(prepared.description, path).check(facts, "the program's adapter", (1, max_rank))
    with nullcontext() if max_size is None else _with_largest(prepared.program, max_size):
        made = _convert(prepared.program, _constant_methods(prepared, max_rank), backend)
    with explain_write_errors(path), stage(f"writing {path.name}"), atomic_replace(path, "new.pte") as new:
        with new.open("wb") as file:  # ``save`` logs what the OS says of a full disk, and raises nothing
            made.write_to_file(file)
        _check_kernels(new)
        add_seal(new)
    return path


def _with_largest(program: ExportedProgram, size: int) -> AbstractContextManager[None]:
    mode = fake_mode_of(program.graph)
    return nullcontext() if mode is None or mode.shape_env is None else limited_sizes(program, mode.shape_env, size)


def _constant_methods(prepared: PreparedExport, max_rank: int) -> dict[str, Any]:
    """Return the methods of the file that say what it is given. Raises ConfigError for a size without a largest one."""
    own_inputs = _own_inputs(prepared)
    about = {
        "description": json.loads(prepared.description),
        "inputs": own_inputs,
        "outputs": list(prepared.output_names),
        "max_rank": max_rank,
    }
    base = tuple(i.identity.detach().cpu().contiguous() for i in prepared.inputs)
    return {TEXT_METHOD: json.dumps(about)} | ({BASE_METHOD: base} if base else {})


def _check_kernels(path: Path) -> None:
    """Raise BackendError for a program whose operators the runtime has no kernels for."""
    try:
        import_executorch("runtime").Runtime.get().load_program(path).load_method("forward")
    except RuntimeError as error:
        raise BackendError(
            "ExecuTorch could not convert the program: its runtime lacks a kernel for one of the operators "
            f"({runtime_error(error)})"
        ) from error


def _own_inputs(prepared: PreparedExport) -> list[dict[str, Any]]:
    """Return name, dtype and [least, largest] of each size, for each of the model's own inputs.

    An input that the program was captured with as a constant has the name "" and its value. ExecuTorch is given it.
    """
    untyped: Any = prepared.program
    ranges = untyped.range_constraints
    arguments = {i.argument for i in prepared.inputs}
    found: list[dict[str, Any]] = []
    for name, value in user_inputs(prepared.program).items():
        if name in arguments:
            continue
        if hasattr(builtins, name):
            raise ConfigError(
                f"ExecuTorch converts no program with an input called {name!r}, which is a name of Python: give the "
                "argument of the model's forward another name"
            )
        if not isinstance(value, Tensor):
            if not (value is None or isinstance(value, (bool, int, float))):
                raise ConfigError(
                    f"the input {name!r} is {short_repr(value)}, which ExecuTorch takes no inputs like: capture the "
                    "model without it"
                )
            found.append({"name": "", "value": value})
            continue
        sizes: list[list[int]] = []
        for axis, size in enumerate(shape_of(value)):
            if isinstance(size, int):
                sizes.append([size, size])
                continue
            expression = symbolic_expression(size)
            bounds: list[tuple[Any, Any]] = [(ranges[s].lower, ranges[s].upper) for s in expression.free_symbols]
            if not all(getattr(most, "is_Integer", isinstance(most, int)) for _, most in bounds):
                raise ConfigError(
                    f"axis {axis} of the input {name!r} has no largest size, and ExecuTorch plans memory for it: "
                    "give max_size=512 or the like, or compile the model with Dims that have max"
                )
            least, most = (
                int(expression.subs({s: b[end] for s, b in zip(expression.free_symbols, bounds, strict=True)}))
                for end in (0, 1)
            )
            sizes.append([least, most])
        found.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "sizes": sizes})
    return found


def _convert(program: ExportedProgram, methods: Mapping[str, Any], backend: str) -> Any:
    """Return the manager of an ExecuTorch program, whose ``methods`` return constants."""
    exir = import_executorch("exir")
    # Calls read the tensors that they are given, which are not copied into memory that is planned.
    planning = import_executorch("exir.passes").MemoryPlanningPass(alloc_graph_input=False)
    partitioners: list[Any] = []
    if backend == "xnnpack":
        partition = import_executorch("backends.xnnpack.partition.xnnpack_partitioner")
        configs = import_executorch("backends.xnnpack.partition.config").ALL_PARTITIONER_CONFIGS
        partitioners = [partition.XnnpackPartitioner([c for c in configs if c.__name__ in _CONFIGS])]
    # Weights in four bits are unpacked by an operator that is not among those of its core.
    options = exir.EdgeCompileConfig(_core_aten_ops_exception_list=[torch.ops.aten.bitwise_right_shift.Tensor_Scalar])
    try:
        with stage("converting the program to ExecuTorch"), hold_graph_lock(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of torch
            edge = exir.to_edge_transform_and_lower(
                program, partitioner=partitioners, compile_config=options, constant_methods=dict(methods) or None
            )
            return edge.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=planning))
    except Exception as error:
        raise BackendError(f"ExecuTorch could not convert the program: {runtime_error(error)}") from error
