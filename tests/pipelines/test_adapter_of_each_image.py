"""An adapter for each image: every image of a batch is what it is alone with its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from tests.support import pipelines
from tests.support.pipelines import adapted, call_options, write_lora

MIXES: list[Any] = ["a", None, {"b": 0.6, "a": -0.4}]
LATENTS = {"sd": (4, 3, 5), "sdxl": (4, 3, 5), "sd3": (4, 3, 5), "flux": (15, 16)}


def _loaded(name: str, folder: Path) -> Any:
    ours = adapted(name)
    ours.load_lora_weights(write_lora(name, folder / "a"), adapter_name="a")
    ours.load_lora_weights(write_lora(name, folder / "b", seed=3, r=2, text=False), adapter_name="b")
    return ours


def _prompts(name: str, rows: list[int]) -> dict[str, Any]:
    if name != "flux":
        return {"prompt": [["a cat", "dog, big", "x"][i] for i in rows]}
    return {
        "prompt_embeds": pipelines.text_embeds(3)[rows],
        "pooled_prompt_embeds": pipelines.pooled(3)["pooled_prompt_embeds"][rows],
    }


def _call(pipe: Any, name: str, rows: list[int], images: int, latents: Tensor, **options: Any) -> Tensor:
    given = {k: v for k, v in call_options(name).items() if "prompt" not in k} | _prompts(name, rows) | options
    return pipe(latents=latents.clone(), num_images_per_prompt=images, **given).images


@pytest.mark.long
@pytest.mark.few(8)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_each_image_is_what_it_is_alone(name: str, guidance: float, tmp_path: Path) -> None:
    ours = _loaded(name, tmp_path)
    count = 1 if name == "flux" else 2  # FLUX repeats no embeddings that it is given
    latents = torch.randn(3 * count, *LATENTS[name], generator=torch.Generator().manual_seed(2))
    together = _call(ours, name, [0, 1, 2], count, latents, guidance_scale=guidance, adapters=MIXES)
    for i, mix in enumerate(MIXES):
        one = slice(i * count, (i + 1) * count)
        ours.disable_lora()
        plain = _call(ours, name, [i], count, latents[one], guidance_scale=guidance)
        ours.enable_lora()
        names = {mix: 1.0} if isinstance(mix, str) else mix or {}
        if names:
            ours.set_adapters(list(names), list(names.values()))
        alone = _call(ours, name, [i], count, latents[one], guidance_scale=guidance) if names else plain
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-4)
        assert not names or (alone - plain).abs().max() > 1e-2


@pytest.mark.long
def test_adapters_come_and_go_between_calls(tmp_path: Path) -> None:
    ours = _loaded("sd", tmp_path)
    latents = torch.randn(1, *LATENTS["sd"], generator=torch.Generator().manual_seed(2))
    first = _call(ours, "sd", [0], 1, latents, adapters=["b"])
    ours.delete_adapters("b")
    ours.load_lora_weights(write_lora("sd", tmp_path / "c", seed=5, r=4, text=False), adapter_name="b")
    other = _call(ours, "sd", [0], 1, latents, adapters=["b"])
    ours.set_adapters("b")
    torch.testing.assert_close(other, _call(ours, "sd", [0], 1, latents), rtol=0, atol=1e-4)
    assert (other - first).abs().max() > 1e-2
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    half = _call(ours, "sd", [0], 1, latents, adapters=["b"], **scaled)
    torch.testing.assert_close(half, _call(ours, "sd", [0], 1, latents, **scaled), rtol=0, atol=1e-4)


@pytest.mark.long
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    ours = _loaded("sd", tmp_path)
    with pytest.raises(adaptc.ConfigError, match=r"adapters has 2 entries, and there is 1 prompt: .*several times"):
        ours("a", adapters=["a", "b"])
    with pytest.raises(adaptc.ConfigError, match="no adapter 'z'"):
        ours(["a", "b"], adapters=["a", "z"])
    with pytest.raises(adaptc.AdaptcError, match="is no list"):
        ours("a", adapters="a")
    config = adaptc.LoHaConfig(r=3, target_modules=["to_q"], init_weights=False)
    other = adaptc.compile(pipelines.pipeline("sd").unet, config)
    adaptc.save_adapter(other, tmp_path / "loha")
    ours.load_lora_weights(tmp_path / "loha", adapter_name="loha")
    with pytest.raises(adaptc.ConfigError, match="'a' and 'loha' are adapters of different methods"):
        ours(["a", "b"], adapters=["a", "loha"], num_inference_steps=1)
    ours.set_adapters("a")
    ours.fuse_lora()
    with pytest.raises(adaptc.ConfigError, match="fused into the weights"):
        ours("a", adapters=["a"], num_inference_steps=1)
