"""The vision task: a small ViT that knows the digits 0 to 4 learns the digits 5 to 9.

The images are scikit-learn's, of 8 by 8 pixels, in parts that a fixed seed draws. The model is trained here on the
first five digits, in about a second, and has an output for each of the ten. Its head is trained with every adapter.
What it knew is asked among the first five digits alone, since any training on the others makes these likelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.comparison.task import Logits, Row, Scores, Task

#: digits below this one are known before
FIRST_NEW = 5
SEED = 0
LAYERS = 3
HEAD = "classifier"
#: shares of the images that are held out
_SHARES = {"test": 0.3, "validation": 0.2}
_BASE_STEPS, _BASE_BATCH, _BASE_RATE = 200, 32, 3e-3


def make() -> Task:
    """Return the task with a model that was trained on the first digits."""
    images, digits = digit_images()
    parts = split_parts(len(digits))
    is_new = digits >= FIRST_NEW

    def chosen(part: str, new: bool) -> tuple[Tensor, Tensor]:
        places = parts[part][is_new[parts[part]] == new]
        return images[places], digits[places]

    model = train_base(*chosen("train", False))
    new_images, new_digits = chosen("train", True)

    def score(logits: Logits, part: str) -> Scores:
        (pixels, labels), (old_pixels, old_labels) = chosen(part, True), chosen(part, False)
        found, old = logits({"pixel_values": pixels}), logits({"pixel_values": old_pixels})
        return Scores(
            float((found.argmax(-1) == labels).float().mean()),
            float(F.cross_entropy(found, labels)),
            float(F.cross_entropy(old[:, :FIRST_NEW], old_labels)),
        )

    return Task(
        name="vision",
        model=model,
        layers=LAYERS,
        small_model=small_model,
        targets={"layers": ["q_proj", "v_proj", "fc1", "fc2"], "norms": ["layernorm_before", "layernorm_after"]},
        options={"modules_to_save": [HEAD]},
        train_rows=[{"pixel_values": i, "labels": d} for i, d in zip(new_images, new_digits, strict=True)],
        collate=collate,
        score=score,
        head=HEAD,
    )


def digit_images() -> tuple[Tensor, Tensor]:
    """Return all images, (n, 1, 8, 8) from 0 to 1, and their digits."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


def split_parts(count: int) -> dict[str, Tensor]:
    """Return part -> the places of its images, in an order that the seed draws."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    test, validation = (int(count * share) for share in _SHARES.values())
    parts = torch.split(order, [test, validation, count - test - validation])
    return dict(zip((*_SHARES, "train"), parts, strict=True))


def small_model(layers: int = LAYERS) -> nn.Module:
    """Return a ViT for these images with random values, the same for each number of layers."""
    from transformers import ViTConfig, ViTForImageClassification

    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": layers}
    images: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    config = ViTConfig(**widths, **images, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(SEED)
    return ViTForImageClassification(config).eval()


def train_base(images: Tensor, digits: Tensor) -> nn.Module:
    """Return the model after its training on these digits."""
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_RATE)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(_BASE_STEPS):
        places = torch.randint(len(digits), (_BASE_BATCH,), generator=generator)
        F.cross_entropy(model(pixel_values=images[places]).logits, digits[places]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
