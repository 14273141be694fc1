"""Write adapters as files for one OpenVINO model, and open models that take adapters of any form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptc.exporters.described_model import described_tensors, write_described_adapter
from adaptc.exporters.row_stacks import RowStacks
from adaptc.exporters.runtime_session import as_session
from adaptc.exporters.to_openvino.adapter_tensors import write_tensors
from adaptc.exporters.to_openvino.openvino_model import OpenVinoModel


def save_openvino_adapter(
    adapter: Any, path: str | os.PathLike[str], *, model: str | os.PathLike[str] | OpenVinoModel, **options: Any
) -> Path:
    """Write an adapter as a safetensors file for one model that :func:`export_openvino` wrote.

    It has a tensor for each input of the sites that the adapter has, by the input's name. Any program can feed them to
    OpenVINO, in place of those of the base. :class:`OpenVinoModel` takes the file by its path.

    Args:
        adapter: an adapter as :func:`swap` takes it: a PEFT directory or file, a state dict, a program, what was bound
            to one.
        path: the file to write, whose name ends in ``.safetensors``.
        model: the ``.xml`` file, or an :class:`OpenVinoModel` of it.
        **options: the options of :func:`swap`, such as ``scale=0.5``.

    Returns:
        the path of the file.

    Raises:
        SwapError: the adapter needs other sites, or has values that follow from the base: bind it to the program, and
            give what ``prog.bind(adapter)`` returns.
        CheckpointError: a file cannot be read or written, a shape is wrong, or a value is not finite.
        ConfigError: an option is wrong.
        BackendError: OpenVINO is not installed. ``path`` is as it was, here and above.

    Example:
        >>> file = adaptc.exporters.export_openvino(prog, "model.xml")
        >>> path = adaptc.exporters.save_openvino_adapter(prog, "current.safetensors", model=file)
        >>> model = adaptc.exporters.openvino_model(file)
        >>> model.load_adapter("current", path)
    """
    session = as_session(model, OpenVinoModel, openvino_model, "an .xml file")
    return write_described_adapter(adapter, Path(path), session, write_tensors, options)


def openvino_model(
    path: str | os.PathLike[str],
    *,
    device: str = "CPU",
    config: Mapping[str, Any] | None = None,
    separate_base: bool = False,
) -> OpenVinoModel:
    """Open a model that :func:`export_openvino` wrote, for calls that each choose an adapter by name.

    Args:
        path: the ``.xml`` file. The files that were written with it lie beside it.
        device: the device of OpenVINO, such as "CPU" or "GPU".
        config: the properties that OpenVINO compiles the model with. None sets ``INFERENCE_PRECISION_HINT`` to "f32",
            without which OpenVINO computes in bfloat16 on some processors.
        separate_base: whether calls without an adapter have a compiled model of their own. They then cost
            nearly what the exported base costs, and the base weights take memory twice.

    Returns:
        the model.

    Raises:
        CheckpointError: the files are damaged or missing, or of another writer.
        BackendError: OpenVINO is not installed, or cannot run the program.
        ConfigError: with ``separate_base``, the base needs inputs of the adapter, as that of DoRA does; or the file has
            an adapter for each row, or a merged one.

    Example:
        >>> model = adaptc.exporters.openvino_model(adaptc.exporters.export_openvino(prog, "model.xml"))
        >>> model.run({"input": x.numpy()})["output"].shape
        (2, 3)
    """
    return OpenVinoModel(
        Path(path), lambda a, text: described_tensors(text, "the model", a), device, config, RowStacks, separate_base
    )
