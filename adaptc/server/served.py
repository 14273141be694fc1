"""Hold what a server serves: a model by the name of its base, and adapters that requests name as models.

A request asks for a model: the base, or an adapter by its name. The field ``adapter`` of a body asks for a mix. A
request keeps the adapters that it began with. :class:`Metrics` counts what was answered, in the text format of
Prometheus.
"""

from __future__ import annotations

import copy
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from adaptc.errors import AdaptcError, did_you_mean, short_repr
from adaptc.locks import reset_after_fork
from adaptc.server.adapter_root import AdapterRoot
from adaptc.server.request_checks import RequestRefusedError
from adaptc.server.server_options import ServerOptions
from adaptc.serving.request_adapter import RequestAdapter
from adaptc.serving.serving_model import ServingModel

#: limits of the histograms, in seconds
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Queue(Protocol):
    """An object that knows how many requests wait and run."""

    @property
    def queue_lengths(self) -> tuple[int, int]: ...


class Metrics:
    """The counters of one server. Labels are the names of adapters, and ``base_name`` for none."""

    def __init__(self, queue: Queue, base_name: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.base_name = base_name
        self.registry = registry = CollectorRegistry()
        label = ["adapter"]
        self.requests = Counter("adaptc_requests", "Requests that ended", [*label, "status"], registry=registry)
        self.prompt_tokens = Counter("adaptc_prompt_tokens", "Tokens of prompts", label, registry=registry)
        self.new_tokens = Counter("adaptc_generated_tokens", "Tokens that were generated", label, registry=registry)
        self.first_token = Histogram(
            "adaptc_time_to_first_token_seconds",
            "From the request to its first token",
            label,
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "adaptc_request_seconds", "From the request to its last token", label, buckets=_SECONDS, registry=registry
        )
        for index, name in enumerate(("waiting", "running")):
            gauge = Gauge(f"adaptc_requests_{name}", f"Requests that are {name}", registry=registry)
            gauge.set_function(lambda i=index: queue.queue_lengths[i])

    def text(self) -> bytes:
        """Return all counters in the text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def count_cancelled(self, adapter: RequestAdapter) -> None:
        """Count a request whose client was gone before its end."""
        self.requests.labels(adapter.name or self.base_name, "cancelled").inc()

    def count(self, adapter: RequestAdapter, output: Any) -> None:
        """Count a request that ended with ``output``, a ``GenerationOutput`` of transformers."""
        name = adapter.name or self.base_name
        self.requests.labels(name, "error" if output.error else "ok").inc()
        self.prompt_tokens.labels(name).inc(len(output.prompt_ids))
        self.new_tokens.labels(name).inc(len(output.generated_tokens))
        if times := output.timestamps:
            self.first_token.labels(name).observe(times[0] - output.created_time)
            self.duration.labels(name).observe(times[-1] - output.created_time)


@dataclass(frozen=True, eq=False)
class CurrentRequest:
    """The request that a task answers.

    It has the model that it named, its adapters, whether it asks for drawn tokens, and whether it says how long its
    answer may be.
    """

    model: str
    adapter: RequestAdapter
    asks_to_draw: bool
    has_length: bool


#: the request of the current task
CURRENT: ContextVar[CurrentRequest] = ContextVar("adaptc_request")


class Served:
    """A serving model with its tokenizer and one manager of requests, which is started at the first request."""

    def __init__(self, serving: ServingModel, tokenizer: Any, options: ServerOptions) -> None:
        self.serving, self.tokenizer, self.options = serving, tokenizer, options
        self.adapter_root = AdapterRoot(options.adapter_root)
        self.metrics = Metrics(self, options.name)
        self._lock = reset_after_fork(threading.Lock())
        self._manager: Any = None
        #: the ids of requests that were cancelled and may still get tokens
        self._cancelled: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Return the names that requests may give as the model: the base's, and those of the adapters."""
        return [self.options.name, *self.serving.bank.adapters]

    def request_adapter(self, model: Any, mix: Any) -> RequestAdapter:
        """Return the adapters of a request for ``model`` with the field ``adapter`` of its body, ``...`` for none.

        An adapter that is loaded on use may be read from its files. Raises RequestRefusedError with the status 404 for
        an unknown name, 422 for what is no mix, and 400 for an adapter that does not fit.
        """
        self.check_name(model)
        asked = (None if model == self.options.name else model) if mix is ... else mix
        try:
            return self.serving.request_adapter(asked)
        except (AdaptcError, OSError) as error:
            asked_names: Any = [asked] if isinstance(asked, str) else asked
            is_mix = isinstance(asked_names, (list, dict)) and all(isinstance(name, str) for name in asked_names)
            unknown = is_mix and not all(map(self._is_known, asked_names))
            found = is_mix and not unknown and not all(name in self.serving.bank for name in asked_names)
            status = 404 if unknown else 400 if found else 422
            raise RequestRefusedError(status, self.adapter_root.without_root(str(error))) from error

    def check_name(self, model: Any) -> None:
        """Raise RequestRefusedError with the status 404 for a name that requests may not give."""
        if not isinstance(model, str) or not self._is_known(model):
            near = did_you_mean(str(model), self.names)
            raise RequestRefusedError(404, f"there is no model {short_repr(model)}{near}: GET /v1/models lists them")

    def _is_known(self, name: str) -> bool:
        """Return whether requests may name ``name``: it is here, or will be loaded at its use."""
        return name in self.names or (self.options.load_on_use and self.adapter_root.find_named(name) is not None)

    def manager(self) -> Any:
        """Return the manager of requests, which runs. Raises RequestRefusedError with the status 503 where it ended."""
        with self._lock:
            if self._manager is None:
                options = copy.deepcopy(self.serving.generation_config)
                # Each request says how its tokens are drawn. transformers makes the processors for that where the
                # config has values other than the neutral ones.
                options.update(do_sample=True, temperature=0.5, top_k=50, top_p=0.5)
                batching = self.serving.batching_config(per_request_processors=True)
                self._manager = self.serving.init_continuous_batching(options, batching)
                self._manager.start()
            if self._manager.background_thread_status.fatal_error is not None:
                raise RequestRefusedError(503, "the server has stopped to compute after an error; it must be restarted")
            return self._manager

    def cancel(self, request_id: str, adapter: RequestAdapter) -> None:
        """Cancel a request whose client is gone, where it still runs."""
        manager = self._manager
        if manager is not None and request_id in manager.output_router.result_handlers:
            manager.cancel_request(request_id)
            self.metrics.count_cancelled(adapter)
            with self._lock:
                self._cancelled.add(request_id)

    def _forget_cancelled(self) -> None:
        """Drop the handlers of cancelled requests that transformers knows no more.

        It drops those of finished requests by itself. One that is dropped too early would leave its last tokens in a
        queue that nobody reads.
        """
        manager = self._manager
        if manager is None or manager.batch_processor is None or not self._cancelled:
            return
        scheduler = manager.batch_processor.scheduler
        known = {*scheduler.waiting_requests, *scheduler.active_requests}
        known |= {state.request_id for state in list(manager.input_queue.queue)}
        with self._lock:
            gone = {name for name in self._cancelled if name not in known}
            self._cancelled -= gone
        for name in gone:
            manager.output_router.result_handlers.pop(name, None)

    @property
    def is_alive(self) -> bool:
        """Return whether the server computes, or has not begun to."""
        return self._manager is None or self._manager.background_thread_status.fatal_error is None

    @property
    def queue_lengths(self) -> tuple[int, int]:
        """Return how many requests wait, and how many have computed tokens."""
        manager = self._manager
        if manager is None or manager.batch_processor is None:
            return 0, 0
        scheduler = manager.batch_processor.scheduler
        return len(scheduler.waiting_requests) + manager.input_queue.qsize(), len(scheduler.active_requests)

    def check_room(self) -> None:
        """Raise RequestRefusedError with the status 429 where as many requests are here as the server takes."""
        self._forget_cancelled()
        if sum(self.queue_lengths) >= self.options.max_requests:
            raise RequestRefusedError(429, f"{self.options.max_requests} requests are waiting or running: try again")

    def stop(self) -> None:
        """Stop the manager; requests that run are answered with an error."""
        with self._lock:
            manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True, timeout=10, hard_stop=True)
            manager.destroy()
