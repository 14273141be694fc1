"""PEFT's combination types: PEFT's numbers, in files that PEFT loads to equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from adaptc.adapters.combining.combine_options import METHODS
from tests.support.combining import (
    EXPECTED_WARNINGS,
    IDS,
    TARGETS,
    changes,
    load_peft_adapter,
    net,
    peft_model,
    save_adapters,
)
from tests.support.oracle import quiet

WEIGHTS = (0.5, -0.3, 1.2)
OPTIONS: dict[str, dict[str, Any]] = {m: {} if m in ("svd", "cat", "linear") else {"density": 0.4} for m in METHODS}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((m, o) for m, o in OPTIONS.items()),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("dare_ties_svd", {"density": 0.7, "majority_sign_method": "frequency"}),
    ("svd", {"svd_rank": 4}),
    ("svd", {"svd_clamp": 0.9}),
    ("svd", {"svd_full_matrices": True, "svd_rank": 2}),
    ("ties_svd", {"density": 0.5, "svd_clamp": 0.95, "svd_rank": 2}),
]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=TARGETS, fan_in_fan_out=True, **options)


def three(rank: int = 3) -> list[peft.LoraConfig]:
    return [lora(r=rank), lora(r=rank, lora_alpha=7), lora(r=rank, lora_alpha=2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[peft.PeftModel, list[Path]]:
    wrapped = peft_model(three())
    return wrapped, save_adapters(wrapped, tmp_path_factory.mktemp("three"))


def theirs(
    wrapped: peft.PeftModel, method: str, options: dict[str, Any], weights: Any = WEIGHTS
) -> dict[str, torch.Tensor]:
    """What PEFT's combination adds, by module."""
    names = {"svd_full_matrices": False, **options}
    with quiet(*EXPECTED_WARNINGS):
        wrapped.add_weighted_adapter(
            [n for n in wrapped.peft_config if n != "mix"][: len(weights)], list(weights), "mix", method, **names
        )
    found = changes(wrapped, "mix")
    wrapped.delete_adapter("mix")
    return found


def ours(path: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of our file, which it loads without a word."""
    return changes(load_peft_adapter(path), "default")


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_type_has_pefts_numbers(
    made: Any, method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wrapped, paths = made
    directories = dict(zip(paths, WEIGHTS, strict=True))
    if method.startswith("dare"):  # in the order of PEFT's modules, as dicts of their tensors have it
        with monkeypatch.context() as patch:
            inject = wrapped.base_model.inject_adapter
            patch.setattr(wrapped.base_model, "inject_adapter", lambda *a: (inject(*a), torch.manual_seed(3)))
            want = theirs(wrapped, method, options)
        if method.endswith("svd"):  # PEFT draws for these as they are stored, here for all as (out, in)
            want = {n: d for n, d in want.items() if n not in ("table", "turned")}
        states = [(peft.get_peft_model_state_dict(wrapped, adapter_name=str(i)), w) for i, w in enumerate(WEIGHTS)]
        objects = [(adaptc.Adapter(wrapped.peft_config[str(i)], s), w) for i, (s, w) in enumerate(states)]
        generator = torch.Generator().manual_seed(3)
        found = adaptc.combine(objects, method=method, generator=generator, **options)
    else:
        want = theirs(wrapped, method, options)
        found = adaptc.combine(directories, method=method, **options)
    got = ours(adaptc.save_adapter(found, tmp_path / "mix"))
    assert got.keys() == set(TARGETS) >= want.keys()
    for name, delta in want.items():
        assert float(delta.abs().max()) > 0
        torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["cat", "linear", "ties"])
def test_outputs_are_equal_in_both(made: Any, method: str, tmp_path: Path):
    _, paths = made
    found = adaptc.combine(dict(zip(paths, WEIGHTS, strict=True)), method=method, **OPTIONS[method])
    prog = adaptc.compile(net(), found, example_inputs=IDS)
    peft_out = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "mix"))(IDS)
    torch.testing.assert_close(prog(IDS), peft_out, rtol=1e-4, atol=1e-5)
    other = adaptc.compile(net(), paths[0], example_inputs=IDS)
    adaptc.swap(other, found)
    torch.testing.assert_close(other(IDS), peft_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.bind(tmp_path / "mix")(IDS), peft_out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net()(IDS), peft_out, atol=1e-2)


def test_the_default_is_pefts(made: Any):
    _, paths = made
    adapters = dict(zip(paths, WEIGHTS, strict=True))
    one, other = adaptc.combine(adapters), adaptc.combine(adapters, method="svd")
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in other.tensors)


def test_ia3_is_the_weighted_sum(tmp_path: Path):
    config = peft.IA3Config(target_modules=["up", "mix", "down"], feedforward_modules=["down"])
    other = peft.IA3Config(target_modules=["up", "turned"], feedforward_modules=["turned"], fan_in_fan_out=True)
    wrapped = peft_model([config, other])
    paths = save_adapters(wrapped, tmp_path)
    with quiet(*EXPECTED_WARNINGS):
        wrapped.add_weighted_adapter(["0", "1"], [0.7, -0.4], "mix")
    wrapped.set_adapter("mix")
    found = adaptc.combine(dict(zip(paths, (0.7, -0.4), strict=True)))
    again = load_peft_adapter(adaptc.save_adapter(found, tmp_path / "sum"))
    torch.testing.assert_close(again(IDS), wrapped(IDS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        adaptc.compile(net(), found, example_inputs=IDS)(IDS), wrapped(IDS), rtol=1e-5, atol=1e-6
    )
