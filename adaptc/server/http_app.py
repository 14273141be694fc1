"""Build the HTTP app of a server: transformers' OpenAI-compatible routes, and those of adapters and metrics."""

from __future__ import annotations

from typing import Any

from adaptc.errors import AdaptcError
from adaptc.server.adapter_routes import add_adapter_routes
from adaptc.server.handlers import AdapterHandler
from adaptc.server.request_checks import RequestLimits, RequestRefusedError, check_request, error_body
from adaptc.server.request_engine import AdapterModels
from adaptc.server.served import Served

#: routes of transformers' app that are of other models than a served one
_OTHER_ROUTES = {"/v1/systemone", "/v1/audio/transcriptions", "/reset"}


class CheckedRequests:
    """An ASGI app that answers a request with an error where :func:`check_request` refuses it."""

    def __init__(self, app: Any, limits: RequestLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi import Request
        from fastapi.responses import JSONResponse

        answer = self._app
        if scope["type"] == "http":
            try:
                check_request(Request(scope), self._limits)
            except RequestRefusedError as error:
                answer = JSONResponse(error_body(str(error)), error.status)
        await answer(scope, receive, send)


def build_app(served: Served) -> Any:
    """Return the FastAPI app of a server.

    Args:
        served: what :func:`adaptc.server.open_server` opened.

    Returns:
        the app, with the routes of OpenAI's API, of adapters, and ``/health`` and ``/metrics``.
    """
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, PlainTextResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    models: Any = AdapterModels(served)
    generation: Any = GenerationState(continuous_batching=True)
    generation.context_length = lambda config: None  # the manager of requests checks lengths, by the pool of blocks too

    def handler(kind: Any) -> Any:
        return AdapterHandler(kind(model_manager=models, generation_state=generation), served)

    unused: Any = None  # handlers of routes that are taken out below
    app: FastAPI = build_server(
        models, handler(ChatCompletionHandler), handler(CompletionHandler), handler(ResponseHandler), unused, unused
    )
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") not in _OTHER_ROUTES]

    @app.exception_handler(AdaptcError)
    async def refuse(request: Any, error: AdaptcError) -> Any:
        return JSONResponse(error_body(str(error)), getattr(error, "status", 400))

    app.add_middleware(CheckedRequests, limits=served.options)
    add_adapter_routes(app, served)

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    return app
