"""Models of diffusers, timm and open_clip: adapted, called, swapped, and equal to PEFT on the same model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils import _pytree as pytree

import adaptc
from tests.support.families import perturb
from tests.support.other_models import MODELS, MultiInputModel

LIBRARIES = [pytest.param("unet", marks=pytest.mark.slow), "flux", "timm_vit", "timm_resnet", "open_clip"]


def run(model: Any, inputs: Any) -> list[Any]:
    with torch.no_grad():
        return pytree.tree_leaves(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def close(found: list[Any], expected: list[Any]) -> None:
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def peft_model(other: MultiInputModel, folder: Path, **options: Any) -> Any:
    """PEFT on the same model, with an adapter that does something, and the adapter written to ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models that are not of transformers have no card
        config = peft.LoraConfig(target_modules=other.targets, init_lora_weights=False, **options)
        wrapped = peft.get_peft_model(other.build(), config).eval()
        adapter = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        perturb(torch.nn.ParameterDict({n.replace(".", "-"): p for n, p in adapter.items()}), seed=options["r"])
        wrapped.save_pretrained(str(folder))
    return wrapped


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_model_is_adapted_called_swapped_and_merged(name: str, tmp_path: Path) -> None:
    other = MODELS[name]
    model, inputs = other.build(), other.inputs(3)
    before = run(model, inputs)
    config = adaptc.LoraConfig(r=3, target_modules=other.targets)
    program = adaptc.compile(model, config, example_inputs=None if other.cached_model else inputs)
    close(run(program, inputs), before)
    for rank, rows in ((2, 2), (5, 4)):
        theirs = peft_model(other, tmp_path / str(rank), r=rank, lora_alpha=3 * rank + 1)
        there = copy.deepcopy(other.inputs(rows))
        expected = run(theirs, there)
        assert not torch.allclose(expected[0], run(model, there)[0], atol=1e-2)
        report = adaptc.swap(program, tmp_path / str(rank))
        assert not report.identity
        close(run(program, there), expected)
    close(run(adaptc.merge(program), inputs), run(theirs, inputs))
    close(run(adaptc.load(adaptc.save(program, tmp_path / "p.pt2")), inputs), run(theirs, inputs))
