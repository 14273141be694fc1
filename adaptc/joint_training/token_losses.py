"""Compute the losses that a service knows by name, from the log-probabilities of target tokens.

Names and fields are those of Tinker's API. Losses are sums over the positions of all texts of a call:

- ``cross_entropy``: -sum(weights * logprobs)
- ``importance_sampling``: -sum(ratio * advantages), where ratio = exp(logprobs - the sampler's logprobs)
- ``ppo``: -sum(min(ratio * advantages, clip(ratio) * advantages)) (https://arxiv.org/abs/1707.06347)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.errors import AdaptcError, ConfigError, did_you_mean, listing, short_repr
from adaptc.joint_training.datum import IGNORED, Text
from adaptc.joint_training.text_layout import TextLayout
from adaptc.torch_typing import is_mapping

#: name of a loss -> the fields that it reads of each datum
REQUIRED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": ("target_tokens", "logprobs", "advantages"),
    "ppo": ("target_tokens", "logprobs", "advantages"),
}
#: the options of PPO: how far the ratio may go
PPO_OPTIONS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput:
    """The result of a call for one client.

    ``loss``: the sum over its texts. ``loss_fn_outputs``: for each text a dict with ``logprobs``, float (length,), of
    its target tokens. ``metrics``: the loss, and what a loss function of the caller's gives.
    """

    loss: float
    loss_fn_outputs: Sequence[Mapping[str, Tensor]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(eq=False)
class TokenLoss:
    """The loss of one client's texts, as a bank calls it: a function of the outputs of their rows.

    ``function``: a name, or a function of (data, logprobs) that gives a loss, or a loss and a dict of metrics. ``data``
    is what the caller gave, ``texts`` the same after the check. ``options``: those of the loss by its name. ``layout``:
    where the texts are in the client's rows, set before the call. Once it was called, ``output`` has the result.
    """

    function: str | Callable[[Any, list[Tensor]], Any]
    data: Any
    texts: Sequence[Text]
    options: Mapping[str, float]
    layout: TextLayout | None = None
    output: ForwardBackwardOutput | None = None

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(t.ids) for t in self.texts]

    def place_texts(self, length: int, packs: bool) -> dict[str, Tensor]:
        """Lay the texts out as rows of ``length`` positions, and return these rows as inputs."""
        self.layout = TextLayout.of_lengths(self.lengths, length, packs)
        return self.layout.inputs([t.ids for t in self.texts])

    def __call__(self, outputs: Any, _: Any) -> Tensor:
        logprobs = self._logprobs(outputs.logits)
        metrics: dict[str, float] = {}
        if isinstance(self.function, str):
            loss = sum(self._of_text(t, p) for t, p in zip(self.texts, logprobs, strict=True))
        else:
            made: Any = self.function(self.data, logprobs)
            loss, metrics = made if isinstance(made, tuple) else (made, {})
        if not isinstance(loss, Tensor):
            raise AdaptcError(f"the loss function gave {short_repr(loss)}: expected a scalar tensor, or it and metrics")
        value = float(loss.detach())
        self.output = ForwardBackwardOutput(
            value,
            [{"logprobs": p.detach().cpu()} for p in logprobs],
            {"loss:sum": value, **{str(k): float(v) for k, v in metrics.items()}},
        )
        return loss

    def _logprobs(self, logits: Tensor) -> list[Tensor]:
        """Return the log-probabilities of each text's targets, from logits (rows, length, vocabulary)."""
        assert self.layout is not None
        targets = self.layout.lay_out([t.fields["target_tokens"] for t in self.texts], IGNORED).to(logits.device)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return self.layout.take(-losses.view(targets.shape), self.lengths)

    def _of_text(self, text: Text, logprobs: Tensor) -> Tensor:
        own = {n: t.to(logprobs) for n, t in text.fields.items() if n != "target_tokens"}
        if self.function == "cross_entropy":
            return -(own["weights"] * logprobs).sum()
        ratio, advantages = torch.exp(logprobs - own["logprobs"]), own["advantages"]
        if self.function == "importance_sampling":
            return -(ratio * advantages).sum()
        clipped = ratio.clamp(self.options["clip_low_threshold"], self.options["clip_high_threshold"])
        return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def check_loss(loss: Any, config: Mapping[str, Any] | None) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the fields that a loss reads, and its options. Raises ConfigError for a loss or an option that is none."""
    if config is not None and not is_mapping(config):
        raise ConfigError(f"loss_config={short_repr(config)} must be a dict of options")
    given = dict(config or {})
    known = dict(PPO_OPTIONS) if loss == "ppo" else {}
    if isinstance(loss, str) and loss not in REQUIRED_FIELDS:
        raise ConfigError(
            f"loss={loss!r} is not one of {listing(map(repr, REQUIRED_FIELDS))}, or a function of the data and their "
            f"log-probabilities{did_you_mean(loss, REQUIRED_FIELDS)}"
        )
    if not isinstance(loss, str) and not callable(loss):
        raise ConfigError(f"loss={short_repr(loss)} must be a name or a function")
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"loss {short_repr(loss)} has no option {name!r}{did_you_mean(str(name), known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"{name}={short_repr(value)} must be a positive number")
    return REQUIRED_FIELDS.get(loss, ("target_tokens",)) if isinstance(loss, str) else ("target_tokens",), known | given
