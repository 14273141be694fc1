"""Serve a model with many adapters over HTTP, by transformers' OpenAI-compatible app.

``adaptc serve`` does so from the command line. From Python, :func:`open_server` opens a model, and :func:`build_app`
gives the FastAPI app, for any server that runs such apps. Both need the extra ``serve``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptc.server.http_app import build_app
from adaptc.server.read_served import ModelOptions
from adaptc.server.request_checks import RequestRefusedError, check_packages
from adaptc.server.served import Served
from adaptc.server.server_options import ServerOptions, open_served_model

__all__ = ["RequestRefusedError", "Served", "ServerOptions", "build_app", "open_server"]


def open_server(model: str | Path, options: ServerOptions, **model_options: Any) -> Served:
    """Open a model and its adapters for the app of a server.

    Args:
        model: a transformers model directory, a GGUF file, or a program or package (.pt2) of a serving model.
        options: the options of the server.
        **model_options: ``backend``, ``device``, ``dtype``, ``quantize``, ``tokenizer`` and
            ``autocast_adapter_dtype``, as of ``adaptc serve``.

    Returns:
        what the server serves, for :func:`build_app`. Its ``is_alive`` tells whether it computes; ``stop()`` ends it.

    Raises:
        CheckpointError: the model or an adapter cannot be read.
        ConfigError: options do not fit, or packages of the extra ``serve`` are missing.
    """
    check_packages()
    return Served(*open_served_model(Path(model), ModelOptions(**model_options), options), options)
