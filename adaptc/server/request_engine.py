"""Answer one request of transformers' serving app with the model of this process and the adapters that it asks for.

transformers' app asks a ``ModelManager`` for the ``EngineClient`` of a model, which has the model in a process of its
own. Here all names are of one model in this process, and an engine belongs to one request: it has its adapters.

Private transformers use, with the public route that was tried: ``_StreamError``, which ends a stream with a message.
Public: an exception, which ends the connection without one.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import torch

from adaptc.errors import AdaptcError
from adaptc.server.request_checks import RequestRefusedError
from adaptc.server.served import CURRENT, CurrentRequest, Served
from adaptc.serving.batching_manager import pool_positions


class AdapterModels:
    """Take the place of transformers' ``ModelManager``: one model, with its own name and those of its adapters."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def get_engine(self, model_id: str) -> RequestEngine:
        """Return the engine of the current request. Raises RequestRefusedError with the status 404 for a wrong name."""
        self.served.check_name(model_id)
        return RequestEngine(self.served, CURRENT.get())

    def load_model_streaming(self, model_id: str) -> AsyncIterator[str]:
        """Return the event of a model that is loaded: ``transformers chat`` waits for it.

        Raises RequestRefusedError with the status 404 for a wrong name, before the response begins.
        """
        self.served.check_name(model_id)

        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps({'status': 'ready', 'model': model_id, 'cached': True})}\n\n"

        return events()

    def list_models(self) -> list[dict[str, Any]]:
        base = self.served.options.name
        parent = {name: None if name == base else base for name in self.served.names}
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "adaptc", "root": root or name, "parent": root}
            for name, root in parent.items()
        ]

    @property
    def is_dead(self) -> bool:
        return not self.served.is_alive

    def shutdown(self) -> None:
        self.served.stop()


class RequestEngine:
    """Take the place of transformers' ``EngineClient`` for one request."""

    use_cb = True

    def __init__(self, served: Served, current: CurrentRequest) -> None:
        from transformers.cli.serving.utils import Modality

        self._served, self._current = served, current
        self.model_id, self.processor, self.modality = current.model, served.tokenizer, Modality.LLM
        self.model_config, self.generation_config = served.serving.config, served.serving.generation_config

    async def generate_non_streaming(
        self, inputs: Mapping[str, Any], generation_kwargs: dict[str, Any]
    ) -> tuple[str, int, list[int]]:
        """Return the text, the number of tokens of the prompt, and the new tokens. Raises what :meth:`_start` raises,
        and RequestRefusedError with the status 500 for a request that failed."""
        tokens = await self._start(inputs, generation_kwargs)
        return self.processor.decode(tokens, skip_special_tokens=True), len(inputs["input_ids"]), tokens

    def generate_streaming(
        self, inputs: Mapping[str, Any], generation_kwargs: dict[str, Any], response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Return the queue of texts, and transformers' ``Detokenizer``, which fills it. Raises what :meth:`_start`
        raises, before the response begins."""
        from transformers.cli.serving.utils import Detokenizer, _StreamError

        texts: asyncio.Queue[Any] = asyncio.Queue()
        streamer = Detokenizer(self.processor.backend_tokenizer, texts, response_parser=response_parser)
        answer = self._start(inputs, generation_kwargs, streamer)

        async def finish() -> None:
            try:
                await answer
                streamer.end()
            except AdaptcError as error:
                texts.put_nowait(_StreamError(str(error)))

        streamer.task = asyncio.create_task(finish())
        return texts, streamer

    def _start(
        self, inputs: Mapping[str, Any], options: dict[str, Any], streamer: Any = None
    ) -> asyncio.Future[list[int]]:
        """Add the request to those that the manager computes, and return the future of its new tokens.

        Its cancelling cancels the request. ``streamer`` gets each token as it comes. ``options["max_new_tokens"]`` is
        set to what there is room for, where the request gives no length. Raises RequestRefusedError with the status 400
        for a request that the model cannot take, and 503 where the manager has ended.
        """
        served, adapter, request_id = self._served, self._current.adapter, uuid.uuid4().hex
        manager, answer = served.manager(), asyncio.get_running_loop().create_future()
        drawing = self._drawing(options)
        sent = 0

        def deliver(output: Any) -> None:
            nonlocal sent
            ended = output.is_finished() or output.error is not None
            if ended:
                served.metrics.count(adapter, output)
            if answer.done():
                return
            if output.error is not None:
                answer.set_exception(RequestRefusedError(500, f"the request failed: {output.error}"))
                return
            if streamer is not None:
                for token in output.generated_tokens[sent:]:
                    streamer.put_token(token)
                sent = len(output.generated_tokens)
            if ended:
                answer.set_result([*output.generated_tokens])

        def free(done: asyncio.Future[list[int]]) -> None:
            if done.cancelled():
                served.cancel(request_id, adapter)

        manager.register_result_handler(request_id, deliver)
        try:
            tokens = [*inputs["input_ids"]]
            if not self._current.has_length:
                most = served.serving.check_request(tokens, None, pool_positions(manager.continuous_batching_config))
                options["max_new_tokens"] = min(n for n in (options["max_new_tokens"], most) if n is not None)
            added = manager.add_request(
                tokens,
                request_id=request_id,
                adapter=adapter,
                streaming=streamer is not None,
                record_timestamps=True,
                max_new_tokens=options["max_new_tokens"],
                eos_token_id=options["eos_token_id"],
                **drawing,
            )
            if added is None:
                raise RequestRefusedError(503, "the server is stopping")
        except BaseException as error:
            manager.output_router.result_handlers.pop(request_id, None)
            if isinstance(error, AdaptcError) and not isinstance(error, RequestRefusedError):
                raise RequestRefusedError(400, str(error)) from error
            raise
        answer.add_done_callback(free)
        return answer

    def _drawing(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the request draws its tokens, as the manager takes it: greedily, or by its own settings."""
        temperature, top_p = options["temperature"], options["top_p"]
        if temperature == 0 or not (options["do_sample"] or self._current.asks_to_draw):
            return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
        if options.get("seed") is not None:
            torch.manual_seed(options["seed"])  # the requests that run draw from one generator
        return {
            "temperature": 1.0 if temperature is None else float(temperature),
            "top_k": int(options["top_k"] or self._served.serving.vocab_size),
            "top_p": 1.0 if top_p is None else float(top_p),
        }
