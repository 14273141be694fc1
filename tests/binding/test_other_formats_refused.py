"""What is no adapter, does not fit or is damaged: an error that says so, and nothing has changed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import adaptc
from adaptc import AdaptcError
from tests.support.component_nets import (
    CONV,
    LINEAR,
    TO_Q,
    flat,
    image,
    kohya,
    loha,
    peft_keys,
    program,
    program_with_all_sites,
    with_kohya_names,
    write_safetensors,
)
from tests.support.cover import examples

# --- refused ----------------------------------------------------------------------------------------------------------

UP, DOWN = f"{flat(TO_Q)}.lora_up.weight", f"{flat(TO_Q)}.lora_down.weight"

BROKEN = {
    "unknown key": (
        kohya() | {"lora_unet_conv_in.what": torch.ones(2)},
        r"not known in the format kohya.*lora_unet_conv_in\.what",
    ),
    "no format": ({"a": torch.ones(2), "b.c": torch.ones(2)}, "no format that is known"),
    "change of another size": (
        {"lora_unet_conv_in.diff": torch.ones(2)},
        r"shape \(2,\), and the model's .*\(7, 3, 3, 3\)",
    ),
    "kohya's OFT": ({"lora_unet_conv_in.oft_blocks": torch.ones(1, 2, 2)}, "OFT of kohya .*subtract_adapter"),
    "up alone": ({UP: torch.ones(12, 2)}, "no lora_A.weight"),
    "alpha alone": ({f"{flat(TO_Q)}.alpha": torch.tensor(2.0)}, "an alpha and nothing else"),
    "alpha of many": ({f"{flat(TO_Q)}.alpha": torch.ones(3)}, "alpha .* is no finite number"),
    "alpha of none": ({f"{flat(TO_Q)}.alpha": torch.tensor(float("nan"))}, "alpha .* is no finite number"),
    "wrong shape": ({UP: torch.ones(11, 2), DOWN: torch.ones(2, 6)}, r"has shape \(11, 2\), expected \(12, 2\)"),
    "no axes": ({UP: torch.ones(()), DOWN: torch.ones(())}, "shape"),
    "nan": ({UP: torch.full((12, 2), float("nan")), DOWN: torch.ones(2, 6)}, "NaN"),
    "two spellings": (
        {**{k.replace("lora_unet_", "lora_prior_unet_"): t for k, t in kohya().items()}, **kohya()},
        "both lora_A.weight of|both alpha of",
    ),
    "two methods": (
        kohya(modules={LINEAR: 0}) | with_kohya_names(TO_Q, loha(TO_Q, 2)[0]),
        "LORA and LOHA|LOHA and LORA",
    ),
    "rank beyond need": (
        with_kohya_names(
            CONV,
            {
                "lora_down.weight": torch.ones(1, 7, 1, 1),
                "lora_mid.weight": torch.ones(64, 1, 3, 3),
                "lora_up.weight": torch.ones(10, 64, 1, 1),
            },
        ),
        "has the rank 64, and no change .* above 63",
    ),
    "half a LoHa": ({f"{flat(TO_Q)}.hada_w1_a": torch.ones(12, 2)}, "no hada_w1_b"),
    "flat LoKr": (
        {f"{flat(TO_Q)}.lokr_w1": torch.ones(12), f"{flat(TO_Q)}.lokr_w2": torch.ones(6)},
        "expected a matrix",
    ),
    "both in one": (
        with_kohya_names(TO_Q, loha(TO_Q, 2)[0]) | {UP: torch.ones(12, 2), DOWN: torch.ones(2, 6)},
        "of several methods",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_adapter_is_refused_by_name(
    name: str, model: nn.Module, wide: adaptc.AdaptedProgram, tmp_path: Path
) -> None:
    tensors, match = BROKEN[name]
    before = wide.binding
    file = write_safetensors(tmp_path / "broken.safetensors", tensors)
    for call in (lambda: program(model, file), lambda: adaptc.swap(wide, file)):
        with pytest.raises(AdaptcError, match=match):
            call()
    assert wide.binding is before


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=examples(60), deadline=None)
def test_damage_is_an_error_or_what_the_file_says(where: Path, seed: int) -> None:
    rng, wide = random.Random(seed), program_with_all_sites()
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 2})}
    file = write_safetensors(where / "x.safetensors", kohya(), header)
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data) if rng.random() < 0.3 else 2000)] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    before = wide.binding
    try:
        adaptc.swap(wide, file)
    except AdaptcError:
        assert wide.binding is before
    else:
        with torch.no_grad():
            assert wide(image()).shape == (2, 4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"a":' * 100_000, "not a JSON object"),
        ('{"unet.r": "many"}', "r"),
        ('{"unet.r": 4, "unet.lora_alpha": 2}', "shape"),
        ('{"unet.r": 3, "unet.init_lora_weights": "corda", "unet.corda_config": {"a": 1}}', "corda_config"),
        ('{"unet.peft_type": "NONE"}', "NONE"),
    ],
)
def test_configs_in_headers_are_checked(text: str, match: str, wide: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    tensors = {f"unet.{k}": t for k, t in peft_keys().items()}
    file = write_safetensors(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": text})
    before = wide.binding
    with pytest.raises(AdaptcError, match=match):
        adaptc.swap(wide, file)
    assert wide.binding is before
