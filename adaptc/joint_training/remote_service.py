"""Train adapters of a service in another process, over HTTP, with the methods that clients have in one process.

A call is sent when it is made, and its future asks for the result. Nothing beside Python's standard library is needed.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adaptc.bank.training.step_report import StepResult
from adaptc.binding.sources.configs import as_config
from adaptc.errors import AdaptcError, short_repr
from adaptc.joint_training.datum import AdamParams
from adaptc.joint_training.sampling import SampledSequence, SamplingParams
from adaptc.joint_training.token_losses import ForwardBackwardOutput
from adaptc.torch_typing import is_list_or_tuple, is_mapping

T = TypeVar("T")


def connect(url: str, api_key: str | None = None, timeout: float = 60.0) -> RemoteService:
    """Return a service that runs in another process, as ``adaptc train-server`` starts it.

    Args:
        url: the address of the server, such as ``http://127.0.0.1:8000``.
        api_key: the key that it wants; None for none.
        timeout: how many seconds a request may take. Steps may take longer: futures ask for results again.

    Returns:
        a service whose ``create`` gives clients with the methods of :class:`Client`. Losses are named, and paths are
        below the server's adapter root.

    Raises:
        AdaptcError: nothing answers there, or the key is wrong.

    Example:
        >>> adaptc.training.connect("http://127.0.0.1:9")
        Traceback (most recent call last):
        ...
        adaptc.errors.AdaptcError: the training server at http://127.0.0.1:9 does not answer: Connection refused
    """
    made = RemoteService(url.rstrip("/"), api_key, timeout)
    made.list_clients()
    return made


class RemoteService:
    """A service at ``url``."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url, self._key, self._timeout = url, api_key, timeout

    def create(self, config: Any, *, seed: int | None = None) -> RemoteClient:
        """Return a new client with an adapter of ``config``. Arguments and errors are those of
        :meth:`Service.create`."""
        fields_of = dict(config) if is_mapping(config) else as_config(config).to_dict()
        return RemoteClient(self, self.call("create", config=fields_of, seed=seed)["client"])

    def list_clients(self) -> list[dict[str, str]]:
        """Return the clients of the server: the name of each, and what it says of itself."""
        return self._send(urllib.request.Request(f"{self.url}/v1/training/clients"))["clients"]

    def call(self, name: str, **body: Any) -> dict[str, Any]:
        """Return the answer of the server to a call. Raises AdaptcError with its message where it refuses the call, or
        does not answer."""
        try:
            text = json.dumps(_plain(body), allow_nan=False)
        except ValueError as error:
            raise AdaptcError(f"{name} was called with a number that is not finite: {error}") from None
        request = urllib.request.Request(f"{self.url}/v1/training/{name}", text.encode())
        request.add_header("Content-Type", "application/json")
        return self._send(request)

    def _send(self, request: urllib.request.Request) -> Any:
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AdaptcError(f"the training server refused a request ({error.code}): {_message_of(error)}") from None
        except (OSError, ValueError) as error:
            reason: Any = getattr(error, "reason", error)
            why = getattr(reason, "strerror", None) or reason
            raise AdaptcError(f"the training server at {self.url} does not answer: {why}") from error

    def __repr__(self) -> str:
        return f"<RemoteService at {self.url}>"


class RemoteFuture(Generic[T]):
    """A result of a call that a server computes."""

    def __init__(self, service: RemoteService, client: str, request_id: str, read: Callable[[Any], T]) -> None:
        self._service, self._client, self._id, self._read = service, client, request_id, read
        self._found: list[T] = []

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise AdaptcError with the message of the error that the call raised.

        Raises TimeoutError where it is not there after ``timeout`` seconds; None waits for as long as it takes.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._found:
            wait = 20.0 if end is None else min(20.0, max(0.0, end - time.monotonic()))
            answer = self._service.call("result", client=self._client, request_id=self._id, wait=wait)
            if answer["status"] == "done":
                self._found.append(self._read(answer["result"]))
            elif end is not None and time.monotonic() >= end:
                raise TimeoutError(f"call {self._id} of {self._client} has no result after {timeout} s")
        return self._found[0]


