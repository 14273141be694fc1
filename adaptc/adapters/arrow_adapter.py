"""Make one adapter of LoRA adapters with Arrow routing between them (``arrow_adapter``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.from_program import as_adapter_object
from adaptc.errors import ConfigError, listing
from adaptc.methods import ExpertAdapter, make_arrow_adapter
from adaptc.methods.lora_family.arrow import ArrowConfig


def arrow_adapter(
    task_specific_adapter_paths: Sequence[Any], arrow_config: Any, general_adapter_paths: Sequence[Any] | None = None
) -> Adapter:
    """Return an Arrow adapter (arXiv 2405.11157), in which each token chooses among LoRA adapters, layer by layer.

    ``save_adapter`` writes the adapters, and the ``arrow_router`` that routes between them, as PEFT does; the path of
    that directory is an adapter again. No tensor of the caller's is written to.

    Args:
        task_specific_adapter_paths: PEFT directories of plain LoRA adapters, or :class:`adaptc.Adapter` objects, at the
            same linear layers. Their ranks and scales may differ.
        arrow_config: an :class:`adaptc.ArrowConfig`, or peft's.
        general_adapter_paths: with ``use_gks`` the adapters whose mean A and B are subtracted from those of each
            adapter (GenKnowSub).

    Returns:
        an adapter for ``compile``, ``swap``, ``bind`` and ``compile_for_generation``. Programs swap to any number of
        adapters of any ranks.

    Raises:
        ConfigError: an adapter is not plain LoRA or has other modules, or there are general adapters without
            ``use_gks``.
        CheckpointError: a file or a shape does not fit.

    Example:
        >>> tasks = [adaptc.Adapter(*lora_weights(seed)) for seed in (0, 1)]
        >>> routed = adaptc.compile(model, adaptc.methods.arrow_adapter(tasks, adaptc.ArrowConfig()), example_inputs=x)
        >>> report = adaptc.swap(routed, adaptc.methods.arrow_adapter(tasks[:1], adaptc.ArrowConfig()))
    """
    arrow = ArrowConfig.from_value(arrow_config)
    tasks = _read_adapters("task_specific_adapter_paths", task_specific_adapter_paths)
    general = _read_adapters("general_adapter_paths", general_adapter_paths or [])
    return Adapter(*make_arrow_adapter(arrow, tasks, general), f"Arrow of {listing((t.source for t in tasks), 3)}")


def _read_adapters(option: str, adapters: Any) -> list[ExpertAdapter]:
    if isinstance(adapters, (str, bytes, os.PathLike)) or not isinstance(adapters, Sequence):
        raise ConfigError(f"{option} must be a list of adapters, got {type(adapters).__name__}")
    objects = [as_adapter_object(a) for a in adapters]
    return [ExpertAdapter(o.config, o.tensors, o.source) for o in objects]
