"""Models that compute with numbers which they read from inputs of images: captured for those of the example inputs."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.capture import capture
from adaptc.capture.vision import tower_facts, trace_towers
from tests.coverage.build import build_and_run
from tests.coverage.rows import all_rows

#: sizes of images are fixed with the numbers, and a warning says so, too
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was captured for some sizes alone:adaptc.AdaptcWarning"),
    pytest.mark.filterwarnings("ignore:.*of layers that the program never calls:adaptc.AdaptcWarning"),
    pytest.mark.filterwarnings("ignore:.*captured for prompts with as many images:adaptc.AdaptcWarning"),
]
SIZES = torch.tensor([[4, 6], [2, 3], [6, 2]])


class Crops(nn.Module):
    """Cuts each image to its size, and sums its rows; ``way`` is how the model reads the sizes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(7, 5), way

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        made = torch.tanh(self.linear(pixel_values))
        if image_sizes[0, 0] > 5:  # torch traces no branch on such a number
            made = made * 2
        parts: list[Tensor] = []
        if self.way == "slices":
            parts = [one[: size[0], : size[1]].flatten(0, 1) for one, size in zip(made, image_sizes, strict=True)]
        elif self.way == "lists":
            for one, (height, width) in zip(made, image_sizes.tolist(), strict=True):
                parts.append(one[:height, :width].flatten(0, 1) if height > width else one.flatten(0, 1))
        elif self.way == "splits":
            whole, counts = made.flatten(0, 2), torch.as_tensor(image_sizes).prod(-1)
            rest = whole.shape[0] - int(counts.sum())
            parts = [*torch.split(whole, [*counts.tolist(), rest], dim=0)]
            parts += [*torch.split(whole[: counts.sum()], [h * w for h, w in image_sizes])]
        elif self.way == "repeats":
            images = torch.repeat_interleave(torch.arange(3, device=image_sizes.device), image_sizes[:, 0])
            widths = torch.repeat_interleave(image_sizes[:, 1], image_sizes[:, 0])
            rows = torch.split(made.flatten(0, 2)[: widths.sum()], widths.tolist())
            parts = [made[images].flatten(0, 2) * widths.max(), *(row * len(row) for row in rows)]
        elif self.way == "branches":
            parts = [made.flatten(0, 2) * 2 if (image_sizes > 5).any() else made.flatten(0, 2)]
        return torch.cat(parts).sum(0)


def pixels(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, 6, 7, generator=torch.Generator().manual_seed(seed))


def compile_crops(way: str) -> tuple[nn.Module, adaptc.AdaptedProgram]:
    torch.manual_seed(0)
    model = Crops(way).eval()
    inputs = {"pixel_values": pixels(), "image_sizes": SIZES}
    with pytest.warns(adaptc.AdaptcWarning, match="captured for those of the example inputs alone"):
        program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["linear"]), example_inputs=inputs)
    return model, program


