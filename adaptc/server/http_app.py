"""Build the HTTP app of a server: transformers' OpenAI-compatible routes, and those of adapters and metrics."""

from __future__ import annotations

from typing import Any

from adaptc.errors import AdaptcError
from adaptc.server.adapter_routes import add_adapter_routes
from adaptc.server.handlers import HTTP_REQUEST, AdapterHandler
from adaptc.server.request_checks import RequestRefusedError, check_request, error_body
from adaptc.server.served import Served
from adaptc.server.transformers_parts import parts_classes

#: routes of transformers' app that are of other models than a served one
_OTHER_ROUTES = {"/v1/systemone", "/v1/audio/transcriptions", "/reset"}


def build_app(served: Served) -> Any:
    """Return the FastAPI app of a server.

    Args:
        served: what :func:`adaptc.server.open_server` opened.

    Returns:
        the app, with the routes of OpenAI's API, of adapters, and ``/health`` and ``/metrics``.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server

    models_class, generation_class = parts_classes()
    models, generation = models_class(served), generation_class(served)

    def handler(kind: Any) -> AdapterHandler:
        return AdapterHandler(kind(model_manager=models, generation_state=generation), served)

    unused: Any = None  # handlers of routes that are taken out below
    app: FastAPI = build_server(
        models,
        handler(ChatCompletionHandler),  # type: ignore[arg-type]
        handler(CompletionHandler),  # type: ignore[arg-type]
        handler(ResponseHandler),  # type: ignore[arg-type]
        unused,
        unused,
        generation,
    )
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") not in _OTHER_ROUTES]

    @app.exception_handler(AdaptcError)
    async def refuse(request: Any, error: AdaptcError) -> Any:
        return JSONResponse(error_body(str(error)), getattr(error, "status", 400))

    @app.middleware("http")
    async def check(request: Request, call_next: Any) -> Any:
        try:
            check_request(request, served.options)
        except RequestRefusedError as error:
            return JSONResponse(error_body(str(error)), error.status)
        HTTP_REQUEST.set(request)
        return await call_next(request)

    add_adapter_routes(app, served)

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    return app
