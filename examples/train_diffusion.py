"""A LoRA of a diffusion pipeline, trained as DreamBooth does: a few pictures of a subject, and a prompt that names it.

The denoiser and the text encoder learn together, from the mean squared error of the noise that was added. Options
weight that error by the signal-to-noise ratio (min-SNR, arXiv 2303.09556), and set the decay of the average of the
adapter's weights. The average is what is saved, in diffusers' format and in kohya's. diffusers draws the same picture
with it. `make demo-all` runs it.

The pipeline is tiny and has random weights, so that this runs on a CPU in a minute, without a network. Yours comes from
`from_pretrained`. The exit status is 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import string
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import adaptc

PROMPT = "a photo of sks disc"
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def tiny_pipeline() -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion with random weights, whose tokenizer spells."""
    torch.manual_seed(0)
    characters = string.ascii_lowercase
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    tokenizer.model_max_length = 20
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 20}
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **sizes, **ids)).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int, size: int = 16) -> Tensor:
    """Return pictures (count, 3, size, size) in -1 to 1 of the subject: a striped disc that lies somewhere."""
    source = torch.Generator().manual_seed(1)
    places = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=source))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = ((rows - places[:, 0]) ** 2 + (columns - places[:, 1]) ** 2) < (size / 4) ** 2
    stripes = torch.where(rows % 4 < 2, 1.0, -0.5) * inside + torch.where(inside, 0.0, -1.0)
    return torch.stack([stripes, -stripes, stripes / 2], 1)


def snr_weights(scheduler: Any, times: Tensor, gamma: float | None) -> Tensor:
    """Return the weight of each row's error: min(SNR, gamma) / SNR for a model of noise, and 1 without ``gamma``."""
    if gamma is None:
        return torch.ones_like(times, dtype=torch.float32)
    signal = scheduler.alphas_cumprod[times]
    ratio = signal / (1 - signal)
    return ratio.clamp(max=gamma) / ratio


def noise_loss(
    unet: Any,
    text: Any,
    scheduler: Any,
    ids: Tensor,
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    gamma: float | None,
) -> Tensor:
    """Return the weighted error of the predicted noise. ``unet`` and ``text`` are modules that train."""
    noisy = scheduler.add_noise(latents, noise, times)
    states = text(input_ids=ids).last_hidden_state
    guess = unet(sample=noisy, timestep=times, encoder_hidden_states=states).sample
    errors = mse_loss(guess, noise, reduction="none").mean((1, 2, 3))
    return (errors * snr_weights(scheduler, times, gamma)).mean()


class AdapterAverage:
    """The moving average of the parameters of adapters, and of nothing else: the base is in no copy."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.live = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.live]
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self._update(self.average, self.live, None)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Run the block with the average in the parameters."""
        own = [p.detach().clone() for p in self.live]
        torch._foreach_copy_(self.live, self.average)
        yield
        torch._foreach_copy_(self.live, own)


def train(
    pipe: Any, steps: int, gamma: float | None, decay: float
) -> tuple[dict[str, Any], list[float], AdapterAverage]:
    """Train adapters of the denoiser and the text encoder. Return their programs, the losses, and the average."""
    programs = {
        "unet": adaptc.compile(
            pipe.unet, adaptc.LoraConfig(r=8, lora_alpha=8, target_modules=UNET_LAYERS), training=True
        ),
        "text_encoder": adaptc.compile(
            pipe.text_encoder, adaptc.LoraConfig(r=4, lora_alpha=4, target_modules=TEXT_LAYERS), training=True
        ),
    }
    unet, text = (p.module() for p in programs.values())
    average = AdapterAverage([unet, text], decay)
    optimizer = torch.optim.AdamW(average.live, lr=1e-2)
    with torch.no_grad():
        latents = pipe.vae.encode(pictures(12)).latent_dist.mean
        latents = latents / latents.std()
    ids = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    source, losses = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        rows = latents[torch.randint(len(latents), (6,), generator=source)]
        noise = torch.randn(rows.shape, generator=source)
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=source)
        texts = ids.expand(len(rows), -1)
        loss = noise_loss(unet, text, pipe.scheduler, texts, rows, noise, times, gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update()
        losses.append(float(loss.detach()))
    return programs, losses, average


def draw(pipe: Any) -> Tensor:
    """Return a picture of the subject, always from the same noise."""
    source = torch.Generator().manual_seed(3)
    return pipe(PROMPT, num_inference_steps=4, height=16, width=16, output_type="pt", generator=source).images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--snr-gamma", type=float, help="5 is usual; without it, all time steps weigh the same")
    parser.add_argument("--decay", type=float, default=0.9, help="of the average of the adapter's weights")
    parser.add_argument("--out", type=Path, help="the directory to write to; without it, a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()  # it says of kohya's files, of one component each, what they lack
    base, failed = tiny_pipeline(), []

    def check(what: str, is_right: bool) -> None:
        print(f"{'ok  ' if is_right else 'FAIL'} {what}")
        failed.extend([] if is_right else [what])

    programs, losses, average = train(base, options.steps, options.snr_gamma, options.decay)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    check(f"the loss falls: {first:.3f} -> {last:.3f}", last < first)

    pipe = adaptc.compile(base)
    plain = draw(pipe)
    with average.applied():
        pipe.load_lora_weights(programs, adapter_name="sks")  # its own copy, and nothing is compiled
        kohya = {n: f"{n}.safetensors" for n in programs}
        with tempfile.TemporaryDirectory() as name:
            folder = options.out or Path(name)
            pipe.save_lora_weights(folder, "sks")
            for component, program in programs.items():
                adaptc.save_adapter(program, folder / kohya[component], format="kohya", component=component)
            picture = draw(pipe)
            check("the adapter changes the picture", float((picture - plain).abs().max()) > 1e-3)
            base.load_lora_weights(folder / "pytorch_lora_weights.safetensors")
            check("diffusers draws it from diffusers' file", torch.allclose(draw(base), picture, atol=1e-4))
            base.unload_lora_weights()
            for file in kohya.values():
                base.load_lora_weights(folder / file, adapter_name=file.partition(".")[0])
            base.set_adapters(list(programs))
            check("diffusers draws it from kohya's files", torch.allclose(draw(base), picture, atol=1e-4))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
