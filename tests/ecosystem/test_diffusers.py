"""Adapter files between diffusers and adaptc: each loads what the other writes, and kohya's as the other does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders import lora_pipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc.adapter_files.formats.ldm import original_names
from tests.support import diffusion
from tests.support.diffusion import COMPONENTS, model_with_peft_adapter, output_tensor

PIPELINES = {
    "unet": lora_pipeline.StableDiffusionLoraLoaderMixin,
    "sd3": lora_pipeline.SD3LoraLoaderMixin,
    "flux": lora_pipeline.FluxLoraLoaderMixin,
}
DIFFUSERS = [n for n in diffusion.MODELS if n != "clip"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The oracle's own warnings are no matter here. transformers asks for a newer peft than the one that tests are
    pinned to, and what is used of it here works with both."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(got: Tensor, wanted: Tensor, name: str) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - output_tensor(diffusion.model(name), name)).abs().max() > 1e-2, "the adapter does nothing"


def swapped(name: str, adapter: Any, **options: Any) -> Tensor:
    program = diffusion.program(name)
    adaptc.swap(program, adapter, **options)
    return output_tensor(program, name)


def state(model: nn.Module) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name="default")


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 9}},
}


# --- written by diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DIFFUSERS)
def test_save_lora_adapter(name: str, variant: str, tmp_path: Path) -> None:
    theirs = model_with_peft_adapter(name, **VARIANTS[variant])
    theirs.save_lora_adapter(tmp_path)
    close(swapped(name, tmp_path), output_tensor(theirs, name), name)


@pytest.mark.long
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_save_lora_weights_of_a_pipeline(name: str, metadata: bool, tmp_path: Path) -> None:
    theirs, component = model_with_peft_adapter(name), COMPONENTS[name]
    text = model_with_peft_adapter("clip", r=2)
    layers = {f"{component}_lora_layers": state(theirs), "text_encoder_lora_layers": state(text)}
    said = {f"{component}_lora_adapter_metadata": theirs.peft_config["default"].to_dict()} if metadata else {}
    PIPELINES[name].save_lora_weights(tmp_path, **layers, **said)
    wanted, wanted_text = theirs, text
    if not metadata:  # then a scale is one, to diffusers too
        wanted, wanted_text = (model_with_peft_adapter(n, r=r, lora_alpha=r) for n, r in ((name, 3), ("clip", 2)))
    else:
        wanted_text = model_with_peft_adapter("clip", r=2, lora_alpha=2)
    program = diffusion.program(name)
    report = adaptc.swap(program, tmp_path / "pytorch_lora_weights.safetensors")
    close(output_tensor(program, name), output_tensor(wanted, name), name)
    assert (report.origin.format, report.origin.component) == ("diffusers", component)
    assert report.origin.other_components == {"text_encoder": len(state(text))}
    close(swapped("clip", tmp_path), output_tensor(wanted_text, "clip"), "clip")


@pytest.mark.long
def test_dora_of_a_unet(tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("unet", use_dora=True, target_modules=["to_q", "conv1"])
    theirs.save_lora_adapter(tmp_path)
    made = adaptc.compile(diffusion.model("unet"), tmp_path, example_inputs=diffusion.inputs("unet"))
    close(output_tensor(made, "unet"), output_tensor(theirs, "unet"), "unet")


# --- read by diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_load_lora_adapter_reads_what_is_written(name: str, prefix: bool, tmp_path: Path) -> None:
    model_with_peft_adapter(name, **VARIANTS["patterns"]).save_lora_adapter(tmp_path / "theirs")
    wanted = swapped(name, tmp_path / "theirs")
    component = COMPONENTS[name] if prefix else None
    file = adaptc.save_adapter(diffusion.program(name), tmp_path / "ours", format="diffusers", component=component)
    assert file == tmp_path / "ours" / "pytorch_lora_weights.safetensors"
    model = diffusion.model(name)
    model.load_lora_adapter(str(tmp_path / "ours"), prefix=component, use_safetensors=True)
    close(output_tensor(model, name), wanted, name)
    close(swapped(name, tmp_path / "ours"), wanted, name)
    front = f"{component}." if prefix else ""
    ours, theirs = load_file(file), load_file(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    assert ours.keys() == {front + k for k in theirs}
    assert all(torch.equal(ours[front + k], t) for k, t in theirs.items())


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_pipelines_read_a_text_encoder_that_is_written(name: str, tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("clip")
    wanted = swapped("clip", state(theirs), config=theirs.peft_config["default"])
    close(wanted, output_tensor(theirs, "clip"), "clip")
    adaptc.save_adapter(diffusion.program("clip"), tmp_path, format="diffusers", component="text_encoder")
    model, loader = diffusion.model("clip"), PIPELINES[name]
    tensors, *_, metadata = loader.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    loader.load_lora_into_text_encoder(
        tensors, network_alphas=None, text_encoder=model, prefix="text_encoder", metadata=metadata
    )
    close(output_tensor(model, "clip"), wanted, "clip")


# --- kohya ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("te", ["lora_te_text_model_", "lora_te1_text_model_"])
def test_kohya_files_mean_what_diffusers_makes_of_them(te: str, tmp_path: Path) -> None:
    """Written by the published layout, read by both. One alpha: of several diffusers keeps the most frequent one for
    attention layers, whose names it loses (tests/binding has files with several)."""
    torch.manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for name, prefix in (("unet", "lora_unet_"), ("clip", te)):
        targets = ("to_q", "to_out.0", "conv1", "proj_in") if name == "unet" else ("q_proj", "out_proj", "fc1")
        for module, layer in diffusion.model(name).named_modules():
            if module.endswith(targets):
                out_size, *into = layer.weight.shape
                key = prefix + module.replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = torch.randn(3, *into) / 2
                tensors[f"{key}.lora_up.weight"] = torch.randn(out_size, 3, *[1] * (len(into) - 1)) / 2
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    loader = PIPELINES["unet"]
    converted, alphas = loader.lora_state_dict(str(tmp_path / "kohya.safetensors"))
    unet, text = diffusion.model("unet"), diffusion.model("clip")
    loader.load_lora_into_unet(converted, network_alphas=alphas, unet=unet)
    close(swapped("unet", tmp_path / "kohya.safetensors"), output_tensor(unet, "unet"), "unet")
    loader.load_lora_into_text_encoder(converted, network_alphas=alphas, text_encoder=text)
    close(swapped("clip", tmp_path / "kohya.safetensors"), output_tensor(text, "clip"), "clip")
    # What its converter gives is taken as a state dict too, without the alphas that it gives apart.
    again = swapped("unet", converted)
    plain = diffusion.model("unet")
    loader.load_lora_into_unet(converted, network_alphas=None, unet=plain)
    close(again, output_tensor(plain, "unet"), "unet")


@pytest.mark.long
def test_kohya_files_with_original_names(tmp_path: Path) -> None:
    model = diffusion.model("unet")
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    original = original_names(names)
    assert sorted(original.values()) == sorted(names)  # one name each, and none without
    torch.manual_seed(4)
    tensors = {}
    for spelled, module in original.items():
        if module.endswith(("to_q", "conv1", "proj_in", "time_emb_proj", "conv_shortcut")):
            out_size, *into = model.get_submodule(module).weight.shape
            key = "lora_unet_" + spelled.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(3, *into) / 2
            tensors[f"{key}.lora_up.weight"] = torch.randn(out_size, 3, *[1] * (len(into) - 1)) / 2
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "ldm.safetensors")
    loader = PIPELINES["unet"]
    converted, alphas = loader.lora_state_dict(str(tmp_path / "ldm.safetensors"), unet_config=model.config)
    loader.load_lora_into_unet(converted, network_alphas=alphas, unet=model)
    close(swapped("unet", tmp_path / "ldm.safetensors"), output_tensor(model, "unet"), "unet")


@pytest.mark.long
@pytest.mark.parametrize("name", ["unet", "clip"])
def test_kohya_files_that_are_written(name: str, tmp_path: Path) -> None:
    theirs = model_with_peft_adapter(name, r=4, lora_alpha=3)
    config = theirs.peft_config["default"]
    wanted = swapped(name, state(theirs), config=config)
    component = COMPONENTS[name]
    program = diffusion.program(name)
    file = adaptc.save_adapter(program, tmp_path / "x.safetensors", format="kohya", component=component)
    loader = PIPELINES["unet"]
    converted, alphas = loader.lora_state_dict(str(file))
    model = diffusion.model(name)
    if name == "unet":
        loader.load_lora_into_unet(converted, network_alphas=alphas, unet=model)
    else:
        loader.load_lora_into_text_encoder(converted, network_alphas=alphas, text_encoder=model)
    close(output_tensor(model, name), wanted, name)
    before = {k: t.clone() for k, t in program.binding.values.items()}
    adaptc.swap(program, file)
    assert all(torch.equal(program.binding.values[k], t) for k, t in before.items())


def test_diffusers_own_kohya_writer(tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("unet", r=3, lora_alpha=3)
    kohya = convert_state_dict_to_kohya({f"unet.{k}": t for k, t in state(theirs).items()})
    save_file({k: t.contiguous() for k, t in kohya.items()}, tmp_path / "x.safetensors")
    close(swapped("unet", tmp_path / "x.safetensors"), output_tensor(theirs, "unet"), "unet")


# --- older names ------------------------------------------------------------------------------------------------------


def old_unet_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of attention processors that diffusers wrote in 2023 and still reads."""
    out: dict[str, Tensor] = {}
    for key, t in tensors.items():
        key = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        for new, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_out.0", "to_out")):
            key = key.replace(f".{new}.lora.", f".processor.{old}_lora.")
        out[f"unet.{key}"] = t
    return out


