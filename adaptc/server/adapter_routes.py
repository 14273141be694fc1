"""Let clients load and unload adapters, by the routes that vLLM has for it, below one directory of the server.

Source: vLLM's ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from adaptc.errors import AdaptcError, short_repr
from adaptc.server.request_checks import RequestRefusedError
from adaptc.server.served import Served


def add_adapter_routes(app: Any, served: Served) -> None:
    """Add the routes to a FastAPI app. A body is a JSON object, and an answer is a line of text."""
    from fastapi.responses import PlainTextResponse

    @app.post("/v1/load_lora_adapter")
    async def load(body: dict[str, Any]) -> Any:
        return PlainTextResponse(await _load_adapter(served, body))

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: dict[str, Any]) -> Any:
        return PlainTextResponse(await _unload_adapter(served, body))


async def _load_adapter(served: Served, body: dict[str, Any]) -> str:
    """Add the adapter ``lora_path``, a path below the adapter root, under the name ``lora_name``.

    With ``load_inplace`` true it may replace an adapter of that name. Raises RequestRefusedError with a status:

        403    the path is not below the root
        404    nothing is there
        409    the name is taken
        400    the adapter does not fit
        422    the body has no name or no path
    """
    name, path = body.get("lora_name"), body.get("lora_path")
    if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
        raise RequestRefusedError(422, "the body has no 'lora_name' and 'lora_path', which are strings")
    if name == served.options.name:
        raise RequestRefusedError(409, f"{name!r} is the name of the base")
    found, bank = served.adapter_root.find(path), served.serving.bank
    replaces = body.get("load_inplace") is True and name in bank
    try:
        await asyncio.to_thread(bank.replace if replaces else bank.add, name, str(found))
    except (AdaptcError, OSError) as error:
        if name in bank and not replaces:
            raise RequestRefusedError(409, f"there is an adapter {name!r} already") from error
        text = str(error).replace(str(found), short_repr(path))
        raise RequestRefusedError(400, served.adapter_root.without_root(text)) from error
    return f"Success: LoRA adapter {name!r} added successfully."


async def _unload_adapter(served: Served, body: dict[str, Any]) -> str:
    """Remove the adapter ``lora_name``; requests that run keep it. Raises RequestRefusedError with the status 404 where
    there is none."""
    name = body.get("lora_name")
    if not isinstance(name, str) or name not in served.serving.bank:
        raise RequestRefusedError(404, f"there is no adapter {short_repr(name)}")
    served.serving.bank.remove(name)
    return f"Success: LoRA adapter {name!r} removed successfully."
