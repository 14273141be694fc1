"""Train adapters for several clients on one base, in the shape of Tinker's API.

Each client has an adapter and its own loop: ``forward_backward``, ``optim_step``, ``sample``. Calls return futures. One
thread runs them, in the order in which they came. Calls of several clients that wait together become one batch, whose
rows are as long as the longest text. Short texts of one client share a row, and texts never attend to each other. A
call that fails changes nothing for other clients.

Clients whose configs fit one program share its bank. A config of another method, or with other layers, gets a program
of its own on the same base weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from adaptc.bank.training.training_bank import TrainingBank
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.joint_training.client import Client
from adaptc.joint_training.program_groups import ProgramGroups
from adaptc.joint_training.text_layout import TextLayout, join_inputs
from adaptc.joint_training.token_losses import TokenLoss
from adaptc.locks import reset_after_fork


@dataclass(eq=False)
class Call:
    """A call that waits. ``run`` does it alone. ``loss`` is that of a batch, which other calls may share, and
    ``has_backward`` whether gradients are wanted."""

    client: Client
    run: Callable[[], Any] | None = None
    loss: TokenLoss | None = None
    has_backward: bool = True
    future: Future[Any] = field(default_factory=Future[Any])


class Service:
    """A trainer of adapters of one model for several clients.

    Args:
        model: a causal language model of transformers.
        capacity: how many clients there may be.
        max_rank: the largest rank of an adapter; None for any.
        max_tokens: the most tokens of a batch, padding counted.
        packing: whether texts of one client share rows, where the model keeps them apart; else each text is a row.
        wait: how many seconds a call waits for those of other clients, to share a batch with them. It does not wait
            once each client of the same program has a call.

    Raises:
        ConfigError: an option has a value that cannot be honoured, or the model is no causal language model.

    Example:
        >>> service = adaptc.training.Service(lm, capacity=2, max_tokens=256)
        >>> client = service.create(LoraConfig(r=2, target_modules=["q_proj"]), seed=0)
        >>> data = [{"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [1.0, 1.0]}}]
        >>> output = client.forward_backward(data, "cross_entropy").result()
        >>> client.optim_step(adaptc.training.AdamParams(learning_rate=1e-3)).result().steps
        1
        >>> service.close()
    """

    def __init__(
        self,
        model: Any,
        *,
        capacity: int = 8,
        max_rank: int | None = None,
        max_tokens: int = 8192,
        wait: float = 0.0,
        packing: bool = True,
    ) -> None:
        limits: dict[str, Any] = {"capacity": capacity, "max_tokens": max_tokens}
        for name, value in limits.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={short_repr(value)} must be a positive integer")
        given: Any = wait  # callers may give anything
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < float("inf"):
            raise ConfigError(f"wait={short_repr(wait)} must be a number of seconds from 0 upwards")
        self.model, self.capacity, self.max_rank, self.max_tokens, self.wait = (
            model,
            capacity,
            max_rank,
            max_tokens,
            wait,
        )
        self._groups = ProgramGroups(model, max_rank, packing)
        self.vocab_size = self._groups.vocab_size
        self.clients: list[Client] = []
        #: the number of batches that were run, each for one client or several
        self.batch_count = 0
        #: the number of tokens of these batches, and of the positions of their rows, padding counted
        self.token_count = self.position_count = 0
        self._calls: list[Call] = []
        #: clients whose calls run now, and those of them that left meanwhile
        self._running: set[Client] = set()
        self._leaving: set[Client] = set()
        self._changed = threading.Condition(reset_after_fork(threading.RLock()))
        self._thread: threading.Thread | None = None
        self._is_closed, self._created = False, 0

    # -- clients -------------------------------------------------------------------------------------------------------

    def create(self, config: Any, *, seed: int | None = None) -> Client:
        """Return a new client with an adapter of ``config``.

        Args:
            config: a config, as ``adaptc.compile`` takes it, without dropout.
            seed: the seed of its first values; None for torch's global generator.

        Returns:
            the client.

        Raises:
            ConfigError: the service is full, or the config has an option that cannot be honoured.
            TargetError: the config selects no layer.
            AdaptcError: the service is closed.
        """
        with self._changed:
            self._check_open()
            if len(self.clients) >= self.capacity:
                raise ConfigError(
                    f"the service has {len(self.clients)} clients and no room for another: close one, or make it "
                    "larger with capacity="
                )
            self._created += 1
            name = f"client{self._created}"
            group = self._groups.add(name, config, seed=seed)
            client = Client(self, group, name)
            self.clients.append(client)
            return client

    def remove(self, client: Client) -> None:
        """Remove a client with its adapter; its calls that wait are cancelled. It may have been removed before.

        A call of it that runs goes on to its end, and the adapter goes after that: others may share the batch.
        """
        with self._changed:
            if client in self.clients:
                self.clients.remove(client)
                for call in [c for c in self._calls if c.client is client]:
                    self._calls.remove(call)
                    call.future.cancel()
                if client in self._running:
                    self._leaving.add(client)
                else:
                    self._groups.remove(client.group, client.name)
                self._changed.notify_all()

    def close(self) -> None:
        """End the service: calls that wait are cancelled, and further ones raise AdaptcError."""
        with self._changed:
            self._is_closed = True
            for call in self._calls:
                call.future.cancel()
            self._calls.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Service: {len(self.clients)} of {self.capacity} clients, {len(self._groups.groups)} programs>"

    # -- calls ---------------------------------------------------------------------------------------------------------

    def submit(self, client: Client, run: Callable[[], Any] | None = None, **options: Any) -> Future[Any]:
        """Let a call of ``client`` wait for its turn; the arguments are the fields of :class:`Call`.

        Raises AdaptcError where the service is closed or the client was removed.
        """
        call = Call(client, run, **options)
        with self._changed:
            self._check_open()
            if call.client not in self.clients:
                raise AdaptcError(f"{call.client!r} was removed from the service: make another with service.create")
            self._calls.append(call)
            if self._thread is None or not self._thread.is_alive():  # a forked child has no thread
                self._thread = threading.Thread(target=self._work, name="adaptc-training-service", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return call.future

    def _check_open(self) -> None:
        if self._is_closed:
            raise AdaptcError("the service was closed: make another one")

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._calls and not self._is_closed:
                    self._changed.wait()
                if self.wait:
                    self._changed.wait_for(self._has_all_calls, self.wait)
                if self._is_closed:
                    return
                calls = self._take_calls()
                self._running = {c.client for c in calls}
            try:
                if calls:
                    self._run(calls)
            finally:
                with self._changed:
                    for client in self._leaving:
                        self._groups.remove(client.group, client.name)
                    self._leaving, self._running = set(), set()

    def _has_all_calls(self) -> bool:
        """Return whether the first call has nothing to wait for: it shares no batch, or each client of its program has
        a call."""
        first = self._calls[0] if self._calls else None
        if self._is_closed or first is None or first.loss is None:
            return True
        clients = {c.client for c in self._calls}
        return all(c in clients for c in self.clients if c.group is first.client.group)

    def _take_calls(self) -> list[Call]:
        """Take the calls that run next: the first, and those of other clients that may share its batch."""
        taken: list[Call] = []
        waiting: set[Client] = set()
        for call in list(self._calls):
            if call.future.cancelled():
                self._calls.remove(call)
                continue
            first = taken[0] if taken else call
            fits = call is first or (
                call.loss is not None
                and first.loss is not None
                and call.client not in waiting
                and call.client.group is first.client.group
                and call.has_backward == first.has_backward
                and _tokens_of([c.loss for c in (*taken, call) if c.loss], first.client.group.packs) <= self.max_tokens
            )
            waiting.add(call.client)
            if fits:
                taken.append(call)
            if first.loss is None:
                break
        self._calls = [c for c in self._calls if c not in taken]
        return [c for c in taken if c.future.set_running_or_notify_cancel()]

    def _run(self, calls: Sequence[Call]) -> None:
        try:
            if calls[0].loss is None:
                assert calls[0].run is not None
                calls[0].future.set_result(calls[0].run())
            else:
                self._run_batch(calls)
        except BaseException as error:  # whatever it is, those who wait must be told
            for call in calls:
                if not call.future.done():
                    call.future.set_exception(error)

    def _run_batch(self, calls: Sequence[Call]) -> None:
        self.batch_count += 1
        bank = calls[0].client.group.bank
        losses = {c.client.name: c.loss for c in calls if c.loss}
        longest = max(n for loss in losses.values() for n in loss.lengths)
        parts = {n: loss.place_texts(longest, calls[0].client.group.packs) for n, loss in losses.items()}
        inputs = join_inputs([*parts.values()], bank.device)
        rows = [n for n, part in parts.items() for _ in part["input_ids"]]
        self.token_count += sum(n for loss in losses.values() for n in loss.lengths)
        self.position_count += inputs["input_ids"].numel()
        if calls[0].has_backward:
            found = bank.forward_backward(inputs, rows, losses)
            errors = {n: one.error for n, one in found.items()}
        else:
            errors = _forward(bank, inputs, rows, losses)
        for call in calls:
            error = errors[call.client.name]
            if error is not None:
                call.future.set_exception(error)
            else:
                call.future.set_result(losses[call.client.name].output)


def _tokens_of(losses: Sequence[TokenLoss], packs: bool) -> int:
    """Return the number of tokens of a batch of these calls, padding counted."""
    longest = max(n for loss in losses for n in loss.lengths)
    return sum(TextLayout.of_lengths(loss.lengths, longest, packs).tokens for loss in losses)


def _forward(bank: TrainingBank, inputs: Any, rows: list[str], losses: dict[str, TokenLoss]) -> dict[str, Any]:
    """Compute the losses of each client without gradients. Returns the error of each, None for none."""
    errors: dict[str, Any] = {}
    with torch.no_grad():
        logits = bank(**inputs, adapters=rows).logits
        for name, loss in losses.items():
            own = [i for i, n in enumerate(rows) if n == name]
            try:
                loss(_Logits(logits[own[0] : own[-1] + 1]), None)
                errors[name] = None
            except Exception as error:
                errors[name] = error
    return errors


@dataclass(frozen=True, eq=False)
class _Logits:
    logits: torch.Tensor
