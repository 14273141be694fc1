"""List the families of models whose adapters are written for llama.cpp: one table, and what its loader does to them.

Names of tensors are those of the package ``gguf``. This table has what that package leaves out: which rows llama.cpp's
converter permutes (``undo_permute`` in its conversion/llama.py), and which models have no output matrix of their own.
Families that are not here are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Family:
    """A family of models in llama.cpp.

    Attributes:
        architecture: the name of its architecture in GGUF files.
        permutes_qk: whether rows of q and k are permuted, since the rotary embedding pairs neighbours.
        always_tied: whether the output matrix is that of the embedding, whatever the config says.
    """

    architecture: str
    permutes_qk: bool = False
    always_tied: bool = False


#: family by ``model_type`` of transformers' configs
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", permutes_qk=True),
        "mistral": Family("llama", permutes_qk=True),
        "qwen2": Family("qwen2"),
        "qwen3": Family("qwen3"),
        "gemma": Family("gemma", always_tied=True),
        "gemma2": Family("gemma2", always_tied=True),
        "phi3": Family("phi3"),
    }
)
