"""Write adapters that may be several directories on disk: all of them, or what was there before stays.

An Arrow adapter is LoRA adapters with a router beside them, and an X-LoRA adapter has its experts below it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.adapter_files.directory import write_adapter
from adaptc.adapter_files.locate import check_plain_name
from adaptc.adapter_files.multi_adapter import write_together
from adaptc.methods import AdapterConfig


def write_with_experts(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    **options: Any,
) -> Path:
    """Write an adapter as :func:`~adaptc.adapter_files.directory.write_adapter` does, and return the path of its
    directory.

    An adapter that files hold as several is written as one directory per name. The path is then that of the directory
    that stands for all.
    """
    root = Path(path) if adapter_name == "default" else Path(path) / check_plain_name(adapter_name, "adapter_name")
    parts = config.adapters_to_write(tensors, str(root.absolute()))
    if named := [n for n in parts if n]:  # first, so that the directory which names them never lies there without them
        with write_together(root, named) as stage:
            for name in named:
                write_adapter(stage, *parts[name], adapter_name=name, **options)
    if "" in parts:
        return write_adapter(path, *parts[""], adapter_name=adapter_name, **options)
    return root / list(parts)[-1]
