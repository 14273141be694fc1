"""Tiny pipelines of diffusers, built as its own tests build them, with adapters and what they are called with."""

from __future__ import annotations

import copy
import inspect
import string
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import peft
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import adaptc

#: layers of text encoders that adapters of tests have
TEXT_LAYERS = ["q_proj", "v_proj", "out_proj", "fc1"]
_WIDTH = 32


@lru_cache
def tokenizer() -> CLIPTokenizer:
    """Spells a text, letter by letter."""
    letters = string.ascii_lowercase + string.digits + ",.!"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    made = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    made.model_max_length = 21
    return made


def _text(kind: type, width: int = _WIDTH, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        vocab_size=100,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        max_position_embeddings=21,
        projection_dim=_WIDTH,
    )
    return kind(config).eval()


def _vae(channels: int = 4) -> nn.Module:
    torch.manual_seed(1)
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return AutoencoderKL(
        block_out_channels=[4, 4, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        latent_channels=channels,
        shift_factor=0.0,
        scaling_factor=1.5,
    ).eval()


def _unet(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": _WIDTH, "attention_head_dim": 4} | options,
    ).eval()


def sd() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text(CLIPTextModel),
        tokenizer=tokenizer(),
        unet=_unet(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> DiffusionPipeline:
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 6 * 8 + _WIDTH,
        "cross_attention_dim": 2 * _WIDTH,
        "use_linear_projection": True,
    }
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text(CLIPTextModel),
        text_encoder_2=_text(CLIPTextModelWithProjection, seed=5),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=_unet(**sizes),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, timestep_spacing="leading"),
    )


def sd3() -> DiffusionPipeline:
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=24,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_text(CLIPTextModelWithProjection, 16),
        tokenizer=tokenizer(),
        text_encoder_2=_text(CLIPTextModelWithProjection, 16, seed=5),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> DiffusionPipeline:
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_text(CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def flux2() -> DiffusionPipeline:
    """Without a text encoder, which is a large language model; calls give its embeddings."""
    torch.manual_seed(4)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=[4, 4, 4, 4],
    ).eval()
    rest = {"tokenizer": None, "text_encoder": None, "vae": None}
    return Flux2Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


def wan() -> DiffusionPipeline:
    """Without a text encoder, as :func:`flux2`."""
    torch.manual_seed(4)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=_WIDTH,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    rest = {"tokenizer": None, "text_encoder": None, "vae": None}
    return WanPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **rest)


def qwen_image() -> DiffusionPipeline:
    """Without a text encoder, as :func:`flux2`."""
    torch.manual_seed(4)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    rest = {"tokenizer": None, "text_encoder": None, "vae": None}
    return QwenImagePipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


def z_image() -> DiffusionPipeline:
    """Without a text encoder, as :func:`flux2`."""
    torch.manual_seed(4)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()
    rest = {"tokenizer": None, "text_encoder": None, "vae": None}
    return ZImagePipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


def ltx() -> DiffusionPipeline:
    """Without a text encoder, as :func:`flux2`."""
    torch.manual_seed(4)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=10,
        cross_attention_dim=30,
        num_layers=2,
        caption_channels=_WIDTH,
    ).eval()
    rest = {"tokenizer": None, "text_encoder": None, "vae": None}
    return LTXPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


#: pipelines that give latents alone
LATENT_PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "flux2": flux2,
    "wan": wan,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "ltx": ltx,
}
_VIDEOS = ("wan", "ltx")


def latents(pipe: Any, name: str, height: int, width: int, frames: int, rows: int = 1, **options: Any) -> Tensor:
    """The latents of a call of one of these pipelines, with guidance."""
    text = text_embeds(rows, 6 + frames)
    given: dict[str, Any] = {"prompt_embeds": text, "height": height, "width": width}
    if name != "flux2":
        given["negative_prompt_embeds"] = text / 2
    if name in _VIDEOS:
        given |= {"num_frames": frames, "guidance_scale": 3.0}
    mask = torch.arange(text.shape[1]) < torch.tensor([[5]] + [[6 + frames]] * (rows - 1))
    if name == "qwen_image":
        given |= {"prompt_embeds_mask": mask, "true_cfg_scale": 3.0}
    elif name == "z_image":
        given |= {"prompt_embeds": [t[m] for t, m in zip(text, mask, strict=True)], "guidance_scale": 3.0}
        given["negative_prompt_embeds"] = list(torch.cat([text] * 6, 1)[:, :35] / 2)
    elif name == "ltx":
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones_like(mask)}
        given |= {"height": 4 * height, "width": 4 * width}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    made = pipe(num_inference_steps=2, output_type="latent", generator=generator, **given, **options)
    return made.frames if name in _VIDEOS else made.images


PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
#: layers of denoisers that adapters of tests have
LAYERS = {
    "sd": ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "time_emb_proj", "ff.net.2"],
    "sdxl": ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.0.proj"],
    "sd3": ["to_q", "to_k", "add_q_proj", "to_out.0", "proj_out", "ff.net.2"],
    "flux": ["to_q", "to_k", "to_out.0", "proj_out", "norm1.linear"],
}
DENOISER = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
TEXT_ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
}


@lru_cache
def _built(name: str) -> DiffusionPipeline:
    made = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)
    return made


