"""Let clients load and unload adapters, by the routes that vLLM has for it, below one directory of the server.

Source: vLLM's ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from adaptc.errors import AdaptcError, short_repr
from adaptc.server.served import RequestRefusedError, Served


async def load_adapter(served: Served, body: dict[str, Any]) -> str:
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
    found, bank = _resolve(served, path), served.serving.bank
    replaces = body.get("load_inplace") is True and name in bank
    try:
        await asyncio.to_thread(bank.replace if replaces else bank.add, name, str(found))
    except (AdaptcError, OSError) as error:
        if name in bank and not replaces:
            raise RequestRefusedError(409, f"there is an adapter {name!r} already") from error
        text = str(error).replace(str(found), short_repr(path))
        raise RequestRefusedError(400, _without_root(served, text)) from error
    return f"Success: LoRA adapter {name!r} added successfully."


async def unload_adapter(served: Served, body: dict[str, Any]) -> str:
    """Remove the adapter ``lora_name``; requests that run keep it. Raises RequestRefusedError with the status 404 where
    there is none."""
    name = body.get("lora_name")
    if not isinstance(name, str) or name not in served.serving.bank:
        raise RequestRefusedError(404, f"there is no adapter {short_repr(name)}")
    served.serving.bank.remove(name)
    return f"Success: LoRA adapter {name!r} removed successfully."


def _resolve(served: Served, path: str) -> Path:
    root = served.options.adapter_root
    if root is None:
        raise RequestRefusedError(403, "this server loads no adapters: it was started without --adapter-root")
    root = root.resolve()
    try:
        found = (root / path).resolve()
        is_inside = found != root and found.is_relative_to(root)
        exists = is_inside and found.exists()
    except (OSError, ValueError):
        raise RequestRefusedError(422, f"{short_repr(path)} is no path") from None
    if not is_inside:
        raise RequestRefusedError(403, f"{short_repr(path)} is not below the server's adapter root")
    if not exists:
        raise RequestRefusedError(404, f"there is nothing at {short_repr(path)}")
    return found


def _without_root(served: Served, text: str) -> str:
    """Return a message without the directory of the server."""
    root = served.options.adapter_root
    assert root is not None
    for place in {str(root.resolve()), str(root.absolute())}:
        text = text.replace(f"{place}/", "").replace(place, "")
    return text
