"""The verbs of diffusers' loaders: sequences of them give diffusers' state and images, and nothing compiles."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.debug import assert_no_recompiles
from tests.support.pipelines import PIPELINES, adapted, images, pipeline, write_lora

NAMES = ["a", "b", "c"]
#: entries for all modules: diffusers fails where one has none
_FLUX = {"single_": 1.0, "transformer_blocks": 0.5, "proj_out": 0.7}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Pipeline, name of an adapter -> its file; ranks differ, and the last is for the denoiser alone."""
    root = tmp_path_factory.mktemp("adapters")
    options: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 5, "use_rslora": True}, "c": {"r": 2, "text": False}}
    return {
        (pipe, name): write_lora(pipe, root / pipe / name, seed=i, **options[name])
        for pipe in PIPELINES
        for i, name in enumerate(NAMES)
    }


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def _weights(name: str, draw: random.Random) -> Any:
    number = round(draw.uniform(-1, 1), 2)
    denoiser = "unet" if name in ("sd", "sdxl") else "transformer"
    blocks = {"down": 0.4, "up": {"block_0": [number, 0.5]}} if name == "sd" else dict(_FLUX, single_=number)
    return draw.choice([number, None, {denoiser: number}, {denoiser: blocks}])


def _step(name: str, draw: random.Random, loaded: list[str]) -> tuple[str, Callable[[Any, dict], None]] | None:
    """A verb that both pipelines can do, with its name. ``loaded`` follows what is loaded."""
    verb = draw.choice(["load", "load", "set", "set", "set", "delete", "off", "fuse", "unload"])
    if verb == "load" and (free := [n for n in NAMES if n not in loaded]):
        one = draw.choice(free)
        loaded.append(one)
        return f"load {one}", lambda p, files: p.load_lora_weights(files[name, one], adapter_name=one)
    if verb == "set" and loaded:
        some = draw.sample(loaded, draw.randint(1, len(loaded)))
        weights = [_weights(name, draw) for _ in some]
        return f"set {some} {weights}", lambda p, _: p.set_adapters(list(some), list(weights))
    if verb == "delete" and len(loaded) > 1:
        one = loaded.pop(draw.randrange(len(loaded)))
        left = list(loaded)

        def delete(pipe: Any, _: Any) -> None:
            # PEFT activates another adapter of each layer where the only active one goes; that differs by layer.
            pipe.set_adapters(left)
            pipe.delete_adapters(one)

        return f"delete {one}", delete
    if verb == "off":
        return "disable, enable", lambda p, _: (p.disable_lora(), p.enable_lora())[0]
    if verb == "fuse" and loaded:
        return "fuse, unfuse", lambda p, _: (p.fuse_lora(), p.unfuse_lora())[0]
    if verb == "unload" and draw.random() < 0.3:
        loaded.clear()
        return "unload", lambda p, _: p.unload_lora_weights()
    return None


def _listed(pipe: Any) -> dict[str, set[str]]:
    """diffusers lists components whose adapters are all gone, too."""
    return {n: set(held) for n, held in pipe.get_list_adapters().items() if held}


@pytest.mark.long
@pytest.mark.few(8)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_any_sequence_of_verbs_gives_the_state_of_diffusers(name: str, seed: int, files: dict) -> None:
    draw, theirs, ours = random.Random(seed), pipeline(name), adapted(name)
    loaded: list[str] = []
    done: list[str] = []
    base = images(theirs, name)
    while len(done) < 12:
        found = _step(name, draw, loaded)
        if found is None:
            continue
        done.append(found[0])
        for pipe in (theirs, ours):
            found[1](pipe, files)
        wanted = images(theirs, name)
        assert (images(ours, name) - wanted).abs().max() < 1e-4, done
        assert _listed(ours) == _listed(theirs), done
        if loaded:
            assert set(theirs.get_active_adapters()) <= set(ours.get_active_adapters()), done
    ours.unload_lora_weights()
    close(images(ours, name), base)


