"""Factors on the scale of a package's adapter: those of the program that it was made of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import AdaptcError, ConfigError
from tests.support.packaged_nets import NET_CONFIG, Packaged, adapter, net_inputs

CONFIG = NET_CONFIG.replace(r=3, lora_alpha=5)
INPUT = net_inputs(3, 7)


def run(call: Any, **how: Any) -> Tensor:
    args, kwargs = INPUT
    with torch.no_grad():
        return call(*args, **kwargs, **how)["y"]


def same(ours: Any, package: Any, **how: Any) -> None:
    torch.testing.assert_close(run(package, **how), run(ours, **how), rtol=2e-5, atol=2e-5)


@pytest.fixture
def both(net: Packaged) -> tuple[Any, Any]:
    """The package and its program, with one adapter."""
    net.swap(adapter(net.program, CONFIG), CONFIG)
    return net.program, net.runner


def test_a_factor_is_that_of_the_program(both: tuple[Any, Any], net: Packaged) -> None:
    ours, package = both
    before = run(package)
    for how in ((0.5,), (0.5,), (-3, "default", "conv"), (0, None, ["lin", "experts"])):
        for p in both:
            p.set_scale(*how)
        same(ours, package)
        assert package.binding.scale_factors == ours.binding.scale_factors
    assert not torch.allclose(run(package), before, rtol=1e-2)
    same(ours, package, adapter_scale=2)
    same(ours, package)
    tensors = adapter(net.program, CONFIG, seed=4)
    same(ours.bind(tensors, config=CONFIG, scale=0.3), package.bind(tensors, config=CONFIG, scale=0.3))
    for p in both:
        adaptc.swap(p, tensors, config=CONFIG, scale=0.7)
    same(ours, package)
    bound = package.bind(package.binding, scale=1)
    assert not bound.binding.scale_factors
    assert package.binding.scale_factors
    for p in both:
        p.set_scale(1)
    same(ours, bound)
    assert adaptc.verify(package, ours).ok


def test_what_is_refused_changes_nothing(both: tuple[Any, Any]) -> None:
    _, package = both
    before, binding = run(package), package.binding
    for attempt in (
        lambda: package.set_scale(0.5, "other"),
        lambda: package.set_scale(0.5, modules="head"),
        lambda: package.set_scale(float("inf")),
        lambda: package.bind(None, scale=0.5),
        lambda: run(package, adapter_scale="much"),
    ):
        with pytest.raises(ConfigError):
            attempt()
    assert package.binding is binding
    assert torch.equal(run(package), before)


@pytest.mark.long
def test_a_package_is_made_with_the_factors_of_its_program(both: tuple[Any, Any], tmp_path: Path) -> None:
    ours = copy.copy(both[0])
    ours.set_scale(-0.5, modules="lin")
    ours.set_scale(2, modules="conv")
    package = adaptc.load_package(adaptc.package(ours, tmp_path / "scaled.pt2", max_rank=3))
    same(ours, package)
    assert package.binding.scale_factors == ours.binding.scale_factors
    said = "'default' is scaled by -0.5 at 1 site, 'default' is scaled by 2 at 1 site"
    assert adaptc.report(package).data()["strength"] == said
    assert said in str(adaptc.report(package))
    assert ours.binding.describe_scales() == said
    for p in (ours, package):
        p.set_scale(1)
    same(ours, package)
    ours.set_active([])
    with pytest.raises(ConfigError, match="'default' is off"):
        adaptc.package(ours, tmp_path / "off.pt2")
    with ours.disabled(), pytest.raises(AdaptcError, match="package is called inside of"):
        adaptc.package(ours, tmp_path / "off.pt2")
