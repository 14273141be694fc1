"""Write adapters as files for one ExecuTorch program, and open programs that take adapters of any form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from adaptc.exporters.described_model import described_tensors, write_described_adapter
from adaptc.exporters.runtime_session import as_session
from adaptc.exporters.to_executorch.executorch_model import ExecutorchModel
from adaptc.exporters.to_executorch.flat_tensors import write_flat_tensors


def save_executorch_adapter(
    adapter: Any, path: str | os.PathLike[str], *, model: str | os.PathLike[str] | ExecutorchModel, **options: Any
) -> Path:
    """Write an adapter as a ``.ptd`` file for one program that :func:`export_executorch` wrote.

    It has a tensor for each input of the sites that the adapter has, by the input's name. ExecuTorch's
    ``FlatTensorDataMap`` reads it in C++, and :class:`ExecutorchModel` takes it by its path.

    Args:
        adapter: an adapter as :func:`swap` takes it: a PEFT directory or file, a state dict, a program, what was bound
            to one.
        path: the file to write, whose name ends in ``.ptd``.
        model: the ``.pte`` file, or an :class:`ExecutorchModel` of it.
        **options: the options of :func:`swap`, such as ``scale=0.5``.

    Returns:
        the path of the file.

    Raises:
        SwapError: the adapter needs other sites, or has values that follow from the base: bind it to the program, and
            give what ``prog.bind(adapter)`` returns.
        CheckpointError: a file cannot be read or written, a shape is wrong, or a value is not finite.
        ConfigError: an option is wrong.
        BackendError: ExecuTorch is not installed. ``path`` is as it was, here and above.

    Example:
        >>> prog = adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> file = adaptc.exporters.export_executorch(prog, "model.pte", max_size=8)
        >>> path = adaptc.exporters.save_executorch_adapter(prog, "current.ptd", model=file)
        >>> model = adaptc.exporters.executorch_model(file)
        >>> model.load_adapter("current", path)
    """
    session = as_session(model, ExecutorchModel, executorch_model, "a .pte file")
    return write_described_adapter(adapter, Path(path), session, write_flat_tensors, options)


def executorch_model(path: str | os.PathLike[str]) -> ExecutorchModel:
    """Open a program that :func:`export_executorch` wrote, for calls that each choose an adapter by name.

    Args:
        path: the ``.pte`` file.

    Returns:
        the model.

    Raises:
        CheckpointError: the file is damaged or missing, or of another writer.
        BackendError: ExecuTorch is not installed, or cannot run the program.

    Example:
        >>> prog = adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> model = adaptc.exporters.executorch_model(adaptc.exporters.export_executorch(prog, "model.pte", max_size=8))
        >>> model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"].shape
        torch.Size([2, 7, 97])
    """
    return ExecutorchModel(Path(path), lambda adapter, text: described_tensors(text, "the model", adapter))
