"""Read the rows of a sweep, choose those of each step, and make batches of them.

All configs see the same rows in the same order, which the seed gives, anew in each epoch. The loss of a step is the
mean over all its tokens, also where gradients accumulate over several batches, as in transformers' ``Trainer``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import AdaptcError, short_repr
from adaptc.joint_training.datum import IGNORED
from adaptc.joint_training.text_layout import TextLayout

#: a function of outputs and a batch that gives a scalar
BatchLoss = Callable[[Any, Mapping[str, Tensor]], Tensor]
#: a row of a dataset: ``input_ids`` and ``labels``, int64 (length,)
TokenRow = Mapping[str, Tensor]


def read_rows(what: str, dataset: Any, vocab_size: int) -> list[TokenRow]:
    """Return the rows of a dataset without their padding. Raises AdaptcError, with the number of the row, for one that
    is malformed."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        raise AdaptcError(f"{what}={short_repr(dataset)} must be a list of rows with input_ids")
    found: list[TokenRow] = []
    for i in range(len(dataset)):
        row: Any = dataset[i]
        if not hasattr(row, "keys") or "input_ids" not in row:
            raise AdaptcError(f"{what}[{i}] is {short_repr(row)}: expected a dict with input_ids")
        mask = row.get("attention_mask")
        try:
            ids = torch.as_tensor(row["input_ids"])
            labels = torch.as_tensor(row["labels"]) if "labels" in row else ids
            kept = slice(None) if mask is None else torch.as_tensor(mask).bool()
            ids, labels = ids[kept], labels[kept]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise AdaptcError(f"{what}[{i}] cannot be read: {short_repr(str(error))}") from error
        if ids.ndim != 1 or ids.is_floating_point() or labels.shape != ids.shape or len(ids) < 2:
            raise AdaptcError(
                f"{what}[{i}] has input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)}: expected at least two "
                "token ids, and as many labels"
            )
        known = labels[labels != IGNORED]
        for name, t in (("input_ids", ids), ("labels", known)):
            if len(t) and (int(t.min()) < 0 or int(t.max()) >= vocab_size):
                raise AdaptcError(f"{what}[{i}] has {name} up to {int(t.max())}; the model has {vocab_size} tokens")
        found.append({"input_ids": ids.long(), "labels": labels.long()})
    return found


def fingerprint_rows(rows: Sequence[TokenRow]) -> str:
    """Return a hash of rows, which tells whether a run goes on with the same."""
    found = hashlib.sha256()
    for row in rows:
        for t in (row["input_ids"], row["labels"]):
            found.update(f"{len(t)}:".encode() + t.numpy().tobytes())
    return found.hexdigest()


def row_indices(count: int, size: int, seed: int, step: int) -> list[int]:
    """Return the ``size`` rows of a step: each epoch of ``count`` rows has its own order."""
    positions = (divmod(p, count) for p in range(step * size, (step + 1) * size))
    return [_row_order(count, seed, epoch)[place] for epoch, place in positions]


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _row_order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def split_rows(rows: Sequence[TokenRow], size: int, by_length: bool) -> list[Sequence[TokenRow]]:
    """Return the rows of a step as batches of ``size`` rows. ``by_length``: rows of like length come together, so that
    padded batches have the least padding."""
    ordered = sorted(rows, key=lambda r: len(r["input_ids"])) if by_length else rows
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def collate(rows: Sequence[TokenRow], packs: bool) -> dict[str, Tensor]:
    """Return rows as one batch, int64 (rows, length): the inputs that :class:`TextLayout` gives, and ``labels``.

    The first token of each text has no label, for no token of the text comes before it.
    """
    lengths = [len(r["input_ids"]) for r in rows]
    layout = TextLayout.of_lengths(lengths, max(lengths), packs)
    labels = [torch.cat([r["labels"].new_full((1,), IGNORED), r["labels"][1:]]) for r in rows]
    return {**layout.inputs([r["input_ids"] for r in rows]), "labels": layout.lay_out(labels, IGNORED)}


def count_labels(rows: Sequence[TokenRow]) -> int:
    """Return how many tokens of rows the loss is of."""
    return sum(int((r["labels"][1:] != IGNORED).sum()) for r in rows)


def next_token_loss(outputs: Any, batch: Mapping[str, Tensor], count: int) -> Tensor:
    """Return the cross entropy of the next token, where ``labels`` (rows, length) are not -100, over ``count``."""
    labels = batch["labels"][:, 1:].to(outputs.logits.device)
    logits = outputs.logits[:, :-1]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / count if count else total * float("nan")


@dataclass(frozen=True)
class StepLoss:
    """The loss of one batch as its part of a step's loss.

    ``function``: the caller's, which gives the mean of a batch; None for :func:`next_token_loss`. ``labels``: how many
    tokens of the step the loss is of. ``batches``: how many batches the step has.
    """

    function: BatchLoss | None
    labels: int
    batches: int

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.function is None:
            return next_token_loss(outputs, batch, self.labels)
        loss: Any = self.function(outputs, batch)
        return loss / self.batches if isinstance(loss, Tensor) and self.batches > 1 else loss
