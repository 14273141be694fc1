"""Derive the parts of transformers' serving app that know which model a request names, and with what it is computed.

transformers' app has a ``ModelManager``, which loads models by name, and a ``GenerationState``, which has a manager for
each of them. Here all names are of one loaded model and one manager. What differs is the request's adapter.

Private transformers use, with the public route that was tried: ``CBGenerateManager._cb``, the manager of requests that
it calls. Public: ``init_cb``, which makes one for each model's name.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.server.request_checks import RequestRefusedError
from adaptc.server.served import CURRENT, CurrentRequest, Served
from adaptc.serving.batching_manager import pool_positions


class AdapterModels:
    """transformers' ``ModelManager`` with one model, which has the names of its adapters besides its own."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.force_model = None
        self.loaded_models: dict[str, Any] = {}

    def process_model_name(self, model_id: str) -> str:
        """Return the name. Raises RequestRefusedError with the status 404 for one that requests may not give."""
        self.served.check_name(model_id)
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.served.serving, self.served.tokenizer

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """Yield the event of a model that is loaded: ``transformers chat`` waits for it."""
        yield f"data: {json.dumps({'status': 'ready', 'model': model_id_and_revision, 'cached': True})}\n\n"

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        base = self.served.options.name
        parent = {name: None if name == base else base for name in self.served.names}
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "adaptc", "root": root or name, "parent": root}
            for name, root in parent.items()
        ]

    def shutdown(self) -> None:
        self.served.stop()


class AdapterGeneration:
    """transformers' ``GenerationState``, which gives each request a manager that adds its adapters."""

    def __init__(self, served: Served) -> None:
        super().__init__(continuous_batching=True)  # type: ignore[call-arg]
        self.served = served

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        from transformers.cli.serving.utils import CBGenerateManager

        made: Any = type("RequestManager", (RequestManager, CBGenerateManager), {})()
        made.current, made.served = CURRENT.get(), self.served
        return made

    def shutdown(self) -> None:
        self.served.stop()

    def is_cb_alive(self) -> bool:
        return self.served.is_alive


class RequestManager:
    """transformers' ``CBGenerateManager`` of one request."""

    current: CurrentRequest
    served: Served
    _cb: Any

    def init_cb(self, model: Any, gen_config: Any) -> None:
        self._cb = RequestQueue(self.served, self.current, gen_config)


class RequestQueue:
    """The manager of requests, as one request calls it: with its adapters and its way to draw tokens."""

    def __init__(self, served: Served, current: CurrentRequest, generation_config: Any) -> None:
        self._served, self._current, self._config = served, current, generation_config
        self._manager = served.manager()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def register_result_handler(self, request_id: str, callback: Any) -> None:
        metrics, adapter = self._served.metrics, self._current.adapter

        def counted(output: Any) -> None:
            if output.is_finished() or output.error is not None:
                metrics.count(adapter, output)
            callback(output)

        self._manager.register_result_handler(request_id, counted)

    def add_request(self, input_ids: Any, request_id: str, **options: Any) -> str:
        """Add the request. Raises RequestRefusedError with the status 400 for one that the model cannot take."""
        config = self._config
        greedy = config.temperature == 0 or not (config.do_sample or self._current.asks_to_draw)
        drawing = {
            "temperature": 1.0 if greedy or config.temperature is None else float(config.temperature),
            "top_k": 1 if greedy else int(config.top_k or self._served.serving.vocab_size),
            "top_p": 1.0 if greedy or config.top_p is None else float(config.top_p),
        }
        try:
            if not self._current.has_length:
                room = pool_positions(self._manager.continuous_batching_config)
                most = self._served.serving.check_request([*input_ids], None, room)
                options["max_new_tokens"] = min(n for n in (options["max_new_tokens"], most) if n is not None)
            added = self._manager.add_request(
                input_ids,
                request_id=request_id,
                adapter=self._current.adapter,
                record_timestamps=True,
                **options,
                **drawing,
            )
        except AdaptcError as error:
            self._forget(request_id)
            raise RequestRefusedError(400, str(error)) from error
        if added is None:
            self._forget(request_id)
            raise RequestRefusedError(503, "the server is stopping")
        return added

    def cancel_request(self, request_id: str) -> None:
        self._served.cancel(request_id, self._current.adapter)

    def _forget(self, request_id: str) -> None:
        router = self._manager.output_router
        router.result_handlers.pop(request_id, None)


@cache
def parts_classes() -> tuple[Any, Any]:
    """Return :class:`AdapterModels` and :class:`AdapterGeneration` as subclasses of transformers' own."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    return (
        type(AdapterModels.__name__, (AdapterModels, ModelManager), {}),
        type(AdapterGeneration.__name__, (AdapterGeneration, GenerationState), {}),
    )
