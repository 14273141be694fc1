"""The package of a denoiser stands in a pipeline for its module, and adapters are swapped in it by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.debug import assert_no_recompiles
from tests.support.pipelines import adapted, images, pipeline, write_lora

SIZES = ({}, {"height": 64, "width": 112})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with room for rank 8 and no adapter, and three LoRA files."""
    made = tmp_path_factory.mktemp("packages")
    for seed, rank in ((1, 3), (2, 5), (3, 9)):
        write_lora("flux", made / f"rank{rank}", seed=seed, text=False, r=rank)
    adaptc.package(adapted("flux").programs["transformer"], made / "denoiser.pt2", max_rank=8)
    return made


def packaged(folder: Path, **options: Any) -> Any:
    return adaptc.compile(pipeline("flux"), packages={"transformer": folder / "denoiser.pt2"}, **options)


@pytest.mark.long
def test_verbs_on_a_package(folder: Path, tmp_path: Path) -> None:
    theirs, ours = pipeline("flux"), packaged(folder)
    base = images(theirs, "flux")
    torch.testing.assert_close(images(ours, "flux"), base, rtol=0, atol=1e-4)
    with assert_no_recompiles():
        for rank in (3, 5):
            for pipe in (theirs, ours):
                pipe.load_lora_weights(folder / f"rank{rank}", adapter_name=f"rank{rank}")
        for names, weights in ((["rank3"], [0.5]), (["rank5"], [1.0]), (["rank3", "rank5"], [0.5, 1.5])):
            for pipe in (theirs, ours):
                pipe.set_adapters(names, weights)
            for size in SIZES:
                wanted = images(theirs, "flux", **size)
                torch.testing.assert_close(images(ours, "flux", **size), wanted, rtol=0, atol=1e-4)
    assert (images(ours, "flux") - base).abs().max() > 1e-2
    ours.save_lora_weights(tmp_path, "rank5")
    ours.disable_lora()
    torch.testing.assert_close(images(ours, "flux"), base, rtol=0, atol=1e-4)
    ours.enable_lora()
    again = pipeline("flux")
    again.load_lora_weights(tmp_path)
    ours.set_adapters("rank5")
    torch.testing.assert_close(images(again, "flux"), images(ours, "flux"), rtol=0, atol=1e-4)


@pytest.mark.long
def test_what_a_package_cannot_do_is_refused_by_name(folder: Path) -> None:
    ours = packaged(folder)
    ours.load_lora_weights(folder / "rank3", adapter_name="film")
    before = images(ours, "flux")
    with pytest.raises(adaptc.SwapError, match="rank 9, and the package has room for 8"):
        ours.load_lora_weights(folder / "rank9", adapter_name="large")
    refused = {
        "fuse_lora merges": ours.fuse_lora,
        "runs on the device": lambda: ours.to("meta"),
        "compiled code, and it runs": lambda: ours.enable_model_cpu_offload(device="meta"),
        "was captured in": lambda: ours.to(torch.float64),
        "each row need a bank": lambda: images(ours, "flux", adapters=["film"]),
    }
    for said, call in refused.items():
        with pytest.raises(adaptc.ConfigError, match=said):
            call()
    assert ours.get_list_adapters() == {"transformer": ["film"]}
    assert ours.vae.dtype == torch.float32
    assert ours.vae.device.type == "cpu"
    assert torch.equal(images(ours, "flux"), before)
    with pytest.raises(adaptc.ConfigError, match="packages has 'unet'"):
        adaptc.compile(pipeline("flux"), packages={"unet": folder / "denoiser.pt2"})
    with pytest.raises(adaptc.ConfigError, match="the transformer of this pipeline is called with"):
        adaptc.compile(pipeline("sd3"), packages={"transformer": folder / "denoiser.pt2"})
    with pytest.raises(adaptc.ConfigError, match="packages= is for pipelines"):
        adaptc.compile(torch.nn.Linear(3, 5), adaptc.LoraConfig(), packages={})
    with pytest.raises(adaptc.CheckpointError):
        adaptc.compile(pipeline("flux"), packages={"transformer": folder / "missing.pt2"})


FRESH = """
import sys, torch, adaptc
from pathlib import Path
from tests.support.pipelines import images, pipeline
folder, base = Path(sys.argv[1]), pipeline("flux")
base.transformer.to("meta")  # the package has the weights
adapters = {"a": folder / "rank3", "b": folder / "rank5"}
pipe = adaptc.compile(base, adapters, packages={"transformer": folder / "denoiser.pt2"})
pipe.set_adapters("b", 0.5)
torch.save(images(pipe, "flux"), folder / "image.pt")
"""


@pytest.mark.long
def test_a_fresh_process_needs_no_weights_of_the_denoiser(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", FRESH, str(folder)], check=True, capture_output=True)
    theirs = pipeline("flux")
    theirs.load_lora_weights(folder / "rank5", adapter_name="b")
    theirs.set_adapters("b", 0.5)
    torch.testing.assert_close(torch.load(folder / "image.pt"), images(theirs, "flux"), rtol=0, atol=1e-4)
