"""Answer the requests of one endpoint by transformers' handler, with the adapters that the request asks for."""

from __future__ import annotations

import asyncio
import uuid
from contextvars import ContextVar
from typing import Any

from adaptc.errors import AdaptcError
from adaptc.server.served import CURRENT, CurrentRequest, RequestRefusedError, Served

#: the HTTP request of the current task, which tells whether the client is still there
HTTP_REQUEST: ContextVar[Any] = ContextVar("adaptc_http_request")
#: how often a client is looked for while it waits, in seconds
_SECONDS_BETWEEN_LOOKS = 0.25
#: fields that would change the meaning of an answer and are not supported, with the value that changes nothing
_UNSUPPORTED = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "best_of": 1,
    "echo": False,
    "stop": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "generation_config": None,
}


class AdapterHandler:
    """A handler of transformers' app, for requests whose body may have the field ``adapter``."""

    def __init__(self, inner: Any, served: Served) -> None:
        self._inner, self._served = inner, served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Return the response of a request.

        Raises RequestRefusedError for one that cannot be answered, before a token was computed.
        """
        served, body = self._served, dict(body)
        served.check_room()
        for name, neutral in _UNSUPPORTED.items():
            if body.get(name, neutral) not in (neutral, None):
                raise RequestRefusedError(422, f"{name!r} is not supported here: leave it out")
        mix = body.pop("adapter", ...)
        name = body.setdefault("model", served.options.name)
        body.setdefault("stream", False)  # OpenAI's default, at every endpoint
        adapter = await asyncio.to_thread(served.request_adapter, name, mix)
        # transformers goes by the model's config alone; OpenAI's clients mean it when they give a temperature.
        asks_to_draw = bool(body.get("temperature")) or body.get("top_p") is not None
        CURRENT.set(CurrentRequest(name, adapter, asks_to_draw))
        # The client chooses the header, and may choose it twice; the manager knows a request by its id alone.
        request_id = f"{request_id}-{uuid.uuid4().hex}"
        answer = asyncio.ensure_future(self._inner.handle_request(body, request_id))
        try:
            while not (await asyncio.wait({answer}, timeout=_SECONDS_BETWEEN_LOOKS))[0]:
                http = HTTP_REQUEST.get(None)
                if http is not None and await http.is_disconnected():
                    raise RequestRefusedError(499, "the client is gone")
            return answer.result()
        except AdaptcError:  # a few of them are ValueErrors too
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise RequestRefusedError(422, f"the body cannot be read: {type(error).__name__}: {error}") from error
        except BaseException:
            if not answer.done():
                answer.cancel()
                served.manager().cancel_request(request_id)
            raise