def test_processor_names(tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("unet", r=3, lora_alpha=3)
    old = old_unet_keys(state(theirs))
    assert any(".processor.to_out_lora.down.weight" in k for k in old)
    save_file({k: t.contiguous() for k, t in old.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    close(swapped("unet", tmp_path), output_tensor(theirs, "unet"), "unet")
    model = diffusion.model("unet")
    model.load_lora_adapter(str(tmp_path), prefix="unet", use_safetensors=True)
    close(output_tensor(model, "unet"), output_tensor(theirs, "unet"), "unet")
    bare = {k.removeprefix("unet."): t for k, t in old.items()}
    close(swapped("unet", bare), output_tensor(theirs, "unet"), "unet")


@pytest.mark.parametrize("outer", ["", "text_model."])
def test_text_encoder_names(outer: str, tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("clip", r=3, lora_alpha=3)
    middle = convert_state_dict_to_diffusers({outer + k: t for k, t in state(theirs).items()})
    oldest = {}
    for key, t in middle.items():
        for new, old in (("q_proj", "to_q"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            key = key.replace(f".{new}.lora_linear_layer.", f".{old}_lora.")
        oldest[key] = t
    assert any(".to_out_lora." in k for k in oldest)
    for tensors in (middle, oldest):
        save_file({f"text_encoder.{k}": t for k, t in tensors.items()}, tmp_path / "pytorch_lora_weights.safetensors")
        close(swapped("clip", tmp_path), output_tensor(theirs, "clip"), "clip")


@pytest.mark.long
def test_metadata_is_written_as_diffusers_reads_it(tmp_path: Path) -> None:
    theirs = model_with_peft_adapter("sd3")
    swapped("sd3", state(theirs), config=theirs.peft_config["default"])
    program = diffusion.program("sd3")
    file = adaptc.save_adapter(program, tmp_path / "x.safetensors", format="diffusers", component="transformer")
    with safe_open(file, "pt") as f:
        said = json.loads(f.metadata()["lora_adapter_metadata"])
    assert said["transformer.r"] == 3
    assert said["transformer.lora_alpha"] == 5
    assert all(k.startswith("transformer.") for k in said)
