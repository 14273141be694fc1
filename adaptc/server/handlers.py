"""Answer the requests of one endpoint by transformers' handler, with the adapters that the request asks for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from adaptc.errors import AdaptcError, listing
from adaptc.server.request_checks import RequestRefusedError
from adaptc.server.served import CURRENT, CurrentRequest, Served

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
    "functions": [],
    "function_call": "none",
    "reasoning_effort": None,
    "modalities": ["text"],
    "audio": None,
    "web_search_options": None,
    "previous_response_id": None,
    "text": {"format": {"type": "text"}},
    "truncation": "disabled",
    "background": False,
    "max_tool_calls": None,
}
#: fields of transformers' generation config, which ``transformers chat`` sends as JSON, that mean something here
_CONFIG_FIELDS = {"do_sample", "max_new_tokens", "temperature", "top_k", "top_p", "transformers_version"}
#: fields that say how long an answer may be
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "generation_config")


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
        _check_tool_choice(body)
        _check_generation_config(body)
        mix = body.pop("adapter", ...)
        name = body.setdefault("model", served.options.name)
        body.setdefault("stream", False)  # OpenAI's default, at every endpoint
        adapter = await asyncio.to_thread(served.request_adapter, name, mix)
        # transformers goes by the model's config alone; OpenAI's clients mean it when they give a temperature.
        asks_to_draw = bool(body.get("temperature")) or body.get("top_p") is not None
        has_length = any(body.get(field) is not None for field in _LENGTHS)
        CURRENT.set(CurrentRequest(name, adapter, asks_to_draw, has_length))
        try:
            return await self._inner.handle_request(body, request_id)
        except AdaptcError:  # a few of them are ValueErrors too
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise RequestRefusedError(422, f"the body cannot be read: {type(error).__name__}: {error}") from error


def _check_tool_choice(body: dict[str, Any]) -> None:
    """Raise RequestRefusedError with the status 422 for a choice of tools that the model is not held to."""
    choice = body.get("tool_choice")
    if choice not in (None, "auto") and (choice != "none" or body.get("tools")):
        raise RequestRefusedError(422, "'tool_choice' is not supported here, but for 'auto': leave it out")


def _check_generation_config(body: dict[str, Any]) -> None:
    """Raise RequestRefusedError with the status 422 for fields of a generation config that would be ignored."""
    text = body.get("generation_config")
    if text is None:
        return
    try:
        fields = json.loads(text)
    except (TypeError, ValueError):
        fields = None
    if not isinstance(fields, dict):
        raise RequestRefusedError(422, "'generation_config' is no JSON object")
    if others := fields.keys() - _CONFIG_FIELDS:
        raise RequestRefusedError(422, f"'generation_config' has {listing(map(repr, others))}, not supported here")
