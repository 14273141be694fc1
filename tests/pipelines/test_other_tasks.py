"""Pipelines of other tasks than text to image: their denoisers as programs draw what diffusers draws with the LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import adaptc
from tests.support import pipelines

HEIGHT, WIDTH = 32, 48
#: a pipeline, and what it is called with
Task = tuple[Any, dict[str, Any]]


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def given_image(height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    return {"image": draw(1, 3, height, width), "height": height, "width": width}


def given_mask() -> dict[str, Any]:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., :20] = 1
    return {"mask_image": mask}


def text(tokens: int = 7) -> dict[str, Any]:
    drawn = draw(1, tokens, 32) - 0.5
    return {"prompt_embeds": drawn, "negative_prompt_embeds": drawn / 2}


def with_other_denoiser(pipe: Any, **config: Any) -> Any:
    """The pipeline with a denoiser of another config."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    old = getattr(pipe, name)
    torch.manual_seed(4)
    known = {k: v for k, v in old.config.items() if not k.startswith("_")}
    setattr(pipe, name, type(old)(**{**known, **config}).eval())
    return pipe


def flux(name: str, call: Mapping[str, Any], **config: Any) -> Task:
    pipe = with_other_denoiser(pipelines.flux(), **config)
    kind = getattr(diffusers, name)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    return kind(**parts), {"prompt_embeds": text()["prompt_embeds"], "pooled_prompt_embeds": draw(1, 32), **call}


def stable_diffusion(name: str, call: Mapping[str, Any], channels: int = 4) -> Task:
    pipe = with_other_denoiser(pipelines.sd(), in_channels=channels)
    kind = getattr(diffusers, name)
    return kind(**pipe.components, requires_safety_checker=False), {"prompt": "a cat", **call}


def wan_parts(**config: Any) -> dict[str, Any]:
    pipe = with_other_denoiser(pipelines.wan(), out_channels=16, **config)
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, **sizes).eval()
    parts = {k: getattr(pipe, k) for k in ("transformer", "scheduler")}
    return {
        **parts,
        "vae": vae,
        "tokenizer": None,
        "text_encoder": None,
        "image_encoder": None,
        "image_processor": None,
    }


def video(tokens: int = 7) -> dict[str, Any]:
    return {**given_image(), **text(tokens), "num_frames": 9, "guidance_scale": 3.0}


def wan() -> Task:
    return diffusers.WanImageToVideoPipeline(**wan_parts(in_channels=36)), video()


def wan_with_times_of_tokens() -> Task:
    return diffusers.WanImageToVideoPipeline(**wan_parts(in_channels=16), expand_timesteps=True), video()


def wan_with_encoded_images() -> Task:
    parts = wan_parts(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    torch.manual_seed(6)
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=2)).eval()
    parts["image_processor"] = CLIPImageProcessor(crop_size=32, size=32)
    return diffusers.WanImageToVideoPipeline(**parts), video(512)


def ltx() -> Task:
    torch.manual_seed(5)
    four: dict[str, Any] = dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), (8,) * 4)
    five: dict[str, Any] = dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (1,) * 5)
    scaling = dict.fromkeys(("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True, True, False, False))
    rest = {"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4}
    vae: Any = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, patch_size=1, patch_size_t=1, **four, **five, **scaling, **rest
    ).eval()
    vae.use_framewise_encoding = False
    pipe = diffusers.LTXImageToVideoPipeline(**{**pipelines.ltx().components, "vae": vae})
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 7))
    return pipe, {**given_image(64, 96), **text(), **masks, "num_frames": 9, "guidance_scale": 3.0}


def qwen_parts() -> tuple[dict[str, Any], dict[str, Any]]:
    pipe = pipelines.qwen_image()
    torch.manual_seed(6)
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    sizes: dict[str, Any] = {"dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    vae = diffusers.AutoencoderKLQwenImage(base_dim=24, z_dim=4, **sizes, **statistics).eval()
    parts = {"transformer": pipe.transformer, "scheduler": pipe.scheduler, "vae": vae}
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(1, 7, dtype=torch.int64))
    return {**parts, "tokenizer": None, "text_encoder": None}, {**text(), **masks, "true_cfg_scale": 3.0}


def qwen_edit() -> Task:
    parts, call = qwen_parts()
    picture = Image.fromarray((draw(HEIGHT, WIDTH, 3) * 255).to(torch.uint8).numpy())
    sizes = {"height": HEIGHT, "width": WIDTH}
    return diffusers.QwenImageEditPipeline(**parts, processor=None), {**call, "image": picture, **sizes}


