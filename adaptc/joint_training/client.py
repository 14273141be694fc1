"""Train one adapter of a service, by calls that return futures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from adaptc.bank.training.adapter_trainer import AdapterTrainer, TrainingOptions
from adaptc.bank.training.step_report import StepResult
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.joint_training.datum import AdamParams, read_texts
from adaptc.joint_training.program_groups import ProgramGroup
from adaptc.joint_training.sampling import SampledSequence, Sampler, SamplingParams, read_prompts
from adaptc.joint_training.token_losses import ForwardBackwardOutput, TokenLoss, check_loss
from adaptc.torch_typing import is_mapping


class CallQueue(Protocol):
    """A service, as far as its clients use it."""

    model: Any
    vocab_size: int
    max_tokens: int
    clients: list[Client]

    def submit(self, client: Client, run: Callable[[], Any] | None = None, **options: Any) -> Future[Any]: ...

    def remove(self, client: Client) -> None: ...


class Client:
    """A client of a service, made by :meth:`Service.create`. Its calls run in the order in which it makes them."""

    def __init__(self, service: CallQueue, group: ProgramGroup, name: str) -> None:
        self.service, self.group, self.name = service, group, name

    # -- training ------------------------------------------------------------------------------------------------------

    def forward_backward(
        self, data: Any, loss: str | Callable[..., Any], loss_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Compute a loss, and add its gradients to those of earlier calls.

        Args:
            data: a list of datums: ``model_input``, token ids, and ``loss_fn_inputs`` with a value for each token.
            loss: a name or a function. "cross_entropy" reads target_tokens and weights. "importance_sampling" and "ppo"
                read target_tokens, logprobs and advantages. A function of the data and a list of log-probabilities
                gives a loss, or a loss and a dict of metrics. The data then have target_tokens.
            loss_config: for "ppo", clip_low_threshold and clip_high_threshold.

        Returns:
            a future of the loss, and of the log-probabilities of each text's targets.

        Raises:
            AdaptcError: a datum is malformed, or there are too many tokens.
            ConfigError: the loss is none, or has no such option.
        """
        return self._submit_loss(data, loss, loss_config, True)

    def forward(
        self, data: Any, loss: str | Callable[..., Any], loss_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Compute a loss without gradients; arguments, result and errors are those of :meth:`forward_backward`."""
        return self._submit_loss(data, loss, loss_config, False)

    def _submit_loss(self, data: Any, loss: Any, loss_config: Any, has_backward: bool) -> Future[Any]:
        required, options = check_loss(loss, loss_config)
        made = TokenLoss(loss, data, read_texts(data, required, self.service.vocab_size), options)
        made.place_texts(max(made.lengths), self.group.packs)
        if made.layout is not None and made.layout.tokens > self.service.max_tokens:
            raise AdaptcError(
                f"the {len(made.texts)} texts make {made.layout.tokens} tokens with their padding, and max_tokens is "
                f"{self.service.max_tokens}: give them in several calls, whose gradients add up"
            )
        return self._submit(loss=made, has_backward=has_backward)

    def optim_step(self, adam: AdamParams | Mapping[str, float] | None = None) -> Future[StepResult]:
        """Take a step of AdamW with the gradients so far, and drop them.

        Args:
            adam: the options of the step; None for those of :class:`AdamParams`.

        Returns:
            a future of the result. Its ``skipped`` tells why the step was not taken, where gradients are not finite.

        Raises:
            ConfigError: an option has a value that is none.
        """
        try:
            params = AdamParams(**adam) if is_mapping(adam) else adam or AdamParams()
        except TypeError as error:
            raise ConfigError(f"a step has no such option: {error}") from None
        given: Any = params  # callers may give anything, such as Tinker's options
        if not all(hasattr(given, n) for n in ("learning_rate", "beta1", "beta2", "eps")):
            raise ConfigError(f"adam={short_repr(adam)} must be AdamParams, or a dict of its options")
        read = AdamParams(**{f.name: getattr(given, f.name) for f in fields(AdamParams) if hasattr(given, f.name)})

        def step() -> StepResult:
            trainer = self.trainer
            for group in trainer.optimizer.param_groups:
                group.update(read.group_options)
            trainer.options = TrainingOptions(max_grad_norm=read.grad_clip_norm or None)
            return self.group.bank.step([self.name])[self.name]

        return self._submit(step)

    @property
    def trainer(self) -> AdapterTrainer:
        """Return what trains the adapter: its parameters, optimizer and number of steps."""
        return self.group.bank.trainer(self.name)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(
        self, prompts: Any, num_samples: int = 1, params: SamplingParams | None = None, **options: Any
    ) -> Future[list[SampledSequence]]:
        """Sample texts with the adapter as it is when the call runs.

        Args:
            prompts: a list of prompts, each a list of token ids.
            num_samples: how many texts for each prompt.
            params: the options of sampling, or None.
            **options: the options by name, such as ``max_tokens=16`` and ``temperature=0``.

        Returns:
            a future of the texts with the log-probabilities of their tokens, those of one prompt together.

        Raises:
            AdaptcError: a prompt is none.
            ConfigError: an option has a value that cannot be honoured.
        """
        if params is not None and options:
            raise ConfigError(f"give {next(iter(options))} in params, or all options by name")
        try:
            chosen = params or SamplingParams(**options)
        except TypeError as error:
            raise ConfigError(f"sampling has no such option: {error}") from None
        read = read_prompts(prompts, self.service.vocab_size)
        given: Any = num_samples  # callers may give anything
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ConfigError(f"num_samples={short_repr(num_samples)} must be a positive integer")

        def sample() -> list[SampledSequence]:
            group = self.group
            if group.sampler is None:
                group.sampler = Sampler(self.service.model, group.bank.program, group.config)
            return group.sampler.sample(group.bank[self.name], read, num_samples, chosen)

        return self._submit(sample)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_adapter(self, path: str | os.PathLike[str]) -> Future[Path]:
        """Write the adapter as a PEFT directory; returns a future of its path."""
        return self._submit(lambda: self.group.bank.save_adapter(self.name, path))

    def save_state(self, path: str | os.PathLike[str]) -> Future[Path]:
        """Write the adapter with its optimizer's state, for :meth:`load_state`; returns a future of the directory."""
        return self._submit(lambda: self.group.bank.save_state(self.name, path))

    def load_state(self, path: str | os.PathLike[str]) -> Future[None]:
        """Go on from a state that :meth:`save_state` wrote; gradients so far are dropped. It may have another rank.

        The future raises CheckpointError or SwapError for a state that does not fit, and the adapter is as it was.
        """

        def load() -> None:
            bank, old = self.group.bank, self.name
            new = old.removesuffix("'") if old.endswith("'") else f"{old}'"
            bank.load_state(new, path)
            self.name = new
            bank.remove(old)

        return self._submit(load)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _submit(self, run: Callable[[], Any] | None = None, **call: Any) -> Future[Any]:
        return self.service.submit(self, run, **call)

    def close(self) -> None:
        """Leave the service: calls that wait are cancelled, and the adapter is dropped."""
        self.service.remove(self)

    def __repr__(self) -> str:
        if self not in self.service.clients:
            return f"<Client {self.name!r}, which was removed>"
        return f"<Client {self.name!r}: {self.group.bank[self.name].summary()}, {self.trainer.steps} steps>"
