"""Let vLLM find adapters in a folder: a LoRA resolver that converts each adapter when it is first asked for.

vLLM asks its resolvers for the name of a model that it does not know. It loads this file as a plug-in, by the entry
point ``adaptc_lora_resolver`` of the group ``vllm.general_plugins``, and calls :func:`register`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptc.adapter_files.format import CONFIG_NAME
from adaptc.engines.check import check_adapter
from adaptc.engines.export import export_adapter
from adaptc.engines.facts import read_facts
from adaptc.engines.model_layers import read_layer_sizes
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.locks import reset_after_fork

#: the variables that :func:`register` reads: the folder of adapters, the folder for converted ones, and the directory
#: of the model, where vLLM was given the name of a repository
ADAPTERS_VARIABLE, CACHE_VARIABLE = "ADAPTC_VLLM_ADAPTERS", "ADAPTC_VLLM_CACHE"
MODEL_VARIABLE = "ADAPTC_VLLM_MODEL"
#: the name under which vLLM knows the resolver
NAME = "adaptc"

_LOGGER = logging.getLogger("adaptc")


class AdapterResolver:
    """A resolver with the interface of vLLM's ``LoRAResolver``, for adapters in the folder ``adapters``.

    An adapter that vLLM takes as it is meant is given to it where it lies. Any other is converted when it is first
    asked for, and again when its files have changed.

    Args:
        adapters: the folder, with a directory for each adapter.
        cache: the folder for converted adapters, which is made when it is needed.
        model: the directory of the base. Methods other than LoRA need it, and so do adapters of q, k and v for a model
            with one layer of the three. None for the name that vLLM gives, where that is a directory.

    Raises:
        ConfigError: ``adapters`` is no directory.

    Example:
        >>> path = adaptc.save_adapter(prog, "my-adapters/fr")
        >>> adaptc.engines.AdapterResolver("my-adapters", "converted").find("fr").name
        'fr'
    """

    def __init__(
        self,
        adapters: str | os.PathLike[str],
        cache: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
    ) -> None:
        self.adapters, self.cache = Path(adapters), Path(cache)
        self.model = None if model is None else Path(model)
        if not self.adapters.is_dir():
            raise ConfigError(f"{short_repr(os.fspath(adapters))} is no directory; expected a folder of adapters")
        self._lock = reset_after_fork(threading.Lock())

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's ``LoRARequest`` for an adapter.

        Args:
            base_model_name: the model that vLLM serves.
            lora_name: the name of a directory in the folder of adapters.

        Returns:
            the request, or None where the folder has no such adapter. None, too, where vLLM cannot take the adapter:
            the log says why, and vLLM asks its other resolvers.
        """
        path = self.find(lora_name)
        if path is None:
            return None
        try:
            # Conversions take seconds, in which vLLM answers other requests.
            ready = await asyncio.to_thread(self.prepare, path, base_model_name)
        except AdaptcError as error:
            _LOGGER.error("vLLM gets no adapter %r: %s", lora_name, error)
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        # vLLM gives the request a number of its own; until then it is one that no two names share.
        number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:4], "little") >> 1 or 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(ready))

    def find(self, lora_name: str) -> Path | None:
        """Return the directory of an adapter.

        Args:
            lora_name: the name of a directory in the folder of adapters.

        Returns:
            the path, or None where the folder has no such adapter. Names that lead out of the folder find none.
        """
        folder = self.adapters.resolve()
        if not lora_name or os.path.isabs(lora_name) or "\0" in lora_name:
            return None
        path = (folder / lora_name).resolve()
        return path if folder in path.parents and (path / CONFIG_NAME).is_file() else None

    def prepare(self, path: Path, base_model_name: str) -> Path:
        """Return a directory with an adapter as vLLM takes it, converted now where it was not before.

        Args:
            path: the adapter's directory.
            base_model_name: the model that vLLM serves.

        Returns:
            the path, in the cache for one that was converted.

        Raises:
            AdaptcError: vLLM cannot take the adapter, or it is damaged.
        """
        model = self.model or (Path(base_model_name) if Path(base_model_name).is_dir() else None)
        ready = self.cache / f"{path.name}-{_digest(path, model)}"
        with self._lock:
            if not (ready / CONFIG_NAME).is_file():
                if _is_as_meant(path, model):
                    return path
                export_adapter(path, ready, engine="vllm", model=model)
                _LOGGER.info("converted the adapter in %s for vLLM, into %s", path, ready)
        return ready


def _is_as_meant(path: Path, model: Path | None) -> bool:
    """Return whether vLLM takes the adapter as it is, and the model has layers of its names."""
    try:
        if not check_adapter(path, "vllm").is_as_meant:
            return False
        layers = read_layer_sizes(model)
        return layers is None or read_facts(path).pairs().keys() <= layers.sizes.keys()
    except AdaptcError:  # of a pickle, or a damaged file: the conversion reads it, or says what is wrong
        return False


def _digest(path: Path, model: Path | None) -> str:
    """Return a text that is another one after the files of the adapter have changed, and for another model."""
    files: Sequence[Path] = sorted(p for p in path.iterdir() if p.is_file())
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr((str(path), state, str(model))).encode()).hexdigest()[:16]


def register() -> None:
    """Register a resolver with vLLM, where the environment names a folder of adapters.

    ``ADAPTC_VLLM_ADAPTERS`` is the folder, and ``ADAPTC_VLLM_MODEL`` the directory of the model. Converted adapters are
    kept in ``ADAPTC_VLLM_CACHE``, by default ``adaptc/vllm`` in the user's cache folder. Raises ConfigError where the
    folder is no directory.
    """
    adapters = os.environ.get(ADAPTERS_VARIABLE)
    if not adapters:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptc" / "vllm"
    LoRAResolver.register(AdapterResolver)  # an abstract class, so vLLM need not be there when this file is imported
    resolver = AdapterResolver(adapters, os.environ.get(CACHE_VARIABLE) or usual, os.environ.get(MODEL_VARIABLE))
    LoRAResolverRegistry.register_resolver(NAME, resolver)
