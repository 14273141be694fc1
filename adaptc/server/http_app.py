"""Build the HTTP app of a server: transformers' OpenAI-compatible routes, and those of adapters and metrics."""

from __future__ import annotations

import hmac
import importlib.util
from typing import Any

from adaptc.errors import AdaptcError, ConfigError, listing
from adaptc.server.adapter_routes import add_adapter_routes
from adaptc.server.handlers import HTTP_REQUEST, AdapterHandler
from adaptc.server.request_refused import RequestRefusedError
from adaptc.server.served import Served
from adaptc.server.transformers_parts import parts_classes

#: routes of transformers' app that are of other models than a served one
_OTHER_ROUTES = {"/v1/systemone", "/v1/audio/transcriptions", "/reset"}
#: routes that need no key: whoever watches the server asks them
_OPEN_ROUTES = {"/health"}


def check_packages() -> None:
    """Raise ConfigError where packages of the extra ``serve`` are missing."""
    wanted = ("fastapi", "uvicorn", "openai", "prometheus_client")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving over HTTP needs {listing(missing)}: pip install 'adaptc[serve]'")


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
        return JSONResponse(_error_body(str(error)), getattr(error, "status", 400))

    @app.middleware("http")
    async def check_request(request: Request, call_next: Any) -> Any:
        try:
            _check_request(served, request)
        except RequestRefusedError as error:
            return JSONResponse(_error_body(str(error)), error.status)
        HTTP_REQUEST.set(request)
        return await call_next(request)

    add_adapter_routes(app, served)

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _check_request(served: Served, request: Any) -> None:
    """Raise RequestRefusedError for a request with a wrong key (401), or with too large a body (413)."""
    key = served.options.api_key
    given = request.headers.get("authorization", "")
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))  # of an app that is mounted in another
    is_open = key is None or path in _OPEN_ROUTES
    if not is_open and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise RequestRefusedError(401, "the key is wrong or missing: send 'Authorization: Bearer KEY'")
    length = request.headers.get("content-length", "")
    if request.method == "POST" and not length.isdigit():
        raise RequestRefusedError(411, "the request has no Content-Length")
    if length.isdigit() and int(length) > served.options.max_body_bytes:
        raise RequestRefusedError(413, f"the body has more than {served.options.max_body_bytes} bytes")


def _error_body(message: str) -> dict[str, Any]:
    """Return the body of an error as OpenAI's API has it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