def qwen_image_to_image() -> Task:
    parts, call = qwen_parts()
    return diffusers.QwenImageImg2ImgPipeline(**parts), {**call, **given_image(), "strength": 0.8}


def z_image_to_image() -> Task:
    parts = {**pipelines.z_image().components, "vae": pipelines.sd().vae}  # type: ignore[attr-defined]
    texts = {n: [t[0]] for n, t in text().items()}
    call = {**given_image(), **texts, "strength": 0.8, "guidance_scale": 3.0}
    return diffusers.ZImageImg2ImgPipeline(**parts), call


_SOME = {"strength": 0.8}
_EXACTLY = {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
_IMAGE = {"image": draw(1, 3, HEIGHT, WIDTH)}
TASKS: dict[str, Callable[[], Task]] = {
    "FLUX Kontext": lambda: flux("FluxKontextPipeline", {**given_image(), **_EXACTLY}),
    "FLUX Fill": lambda: flux(
        "FluxFillPipeline", {**given_image(), **given_mask()}, in_channels=16 + 16 + 256, out_channels=16
    ),
    "FLUX, an image": lambda: flux("FluxImg2ImgPipeline", {**given_image(), **_SOME}),
    "FLUX, a part": lambda: flux("FluxInpaintPipeline", {**given_image(), **given_mask(), **_SOME}),
    "FLUX Control": lambda: flux(
        "FluxControlPipeline",
        {"control_image": _IMAGE["image"], "height": HEIGHT, "width": WIDTH},
        in_channels=32,
        out_channels=16,
    ),
    "SD, instructions": lambda: stable_diffusion("StableDiffusionInstructPix2PixPipeline", _IMAGE, 8),
    "SD, a part": lambda: stable_diffusion("StableDiffusionInpaintPipeline", {**given_image(), **given_mask()}, 9),
    "SD 3, an image": lambda: (
        diffusers.StableDiffusion3Img2ImgPipeline(**pipelines.sd3().components),
        {"prompt": "a cat", **given_image(), **_SOME},
    ),
    "SDXL, an image": lambda: (
        diffusers.StableDiffusionXLImg2ImgPipeline(**pipelines.sdxl().components),
        {"prompt": "a cat", **_IMAGE, **_SOME},
    ),
    "LTX, a video": ltx,
    "Wan, a video": wan,
    "Wan, a video, times of tokens": wan_with_times_of_tokens,
    "Wan, a video, encoded images": wan_with_encoded_images,
    "Qwen-Image Edit": qwen_edit,
    "Qwen-Image, an image": qwen_image_to_image,
    "Z-Image, an image": z_image_to_image,
}


def result(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False}
    return pipe(generator=torch.Generator().manual_seed(3), **options, **call)[0]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's edits scale the given picture to a million pixels."""
    scale = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: scale(64 * 64, ratio))


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_pipelines_of_other_tasks(name: str, tmp_path: Path) -> None:
    (theirs, call), (base, _) = TASKS[name](), TASKS[name]()
    plain = result(theirs, call)
    file = pipelines.write_denoiser_lora(TASKS[name]()[0], tmp_path)
    theirs.load_lora_weights(file)
    wanted = result(theirs, call)
    assert (wanted - plain).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(result(adaptc.compile(base, file), call), wanted, rtol=0, atol=1e-4)


@pytest.mark.long
def test_keys_of_images_are_kept_where_diffusers_overwrites_them(tmp_path: Path) -> None:
    (base, call), (merged, _), (made, _) = (wan_with_encoded_images() for _ in range(3))
    layers = {"target_modules": ["to_k", "add_k_proj"]}
    path = pipelines.write_denoiser_lora(made, tmp_path, **layers)
    tensors = load_file(path / "pytorch_lora_weights.safetensors")
    kept = 0
    for name, up in tensors.items():
        if name.endswith("lora_B.weight"):
            layer = merged.transformer.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_B.weight"))
            layer.weight.data += up @ tensors[name.replace("lora_B", "lora_A")]
            kept += "add_k_proj" in name
    assert kept == 2
    plain, wanted = result(base, call), result(merged, call)
    assert (wanted - plain).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(result(adaptc.compile(base, path), call), wanted, rtol=0, atol=1e-4)


def test_a_program_without_times_of_tokens_refuses_them(tmp_path: Path) -> None:
    pipe, call = wan_with_times_of_tokens()
    adapted = adaptc.compile(diffusers.WanPipeline(**{**pipelines.wan().components, "transformer": pipe.transformer}))
    pipe.transformer = adapted.transformer
    with pytest.raises(adaptc.ConfigError, match=r"timestep has 4 dimensions, and the program of transformer takes 1"):
        result(pipe, call)
