"""A small model that describes drawn shapes, adapted, swapped, and asked again. `make demo-all` runs it.

The model has a vision tower and a language model, of transformers' SmolVLM, and is made and trained here. It learns to
say "a red square" of a picture with a red square. One adapter then teaches it French, from pictures and captions.
Another one teaches it a shape that it has never seen. Both are swapped into one program that generates, without a
recompile.

It needs a CPU, less than three minutes, less than 2 GB of memory, and no network. The exit status is 1 when a check
fails.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

import adaptc

SIZE, PATCH = 24, 6
#: tokens of an image: four patches become one
IMAGE_TOKENS = (SIZE // PATCH) ** 2 // 4
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.3, 1.0)}
SHAPES = ["square", "circle", "cross"]
NEW_SHAPE = "frame"
FRENCH = {
    "red": "rouge", "green": "vert", "blue": "bleu", "square": "carré", "circle": "cercle", "cross": "croix",
    "frame": "cadre",
}  # fmt: skip
WORDS = ["<pad>", "<image>", "<begin>", "<end>", "a", "un", *COLOURS, *SHAPES, NEW_SHAPE, *FRENCH.values()]
ID = {word: i for i, word in enumerate(WORDS)}
PROMPT = [ID["<begin>"], *[ID["<image>"]] * IMAGE_TOKENS]
LENGTH = 5  # of a caption with its end

Picture = tuple[str, str]


def make_model() -> Any:
    """Return the model, with random weights."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "initializer_range": 0.1,
    }
    text = {
        **shared, "model_type": "llama", "intermediate_size": 128, "num_key_value_heads": 2, "vocab_size": len(WORDS),
        "max_position_embeddings": 64, "pad_token_id": ID["<pad>"],
    }  # fmt: skip
    tower = {**shared, "image_size": SIZE, "patch_size": PATCH, "intermediate_size": 128}
    config = SmolVLMConfig(
        text_config=text, vision_config=tower, scale_factor=2, image_token_id=ID["<image>"],
        pad_token_id=ID["<pad>"], bos_token_id=ID["<begin>"], eos_token_id=ID["<end>"], tie_word_embeddings=False,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


def draw(picture: Picture, at: random.Random) -> Tensor:
    """Return the pixels (3, SIZE, SIZE) of a shape in a colour, about the middle of a dark ground with some noise."""
    colour, shape = picture
    half = at.randint(7, 9)
    x, y = at.randint(SIZE // 2 - 2, SIZE // 2 + 2), at.randint(SIZE // 2 - 2, SIZE // 2 + 2)
    rows, columns = torch.arange(SIZE)[:, None] - y, torch.arange(SIZE)[None] - x
    inside = (rows.abs() < half) & (columns.abs() < half)
    drawn = {
        "square": inside,
        "circle": rows**2 + columns**2 < half**2,
        "cross": inside & ((rows.abs() < half / 3) | (columns.abs() < half / 3)),
        "frame": inside & ((rows.abs() > half / 2) | (columns.abs() > half / 2)),
    }[shape]
    ground = torch.tensor([at.gauss(0, 0.08) for _ in range(SIZE * SIZE)]).reshape(1, SIZE, SIZE)
    return torch.where(drawn, torch.tensor(COLOURS[colour])[:, None, None], 0.05) + ground


def caption(picture: Picture, french: bool = False) -> list[str]:
    colour, shape = picture
    return ["un", FRENCH[shape], FRENCH[colour], "<end>"] if french else ["a", colour, shape, "<end>"]


def batch(pictures: Sequence[Picture], at: random.Random, french: bool = False) -> dict[str, Tensor]:
    """Return the inputs of training: a prompt with an image, and the caption, whose tokens alone have labels."""
    captions = torch.tensor([[ID[word] for word in caption(p, french)] for p in pictures])
    prompts = torch.tensor([PROMPT] * len(pictures))
    ids = torch.cat([prompts, captions], 1)
    pixels = torch.stack([draw(p, at) for p in pictures])[:, None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(len(pictures), 1, SIZE, SIZE, dtype=torch.int64),
        "labels": torch.cat([torch.full_like(prompts, -100), captions], 1),
    }


def all_pictures(shapes: Sequence[str]) -> list[Picture]:
    return [(colour, shape) for colour in COLOURS for shape in shapes]


def train(module: Any, shapes: Sequence[str], steps: int, rate: float, what: str, french: bool = False) -> None:
    """Train those parameters of ``module`` that have gradients, on ``steps`` batches of pictures."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    at, pictures = random.Random(1), all_pictures(shapes)
    module.train()
    with tqdm(range(steps), desc=what) as bar:
        for _ in bar:
            loss = module(**batch(at.choices(pictures, k=24), at, french)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    module.eval()


def train_adapter(model: Any, folder: Path, shapes: Sequence[str], steps: int, french: bool = False) -> Path:
    """Train an adapter of the whole model, tower included, and return the directory that it was saved to."""
    config = adaptc.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules="lm_head")
    at = random.Random(2)
    example = batch(all_pictures(shapes), at, french)
    program = adaptc.compile(model, config, example_inputs=example, training=True)
    train(program.module(), shapes, steps, 4e-3, f"adapter {folder.name}", french)
    return adaptc.save_adapter(program, folder)


def describe(model: Any, pictures: Sequence[Picture], seed: int = 3) -> list[list[str]]:
    """Return what ``model``, anything that generates, says of new drawings of these pictures."""
    given = batch(pictures, random.Random(seed))
    prompts = {n: t[:, : len(PROMPT)] if t.ndim == 2 else t for n, t in given.items() if n != "labels"}
    tokens = model.generate(**prompts, max_new_tokens=LENGTH, do_sample=False)[:, len(PROMPT) :]
    said = [[WORDS[i] for i in row if i != ID["<pad>"]] for row in tokens.tolist()]
    return [words[: words.index("<end>") + 1] if "<end>" in words else words for words in said]


def accuracy(model: Any, shapes: Sequence[str], french: bool = False) -> float:
    """Return the share of right captions, of eight drawings for each picture."""
    pictures = all_pictures(shapes) * 8
    said = describe(model, pictures)
    return sum(words == caption(p, french) for words, p in zip(said, pictures, strict=True)) / len(pictures)


def main(steps: int = 400, adapter_steps: int = 160) -> None:
    model = make_model()
    train(model, SHAPES, steps, 2e-3, "the model")
    every_shape = [*SHAPES, NEW_SHAPE]
    with tempfile.TemporaryDirectory() as directory:
        french = train_adapter(model, Path(directory, "french"), SHAPES, adapter_steps, french=True)
        frames = train_adapter(model, Path(directory, "frames"), every_shape, adapter_steps)
        prompt = {n: t[:1] for n, t in batch(all_pictures(SHAPES), random.Random(4)).items() if n != "labels"}
        prompt = {n: t[:, : len(PROMPT)] if t.ndim == 2 else t for n, t in prompt.items()}
        program = adaptc.compile_for_generation(model, french, example_inputs=prompt, max_batch=96, max_length=32)

        shown = [("blue", "cross"), ("green", "frame")]
        rows: dict[str, tuple[float, str]] = {}
        rows["the model"] = accuracy(program.base, SHAPES), _sentences(program.base, shown)
        rows["in French"] = accuracy(program, SHAPES, french=True), _sentences(program, shown)
        before = describe(program, all_pictures(SHAPES))
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(program, frames)
            rows["with frames"] = accuracy(program, every_shape), _sentences(program, shown)
            adaptc.swap(program, french)
        went_back = describe(program, all_pictures(SHAPES)) == before

    print("\n                right   what is said of a blue cross and a green frame")
    for name, (share, said) in rows.items():
        print(f"{name:14} {share:6.0%}   {said}")
    checks = {f"captions of {name} are right": share >= 0.9 for name, (share, _) in rows.items()}
    checks["after swaps there and back the first adapter says the same"] = went_back
    for what, held in checks.items():
        print(f"{'ok' if held else 'FAILED'}: {what}")
    sys.exit(0 if all(checks.values()) else 1)


def _sentences(model: Any, pictures: Sequence[Picture]) -> str:
    return ", ".join(" ".join(w for w in words if w != "<end>") for words in describe(model, pictures))


if __name__ == "__main__":
    main()
