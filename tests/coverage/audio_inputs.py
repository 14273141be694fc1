"""Makes sounds, as waves or as the features of their frames, alone and in texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.coverage.image_texts import beside
from tests.coverage.small_values import find_setting, random_values

Maker = Callable[[int, int], dict[str, Any]]
_MELS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "mel_bins", "n_mels")
_AUDIO_TOKENS = (
    "audio_token_id",
    "audio_token_index",
    "audio_pad_token_id",
    "speech_token_id",
    "sound_context_token_id",
)


def sounds(config: Any, forward: list[str]) -> Iterator[Maker]:
    """Yield makers of sounds in all forms that ``forward`` may take: waves, and features in both orders of axes."""
    mels = int(find_setting(config, *_MELS) or 16)
    positions = find_setting(config, "max_source_positions")
    frames = int(2 * positions) if positions else 64
    long = int(find_setting(config, "max_length") or 64)
    rows = int(find_setting(config, "input_dim") or mels)
    shapes = {
        "input_features": [(mels, frames), (frames, mels), (64, mels), (64, rows)],
        "input_values": [(1600,), (4000,), (1, 1600), (long, mels)],
        "inputs": [(1600,)],
    }
    for name, forms in shapes.items():
        for shape in forms if name in forward else ():

            def sound(batch: int, length: int, name: str = name, shape: tuple[int, ...] = shape) -> dict[str, Any]:
                return {name: random_values(batch, *shape)}

            yield sound


def audio_text_forms(model: Any, forward: list[str], text: Maker) -> Iterator[Maker]:
    """Yield makers of texts with a sound in each row, with and without a mask of its frames."""
    if find_setting(model.config, *_AUDIO_TOKENS) is None:
        return
    masks = [name for name in ("input_features_mask", "feature_attention_mask", "padding_mask") if name in forward]
    for sound in sounds(model.config, forward):
        for name in (*masks, None):

            def masked(batch: int, length: int, sound: Maker = sound, name: str | None = name) -> dict[str, Any]:
                out = sound(batch, length)
                values = next(iter(out.values()))
                frames = max(values.shape[1:])
                return {**out, name: torch.ones(batch, frames, dtype=torch.long)} if name else out

            yield beside(model, forward, text, masked, _AUDIO_TOKENS, _first_count(model.config, sound))


def _first_count(config: Any, sound: Maker) -> int:
    """Return with how many placeholders to begin.

    Qwen2-Audio takes one as well, for each sound, which its processor no longer gives.
    """
    if config.model_type != "qwen2_audio":
        return 1
    frames = max(next(iter(sound(1, 1).values())).shape[1:])
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1
