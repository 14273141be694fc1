"""Images of an adapted pipeline equal those of diffusers' pipeline with the same adapter, whatever calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from torch import Tensor

import adaptc
from adaptc.debug import assert_no_recompiles
from adaptc.exporters.plain_program import plain_program
from adaptc.pipelines.component_program import tensor_calls
from tests.support import pipelines
from tests.support.pipelines import PIPELINES, adapted, images, pipeline, write_lora


def close(got: Tensor, wanted: Tensor, base: Tensor | None = None) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert base is None or (wanted - base).abs().max() > 1e-2, "the adapter does nothing"


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 9}},
    # diffusers drops the magnitudes of text encoders.
    "dora": {"use_dora": True, "text": False},
    "denoiser alone": {"text": False},
}


@pytest.mark.long
@pytest.mark.few(8)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PIPELINES)
def test_an_adapter_gives_the_images_that_it_gives_in_diffusers(name: str, variant: str, tmp_path: Path) -> None:
    file = write_lora(name, tmp_path, **VARIANTS[variant])
    theirs, ours = pipeline(name), adapted(name)
    base = images(theirs, name)
    theirs.load_lora_weights(file)
    close(images(ours, name), base)
    ours.load_lora_weights(file)
    # Latents of 3 x 5, 4 x 7 and 11 x 9; several images with and without guidance.
    sizes = ((24, 40), (32, 56), (88, 72)) if name != "flux" else ((48, 80), (64, 112), (176, 144))
    for height, width in sizes:
        size = {"height": height, "width": width}
        wanted = images(theirs, name, **size)
        close(images(ours, name, **size), wanted, base if wanted.shape == base.shape else None)
    if name != "flux":
        several = {"prompt": ["a", "dog, big", "!"], "num_images_per_prompt": 2, "guidance_scale": 1.0}
        close(images(ours, name, **several), images(theirs, name, **several))


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_float64(name: str, tmp_path: Path) -> None:
    """Of denoisers alone: pipelines of float64 make float32 of their latents in between."""
    file = write_lora(name, tmp_path, text=False)
    part = pipelines.DENOISER[name]
    theirs, base = pipeline(name), pipeline(name)
    theirs.load_lora_weights(file)
    for pipe in (theirs, base):
        getattr(pipe, part).double()
    ours = adaptc.compile(base, file)
    inputs = pipelines.denoiser_inputs(name, torch.float64)
    with torch.no_grad():
        wanted, got = (getattr(p, part)(**inputs, return_dict=False)[0] for p in (theirs, ours))
        plain = getattr(base, part)(**inputs, return_dict=False)[0]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    assert (wanted - plain).abs().max() > 1e-2


def _img2img(pipe: Any) -> Tensor:
    made = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    return _call(made, image=image, strength=0.8)


def _inpaint(pipe: Any) -> Tensor:
    made = StableDiffusionInpaintPipeline.from_pipe(pipe)
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., :17] = 1
    return _call(made, image=image, mask_image=mask, height=24, width=40, strength=0.9)


def _euler(pipe: Any) -> Tensor:
    made = copy.copy(pipe)
    made.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return images(made, "sd")


def _pndm(pipe: Any) -> Tensor:
    made = copy.copy(pipe)
    made.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    return images(made, "sd", num_inference_steps=4)


def _scale(pipe: Any) -> Tensor:
    return images(copy.copy(pipe), "sd", cross_attention_kwargs={"scale": 0.4})


def _callback(pipe: Any) -> Tensor:
    """A weight that a callback changes between the steps."""

    def halve(made: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters("a", 0.5)
        return {"latents": given["latents"] * 1.25}

    return images(pipe, "sd", callback_on_step_end=halve)


def _call(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "pt"} | options
    return pipe(generator=torch.Generator().manual_seed(3), **given).images


@pytest.mark.long
@pytest.mark.few(20)
@pytest.mark.parametrize("call", [_img2img, _inpaint, _euler, _pndm, _scale, _callback])
def test_other_ways_to_call(call: Callable[[Any], Tensor], tmp_path: Path) -> None:
    file = write_lora("sd", tmp_path)
    theirs, ours = pipeline("sd"), adapted("sd")
    plain = call(ours) if call is not _callback else None
    for pipe in (theirs, ours):
        pipe.load_lora_weights(file, adapter_name="a")
    close(call(ours), call(theirs), plain)


@pytest.mark.long
def test_another_task_has_the_programs_and_adapters_of_its_own(tmp_path: Path) -> None:
    file, theirs, ours = write_lora("sd", tmp_path), pipeline("sd"), adapted("sd")
    ours.load_lora_weights(file, adapter_name="a")
    other = adaptc.compile(StableDiffusionImg2ImgPipeline.from_pipe(ours))
    assert other.get_list_adapters() == ours.get_list_adapters()
    other.set_adapters("a", 0.5)
    theirs.load_lora_weights(file, adapter_name="a")
    close(images(ours, "sd"), images(theirs, "sd"))
    theirs.set_adapters("a", 0.5)
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    wanted = _call(StableDiffusionImg2ImgPipeline.from_pipe(theirs), image=image, strength=0.8)
    close(_call(other, image=image, strength=0.8), wanted)


@pytest.mark.long
@pytest.mark.parametrize("name", pipelines.LATENT_PIPELINES)
def test_denoisers_whose_text_encoders_take_no_adapters(name: str, tmp_path: Path) -> None:
    made = [pipelines.LATENT_PIPELINES[name]() for _ in range(2)]
    theirs, ours = made[0], adaptc.compile(made[1], pipelines.write_latent_lora(name, tmp_path))
    theirs.load_lora_weights(tmp_path)
    for size in ((48, 80, 9), (64, 48, 5), (32, 112, 1)):
        wanted = pipelines.latents(theirs, name, *size)
        close(pipelines.latents(ours, name, *size), wanted, pipelines.latents(made[1], name, *size))
    two = pipelines.latents(ours, name, 48, 80, 5, rows=2, adapters=["default", None])
    theirs.disable_lora()
    close(two[1:], pipelines.latents(theirs, name, 48, 80, 5, rows=2)[1:])
    theirs.enable_lora()
    close(two[:1], pipelines.latents(theirs, name, 48, 80, 5, rows=2)[:1])


@pytest.mark.long
@pytest.mark.parametrize("name", pipelines.LATENT_PIPELINES)
def test_float64_of_such_denoisers(name: str, tmp_path: Path) -> None:
    theirs, base = (pipelines.LATENT_PIPELINES[name]() for _ in range(2))
    theirs.load_lora_weights(pipelines.write_latent_lora(name, tmp_path))
    for pipe in (theirs, base):
        pipe.transformer.double()
    ours = adaptc.compile(base, tmp_path)
    given = pipelines.transformer_call(name, torch.float64) | {"return_dict": False}
    with torch.no_grad():
        got, wanted, plain = (p.transformer(**copy.deepcopy(given))[0] for p in (ours, theirs, base))
    for g, w, p in zip(got, wanted, plain, strict=True):
        assert g.dtype == torch.float64
        torch.testing.assert_close(g, w, rtol=0, atol=1e-9)
        assert (w - p).abs().max() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "ltx"])
def test_swaps_at_three_sizes_compile_nothing(name: str, tmp_path: Path) -> None:
    files = [pipelines.write_latent_lora(name, tmp_path / str(r), seed=r, r=r) for r in (2, 7)]
    theirs, ours = pipelines.LATENT_PIPELINES[name](), adaptc.compile(pipelines.LATENT_PIPELINES[name](), files[0])
    pipelines.latents(ours, name, 48, 80, 9)
    theirs.load_lora_weights(files[1])
    with assert_no_recompiles():
        ours.load_lora_weights(files[1], adapter_name="other")
        got = [pipelines.latents(ours, name, *size) for size in ((48, 80, 9), (64, 48, 5), (32, 112, 1))]
    close(got[1], pipelines.latents(theirs, name, 64, 48, 5))


@pytest.mark.long
def test_calls_that_no_program_follows(tmp_path: Path) -> None:
    z, qwen = (adaptc.compile(pipelines.LATENT_PIPELINES[n]()) for n in ("z_image", "qwen_image"))
    call = pipelines.transformer_call("z_image", torch.float32)
    wrong = {"several sizes": [call["x"][0][..., :4], *call["x"][1:]], "several images": [[x] for x in call["x"]]}
    for given in wrong.values():
        with pytest.raises(adaptc.ConfigError, match="one image for each row, all of one size"):
            z.transformer(**call | {"x": given})
    call = pipelines.transformer_call("qwen_image", torch.float32)
    with pytest.raises(adaptc.ConfigError, match="transformer needs img_shapes, and the call has none"):
        qwen.transformer(**{n: v for n, v in call.items() if n != "img_shapes"})
    with pytest.raises(adaptc.ConfigError, match="timestep has 2 dimensions, and the program of transformer takes 1"):
        qwen.transformer(**call | {"timestep": call["timestep"][:, None]})
    with pytest.raises(adaptc.CaptureError, match=r"takes lists and sizes.*adapt its pipeline"):
        adaptc.compile(pipelines.LATENT_PIPELINES["ltx"]().transformer, adaptc.LoraConfig(target_modules=["to_q"]))


@pytest.mark.long
def test_a_controlnet_gives_inputs_of_the_program(tmp_path: Path) -> None:
    file, base = write_lora("sd", tmp_path), pipeline("sd")
    torch.manual_seed(6)
    net = ControlNetModel.from_unet(base.unet, conditioning_channels=3, controlnet_conditioning_channel_order="rgb")
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter) / 20
    parts = {**base.components, "controlnet": net.eval(), "safety_checker": None}
    made = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    ours = adaptc.compile(made, file)
    made.load_lora_weights(file)
    control = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 0.5):
        options = {"image": control, "height": 32, "width": 48, "controlnet_conditioning_scale": scale}
        close(_call(ours, **options), _call(made, **options))
    far = {"image": control, "height": 32, "width": 48, "controlnet_conditioning_scale": 0.0}
    assert (_call(ours, **far) - _call(ours, **options)).abs().max() > 1e-3


@pytest.mark.long
def test_the_callers_pipeline_stays(tmp_path: Path) -> None:
    base = pipeline("sd")
    before, held = images(base, "sd"), dict(vars(base))
    state = {k: v.clone() for k, v in base.unet.state_dict().items()}
    ours = adaptc.compile(base, {"a": write_lora("sd", tmp_path / "a"), "b": write_lora("sd", tmp_path / "b", seed=3)})
    assert ours.get_active_adapters() == ["a", "b"]
    ours.fuse_lora()
    images(ours, "sd")
    assert vars(base).keys() == held.keys()
    assert all(vars(base)[k] is v for k, v in held.items())
    assert all(torch.equal(state[k], v) for k, v in base.unet.state_dict().items())
    assert torch.equal(images(base, "sd"), before)
    assert isinstance(ours, type(base))
    assert type(ours).__name__ == type(base).__name__
    assert ours.config == base.config
    assert ours.scheduler is not base.scheduler


@pytest.mark.long
def test_a_new_adapter_of_a_config(tmp_path: Path) -> None:
    base = pipeline("sd3")
    config = adaptc.LoraConfig(r=3, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    ours = adaptc.compile(base, config, adapter_name="new", generator=torch.Generator().manual_seed(1))
    assert ours.get_list_adapters() == {"transformer": ["new"]}
    made = images(ours, "sd3")
    assert (made - images(base, "sd3")).abs().max() > 1e-2
    ours.save_lora_weights(tmp_path, "new")
    base.load_lora_weights(tmp_path)
    close(made, images(base, "sd3"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_compilers_see_no_complex_numbers(name: str, tmp_path: Path) -> None:
    """Rotary positions are pairs of real numbers, among the inputs as well."""
    pipe = adaptc.compile(pipelines.LATENT_PIPELINES[name](), pipelines.write_latent_lora(name, tmp_path))
    program = plain_program(pipe.programs["transformer"])
    values = [n.meta.get("val") for n in program.graph.nodes]
    assert not any(isinstance(v, Tensor) and v.is_complex() for v in values)
    options = ("attention_kwargs", "joint_attention_kwargs", "return_dict")
    given = {
        n: v for n, v in pipelines.transformer_call(name, torch.float32).items() if n not in options and v is not None
    }
    inputs, _ = tensor_calls(pipelines.LATENT_PIPELINES[name]().transformer).encode(given)
    wanted = pipe.programs["transformer"].module()(**inputs).sample
    torch.testing.assert_close(program.module()(**inputs).sample, wanted, rtol=1e-4, atol=1e-5)
