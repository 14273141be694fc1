"""The resolver has the interface of vLLM's, gives it adapters as they are meant, and converts each once.

vLLM is not installed here: modules of its names stand in for it, with the classes that its own resolvers use.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc.engines import vllm_resolver
from adaptc.engines.vllm_resolver import NAME, AdapterResolver, register
from adaptc.errors import ConfigError
from tests.engines.adapter_directories import adapter_directory, model_directory, peft_logits, write_directory
from tests.engines.test_fused_layers import QKV, by_hand, phi3_directory, split_adapter
from tests.support.guides import ROOT

pytestmark = pytest.mark.usefixtures("no_progress_bars")


@dataclass
class LoRARequest:
    """The fields of vLLM's that its own resolvers give."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1  # as vLLM asserts


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of a vLLM that is there."""
    found = Registry()
    names = {"vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": LoRARequest}}
    names["vllm.lora.resolver"] = {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found}
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters: LoRA of one rank, LoRA of several, LoHa, aLoRA."""
    path = tmp_path / "adapters"
    write_directory(path / "plain", {"lora_alpha": 6})
    for name in ("patterns", "loha", "alora"):
        shutil.copytree(adapter_directory(name), path / name)
    (path / "no-adapter").mkdir()
    return path


def resolve(resolver: Any, name: str, base: str = "some/model") -> Any:
    return asyncio.run(resolver.resolve_lora(base, name))


def test_what_vllm_takes_is_given_where_it_lies(folder: Path, registry: Registry, tmp_path: Path) -> None:
    resolver = AdapterResolver(folder, tmp_path / "cache")
    found = {name: resolve(resolver, name) for name in ("plain", "patterns")}
    assert all(type(request) is LoRARequest for request in found.values())
    assert {n: r.lora_path for n, r in found.items()} == {n: str(folder.resolve() / n) for n in found}
    assert [r.lora_name for r in found.values()] == ["plain", "patterns"]
    assert found["plain"].lora_int_id != found["patterns"].lora_int_id
    assert resolve(resolver, "plain") == found["plain"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("by_name", [True, False])
def test_another_method_is_converted_once_and_again_when_it_changes(
    folder: Path, registry: Registry, tmp_path: Path, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = vllm_resolver.export_adapter
    monkeypatch.setattr(vllm_resolver, "export_adapter", lambda *a, **k: (calls.append(a), real(*a, **k)))
    model = model_directory()
    resolver = AdapterResolver(folder, tmp_path / "cache", None if by_name else model)
    first = resolve(resolver, "loha", str(model) if by_name else "some/model")
    again = resolve(resolver, "loha", str(model) if by_name else "some/model")
    assert first == again
    assert len(calls) == 1
    path = Path(first.lora_path)
    assert path.parent == tmp_path / "cache"
    assert adaptc.engines.check_adapter(path, "vllm").is_as_meant
    torch.testing.assert_close(peft_logits(path), peft_logits(folder / "loha"), rtol=1e-3, atol=1e-3)
    file = folder / "loha" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha": 6}))
    changed = resolve(resolver, "loha", str(model) if by_name else "some/model")
    assert changed.lora_path != first.lora_path
    assert len(calls) == 2
    torch.testing.assert_close(peft_logits(Path(changed.lora_path)), peft_logits(folder / "loha"), rtol=1e-3, atol=1e-3)


def test_layers_of_the_model_are_given(registry: Registry, tmp_path: Path) -> None:
    """An adapter of q, k and v for Phi 3, which vLLM takes by its config, and by its names not."""
    split_adapter(tmp_path / "adapters" / "split", QKV)
    resolver = AdapterResolver(tmp_path / "adapters", tmp_path / "cache")
    request = resolve(resolver, "split", str(phi3_directory()))
    names = load_file(Path(request.lora_path) / "adapter_model.safetensors")
    assert {k.split(".")[-3] for k in names} == {"qkv_proj"}
    assert by_hand(tmp_path / "adapters" / "split").isfinite().all()


@pytest.mark.parametrize(("name", "said"), [("loha", "it is of LOHA.*model"), ("alora", "has no such adapters")])
def test_what_vllm_cannot_take_is_not_found_and_the_log_says_why(
    folder: Path, registry: Registry, name: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resolver = AdapterResolver(folder, tmp_path / "cache")
    with caplog.at_level(logging.ERROR, "adaptc"):
        assert resolve(resolver, name) is None
    (record,) = caplog.records
    assert f"vLLM gets no adapter {name!r}" in record.getMessage()
    assert re.search(said, record.getMessage())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["missing", "no-adapter", "", ".", "..", "../outside", "/etc", "plain/../../outside", "a\0b", "link"]
)
def test_names_that_are_no_adapters_find_nothing(folder: Path, registry: Registry, name: str, tmp_path: Path) -> None:
    outside = write_directory(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    assert resolve(AdapterResolver(folder, tmp_path / "cache"), name) is None


def test_a_folder_in_the_folder_is_found(folder: Path, registry: Registry, tmp_path: Path) -> None:
    write_directory(folder / "team" / "one")
    request = resolve(AdapterResolver(folder, tmp_path / "cache"), "team/one")
    assert request.lora_name == "team/one"


def test_requests_are_answered_while_one_is_converted(
    folder: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []

    async def run() -> None:
        resolver = AdapterResolver(folder, tmp_path / "cache", model_directory())
        converting = asyncio.create_task(resolver.resolve_lora("m", "loha"))
        while not converting.done():
            await asyncio.sleep(0.01)
            ticks.append(1)
        assert (await converting) is not None

    asyncio.run(run())
    assert len(ticks) > 3


def test_the_plugin_registers_by_the_environment(
    folder: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ADAPTC_VLLM_ADAPTERS", "ADAPTC_VLLM_CACHE", "ADAPTC_VLLM_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    register()
    assert not registry.resolvers
    monkeypatch.setenv("ADAPTC_VLLM_ADAPTERS", str(folder))
    monkeypatch.setenv("ADAPTC_VLLM_MODEL", str(model_directory()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    register()
    resolver: Any = registry.resolvers[NAME]
    assert isinstance(resolver, LoRAResolver)
    assert resolver.cache == tmp_path / "home" / "adaptc" / "vllm"
    assert resolver.model == model_directory()
    monkeypatch.setenv("ADAPTC_VLLM_CACHE", str(tmp_path / "cache"))
    register()
    assert registry.resolvers[NAME].cache == tmp_path / "cache"  # type: ignore[attr-defined]
    monkeypatch.setenv("ADAPTC_VLLM_ADAPTERS", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="is no directory; expected a folder of adapters"):
        register()


def test_the_entry_point_is_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    assert importlib.metadata.EntryPoint("x", value, "vllm.general_plugins").load() is register
