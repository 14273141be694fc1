"""A grid of pictures by one diffusion pipeline: its base, two LoRAs, both at once, each picture with its own adapter.

`make demo` runs it, and it writes a PNG. A small denoiser learns to draw discs first. Then one LoRA learns red discs,
and another one striped discs. One call draws four pictures from the same noise: by the base, by each adapter, and by
both. The checks compare each picture with the one that the pipeline draws alone, and with diffusers' own.

All is tiny and starts from random weights, so that this takes about a minute on a CPU, without a network. A picture of
16 x 16 pixels is its own latent here. Your pipeline comes from `from_pretrained`. The exit status is 1 when a check
fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from train_diffusion import tiny_pipeline

import adaptc

SIZE, SCALE, ROWS = 16, 6, 4
PROMPT = "a disc"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out"]
COLUMNS: list[Any] = [None, "red", "striped", {"red": 1.0, "striped": 1.0}]


def discs(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return where the discs of some pictures lie, bool (count, 1, size, size), and their pictures, grey on black."""
    radius, places = SIZE * 0.28, SIZE * (0.35 + 0.3 * torch.rand(count, 2, 1, 1, generator=source))
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    inside = ((rows - places[:, 0]) ** 2 + (columns - places[:, 1]) ** 2 < radius**2)[:, None]
    return inside, torch.where(inside, 0.5, -1.0).expand(-1, 3, -1, -1)


def red(inside: Tensor, picture: Tensor) -> Tensor:
    """Return the pictures with red discs."""
    return torch.where(inside, torch.tensor([0.9, -0.8, -0.8])[:, None, None], picture)


def striped(inside: Tensor, picture: Tensor) -> Tensor:
    """Return the pictures with stripes across the discs."""
    return torch.where(inside & (torch.arange(SIZE)[:, None] % 4 < 2), -1.0, picture)


def make_pipeline() -> Any:
    """Return a pipeline whose denoiser works on pictures, with random weights."""
    parts = tiny_pipeline()
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(24, 48),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="sample")
    own = {**parts.components, "unet": unet.eval(), "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**own, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(pipe: Any, unet: Any, steps: int, rate: float, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Train what ``unet`` may train to draw discs that ``change`` has changed."""
    source = torch.Generator().manual_seed(1)
    ids = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(input_ids=ids).last_hidden_state
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        inside, grey = discs(16, source)
        clean = change(inside, grey)
        noise = torch.randn(clean.shape, generator=source)
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(clean),), generator=source)
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        guess = unet(sample=noisy, timestep=times, encoder_hidden_states=states.expand(len(clean), -1, -1)).sample
        optimizer.zero_grad()
        mse_loss(guess, clean).backward()
        optimizer.step()
        schedule.step()


def draw(pipe: Any, rows: int, **options: Any) -> Tensor:
    """Return a picture for each row, all from the noise of one seed: (rows, 3, size, size) in -1 to 1."""
    noise = torch.randn(ROWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    noise = noise.repeat_interleave(rows // ROWS, 0)
    options |= {"num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe([PROMPT] * rows, latents=noise, height=8 * SIZE, width=8 * SIZE, **options).images


def save_grid(pictures: Tensor, path: Path) -> None:
    """Write a PNG of pictures (lines, columns, 3, size, size)."""
    lines, columns = pictures.shape[:2]
    rounded = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grid = rounded.permute(0, 3, 1, 4, 2).reshape(lines * SIZE, columns * SIZE, 3)
    image = Image.fromarray(grid.numpy())
    image.resize((SCALE * image.width, SCALE * image.height), Image.Resampling.NEAREST).save(path)


def main(folder: Path, base_steps: int = 220, steps: int = 80) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()  # it says of a file without a text encoder's adapter that it has none
    base, failed = make_pipeline(), list[str]()

    def check(what: str, is_right: bool) -> None:
        print(f"{'ok  ' if is_right else 'FAIL'} {what}")
        failed.extend([] if is_right else [what])

    train(base, base.unet.train(), base_steps, 6e-3, lambda _, picture: picture)
    base.unet.eval().requires_grad_(False)
    pipe = adaptc.compile(base)
    for name, change in (("red", red), ("striped", striped)):
        program = adaptc.compile(base.unet, adaptc.LoraConfig(r=8, lora_alpha=8, target_modules=LAYERS), training=True)
        train(base, program.module(), steps, 8e-3, change)
        pipe.load_lora_weights({"unet": program}, adapter_name=name)  # nothing is compiled

    apart = draw(pipe, ROWS * len(COLUMNS), adapters=COLUMNS * ROWS).unflatten(0, (ROWS, len(COLUMNS)))
    folder.mkdir(parents=True, exist_ok=True)
    save_grid(apart, folder / "pictures.png")
    print(f"wrote {folder / 'pictures.png'}: in each line the base, red, striped, and both")

    for column, chosen in enumerate(COLUMNS[1:], 1):
        weights = chosen if isinstance(chosen, dict) else {chosen: 1.0}
        pipe.set_adapters(list(weights), list(weights.values()))
        same = torch.allclose(draw(pipe, ROWS), apart[:, column], atol=1e-4)
        check(f"{' and '.join(weights)}: the pictures of a batch are those drawn alone", same)
    for column, name in ((1, "red"), (2, "striped")):
        pipe.save_lora_weights(folder / name, name)
        base.load_lora_weights(folder / name)
        check(
            f"{name}: diffusers draws it from the file", torch.allclose(draw(base, ROWS), apart[:, column], atol=1e-4)
        )
        base.unload_lora_weights()
    plain, coloured, stripes, both = apart.mean((0, 3, 4))  # the mean red, green and blue of each column
    check("red discs have less green", bool(coloured[0] > coloured[1] + 0.1 and coloured[1] < plain[1]))
    check("striped discs are darker", bool(stripes.mean() < plain.mean()))
    check("both: less green than red, and darker", bool(both[0] > both[1] + 0.05 and both[0] < coloured[0]))
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as made_in:
        sys.exit(main(Path(made_in)))
