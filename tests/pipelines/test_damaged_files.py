"""A damaged LoRA file is refused clearly, and the pipeline stays as it was, or it is loaded as diffusers loads it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptc
from tests.support.damage import mutate_bytes
from tests.support.pipelines import adapted, denoiser_inputs, pipeline, write_lora

CASES = 150


@lru_cache
def inputs() -> dict[str, Any]:
    return denoiser_inputs("flux", torch.float32)


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    return pipe.transformer(**copy.deepcopy(inputs()), return_dict=False)[0]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora("flux", tmp_path_factory.mktemp("lora"), text=False)


def in_diffusers(file: Path) -> Tensor | None:
    """The output with the adapter in diffusers, or None where that refuses it."""
    theirs = pipeline("flux")
    try:
        theirs.load_lora_weights(str(file))
    except Exception:  # whatever its readers and peft raise
        return None
    return output(theirs)


def check(file: Path, whole: Path, said: str) -> str:
    """Load the file, a damaged form of ``whole``. Return "refused" or "loaded"."""
    ours = adapted("flux")
    base, refusal = output(ours), ""
    try:
        ours.load_lora_weights(file, adapter_name="damaged")
    except adaptc.AdaptcError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal) > 20, said
        assert ours.get_list_adapters() == {}, said
        assert torch.equal(output(ours), base), said
        return "refused"
    got, wanted = output(ours), in_diffusers(file)
    # Where diffusers refuses a file, such as for a field of its config without a value, nothing of it may be lost.
    wanted = in_diffusers(whole) if wanted is None else wanted
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m: f"{said}: {m}")
    return "loaded"


@pytest.mark.long
def test_damaged_bytes(lora: Path, tmp_path: Path) -> None:
    data, file = lora.read_bytes(), tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(data[:8], "little")
    found = set[str]()
    for seed in range(CASES):
        rng = random.Random(seed)
        # Half of the cases are in the header, which is a small part of the file.
        changed = mutate_bytes(data[:header], rng) + data[header:] if seed % 2 else mutate_bytes(data, rng)
        file.write_bytes(changed)
        found.add(check(file, lora, f"bytes, seed {seed}"))
    assert found == {"refused", "loaded"}


def _drop(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    del tensors[key]


def _rename(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    at = rng.randrange(len(key))
    tensors[key[:at] + rng.choice("._x0") + key[at + 1 :]] = tensors.pop(key)


def _swap_slots(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
    tensors[key], tensors[other] = tensors[other], tensors[key]


def _transpose(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    tensors[key] = tensors[key].T.contiguous()


def _another_rank(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    axis = 0 if "lora_A" in key else 1
    tensors[key] = torch.cat([tensors[key]] * 2, axis)


def _another_dtype(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    tensors[key] = tensors[key].to(rng.choice([torch.float16, torch.bfloat16, torch.int32, torch.float64, torch.bool]))


def _not_finite(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([float("nan"), float("inf")])


def _another_key(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    inner = key.removeprefix("transformer.")
    other = inner.replace("0", "7", 1) if "0" in inner else f"more.{inner}"
    tensors[rng.choice(["transformer.", "unet.", "", "text_encoder."]) + other] = tensors[key]


def _empty(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    tensors[key] = torch.zeros(rng.choice([(0,), (0, 3), (3, 0), ()]))


def _alpha(tensors: dict[str, Tensor], key: str, rng: random.Random) -> None:
    for layer in {k.partition(".lora_")[0] for k in tensors}:
        tensors[f"{layer}.alpha"] = torch.tensor(rng.choice([0.5, 3.0, -2.0]))


DAMAGES: list[Callable[[dict[str, Tensor], str, random.Random], None]] = [
    *(_drop, _rename, _swap_slots, _transpose, _another_rank, _another_dtype, _not_finite, _another_key, _empty, _alpha)
]


@pytest.mark.long
def test_damaged_keys_and_tensors(lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.safetensors"
    found: dict[str, set[str]] = {}
    for seed in range(CASES):
        rng, tensors = random.Random(seed), load_file(lora)
        damage = DAMAGES[seed % len(DAMAGES)]
        damage(tensors, rng.choice(sorted(tensors)), rng)
        save_file({k: t.clone() for k, t in tensors.items()}, file)
        found.setdefault(damage.__name__, set()).add(check(file, lora, f"{damage.__name__}, seed {seed}"))
    for damage in (_drop, _swap_slots, _transpose, _another_rank, _not_finite, _another_key, _empty):
        assert found[damage.__name__] == {"refused"}, damage.__name__
    assert "loaded" in found["_another_dtype"]
    assert found["_alpha"] == {"loaded"}


@pytest.mark.long
def test_an_alpha_of_one_layer_is_of_that_layer(lora: Path, tmp_path: Path) -> None:
    """diffusers takes it for all layers that have none."""
    tensors, file = load_file(lora), tmp_path / "changed.safetensors"
    layer = next(k for k in sorted(tensors) if k.endswith("lora_B.weight")).partition(".lora_")[0]
    save_file({**tensors, f"{layer}.alpha": torch.tensor(0.5)}, file)
    ours = adapted("flux")
    ours.load_lora_weights(file)
    got = output(ours)
    rank = tensors[f"{layer}.lora_B.weight"].shape[1]
    tensors[f"{layer}.lora_B.weight"] *= 0.5 / rank
    save_file(tensors, file)
    torch.testing.assert_close(got, in_diffusers(file), rtol=0, atol=1e-4)
