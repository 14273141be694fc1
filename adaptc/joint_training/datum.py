"""Describe one text to train on.

The names are those of Tinker's API: a datum has ``model_input`` and ``loss_fn_inputs``, which are shifted against each
other by the caller, so position ``i`` of the input predicts ``target_tokens[i]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, ConfigError, listing, short_repr
from adaptc.torch_typing import is_list_or_tuple, is_mapping, to_python

#: the target of positions that no loss reads
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Datum:
    """One text to train on.

    Attributes:
        model_input: its token ids (length,).
        loss_fn_inputs: name -> what its loss reads at each position, numbers (length,).

    Example:
        >>> adaptc.training.Datum([5, 6], {"target_tokens": [6, 7], "weights": [0.0, 1.0]}).model_input
        [5, 6]
    """

    model_input: Any
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class AdamParams:
    """The options of one step of AdamW. Raises ConfigError for a value that is none.

    Attributes:
        learning_rate: the learning rate.
        beta1: the decay of the mean of gradients.
        beta2: the decay of the mean of their squares.
        eps: what is added to the root of that mean.
        weight_decay: the decoupled weight decay.
        grad_clip_norm: the norm to which gradients are clipped; 0 for no clipping.

    Example:
        >>> adaptc.training.AdamParams(learning_rate=1e-3).beta2
        0.95
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            given: Any = value  # callers may give anything
            is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
            if not is_number or not 0 <= given < (1 if name.startswith("beta") else float("inf")):
                raise ConfigError(f"{name}={short_repr(value)} must be a number from 0 upwards, betas below 1")

    @property
    def group_options(self) -> dict[str, Any]:
        """Return the options as a group of parameters of ``torch.optim.AdamW`` has them."""
        return {
            "lr": self.learning_rate,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True, eq=False)
class Text:
    """A datum that was checked. ``ids``: its token ids, int64 (length,). ``fields``: name -> a tensor (length,)."""

    ids: Tensor
    fields: Mapping[str, Tensor]


def read_texts(data: Any, required: Sequence[str], vocab_size: int) -> list[Text]:
    """Return the texts of ``data``, a list of datums, whose losses read the fields ``required``.

    A datum is a :class:`Datum`, an object with its attributes, or a dict with its keys. Raises AdaptcError, with the
    number of the datum, for one that is malformed.
    """
    if not is_list_or_tuple(data) or not data:
        raise AdaptcError(f"data={short_repr(data)} must be a list of datums with model_input and loss_fn_inputs")
    return [_read_text(i, one, required, vocab_size) for i, one in enumerate(data)]


def _read_text(i: int, datum: Any, required: Sequence[str], vocab_size: int) -> Text:
    parts = (
        dict(datum) if is_mapping(datum) else {n: getattr(datum, n, None) for n in ("model_input", "loss_fn_inputs")}
    )
    source, given = parts.get("model_input"), parts.get("loss_fn_inputs")
    if source is None or not is_mapping(given):
        raise AdaptcError(f"data[{i}] is {short_repr(datum)}: expected model_input, and a dict loss_fn_inputs")
    ids = _as_tensor(f"data[{i}].model_input", source.to_ints() if hasattr(source, "to_ints") else source)
    _check_ids(f"data[{i}].model_input", ids, vocab_size)
    missing = [n for n in required if n not in given]
    if missing:
        raise AdaptcError(
            f"data[{i}].loss_fn_inputs has no {missing[0]!r}, which the loss reads; it has {listing(given)}"
        )
    fields = {str(n): _as_tensor(f"data[{i}].loss_fn_inputs[{n!r}]", v) for n, v in given.items()}
    for name, t in fields.items():
        if t.shape != ids.shape:
            raise AdaptcError(
                f"data[{i}].loss_fn_inputs[{name!r}] has shape {tuple(t.shape)}, and the input {tuple(ids.shape)}: "
                "give one entry for each position"
            )
        if not bool(t.isfinite().all()):
            raise AdaptcError(f"data[{i}].loss_fn_inputs[{name!r}] has NaN or infinity")
    if "target_tokens" in fields:
        _check_ids(f"data[{i}].loss_fn_inputs['target_tokens']", fields["target_tokens"], vocab_size)
    return Text(ids, fields)


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise AdaptcError(f"{name} has shape {tuple(ids.shape)} and {ids.dtype}: expected whole numbers (length,)")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise AdaptcError(f"{name} has tokens from {int(ids.min())} to {int(ids.max())}; the model has {vocab_size}")


def _as_tensor(name: str, value: Any) -> Tensor:
    value = value.to_torch() if hasattr(value, "to_torch") else value
    try:
        t = (
            value.detach().cpu()
            if isinstance(value, Tensor)
            else torch.tensor(to_python(value) if hasattr(value, "tolist") else list(value))
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AdaptcError(f"{name} is {short_repr(value)}: expected a list of numbers, or a tensor") from error
    return t if t.is_floating_point() else t.long()