@pytest.mark.parametrize("way", ["slices", "lists", "splits", "repeats", "branches"])
def test_numbers_of_the_example_are_kept(way: str) -> None:
    model, program = compile_crops(way)
    x = pixels(1)
    expected = model(x, SIZES)
    torch.testing.assert_close(program.base(pixel_values=x, image_sizes=SIZES), expected)
    assert "forward" not in vars(model)
    for name, t in program.binding.values.items():
        if "lora_B" in name:
            t.data.normal_()
    merged = adaptc.merge(program)
    found = program(pixel_values=x, image_sizes=SIZES)
    torch.testing.assert_close(found, merged(pixel_values=x, image_sizes=SIZES))
    assert float((found - expected).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("way", ["slices", "repeats"])
def test_other_numbers_are_refused_by_the_name_of_the_input(way: str) -> None:
    _, program = compile_crops(way)
    with pytest.raises(adaptc.AdaptcError, match="captured for other values of 'image_sizes'"):
        program(pixel_values=pixels(), image_sizes=SIZES.flip(1))


class Draws(nn.Module):
    """Branches on a number of the sizes of images, and on another one, which ``way`` says what it is of."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(7, 5), way

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        made = self.linear(pixel_values) * image_sizes[0, 0]
        if image_sizes[0, 1] > 3:
            made = made + 1
        number = torch.zeros(3)
        if self.way == "hidden":
            number = made.flatten()
        elif self.way == "random":
            number = torch.rand_like(image_sizes[0].float())
        elif self.way == "written":
            view = number[:2]
            view.copy_(made.flatten()[:2])
        return made * 2 if number[0] > 0.5 else made


@pytest.mark.parametrize("way", ["hidden", "random", "written"])
def test_other_numbers_are_not_kept(way: str) -> None:
    """Those of hidden values differ from adapter to adapter."""
    model, inputs = Draws(way).eval(), {"pixel_values": pixels()[0], "image_sizes": SIZES}
    with pytest.raises(adaptc.CaptureError, match="data-dependent") as refusal:
        adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["linear"]), example_inputs=inputs)
    # It is the error of the first trace, at the model's own line.
    assert "if image_sizes[0, 1] > 3:" in str(refusal.value)
    assert "forward" not in vars(model)


FAMILIES = ["mistral3", "llava_next", "llava_onevision", "lighton_ocr", "kimi_k25"]


@pytest.fixture
def no_method_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be captured as one is whose code loops over images in a way that nobody knows."""
    for module in (capture, trace_towers, tower_facts):
        monkeypatch.setattr(module, "has_free_images", lambda model: False)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.usefixtures("no_method_is_known")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_what_peft_gives(family: str) -> None:
    """At other pixels and other texts, and with more text behind the images."""
    (row,) = (r for r in all_rows() if r.family == family and r.task == "IMAGE_TEXT_TO_TEXT")
    model, (inputs, _) = build_and_run(row)
    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config, init_lora_weights=False)).eval()
    with pytest.warns(adaptc.AdaptcWarning, match="captured for those of the example inputs alone"):
        program = adaptc.compile(model, adaptc.LoraConfig(**config), example_inputs=inputs)
    adapter = peft.get_peft_model_state_dict(theirs)
    adaptc.swap(program, adapter)
    pixel_names = [n for n, t in inputs.items() if t.is_floating_point()]
    text = [n for n in ("input_ids", "attention_mask", "labels") if n in inputs]
    longer = {n: torch.cat([inputs[n], inputs[n][:, -1:].expand(-1, 3)], 1) for n in text}
    for call in (
        inputs,
        {**inputs, **{n: torch.randn_like(inputs[n]) for n in pixel_names}},
        {**inputs, **longer},
    ):
        with torch.no_grad():
            found, want, base = program(**call).logits, theirs(**call).logits, model(**call).logits
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
        assert float((want - base).abs().max()) > 1e-3


@pytest.mark.long
@pytest.mark.usefixtures("no_method_is_known")
@pytest.mark.parametrize("family", ["mistral3", "llava_next"])
def test_families_generate_what_peft_generates(family: str) -> None:
    (row,) = (r for r in all_rows() if r.family == family and r.task == "IMAGE_TEXT_TO_TEXT")
    model, (inputs, _) = build_and_run(row)
    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 3, "lora_alpha": 60, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config, init_lora_weights=False)).eval()
    with pytest.warns(adaptc.AdaptcWarning, match="captured for those of the example inputs alone"):
        generator = adaptc.compile_for_generation(model, adaptc.LoraConfig(**config), example_inputs=inputs)
    adaptc.swap(generator, peft.get_peft_model_state_dict(theirs))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for seed in (0, 1):
        torch.manual_seed(seed)
        prompt = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
        want = theirs.generate(**prompt, **options)
        assert torch.equal(generator.generate(**prompt, **options), want)
        assert not torch.equal(model.generate(**prompt, **options), want)
