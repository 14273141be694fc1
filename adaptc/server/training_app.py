"""Offer a training service over HTTP: clients in other processes train adapters of one base.

A call that computes is answered at once with a number, ``request_id``, and its result is asked for with
``/v1/training/result``, which waits for a while. So a client can send ``forward_backward`` and ``optim_step`` one after
the other without waiting, as in one process. And a connection that breaks loses no result: whether a step was taken can
be asked again, where a repeated call would take another one.

Each body is a JSON object. Paths are relative to one directory of the server.

    POST /v1/training/create            config, seed                         -> client
    POST /v1/training/forward_backward  client, data, loss, loss_config      -> request_id
    POST /v1/training/forward           the same, without gradients          -> request_id
    POST /v1/training/optim_step        client, adam                         -> request_id
    POST /v1/training/sample            client, prompts, num_samples, params -> request_id
    POST /v1/training/save_state        client, path                         -> request_id
    POST /v1/training/load_state        client, path                         -> request_id
    POST /v1/training/save_adapter      client, path                         -> request_id
    POST /v1/training/result            client, request_id, wait             -> status, result
    POST /v1/training/close             client
    GET  /v1/training/clients                                                -> clients
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.binding.sources.configs import config_from_fields
from adaptc.errors import AdaptcError, ConfigError, did_you_mean, short_repr
from adaptc.joint_training.client import Client
from adaptc.joint_training.service import Service
from adaptc.locks import reset_after_fork
from adaptc.server.adapter_root import AdapterRoot
from adaptc.server.request_checks import RequestRefusedError, check_packages, check_request, error_body, parse_body
from adaptc.tables import to_json_value

#: the longest time that a request waits for a result, in seconds: proxies end connections that are silent for a minute
MAX_WAIT = 30.0


@dataclass(frozen=True)
class TrainingServerOptions:
    """The options of a training server.

    ``adapter_root``: the directory below which clients write and read; None for no files. ``api_key``: the key that
    requests must bring, None for no key. ``max_body_bytes``: the largest body. ``max_results``: the most calls of a
    client whose results were not asked for. ``max_sequences``: the most texts of a call that samples.
    """

    adapter_root: Path | None = None
    api_key: str | None = None
    max_body_bytes: int = 64 << 20
    max_results: int = 256
    max_sequences: int = 256

    def __post_init__(self) -> None:
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ConfigError(f"the adapter root {self.adapter_root} is no directory")
        if min(self.max_body_bytes, self.max_results, self.max_sequences) < 1:
            raise ConfigError(
                "a server takes bodies of one byte or more, and one call of a client and one text or more"
            )


@dataclass(eq=False)
class _Session:
    """A client with its calls. ``pending``: request id -> a future and what makes JSON of its result. ``told``: ids of
    results that were asked for, oldest first."""

    client: Client
    pending: dict[str, tuple[Future[Any], Callable[[Any], Any]]] = field(default_factory=dict[str, Any])
    told: dict[str, None] = field(default_factory=dict[str, None])
    numbers: count[int] = field(default_factory=lambda: count(1))
    lock: Any = field(default_factory=lambda: reset_after_fork(threading.RLock()))

    def submit(self, call: Callable[[], Future[Any]], to_json: Callable[[Any], Any], limit: int) -> dict[str, Any]:
        """Make a call, and return the id under which its result is kept. Results that were asked for make room.

        Raises RequestRefusedError with the status 429 where there is no room.
        """
        with self.lock:
            while len(self.pending) >= limit and self.told:
                oldest = next(iter(self.told))
                del self.told[oldest], self.pending[oldest]
            if len(self.pending) >= limit:
                raise RequestRefusedError(429, f"{limit} calls of the client have results that were not asked for")
            name = str(next(self.numbers))
            self.pending[name] = call(), to_json
            return {"request_id": name}


class TrainingSessions:
    """The clients of a service by the names that requests give, and the answers to requests."""

    def __init__(self, service: Service, options: TrainingServerOptions) -> None:
        self.service, self.options = service, options
        self.root = AdapterRoot(options.adapter_root)
        self._sessions: dict[str, _Session] = {}
        self._numbers = count(1)

    # -- clients -------------------------------------------------------------------------------------------------------

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if len(self.service.clients) >= self.service.capacity:
            raise RequestRefusedError(429, f"the server has {self.service.capacity} clients, and takes no more now")
        client = self.service.create(config_from_fields(body["config"]), seed=body.get("seed"))
        name = f"client{next(self._numbers)}"
        self._sessions[name] = _Session(client)
        return {"client": name}

    def clients(self) -> dict[str, Any]:
        sessions = list(self._sessions.items())
        return {"clients": [{"client": name, "says": repr(s.client)} for name, s in sessions]}

    def close(self, body: Mapping[str, Any]) -> dict[str, Any]:
        session = self._session(body)
        self._sessions.pop(body["client"], None)
        session.client.close()
        return {}

    def _session(self, body: Mapping[str, Any]) -> _Session:
        name = body["client"]
        if not isinstance(name, str) or name not in self._sessions:
            near = did_you_mean(str(name), self._sessions)
            raise RequestRefusedError(
                404, f"there is no client {short_repr(name)}{near}: /v1/training/create makes one"
            )
        return self._sessions[name]

    # -- calls ---------------------------------------------------------------------------------------------------------

    def forward_backward(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit_loss(body, "forward_backward")

    def forward(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit_loss(body, "forward")

    def _submit_loss(self, body: Mapping[str, Any], method: str) -> dict[str, Any]:
        if not isinstance(body["loss"], str):
            raise RequestRefusedError(422, f"loss is {short_repr(body['loss'])}: expected a name, for code is not sent")

        def to_json(output: Any) -> Any:
            texts = [{n: t.tolist() for n, t in one.items()} for one in output.loss_fn_outputs]
            return {"loss": output.loss, "loss_fn_outputs": texts, "metrics": dict(output.metrics)}

        arguments = body["data"], body["loss"], body.get("loss_config")
        return self._submit(body, lambda client: getattr(client, method)(*arguments), to_json)

    def optim_step(self, body: Mapping[str, Any]) -> dict[str, Any]:
        def to_json(result: Any) -> Any:
            rates, skipped = list(result.learning_rates), result.skipped or None
            return {"steps": result.steps, "grad_norm": result.grad_norm, "learning_rates": rates, "skipped": skipped}

        options = _options_of(body, "adam")
        return self._submit(body, lambda client: client.optim_step(options), to_json)

    def sample(self, body: Mapping[str, Any]) -> dict[str, Any]:
        prompts, number, limit = body["prompts"], body.get("num_samples", 1), self.options.max_sequences
        if isinstance(prompts, list) and isinstance(number, int) and len(prompts) * number > limit:
            raise RequestRefusedError(413, f"{len(prompts)} prompts with {number} samples are more than {limit} texts")

        def to_json(samples: Any) -> Any:
            return [
                {"prompt": s.prompt, "tokens": s.tokens, "logprobs": s.logprobs.tolist(), "stop_reason": s.stop_reason}
                for s in samples
            ]

        options = _options_of(body, "params")
        return self._submit(body, lambda client: client.sample(prompts, number, **options), to_json)

    def save_state(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit_path(body, "save_state", self._new_place)

    def save_adapter(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit_path(body, "save_adapter", self._new_place)

    def load_state(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._submit_path(body, "load_state", self.root.find)

    def _submit_path(self, body: Mapping[str, Any], method: str, place: Callable[[str], Path]) -> dict[str, Any]:
        path = body["path"]
        if not isinstance(path, str) or not path:
            raise RequestRefusedError(422, f"path is {short_repr(path)}: expected a text")
        found = place(path)
        return self._submit(body, lambda client: getattr(client, method)(found), lambda _: {"path": path})

    def _new_place(self, path: str) -> Path:
        """Return a place to write an adapter to: nothing is there, or an adapter."""
        found = self.root.place(path)
        if found.exists() and not (found / CONFIG_NAME).is_file():
            raise RequestRefusedError(409, f"there is something else than an adapter at {short_repr(path)}")
        return found

    def _submit(
        self, body: Mapping[str, Any], call: Callable[[Client], Future[Any]], to_json: Callable[[Any], Any]
    ) -> dict[str, Any]:
        session = self._session(body)
        return session.submit(lambda: call(session.client), to_json, self.options.max_results)

    # -- results -------------------------------------------------------------------------------------------------------

    async def result(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a call, or ``{"status": "pending"}`` where it is not there in time. Raises what the call
        raised, and RequestRefusedError with the status 404 for an id that is none."""
        session, name, wait = self._session(body), body["request_id"], body.get("wait", MAX_WAIT)
        kept = session.pending.get(name) if isinstance(name, str) else None
        if kept is None:
            raise RequestRefusedError(404, f"the client has no call {short_repr(name)}, or its result has made room")
        if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not wait >= 0:
            raise RequestRefusedError(422, f"wait is {short_repr(wait)}: expected a number of seconds")
        future, to_json = kept
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake(_: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(done.set)

        future.add_done_callback(wake)
        try:
            await asyncio.wait_for(done.wait(), min(wait, MAX_WAIT))
        except TimeoutError:
            return {"status": "pending"}
        with session.lock:
            session.told[name] = None
        try:
            return {"status": "done", "result": to_json_value(to_json(future.result()))}
        except CancelledError:
            raise RequestRefusedError(409, "the call was cancelled: its client or the service was closed") from None


def _options_of(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    options = body.get(key)
    if options is not None and not isinstance(options, dict):
        raise RequestRefusedError(422, f"{key} is {short_repr(options)}: expected an object of options")
    return options or {}


#: name of a call -> the keys that its body must have, and those that it may have
_CALLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "create": (("config",), ("seed",)),
    "forward_backward": (("client", "data", "loss"), ("loss_config",)),
    "forward": (("client", "data", "loss"), ("loss_config",)),
    "optim_step": (("client",), ("adam",)),
    "sample": (("client", "prompts"), ("num_samples", "params")),
    "save_state": (("client", "path"), ()),
    "load_state": (("client", "path"), ()),
    "save_adapter": (("client", "path"), ()),
    "close": (("client",), ()),
    "result": (("client", "request_id"), ("wait",)),
}


def build_training_app(service: Service, options: TrainingServerOptions | None = None) -> Any:
    """Return a FastAPI app that offers ``service`` to clients, see the routes above.

    Args:
        service: the service, which the caller closes.
        options: the options; None for no key, and no files.

    Returns:
        the app. An error is ``{"error": {"message": ...}}`` with a status. It is 401 for a wrong key, 404 for a client
        or a call that is none, and 413 for too large a body. It is 422 for a body that cannot be read, and 400 for what
        adaptc refuses. A call that failed otherwise has 500. None of them changes anything for other clients.

    Raises:
        ConfigError: packages of the extra ``serve`` are missing.
    """
    check_packages("fastapi")
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    limits = options or TrainingServerOptions()
    sessions = TrainingSessions(service, limits)
    app = FastAPI(title="adaptc training")

    def refusal(error: Exception) -> Any:
        text = sessions.root.without_root(str(error))
        if isinstance(error, AdaptcError):
            return JSONResponse(error_body(text), getattr(error, "status", 400))
        return JSONResponse(error_body(f"{type(error).__name__}: {text}"), 500)

    def add(name: str) -> None:
        required, optional = _CALLS[name]
        call: Any = getattr(sessions, name)

        async def answer(request: Any) -> Any:
            try:
                check_request(request, limits)
                body = parse_body(await request.body(), required, optional)
                # What may wait for a lock or compile must not stop other requests.
                found = await (call(body) if name == "result" else asyncio.to_thread(call, body))
                return JSONResponse(found)
            except Exception as error:
                return refusal(error)

        app.add_route(f"/v1/training/{name}", answer, methods=["POST"])

    for name in _CALLS:
        add(name)

    async def clients(request: Any) -> Any:
        try:
            check_request(request, limits)
            return JSONResponse(await asyncio.to_thread(sessions.clients))
        except RequestRefusedError as error:
            return refusal(error)

    async def health(request: Any) -> Any:
        return JSONResponse({"status": "ok"})

    app.add_route("/v1/training/clients", clients, methods=["GET"])
    app.add_route("/health", health, methods=["GET"])
    return app
