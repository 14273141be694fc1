"""Register the ops of transformers that programs and packages of its models have.

A file is loaded without the model's own code, whose import is what registers them.
"""

from __future__ import annotations


def register_ops_of_transformers() -> None:
    """Register the op that computes the experts of a model in float32."""
    import transformers.integrations.moe  # noqa: F401  # pyright: ignore[reportUnusedImport]
