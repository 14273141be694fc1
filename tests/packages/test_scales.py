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


def same(ours: Any, package: Any) -> None:
    torch.testing.assert_close(run(package), run(ours), rtol=2e-5, atol=2e-5)


@pytest.fixture
def both(net: Packaged) -> tuple[Any, Any]:
    """The package and its program, with one adapter."""
    net.swap(adapter(net.program, CONFIG), CONFIG)
    return net.program, net.runner


def test_a_factor_is_that_of_the_program(both: tuple[Any, Any], net: Packaged) -> None:
    ours, package = both
    before = run(package)
    for factor, modules in ((0.5, None), (0.5, None), (-3, "conv"), (0, ["lin", "experts"])):
        for p in both:
            p.set_active({"default": factor}, modules)
        same(ours, package)
        assert package.binding.scale_factors == ours.binding.scale_factors
    assert not torch.allclose(run(package), before, rtol=1e-2)
    for scale in (-2, {"default": 0.75}):
        with ours.scaled(scale), package.scaled(scale):
            same(ours, package)
            with ours.scaled(3), package.scaled(3):
                same(ours, package)
                with ours.disabled(), package.disabled():
                    same(ours, package)
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
        p.set_active({"default": 1})
    same(ours, bound)
    assert adaptc.verify(package, ours).ok


def test_its_adapter_is_on_and_off(both: tuple[Any, Any]) -> None:
    ours, package = both
    package.set_active({"default": 0.5})
    before = run(package)
    for p in both:
        p.set_active([])
        assert (p.active_adapters, p.available_adapters) == ([], ["default"])
    same(ours, package)
    assert torch.equal(run(package), run(package.base))
    assert adaptc.report(package).to_dict()["strength"] == "'default' is off"
    package.set_active("default")  # with the factor that it had
    assert torch.equal(run(package), before)
    assert package.active_adapters == ["default"]
    with package.scaled({}):
        assert torch.equal(run(package), run(package.base))
    package.set_active([])
    adaptc.swap(package, ours.binding.active_form, scale=0.5)
    assert package.active_adapters == ["default"]
    assert torch.equal(run(package), before)
    for p in both:
        p.set_active({"default": 1})


def test_old_names_warn_and_work(both: tuple[Any, Any]) -> None:
    _, package = both
    package.set_active({"default": 2})
    expected = run(package)
    package.set_active({"default": 1})
    with pytest.warns(DeprecationWarning, match=r"package\.scaled\(scale\)") as told:
        found = run(package, adapter_scale=2)
    assert torch.equal(found, expected)
    with pytest.warns(DeprecationWarning, match="set_active") as also_told:
        package.set_scale(2, "default")
    assert [w.filename for w in (*told, *also_told)] == [__file__] * 2
    assert torch.equal(run(package), expected)
    package.set_active({"default": 1})


def test_what_is_refused_changes_nothing(both: tuple[Any, Any]) -> None:
    _, package = both
    before, binding = run(package), package.binding
    for attempt in (
        lambda: package.set_active({"other": 0.5}),
        lambda: package.set_active({"default": 0.5}, modules="head"),
        lambda: package.set_active({"default": float("inf")}),
        lambda: package.scaled("much"),
        lambda: package.scaled({"other": 0.5}),
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
    ours.set_active({"default": -0.5}, modules="lin")
    ours.set_active({"default": 2}, modules="conv")
    package = adaptc.load_package(adaptc.package(ours, tmp_path / "scaled.pt2", max_rank=3))
    same(ours, package)
    assert package.binding.scale_factors == ours.binding.scale_factors
    said = "'default' is scaled by -0.5 at 1 site, 'default' is scaled by 2 at 1 site"
    assert adaptc.report(package).to_dict()["strength"] == said
    assert said in str(adaptc.report(package))
    assert ours.binding.describe_scales() == said
    for p in (ours, package):
        p.set_active({"default": 1})
    same(ours, package)
    ours.set_active([])
    with pytest.raises(ConfigError, match="'default' is off"):
        adaptc.package(ours, tmp_path / "off.pt2")
    with ours.disabled(), pytest.raises(AdaptcError, match="package is called inside of"):
        adaptc.package(ours, tmp_path / "off.pt2")
