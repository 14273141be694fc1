"""Models whose shapes or branches depend on values are captured with free sizes: outputs and the gradients of adapters
are PEFT's at two sizes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.coverage.build import build_and_run
from tests.coverage.outputs import float_tensors
from tests.coverage.rows import all_rows
from tests.support.oracle import quiet, randomize

#: family -> what depends on values there, and the layers that are adapted
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "dbrx": ("the experts that tokens chose", ["Wqkv", "out_proj"]),
    "switch_transformers": ("experts that are layers", ["wi", "wo", "q"]),
    "rt_detr": ("len() of the batch", ["value_proj", "output_proj"]),
    "qwen2_5_omni_thinker": ("positions of images, found by ids", ["q_proj", "down_proj"]),
    "ernie4_5_vl_moe": ("positions of frames, pairs of frames, a mask of images", ["q_proj", "temporal_linear.fc1"]),
    "cosmos3_edge": ("a table that is resized to each image", ["linear_fc1", "k_proj"]),
    "ovis2": ("whether a text has marks of images", ["q_proj", "fc1"]),
    "fsmt": ("whether a text is padded", ["fc1", "v_proj"]),
    "musicflamingo": ("where each sound begins", ["linear_1", "q_proj"]),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::adaptc.AdaptcWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts(family: str, tmp_path: Path) -> None:
    row = next(r for r in all_rows() if r.family == family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, calls = build_and_run(row)
    for module in model.modules():
        if hasattr(module, "jitter_noise"):  # of routers in train mode, in which a program to train is captured
            module.jitter_noise = 0.0
    with quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=FAMILIES[family][1])
        ).eval()
        with torch.no_grad():
            randomize(theirs)
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path), is_trainable=True).eval()
    program = adaptc.compile(model, tmp_path, example_inputs=copy.deepcopy(calls[0]), training=True)
    module = program.module().eval()
    for call in calls:
        wanted, found = _gradients(twin, call), _gradients(module, call)
        _assert_equal(found[0], wanted[0])
        assert len(wanted[1]) > 1
        # An expert that no token chose has a gradient of zeros in a program.
        assert not any(found[1].pop(n).any() for n in found[1].keys() - wanted[1].keys())
        assert any(float(g.abs().max()) > 1e-4 for g in wanted[1].values())
        _assert_equal(found[1], wanted[1])


def _gradients(model: nn.Module, call: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the float outputs, and the gradients of all adapters' tensors by PEFT's names."""
    model.zero_grad()
    outputs = float_tensors(model(**copy.deepcopy(call)), detached=False)
    name = next(n for n in ("logits", "last_hidden_state") if n in outputs)
    outputs[name].float().square().sum().backward()
    gradients = {
        n.replace(".default", "").removeprefix("base_model.model."): p.grad
        for n, p in model.named_parameters()
        if "lora_" in n and p.grad is not None
    }
    return {name: outputs[name].detach()}, gradients


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(v.abs().max()) for v in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * max(largest, 1), msg=name)
