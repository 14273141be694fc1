"""Write adapters as files of ONNX Runtime, and open sessions that take adapters of any form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.errors import BackendError, CheckpointError, ConfigError
from adaptc.exporters.adapter_feeds import METADATA_KEY, AdapterInputs
from adaptc.exporters.described_model import check_adapter_path, described_tensors
from adaptc.exporters.row_stacks import RowStacks
from adaptc.exporters.to_onnx.session import ADAPTER_SUFFIX, OnnxSession, model_version
from adaptc.progress import stage

#: the number of bfloat16 among the types of ONNX tensors, which numpy lacks
_BFLOAT16 = 16


def save_onnx_adapter(
    adapter: Any,
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | OnnxSession,
    **options: Any,
) -> Path:
    """Write an adapter as an ``.onnx_adapter`` file, for one model that :func:`export_onnx` wrote.

    ONNX Runtime reads it with ``onnxruntime.LoraAdapter.Load``, and :class:`OnnxSession` by its path. It has a tensor
    for each input of the sites that the adapter has. Sites that it lacks compute the base.

    Args:
        adapter: an adapter as :func:`swap` takes it: a PEFT directory or file, a state dict, a program, what was bound
            to one.
        path: the file to write, whose name ends in ``.onnx_adapter``.
        model: the ``.onnx`` file, or a session of it.
        **options: the options of :func:`swap`, such as ``scale=0.5``.

    Returns:
        the path of the file.

    Raises:
        SwapError: the adapter needs other sites, or has values that follow from the base: bind it to the program, and
            give what ``prog.bind(adapter)`` returns.
        CheckpointError: a file cannot be read or written, a shape is wrong, or a value is not finite.
        ConfigError: an option is wrong.
        BackendError: onnxruntime or onnx is not installed. ``path`` is as it was, here and above.

    Example:
        >>> model = adaptc.exporters.export_onnx(prog, "model.onnx")
        >>> path = adaptc.exporters.save_onnx_adapter(prog, "current.onnx_adapter", model=model)
        >>> session = adaptc.exporters.onnx_session(model)
        >>> session.load_adapter("current", path)
    """
    path = Path(path)
    check_adapter_path(path, ADAPTER_SUFFIX)
    source, text = _description_text(model)
    values = described_tensors(text, source, adapter, **options)
    ort = _onnxruntime()
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(model_version(AdapterInputs.parse(text, Path(source)).fingerprint))
    parameters = {name: _ort_value(value) for name, value in values.items()}
    made.set_parameters(parameters)  # which keeps no array alive, and reads them when it writes: ``parameters`` does
    with (
        explain_write_errors(path, RuntimeError),
        stage(f"writing {path.name}"),
        atomic_replace(path, "new" + ADAPTER_SUFFIX) as new,
    ):
        made.export_adapter(str(new))
    return path


def onnx_session(
    path: str | os.PathLike[str], *, providers: Sequence[Any] | None = None, session_options: Any = None
) -> OnnxSession:
    """Open a file that :func:`export_onnx` wrote, for calls that each choose an adapter by name.

    Args:
        path: the ``.onnx`` file.
        providers: the execution providers of ONNX Runtime; None for the CPU.
        session_options: an ``onnxruntime.SessionOptions``.

    Returns:
        the session.

    Raises:
        CheckpointError: the file cannot be opened, or is of another writer.
        BackendError: onnxruntime is not installed.

    Example:
        >>> session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(prog, "model.onnx"))
        >>> session.run({"input": x.numpy()})["output"].shape
        (2, 3)
    """
    _onnxruntime()
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    return OnnxSession(Path(path), read_adapter, providers, session_options, RowStacks)


def read_adapter(adapter: Any, text: str) -> Mapping[str, Any]:
    """Return the tensors of an adapter by the names of the inputs that the description ``text`` lists."""
    values = described_tensors(text, "the model", adapter)
    return {name: _ort_value(value) for name, value in values.items()}


def _description_text(model: Any) -> tuple[str, str]:
    """Return the name of a model, and the description in its file."""
    if isinstance(model, OnnxSession):
        return str(model.path), model.text
    given = type(model).__name__
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(f"model is the path of an .onnx file or a session of it, not a {given}")
    name = str(cast("Any", model))
    try:
        import onnx

        untyped: Any = onnx
    except ImportError as error:
        raise BackendError(f"reading an ONNX file needs onnx: pip install 'adaptc[onnx]' ({error})") from error
    try:
        read = untyped.load(name, load_external_data=False)
    except Exception as error:  # a damaged file can break any reader
        raise CheckpointError(f"{name} is no ONNX file, or is missing or damaged: {error}") from error
    texts = {p.key: p.value for p in read.metadata_props}
    if METADATA_KEY not in texts:
        raise CheckpointError(
            f"{name} has no inputs for adapters: write it with adaptc.exporters.export_onnx(program, path)"
        )
    return name, texts[METADATA_KEY]


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise BackendError(f"this needs onnxruntime: pip install 'adaptc[onnx]' ({error})") from error
    return onnxruntime


def _ort_value(value: Tensor) -> Any:
    """Return a tensor as ONNX Runtime has it, in memory of its own."""
    ort, plain = _onnxruntime(), value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if value.dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain.view(torch.uint16).numpy(), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(plain.numpy())