def pipeline(name: str) -> DiffusionPipeline:
    """A fresh one, with modules of its own: diffusers' loaders change the modules that they load into."""
    found = _built(name)
    made = copy.copy(found)
    vars(made).update(
        {n: copy.deepcopy(m) for n, m in vars(found).items() if isinstance(m, nn.Module) or n == "scheduler"}
    )
    return made


def call_options(name: str, **changes: Any) -> dict[str, Any]:
    """Options of a call that gives a tensor, with classifier-free guidance where the pipeline has it."""
    made: dict[str, Any] = {"prompt": "a cat, red", "num_inference_steps": 2, "height": 24, "width": 40}
    made |= {"output_type": "pt", "guidance_scale": 4.0}
    if name == "flux":
        made |= {"height": 48, "width": 80, "prompt_embeds": text_embeds(1)} | pooled(1)
        del made["prompt"]
    return made | changes


def text_embeds(rows: int, length: int = 7) -> Tensor:
    return torch.randn(rows, length, _WIDTH, generator=torch.Generator().manual_seed(11))


def pooled(rows: int) -> dict[str, Tensor]:
    return {"pooled_prompt_embeds": torch.randn(rows, _WIDTH, generator=torch.Generator().manual_seed(12))}


def images(pipe: Any, name: str, **changes: Any) -> Tensor:
    options = call_options(name, **changes)
    return pipe(generator=torch.Generator().manual_seed(7), **options).images


def lora_config(name: str, component: str, **options: Any) -> peft.LoraConfig:
    layers = TEXT_LAYERS if component.startswith("text") else LAYERS[name]
    return peft.LoraConfig(init_lora_weights=False, target_modules=layers, **{"r": 3, "lora_alpha": 5} | options)


def write_lora(name: str, path: Any, seed: int = 8, text: bool = True, **options: Any) -> Any:
    """Write a LoRA file by diffusers' own ``save_lora_weights``, with adapters that peft made, and return its path."""
    pipe = pipeline(name)
    layers: dict[str, Any] = {}
    for component in [DENOISER[name], *(TEXT_ENCODERS[name] if text else [])]:
        module = getattr(pipe, component)
        torch.manual_seed(seed)
        config = lora_config(name, component, **options)
        peft.inject_adapter_in_model(config, module, "default")
        layers[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(module, adapter_name="default")
        module.peft_config = {"default": config}
        layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
    for tensors in [v for k, v in layers.items() if k.endswith("_layers")]:
        for key, tensor in tensors.items():
            tensors[key] = (tensor * 0.5).detach().clone()
    type(pipe).save_lora_weights(path, **layers)
    return path / "pytorch_lora_weights.safetensors"


def write_latent_lora(name: str, path: Any, seed: int = 9, **options: Any) -> Any:
    """As :func:`write_lora`, for one of :data:`LATENT_PIPELINES`."""
    return write_denoiser_lora(LATENT_PIPELINES[name](), path, seed, **options)


def write_denoiser_lora(made: Any, path: Any, seed: int = 9, **options: Any) -> Any:
    """Write a LoRA for the denoiser of ``made``, which has it afterwards, by diffusers, and return ``path``."""
    part = "unet" if hasattr(made, "unet") else "transformer"
    layers = ["to_q", "to_k", "to_out.0", "to_qkv_mlp_proj", "ffn.net.2", "img_mlp.net.2", "txt_mlp.net.2", "w2"]
    torch.manual_seed(seed)
    given = {"r": 3, "lora_alpha": 5, "target_modules": [*layers, "add_k_proj", "add_v_proj", "proj_out"]} | options
    config = peft.LoraConfig(init_lora_weights=False, **given)
    peft.inject_adapter_in_model(config, getattr(made, part), "default")
    tensors = peft.get_peft_model_state_dict(getattr(made, part), adapter_name="default")
    type(made).save_lora_weights(path, **{f"{part}_lora_layers": tensors})
    return path


def transformer_call(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What one of :data:`LATENT_PIPELINES` calls its transformer with, in ``dtype``."""
    pipe = LATENT_PIPELINES[name]()
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        calls.append(bound.arguments)

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    latents(pipe, name, 48, 80, 9, rows=2)

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        is_float = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(dtype) if is_float else value

    return {n: convert(v) for n, v in calls[0].items()}


@lru_cache
def _compiled(name: str) -> Any:
    return adaptc.compile(_built(name))


def adapted(name: str) -> Any:
    """An adapted pipeline without adapters; its captures take seconds, and tests share them."""
    made = _compiled(name)
    made.unfuse_lora()
    made.unload_lora_weights()
    return made


def denoiser_inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of a denoiser, as its pipeline gives them."""
    source = torch.Generator().manual_seed(13)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=source, dtype=torch.float64).to(dtype)

    if name == "sd":
        return {
            "sample": random(3, 4, 5, 7),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": random(3, 5, _WIDTH),
        }
    assert name == "flux"
    made = {"hidden_states": random(3, 15, 16), "encoder_hidden_states": random(3, 5, _WIDTH)}
    made |= {"pooled_projections": random(3, _WIDTH), "timestep": torch.tensor([0.25, 0.5, 0.75], dtype=dtype)}
    return made | {"img_ids": random(15, 3).round(), "txt_ids": torch.zeros(5, 3, dtype=dtype)}
