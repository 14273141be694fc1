"""Two replicas under Ray Serve: one dies under load, adapters come, and every answer is of the adapter asked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.support.chats import ChatModel, make_chat_model

# Ray's own code uses what newer libraries have deprecated, and leaves sockets to the garbage collector.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
SIZES = {"max_batch_tokens": 16, "num_blocks": 48, "page_size": 4}
TEXT = "w11 w12 w30"


@dataclass(frozen=True)
class Cluster:
    example: Any
    chat: ChatModel
    images: Path

    def expected_answer(self, adapter: str | None, text: str) -> str:
        """The greedy answer of eight tokens, computed in this process without a cache."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.chat.folder / "model")
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return tokenizer.decode(self.chat.uncached_answer(adapter, ids, 8), skip_special_tokens=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    import ray
    from ray import serve

    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = sys.modules["ray_serve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ray.cloudpickle.register_pickle_by_value(example)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ray")
    chat = make_chat_model(folder / "chat")
    images = folder / "images"
    example.make_classifier(images)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        example.start(
            str(chat.folder / "model"), str(chat.folder), str(images / "model"), str(images / "adapters"), **SIZES
        )
        yield Cluster(example, chat, images)
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.modules.pop("ray_serve")


def test_answers_are_of_the_adapter_that_was_asked(cluster: Cluster) -> None:
    found = {name: cluster.example.chat(name, TEXT) for name in ("base", "one", "two")}
    assert found == {n: cluster.expected_answer(None if n == "base" else n, TEXT) for n in found}
    assert len({*found.values()}) == 3
    with pytest.raises(urllib.error.HTTPError, match="404"):
        cluster.example.chat("absent", TEXT)


def replicas() -> list[Any]:
    """The running replicas of the language model."""
    import ray

    names = [n for n in ray.util.list_named_actors(all_namespaces=True) if "LanguageModel" in n["name"]]
    return [ray.get_actor(n["name"], namespace=n["namespace"]) for n in names]


def test_a_replica_dies_and_an_adapter_comes_under_load(cluster: Cluster) -> None:
    """Clients try again after an error; none gets a wrong answer, none is left without one."""
    import ray

    expected = {n: cluster.expected_answer(a, TEXT) for n, a in (("base", None), ("one", "one"), ("two", "two"))}
    expected["late"] = expected["two"]
    wrong, lost, answers, errors = list[Any](), list[str](), list[str](), list[str]()
    names, is_over = ["base", "one", "two"], threading.Event()

    def client(number: int) -> None:
        for i in range(10_000):
            if is_over.is_set():
                return
            name = names[(number + i) % len(names)]
            for _ in range(40):
                try:
                    found = cluster.example.chat(name, TEXT)
                    break
                except (urllib.error.URLError, ConnectionError) as error:
                    errors.append(str(error))
                    time.sleep(0.25)
            else:
                lost.append(name)
                continue
            answers.append(name)
            if found != expected[name]:
                wrong.append((name, found))

    def wait_for(condition: Any) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, (len(answers), errors[-3:])
            time.sleep(0.1)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(answers) > 12)
        first = replicas()
        assert len(first) == 2
        ray.kill(first[0])
        before = len(answers)
        wait_for(lambda: len(answers) > before + 12)
        shutil.copytree(cluster.chat.folder / "two", cluster.chat.folder / "coming")
        os.rename(cluster.chat.folder / "coming", cluster.chat.folder / "late")
        names.append("late")
        wait_for(lambda: answers.count("late") > 6)
        wait_for(lambda: len(replicas()) == 2 and all(r not in first[:1] for r in replicas()))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not lost
    assert {*answers} == {*names}


def test_a_batch_of_images_has_an_adapter_for_each(cluster: Cluster) -> None:
    from transformers import ViTForImageClassification

    folder = cluster.images / "adapters"
    model: Any = ViTForImageClassification.from_pretrained(cluster.images / "model").eval()
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules="all-linear"))
    images = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        bound = {n: program.bind(folder / n if n else None) for n in ("birds", "cars", "")}
        expected = {n: b(pixel_values=images).logits.argmax(-1).tolist() for n, b in bound.items()}
    assert len({tuple(labels) for labels in expected.values()}) == 3

    def ask(name: str, number: int) -> int:
        headers = {"serve_multiplexed_model_id": name} if name else {}
        return cluster.example.ask("/classify", images[number].tolist(), **headers)["label"]

    asked = [(name, i) for i in range(len(images)) for name in expected]
    with ThreadPoolExecutor(12) as threads:
        found = [*threads.map(lambda pair: ask(*pair), asked)]
    assert found == [expected[name][i] for name, i in asked]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask("planes", 0)
    shutil.copytree(cluster.chat.folder / "one", folder / "text")
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("text", 0)
    assert ask("birds", 0) == expected["birds"][0]