@pytest.mark.long
@pytest.mark.parametrize("name", PIPELINES)
def test_fused_adapters_are_taken_out_to_the_bit(name: str, files: dict) -> None:
    theirs, ours = pipeline(name), adapted(name)
    base = images(ours, name)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(files[name, "a"], adapter_name="a")
        pipe.load_lora_weights(files[name, "b"], adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.5, 0.25])
    before = images(ours, name)
    for pipe in (theirs, ours):
        pipe.fuse_lora(lora_scale=0.5)
    close(images(ours, name), images(theirs, name))
    assert ours.fused_loras == theirs.fused_loras == {"a", "b"}
    assert (images(ours, name) - before).abs().max() > 1e-3
    with pytest.raises(adaptc.ConfigError, match=r"fused into the weights.*unfuse_lora"):
        ours.set_adapters("a")
    ours.unfuse_lora()
    assert torch.equal(images(ours, name), before)
    assert ours.num_fused_loras == 0
    # Fused for good, as diffusers' users ship a model; then another adapter on these weights. Not in the pipeline that
    # tests share.
    fresh, ours = pipeline(name), adaptc.compile(pipeline(name))
    for pipe in (fresh, ours):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(files[name, "a"], adapter_name="a")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    fused = images(fresh, name)
    close(images(ours, name), fused)
    assert (fused - base).abs().max() > 1e-2
    for pipe in (fresh, ours):
        pipe.load_lora_weights(files[name, "c"], adapter_name="c")
    close(images(ours, name), images(fresh, name))


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_nothing_compiles_around_swaps(name: str, files: dict) -> None:
    ours = adapted(name)
    ours.load_lora_weights(files[name, "a"], adapter_name="a")
    images(ours, name)
    ours.enable_lora_hotswap(target_rank=64)
    unit = 16 if name == "flux" else 8
    with assert_no_recompiles():
        for i, (height, width) in enumerate([(3, 5), (7, 4), (9, 10)]):
            size = {"height": height * unit, "width": width * unit}
            ours.load_lora_weights(files[name, "b"], adapter_name=f"b{i}")
            ours.set_adapters(["a", f"b{i}"], [0.5, 0.25])
            both = images(ours, name, **size)
            ours.set_adapters("a")
            assert (images(ours, name, **size) - both).abs().max() > 1e-3
            ours.delete_adapters(f"b{i}")


@pytest.mark.long
def test_another_adapter_acts_where_the_only_one_that_acts_is_deleted(files: dict) -> None:
    theirs, ours = pipeline("flux"), adapted("flux")
    for pipe in (theirs, ours):
        pipe.load_lora_weights(files["flux", "b"], adapter_name="b")
        pipe.set_adapters("b", 0.5)
        pipe.load_lora_weights(files["flux", "a"], adapter_name="a")
        pipe.delete_adapters("a")
    assert ours.get_active_adapters() == theirs.get_active_adapters() == ["b"]
    close(images(ours, "flux"), images(theirs, "flux"))
    ours.delete_adapters(["b"])
    close(images(ours, "flux"), images(pipeline("flux"), "flux"))
    with pytest.raises(adaptc.ConfigError, match="no adapter 'b'"):
        ours.delete_adapters("b")


@pytest.mark.long
def test_hotswap_exchanges_an_adapter(files: dict) -> None:
    theirs, ours = pipeline("sd"), adapted("sd")
    ours.load_lora_weights(files["sd", "a"], adapter_name="x")
    ours.set_adapters("x", 0.5)
    ours.load_lora_weights(files["sd", "b"], adapter_name="x", hotswap=True)  # another rank, and a text encoder
    theirs.load_lora_weights(files["sd", "b"], adapter_name="x")
    theirs.set_adapters("x", 0.5)
    close(images(ours, "sd"), images(theirs, "sd"))
    ours.load_lora_weights(files["sd", "c"], adapter_name="x", hotswap=True)  # of the denoiser alone
    assert ours.get_list_adapters() == {"unet": ["x"]}
    with pytest.raises(adaptc.ConfigError, match="no adapter 'y'"):
        ours.load_lora_weights(files["sd", "b"], adapter_name="y", hotswap=True)


@pytest.mark.slow
def test_inductor(files: dict) -> None:
    """One compilation serves every size and adapter."""
    theirs, ours = pipeline("flux"), adaptc.compile(pipeline("flux"), files["flux", "c"], backend="inductor")
    theirs.load_lora_weights(files["flux", "c"], adapter_name="default")
    images(ours, "flux")
    images(ours, "flux", height=80, width=64)
    with assert_no_recompiles():
        for pipe in (theirs, ours):
            pipe.set_adapters("default", 0.5)
        close(images(ours, "flux", height=112, width=96), images(theirs, "flux", height=112, width=96))


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("name", PIPELINES)
def test_files_that_are_saved_are_read_by_diffusers(name: str, files: dict, tmp_path: Path) -> None:
    theirs, again, ours = pipeline(name), pipeline(name), adapted(name)
    ours.load_lora_weights(files[name, "b"], adapter_name="b")
    ours.set_adapters("b", 0.5)  # files have the scale that an adapter was made with
    ours.save_lora_weights(tmp_path)
    theirs.load_lora_weights(files[name, "b"])
    again.load_lora_weights(tmp_path)
    close(images(again, name), images(theirs, name))
    ours.load_lora_weights(tmp_path, adapter_name="again")
    close(images(ours, name), images(theirs, name))
    ours.set_adapters(["b", "again"])
    with pytest.raises(adaptc.ConfigError, match="say adapter_name="):
        ours.save_lora_weights(tmp_path)
