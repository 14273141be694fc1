"""Models with vision towers, adapted for any number of images of any sizes, against PEFT and transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import adaptc
from adaptc.capture.vision.tower_facts import find_towers
from tests.support.image_models import (
    FAMILIES,
    IMAGE,
    adapted_by_peft,
    build,
    call_with_images,
    check_training,
    with_labels,
)
from tests.support.oracle import quiet

# What is refused at a call names the line of the model that refuses it.
pytestmark = pytest.mark.usefixtures("stack_traces")

EXAMPLE = [[(1, 4, 2), (1, 2, 6)], [(1, 4, 4)], [(1, 2, 2)]]
CALLS = {
    "as captured": EXAMPLE,
    "one text, one image": [[(1, 4, 6)]],
    "a text without images": [[], [(1, 6, 4)], [(1, 2, 2), (1, 8, 2), (1, 2, 4)]],
    "frames": [[(1, 2, 4)], [(1, 10, 6), (1, 2, 2)]],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def program_of(family: str) -> adaptc.AdaptedProgram:
    return adaptc.compile(build(family), adapted_by_peft(family)[1], example_inputs=call_with_images(EXAMPLE))


@torch.no_grad()
def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    return model(**copy.deepcopy(call))["logits"]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("which", CALLS)
@pytest.mark.parametrize("pads_left", [False, True])
def test_outputs_are_pefts(family: str, which: str, pads_left: bool) -> None:
    oracle, _ = adapted_by_peft(family)
    call = call_with_images(CALLS[which], pads_left=pads_left)
    wanted, found = logits(oracle, call), logits(program_of(family), call)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    with oracle.disable_adapter():
        assert not torch.allclose(found, logits(oracle, call), rtol=0.02, atol=0.02)


@pytest.mark.long
@pytest.mark.few(2)
def test_other_images_give_other_outputs(family: str) -> None:
    call = call_with_images(EXAMPLE)
    other = {**call, "pixel_values": call["pixel_values"].flip(0)}
    assert not torch.allclose(logits(program_of(family), call), logits(program_of(family), other), atol=1e-3)


@pytest.mark.long
@pytest.mark.few(2)
def test_tower_projector_and_text_are_adapted(family: str) -> None:
    keys = {a.key for a in program_of(family).adaptation.attachments}
    assert {"model.visual", "model.language_model"} <= {".".join(k.split(".")[:2]) for k in keys}
    assert any("merger" in k for k in keys)
    oracle, _ = adapted_by_peft(family)
    adapted = {
        n.removeprefix("base_model.model.").partition(".lora_A")[0]
        for n, _ in oracle.named_parameters()
        if ".lora_A." in n
    }
    assert keys == adapted


@pytest.mark.few(2)
def test_swaps_and_merges(family: str) -> None:
    program, call = program_of(family), call_with_images(CALLS["frames"])
    before = logits(program, call)
    merged = adaptc.merge(program)
    torch.testing.assert_close(logits(merged, call), before, rtol=2e-5, atol=2e-5)
    with quiet():
        bare = build(family)
    torch.testing.assert_close(logits(program.base, call), logits(bare, call), rtol=1e-5, atol=1e-5)


def _without(call: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if what == "patches":
        return {**call, "pixel_values": call["pixel_values"][:-4]}
    if what == "grids":
        return {**call, "image_grid_thw": call["image_grid_thw"][:-1]}
    ids = call["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 11
    return {**call, "input_ids": ids}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("what", "said"), [("patches", "have_all_patches"), ("grids", "have_all_patches"), ("a placeholder", "placeholder")]
)
def test_numbers_that_do_not_fit_are_refused(family: str, what: str, said: str) -> None:
    with pytest.raises(adaptc.AdaptcError, match=f"values of the inputs do not pass the check in .*{said}"):
        program_of(family)(**_without(call_with_images(EXAMPLE), what))


@pytest.mark.long
def test_the_model_is_as_it_was(family: str) -> None:
    model = build(family)
    before = {id(m): dict(vars(m)) for m in model.modules()}
    implementation = model.config.vision_config._attn_implementation
    adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules="all-linear"), example_inputs=call_with_images(EXAMPLE))
    assert [dict(vars(m)).keys() for m in model.modules()] == [before[id(m)].keys() for m in model.modules()]
    assert all("forward" not in vars(m) for m in model.modules())
    assert model.config.vision_config._attn_implementation == implementation


@pytest.mark.long
def test_gradients_of_training(family: str) -> None:
    """The loss of a text with images, and the gradients of all adapters, are PEFT's."""
    oracle, path = adapted_by_peft(family)
    call = with_labels(call_with_images(EXAMPLE))
    check_training(build(family), oracle, path, call, call, torch.float64)


@pytest.mark.long
def test_a_saved_program_runs_without_adaptc(family: str, tmp_path: Path) -> None:
    call = call_with_images(CALLS["frames"])
    adaptc.save(adaptc.merge(program_of(family)), tmp_path / "model.pt2")
    torch.save((call, logits(program_of(family), call)), tmp_path / "call.pt")
    script = textwrap.dedent("""
        import importlib, sys, torch
        importlib.import_module(sys.argv[2])  # the classes of the outputs
        program = torch.export.load(sys.argv[1] + "/model.pt2")
        call, wanted = torch.load(sys.argv[1] + "/call.pt")
        found = program.module()(**call)["logits"]
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
        assert "adaptc" not in sys.modules
        print("equal")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), type(build(family)).__module__],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


def last_boundary(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[-1] / 10


def one_for_each_boundary(cu_seqlens: Tensor) -> Tensor:
    """Return a number, and fail for more than eight boundaries."""
    return torch.ones(8)[torch.arange(cu_seqlens.shape[0])].sum()


@pytest.mark.long
@pytest.mark.parametrize(
    ("use", "said"), [(last_boundary, "would differ from the model's"), (one_for_each_boundary, "the program fails")]
)
def test_a_tower_that_uses_grids_in_another_way_is_refused(use: Any, said: str) -> None:
    """What a model does with a tower's facts beyond attention is found by comparing outputs."""
    model = build("qwen2_vl")
    block: Any = next(iter(find_towers(model))).get_submodule("blocks.0")
    original = block.forward

    def forward(hidden_states: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        return original(hidden_states, cu_seqlens=cu_seqlens, **kwargs) + use(cu_seqlens)

    block.forward = forward
    with pytest.raises(adaptc.CaptureError, match=f"masks of its own, in a way .*{said}"):
        adaptc.compile(model, adaptc.LoraConfig(r=2), example_inputs=call_with_images(EXAMPLE))


def test_text_alone_is_captured_as_before() -> None:
    model = build("qwen2_vl")
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules="all-linear"))
    call = {k: v for k, v in call_with_images(EXAMPLE).items() if k in ("input_ids", "attention_mask")}
    call["input_ids"] = call["input_ids"].masked_fill(call["input_ids"] == IMAGE, 12)
    torch.testing.assert_close(logits(program, call), logits(model, call), rtol=1e-5, atol=1e-5)
    assert isinstance(program, ExportedProgram)
