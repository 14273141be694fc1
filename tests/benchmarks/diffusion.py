"""Pipelines of diffusers next to diffusers' own adapters, in one interleaved run: steps, swaps, a batch, packages.

A UNet of Stable Diffusion 1.5's shape at a quarter of its width, which has a quarter of its heads and heads of the same
sizes, and a DiT of FLUX's shape with four blocks. Rank 16 on all attention layers. A step is one call of the denoiser,
with two rows as guidance has them.

``python -m tests.benchmarks.diffusion [rounds]`` prints these rows, with the load of the machine.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import Tensor

import adaptc
from tests.benchmarks.harness import Row, interleave, machine, markdown

RANK, TARGETS = 16, ["to_q", "to_k", "to_v", "to_out.0"]
#: adapters that are loaded beside the one that acts
INACTIVE = 19
#: images of one batch, and steps of the denoiser for each
IMAGES, STEPS = 4, 2


def unet() -> DiffusionPipeline:
    """A pipeline whose UNet has Stable Diffusion 1.5's blocks at a quarter of their width, and nothing else."""
    denoiser = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320, 320),
        norm_num_groups=16,
        attention_head_dim=2,  # the number of heads, whatever the name says
        cross_attention_dim=192,
    )
    rest: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(
        unet=denoiser.eval(), scheduler=DDIMScheduler(), requires_safety_checker=False, **rest
    )


def dit() -> DiffusionPipeline:
    """A pipeline whose transformer has FLUX's blocks: two double and two single ones, 512 wide, and nothing else."""
    denoiser = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 28, 28),
    )
    rest: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=denoiser.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


def _unet_inputs() -> dict[str, Any]:
    text = {"encoder_hidden_states": torch.randn(2, 77, 192)}
    return {"sample": torch.randn(2, 4, 32, 32), "timestep": torch.full((2,), 500.0)} | text


def _dit_inputs() -> dict[str, Any]:
    text = {"encoder_hidden_states": torch.randn(2, 64, 256), "pooled_projections": torch.randn(2, 128)}
    positions = {"img_ids": torch.randn(256, 3).round(), "txt_ids": torch.zeros(64, 3)}
    return {"hidden_states": torch.randn(2, 256, 64), "timestep": torch.tensor([0.5, 0.5])} | text | positions


def _unet_texts(rows: int) -> dict[str, Any]:
    texts = ("prompt_embeds", "negative_prompt_embeds")
    return {n: torch.randn(rows, 77, 192) for n in texts} | {"latents": torch.randn(rows, 4, 32, 32)}


def _dit_texts(rows: int) -> dict[str, Any]:
    texts = {"prompt_embeds": torch.randn(rows, 64, 256), "pooled_prompt_embeds": torch.randn(rows, 128)}
    return texts | {"latents": torch.randn(rows, 256, 64), "height": 256, "width": 256}


class Family(NamedTuple):
    """A pipeline to be made, the name of its denoiser, inputs of a step, and inputs of the pipeline for some rows."""

    make: Callable[[], Any]
    part: str
    inputs: Callable[[], dict[str, Any]]
    texts: Callable[[int], dict[str, Any]]


FAMILIES = {
    "UNet, a quarter of SD 1.5": Family(unet, "unet", _unet_inputs, _unet_texts),
    "DiT, FLUX's blocks": Family(dit, "transformer", _dit_inputs, _dit_texts),
}


def run(family: str, folder: Path, rounds: int) -> list[Row]:
    """Return the rows of one family."""
    make, part, make_inputs, make_texts = FAMILIES[family]
    torch.manual_seed(0)
    base, inputs = make(), make_inputs()
    base.set_progress_bar_config(disable=True)
    files = [_write(base, part, folder / str(i), i) for i in range(INACTIVE + 1)]
    theirs, ours = (_copy(base, part) for _ in range(2))
    theirs.load_lora_weights(files[0], adapter_name="a0")
    ours = adaptc.compile(ours, files[0], adapter_name="a0")
    fused = adaptc.compile(_copy(base, part), files[0])
    fused.fuse_lora()

    def step(pipe: Any) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            return getattr(pipe, part)(**inputs, return_dict=False)[0]

        return call

    steps = {"the base": step(base), "adaptc": step(ours), "adaptc, fused": step(fused), "diffusers": step(theirs)}
    torch.testing.assert_close(steps["adaptc"](), steps["diffusers"](), rtol=1e-3, atol=1e-3)
    rows = interleave(f"{family}: a step, one adapter", steps, "the base", rounds)
    swaps = {
        "diffusers, delete and load_lora_weights": lambda: _exchange(theirs, files),
        "diffusers, load_lora_weights(hotswap=True)": lambda: _load(theirs, files, hotswap=True),
        "adaptc, load_lora_weights(hotswap=True)": lambda: _load(ours, files, hotswap=True),
    }
    rows += interleave(f"{family}: another file", swaps, "diffusers, load_lora_weights(hotswap=True)", rounds, warmup=1)
    for i, file in enumerate(files[1:], 1):
        for pipe in (theirs, ours):
            pipe.load_lora_weights(file, adapter_name=f"a{i}")
    weights = iter(range(1, 10**6))
    sets = {
        "diffusers": lambda: theirs.set_adapters("a0", 1 / next(weights)),
        "adaptc": lambda: ours.set_adapters("a0", 1 / next(weights)),
    }
    rows += interleave(f"{family}: another weight, {INACTIVE + 1} loaded", sets, "diffusers", rounds)
    others = {name: _choose_in_turn(pipe) for name, pipe in (("diffusers", theirs), ("adaptc", ours))}
    others["diffusers, the tensors of another file, hotswap=True"] = _load_in_turn(theirs, files)
    rows += interleave(f"{family}: another of {INACTIVE + 1} adapters", others, "diffusers", rounds)
    for pipe in (theirs, ours):
        pipe.set_adapters("a0")
    rows += interleave(
        f"{family}: a step, {INACTIVE + 1} loaded, one acts",
        {name: steps[name] for name in ("the base", "adaptc", "diffusers")},
        "the base",
        rounds,
    )
    texts = make_texts(IMAGES) | {"num_inference_steps": STEPS, "output_type": "latent"}
    rows += interleave(
        f"{family}: {IMAGES} images on {IMAGES} adapters, {STEPS} steps",
        {
            "one after the other": lambda: _alone(ours, texts),
            "in one batch": lambda: _together(ours, texts),
            "the base, one after the other": lambda: _rows(base, texts),
            "the base, in one batch": lambda: base(**texts).images,
        },
        "one after the other",
        rounds,
    )
    torch.testing.assert_close(_together(ours, texts), _alone(ours, texts), rtol=1e-3, atol=1e-3)
    return rows + packages(family, base, part, inputs, files, folder, rounds)


