"""Serve adapters on several machines: Ray Serve runs replicas, and starts another one where one dies.

`make demo` trains the adapters: python examples/ray_serve.py build/demo. It needs pip install 'adaptc[ray]'.

`LanguageModel` answers as OpenAI's API does. Its replicas read the same directory of adapters: one that a request names
as its model is loaded at its first use. `Classifier` is a model that generates nothing: each of its batches is one call
of a bank, whose rows have adapters of their own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import urllib.request
from itertools import count
from pathlib import Path
from typing import Any

# A small machine that is busy takes longer to start Ray's proxy than the five seconds that Ray gives it.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import adaptc
from adaptc.server import ServerOptions, build_app, open_server


@serve.deployment(ray_actor_options={"num_cpus": 0.5})  # so that two of each start on a small machine
@serve.ingress()
class LanguageModel:
    """A replica of a language model with a bank of adapters, behind the routes of OpenAI's API."""

    def __init__(self, model: str, adapters: str, sizes: dict[str, Any]) -> None:
        root = Path(adapters)
        self.served = open_server(model, ServerOptions("base", root, load_on_use=True, max_adapters=8, **sizes))

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.served)

    def check_health(self) -> None:
        """Tell Ray to start another replica where this one computes no more."""
        if not self.served.is_alive:
            raise RuntimeError("the replica has stopped to compute")


class Loaded:
    """An adapter in the bank of a replica, until neither Ray nor a request refers to it."""

    _numbers = count()

    def __init__(self, bank: Any, path: Path) -> None:
        name = f"{path.name} {next(self._numbers)}"
        bank.add(name, str(path))  # raises for an adapter that does not fit
        self.bank, self.name = bank, name

    def __del__(self) -> None:
        if name := getattr(self, "name", ""):
            self.bank.remove(name)


@serve.deployment(ray_actor_options={"num_cpus": 0.25})
class Classifier:
    """A replica of an image classifier: requests that come together are one call, each with its adapter."""

    def __init__(self, model: str, adapters: str) -> None:
        base = AutoModelForImageClassification.from_pretrained(model).eval()
        config = adaptc.LoraConfig(r=2, target_modules="all-linear")
        self.adapters, self.bank = Path(adapters), adaptc.compile(base, config).bank()

    @serve.multiplexed(max_num_models_per_replica=16)
    async def load(self, name: str) -> Loaded:
        path = self.adapters / Path(name).name  # a name, and no path to elsewhere
        if not (path / "adapter_config.json").is_file():
            raise KeyError(name)
        return Loaded(self.bank, path)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def classify(self, requests: list[tuple[list[Any], Loaded | None]]) -> list[int]:
        pixels = torch.tensor([image for image, _ in requests])
        names = [None if adapter is None else adapter.name for _, adapter in requests]
        with torch.no_grad():
            return self.bank(pixel_values=pixels, adapters=names).logits.argmax(-1).tolist()

    async def __call__(self, request: Request) -> Any:
        name, image = serve.get_multiplexed_model_id(), await request.json()
        try:
            adapter = await self.load(name) if name else None
        except KeyError:
            return JSONResponse({"error": f"there is no adapter {name!r}"}, 404)
        except adaptc.AdaptcError:
            return JSONResponse({"error": f"the adapter {name!r} does not fit the model"}, 400)
        return {"label": await self.classify((image, adapter))}


def start(model: str, adapters: str, classifier: str, labels: str, replicas: int = 2, **sizes: Any) -> None:
    """Start both apps, at /llm and /classify of port 8000."""
    llm = LanguageModel.options(num_replicas=replicas).bind(model, adapters, sizes)
    serve.run(llm, name="llm", route_prefix="/llm")
    serve.run(
        Classifier.options(num_replicas=replicas).bind(classifier, labels), name="classify", route_prefix="/classify"
    )


def ask(path: str, body: Any, **headers: str) -> Any:
    """Return the answer to a request, or raise HTTPError."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:8000{path}", data, {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def chat(adapter: str, text: str) -> str:
    """Return what the language model answers with an adapter."""
    body = {"model": adapter, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
    return ask("/llm/v1/chat/completions", body)["choices"][0]["message"]["content"]


def make_classifier(folder: Path) -> None:
    """Write a random image classifier and two adapters for it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 7}
    config = ViTConfig(image_size=16, patch_size=8, num_attention_heads=4, initializer_range=0.3, **sizes)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder / "model")
    for name in ("birds", "cars"):
        lora = adaptc.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adaptc.save_adapter(adaptc.compile(model, lora), folder / "adapters" / name)


def main(adapters: str) -> None:
    import quickstart

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_classifier(folder)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            start(str(quickstart.gguf_path()), adapters, str(folder / "model"), str(folder / "adapters"))
            for adapter in ("pirate", "telegram", "base"):
                print(f"{adapter}: {chat(adapter, 'Where is the library?')!r}")
            image = torch.rand(3, 16, 16).tolist()
            for adapter in ("birds", "cars", ""):
                headers = {"serve_multiplexed_model_id": adapter} if adapter else {}
                print(f"{adapter or 'no adapter'}: label {ask('/classify', image, **headers)['label']}")
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main(str(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo").resolve()))
