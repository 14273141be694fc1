"""One adapter trained by several processes: pipeline stages, sharded bases, layers divided among processes, and
checkpoints for any number of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptc.public_names import lazy_names

if TYPE_CHECKING:
    from adaptc.distributed.meta_start import compile_from_config, load_base
    from adaptc.distributed.pipeline import TrainingPipeline
    from adaptc.distributed.split_program import SplitProgram
    from adaptc.distributed.staged_module import StagedModule
    from adaptc.distributed.tensor_parallel import shard_tensors
    from adaptc.distributed.train_state import load_state, save_state

#: public name -> the module that defines it
PUBLIC = {
    "SplitProgram": "adaptc.distributed.split_program",
    "TrainingPipeline": "adaptc.distributed.pipeline",
    "compile_from_config": "adaptc.distributed.meta_start",
    "load_base": "adaptc.distributed.meta_start",
    "StagedModule": "adaptc.distributed.staged_module",
    "shard_tensors": "adaptc.distributed.tensor_parallel",
    "save_state": "adaptc.distributed.train_state",
    "load_state": "adaptc.distributed.train_state",
}

__all__ = [*PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, PUBLIC)