def packages(
    family: str, base: Any, part: str, inputs: dict[str, Any], files: list[Path], folder: Path, rounds: int
) -> list[Row]:
    """Return the rows of the denoiser's package with an adapter swapped in, next to the package of the base."""
    program = adaptc.compile(_copy(base, part), files[0]).programs[part]
    paths = [folder / f"{name}.pt2" for name in ("adapted", "base")]
    bare_program = adaptc.unload(program)
    # A pipeline's program has sites at all layers. The package is for adapters of the attention layers alone.
    sites = adaptc.compile(bare_program, adaptc.LoraConfig(r=RANK, target_modules=TARGETS))
    adaptc.package(sites, paths[0], max_rank=RANK)
    adaptc.package(bare_program, paths[1])
    adapted = adaptc.compile(_copy(base, part), files[0], packages={part: paths[0]})
    adapted.load_lora_weights(files[1], adapter_name="other")
    bare = adaptc.load_package(paths[1])
    calls: dict[str, Callable[[], Any]] = {
        "the base's package": lambda: bare(**inputs),
        "the package with a LoRA swapped in": lambda: getattr(adapted, part)(**inputs, return_dict=False)[0],
    }
    with torch.no_grad():
        return interleave(f"{family}: a step, AOTInductor", calls, "the base's package", rounds)


def _choose_in_turn(pipe: Any) -> Callable[[], None]:
    names = cycle(f"a{i}" for i in range(INACTIVE + 1))
    return lambda: pipe.set_adapters(next(names))


def _load_in_turn(pipe: Any, files: list[Path]) -> Callable[[], None]:
    tensors = cycle([load_file(f / "pytorch_lora_weights.safetensors") for f in files])
    return lambda: pipe.load_lora_weights(dict(next(tensors)), adapter_name="a0", hotswap=True)


def _together(pipe: Any, texts: dict[str, Any]) -> Tensor:
    return pipe(**texts, adapters=[f"a{i}" for i in range(IMAGES)]).images


def _alone(pipe: Any, texts: dict[str, Any]) -> Tensor:
    return _rows(pipe, texts, lambda i: pipe.set_adapters(f"a{i}"))


def _rows(pipe: Any, texts: dict[str, Any], before: Callable[[int], object] = lambda _: None) -> Tensor:
    made: list[Tensor] = []
    for i in range(IMAGES):
        before(i)
        one = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in texts.items()}
        made.append(pipe(**one).images)
    return torch.cat(made)


def _copy(pipe: Any, part: str) -> Any:
    made = copy.copy(pipe)
    vars(made)[part] = copy.deepcopy(getattr(pipe, part))
    return made


def _write(pipe: Any, part: str, path: Path, seed: int) -> Path:
    module = copy.deepcopy(getattr(pipe, part))
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    peft.inject_adapter_in_model(config, module, "default")
    tensors = {k: t.detach() / 10 for k, t in peft.get_peft_model_state_dict(module).items()}
    type(pipe).save_lora_weights(path, **{f"{part}_lora_layers": tensors})
    return path


def _load(pipe: Any, files: list[Path], **options: Any) -> None:
    files.append(files.pop(0))  # another one each time
    pipe.load_lora_weights(files[0], adapter_name="a0", **options)


def _exchange(pipe: Any, files: list[Path]) -> None:
    pipe.delete_adapters("a0")
    _load(pipe, files)


def main() -> None:
    warnings.filterwarnings("ignore")  # of other libraries, about versions and devices
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(f"Measured on {machine()}, {rounds} rounds, load {os.getloadavg()[0]:.1f}.\n")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            print(markdown(run(family, Path(folder), rounds)), "\n", flush=True)


if __name__ == "__main__":
    main()
