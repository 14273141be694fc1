"""Check requests before they are answered: their key, their size and their bodies; and word what refuses them."""

from __future__ import annotations

import hmac
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from adaptc.errors import AdaptcError, ConfigError, did_you_mean, listing, short_repr
from adaptc.torch_typing import is_mapping

#: routes that need no key: whoever watches the server asks them
_OPEN_ROUTES = {"/health"}


class RequestRefusedError(AdaptcError):
    """A request that is answered with an HTTP status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestLimits(Protocol):
    """The options of a server, as far as each request is checked by them."""

    @property
    def api_key(self) -> str | None: ...

    @property
    def max_body_bytes(self) -> int: ...


#: the oldest transformers whose server asks for models as this one does
_TRANSFORMERS = (5, 25)


def check_packages(*wanted: str) -> None:
    """Raise ConfigError where packages of the extra ``serve`` are missing, or transformers is too old for its server.

    ``wanted``: names of packages; none for all that transformers' server needs.
    """
    if not wanted:
        found, oldest = importlib.metadata.version("transformers"), ".".join(map(str, _TRANSFORMERS))
        if tuple(map(int, found.split(".")[:2])) < _TRANSFORMERS:
            raise ConfigError(
                f"serving over HTTP needs transformers {oldest}, and this is {found}: pip install -U 'adaptc[serve]'"
            )
    wanted = wanted or ("fastapi", "uvicorn", "openai", "prometheus_client")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving over HTTP needs {listing(missing)}: pip install 'adaptc[serve]'")


def check_request(request: Any, limits: RequestLimits) -> None:
    """Raise RequestRefusedError for a request with a wrong key (401), or with too large a body (413)."""
    key = limits.api_key
    given = request.headers.get("authorization", "")
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))  # of an app that is mounted in another
    is_open = key is None or path in _OPEN_ROUTES
    if not is_open and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise RequestRefusedError(401, "the key is wrong or missing: send 'Authorization: Bearer KEY'")
    length = request.headers.get("content-length", "")
    if request.method == "POST" and not length.isdigit():
        raise RequestRefusedError(411, "the request has no Content-Length")
    if length.isdigit() and int(length) > limits.max_body_bytes:
        raise RequestRefusedError(413, f"the body has more than {limits.max_body_bytes} bytes")


def error_body(message: str) -> dict[str, Any]:
    """Return the body of an error as OpenAI's API has it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def parse_body(text: bytes, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return the JSON object in a body, which has these keys and no others.

    Raises RequestRefusedError with the status 422 for anything else, and for numbers that JSON does not have.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        body = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError(422, f"the body is no JSON: {error}") from error
    if not is_mapping(body):
        raise RequestRefusedError(422, f"the body is {short_repr(body)}: expected an object with {listing(required)}")
    known = (*required, *optional)
    for key in body:
        if key not in known:
            raise RequestRefusedError(422, f"the body has no key {short_repr(key)}{did_you_mean(key, known)}")
    if missing := [k for k in required if k not in body]:
        raise RequestRefusedError(422, f"the body lacks {missing[0]!r}")
    return body