class RemoteClient:
    """A client of a service in another process; its methods are those of :class:`Client`."""

    def __init__(self, service: RemoteService, name: str) -> None:
        self.service, self.name = service, name

    def forward_backward(
        self, data: Any, loss: str, loss_config: Mapping[str, Any] | None = None
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Compute a loss, and add its gradients to those of earlier calls; see :meth:`Client.forward_backward`."""
        return self._submit("forward_backward", _read_output, data=data, loss=loss, loss_config=loss_config)

    def forward(
        self, data: Any, loss: str, loss_config: Mapping[str, Any] | None = None
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Compute a loss without gradients; see :meth:`Client.forward`."""
        return self._submit("forward", _read_output, data=data, loss=loss, loss_config=loss_config)

    def optim_step(self, adam: AdamParams | Mapping[str, float] | None = None) -> RemoteFuture[StepResult]:
        """Take a step of AdamW with the gradients so far; see :meth:`Client.optim_step`."""

        def read(found: Any) -> StepResult:
            norm = float("nan") if found["grad_norm"] is None else found["grad_norm"]
            return StepResult(self.name, found["steps"], norm, tuple(found["learning_rates"]), found["skipped"] or "")

        return self._submit("optim_step", read, adam=adam)

    def sample(
        self, prompts: Any, num_samples: int = 1, params: SamplingParams | None = None, **options: Any
    ) -> RemoteFuture[list[SampledSequence]]:
        """Sample texts with the adapter as it is when the call runs; see :meth:`Client.sample`."""

        def read(found: Any) -> list[SampledSequence]:
            return [SampledSequence(**{**s, "logprobs": torch.tensor(s["logprobs"])}) for s in found]

        return self._submit("sample", read, prompts=prompts, num_samples=num_samples, params=params or options)

    def save_state(self, path: str) -> RemoteFuture[str]:
        """Write the adapter with its optimizer's state below the server's adapter root; a future of the path."""
        return self._submit("save_state", _read_path, path=path)

    def load_state(self, path: str) -> RemoteFuture[str]:
        """Go on from a state that :meth:`save_state` wrote; a future of the path."""
        return self._submit("load_state", _read_path, path=path)

    def save_adapter(self, path: str) -> RemoteFuture[str]:
        """Write the adapter as a PEFT directory below the server's adapter root; a future of the path."""
        return self._submit("save_adapter", _read_path, path=path)

    def close(self) -> None:
        """Leave the service: calls that wait are cancelled, and the adapter is dropped."""
        self.service.call("close", client=self.name)

    def _submit(self, name: str, read: Callable[[Any], T], **body: Any) -> RemoteFuture[T]:
        given = {k: v for k, v in body.items() if v is not None}
        answer = self.service.call(name, client=self.name, **given)
        return RemoteFuture(self.service, self.name, answer["request_id"], read)

    def __repr__(self) -> str:
        return f"<RemoteClient {self.name!r} at {self.service.url}>"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: tensors and arrays as lists, datums and options as dicts."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if hasattr(value, "to_ints"):  # Tinker's inputs
        return value.to_ints()
    if hasattr(value, "tolist"):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in fields(value)})
    if is_mapping(value):
        return {str(k): _plain(v) for k, v in value.items()}
    if is_list_or_tuple(value) or isinstance(value, (set, frozenset)):
        return [_plain(v) for v in value]
    datum: Any = value
    if hasattr(datum, "loss_fn_inputs"):
        return _plain({"model_input": datum.model_input, "loss_fn_inputs": datum.loss_fn_inputs})
    raise AdaptcError(f"{short_repr(value)} cannot be sent: give numbers, texts, lists, dicts and tensors")


def _message_of(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _read_output(found: Any) -> ForwardBackwardOutput:
    texts: Sequence[Any] = found["loss_fn_outputs"]
    outputs = [{n: torch.tensor(values) for n, values in one.items()} for one in texts]
    return ForwardBackwardOutput(found["loss"], outputs, found["metrics"])


def _read_path(found: Any) -> str:
    return found["path"]
