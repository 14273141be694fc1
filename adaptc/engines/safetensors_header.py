"""Read the header of a safetensors file alone: names, shapes and dtypes, without values and without torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from adaptc.errors import CheckpointError, short_repr


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, dtype as safetensors calls it) of each tensor, by its key.

    Raises CheckpointError for a file that is missing or damaged.
    """
    try:
        # The format of arrays is not used: no tensor is read.
        with safe_open(file, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is no readable safetensors file ({short_repr(str(error))}). Save or download it again."
        ) from error
