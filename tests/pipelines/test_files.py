"""Files of adapters for pipelines: diffusers' converters read them, and what these drop is read or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc.adapter_files.formats.ldm import original_names
from adaptc.pipelines.traced_tensors import lost_keys, plain, traced
from tests.support import pipelines
from tests.support.pipelines import DENOISER, LAYERS, TEXT_ENCODERS, TEXT_LAYERS, adapted, images, pipeline, write_lora

_PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya(name: str, kind: str = "lora", text: bool = True, is_original: bool = False) -> dict[str, Tensor]:
    """Tensors as kohya's scripts and LyCORIS name them; ``is_original`` names a UNet's layers by its original code."""
    pipe, tensors = pipeline(name), dict[str, Tensor]()
    torch.manual_seed(4)
    for component in [DENOISER[name], *(TEXT_ENCODERS[name] if text else [])]:
        module = getattr(pipe, component)
        is_text = component.startswith("text")
        names = [n for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        spelled = {v: k for k, v in original_names(names).items()} if is_original and not is_text else {}
        for path in names:
            if path.endswith(tuple(TEXT_LAYERS if is_text else LAYERS[name])):
                full = f"text_model.{path.removeprefix('text_model.')}" if is_text else spelled.get(path, path)
                key = _PREFIXES.get(component, "lora_unet_") + full.replace(".", "_")
                weight = module.get_submodule(path).weight
                tensors |= {f"{key}.{slot}": t for slot, t in _slots(kind, weight).items()}
    return tensors


def _slots(kind: str, weight: Tensor) -> dict[str, Tensor]:
    out, *into = weight.shape
    width = weight[0].numel()
    alpha = {"alpha": torch.tensor(2.0)}
    if kind == "loha":
        sides = ("hada_w1", "hada_w2")
        slots = {f"{s}_a": torch.randn(out, 3) / 2 for s in sides} | {
            f"{s}_b": torch.randn(3, width) / 2 for s in sides
        }
        return slots | alpha
    if kind == "lokr":
        return {
            "lokr_w1": torch.randn(2, 2) / 2,
            "lokr_w2": torch.randn(out // 2, into[0] // 2, *into[1:]) / 9,
            **alpha,
        }
    down, up = torch.randn(3, *into) / 3, torch.randn(out, 3, *[1] * (len(into) - 1)) / 3
    dora = {"dora_scale": weight.flatten(1).norm(dim=1)[:, None] * 1.5} if kind == "dora" else {}
    return {"lora_down.weight": down, "lora_up.weight": up, **alpha, **dora}


def _close(ours: Any, theirs: Any, name: str) -> None:
    base, wanted = images(pipeline(name), name), images(theirs, name)
    torch.testing.assert_close(images(ours, name), wanted, rtol=0, atol=1e-4)
    assert (wanted - base).abs().max() > 1e-2


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "is_original"), [("sd", False), ("sdxl", False), ("sdxl", True)])
def test_kohyas_files_mean_what_diffusers_makes_of_them(name: str, is_original: bool, tmp_path: Path) -> None:
    save_file(kohya(name, is_original=is_original), tmp_path / "x.safetensors")
    theirs, ours = pipeline(name), adapted(name)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert set(ours.get_list_adapters()) == {"unet", *TEXT_ENCODERS[name]}
    _close(ours, theirs, name)


@pytest.mark.long
def test_names_that_a_converter_gets_wrong_are_read_by_adaptc() -> None:
    """diffusers renames a UNet's original names for SDXL alone, and makes names of no module of them for others."""
    theirs, ours = pipeline("sd"), adapted("sd")
    theirs.load_lora_weights(kohya("sd"))
    ours.load_lora_weights(kohya("sd", is_original=True))
    _close(ours, theirs, "sd")


@pytest.mark.long
@pytest.mark.few(6)
@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_what_diffusers_does_not_read(name: str, kind: str) -> None:
    """The oracle is the changed weight, computed here."""
    tensors, plain_lora = kohya(name, kind, text=False), kohya(name, text=False)
    theirs, other, ours = _with_changes(name, kind, tensors), _with_changes(name, "lora", plain_lora), adapted(name)
    ours.load_lora_weights(tensors, adapter_name="x")
    _close(ours, theirs, name)
    # Beside it LoRA, which another method cannot act together with.
    ours.load_lora_weights(plain_lora, adapter_name="y")
    _close(ours, other, name)
    ours.set_adapters("x")
    _close(ours, theirs, name)
    with pytest.raises(adaptc.ConfigError, match="cannot act together"):
        ours.set_adapters(["x", "y"])
    assert ours.get_active_adapters() == ["x"]


def _with_changes(name: str, kind: str, tensors: dict[str, Tensor]) -> Any:
    """The pipeline with an adapter's changes in its weights."""
    made = pipeline(name)
    for path, layer in getattr(made, DENOISER[name]).named_modules():
        key = "lora_unet_" + path.replace(".", "_")
        slots = {k.removeprefix(f"{key}."): t for k, t in tensors.items() if k.startswith(f"{key}.")}
        if slots:
            layer.weight.data = _changed(kind, layer.weight.data, slots)
    return made


def _changed(kind: str, weight: Tensor, slots: dict[str, Tensor]) -> Tensor:
    scale = 2.0 / 3
    if kind == "loha":
        change = (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"])
        return weight + scale * change.reshape(weight.shape)
    if kind == "lokr":  # of two whole factors the scale is 1
        first = slots["lokr_w1"].reshape(2, 2, *[1] * (weight.ndim - 2))
        return weight + torch.kron(first, slots["lokr_w2"])
    down, up = slots["lora_down.weight"].flatten(1), slots["lora_up.weight"].flatten(1)
    whole = weight + scale * (up @ down).reshape(weight.shape)
    if kind == "lora":
        return whole
    norm = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return whole / norm * slots["dora_scale"].reshape(norm.shape)


# --- bad input ----------------------------------------------------------------------------------------------------


def _refused(ours: Any, name: str, source: Any, match: str) -> None:
    before, listed, active = images(ours, name), ours.get_list_adapters(), ours.get_active_adapters()
    with pytest.raises(adaptc.CheckpointError, match=match):
        ours.load_lora_weights(source, adapter_name="bad")
    assert (ours.get_list_adapters(), ours.get_active_adapters()) == (listed, active)
    assert torch.equal(images(ours, name), before)


@pytest.mark.long
def test_bad_files_are_named_and_change_nothing(tmp_path: Path) -> None:
    ours = adapted("sd")
    good = write_lora("sd", tmp_path)
    ours.load_lora_weights(good, adapter_name="good")
    tensors = load_file(good)
    flux = load_file(write_lora("flux", tmp_path / "flux", text=False))
    _refused(ours, "sd", flux, r"'transformer\.|transformer_blocks")
    _refused(ours, "sd", {**tensors, "unet.no_such_block.to_q.lora_A.weight": torch.ones(3, 8)}, "no_such_block")
    _refused(ours, "sd", {**tensors, "unet.down_blocks.1.attentions.0.proj_in.strange": torch.ones(3)}, "strange")
    # diffusers leaves this one out with a line in the log.
    dropped = {**tensors, "unet.down_blocks.1.attentions.0.proj_in.dora_scale": torch.ones(16, 1)}
    _refused(ours, "sd", dropped, r"proj_in\.dora_scale.*drops 1 of")
    second = {k.replace("text_encoder", "text_encoder_2"): t for k, t in tensors.items()}
    _refused(ours, "sd", second, "text_encoder_2.*the pipeline has no text_encoder_2")
    key = next(k for k in tensors if "to_q.lora_A" in k)
    _refused(ours, "sd", {**tensors, key: torch.ones(3, 5)}, "to_q")
    _refused(ours, "sd", {**tensors, key: torch.full_like(tensors[key], float("nan"))}, "to_q")
    half = tmp_path / "half.safetensors"
    half.write_bytes(good.read_bytes()[:-100])
    _refused(ours, "sd", half, "half.safetensors")
    _refused(ours, "sd", tmp_path / "missing.safetensors", "no file or directory")
    with pytest.raises(adaptc.ConfigError, match="does not know offset"):
        ours.load_lora_weights(good, offset=3)


@pytest.mark.long
def test_other_options_are_refused_by_name() -> None:
    base, ours = pipeline("sd"), adapted("sd")
    with pytest.raises(adaptc.ConfigError, match="training is not for whole pipelines"):
        adaptc.compile(base, adaptc.LoraConfig(target_modules=["to_q"]), training=True)
    with pytest.raises(adaptc.ConfigError, match="adapted already"):
        adaptc.compile(ours, None)
    for verb in ("enable_sequential_cpu_offload", "load_ip_adapter", "save_pretrained", "enable_freeu"):
        with pytest.raises(adaptc.AdaptcError, match=f"{verb} is not offered"):
            getattr(ours, verb)()
    with pytest.raises(adaptc.AdaptcError, match=r"unet\.set_attn_processor"):
        ours.unet.set_attn_processor(None)
    with pytest.raises(adaptc.ConfigError, match=r"captured in torch\.float32"):
        ours.to(torch.float16)
    with pytest.raises(adaptc.ConfigError, match="encoder_attention_mask"):
        ours.unet(**pipelines.denoiser_inputs("sd", torch.float32), encoder_attention_mask=torch.ones(3, 5))
    with pytest.raises(adaptc.ConfigError, match="ip_adapter_masks"):
        images(ours, "sd", cross_attention_kwargs={"ip_adapter_masks": []})
    ours.load_lora_weights(kohya("sd"), adapter_name="x")
    for weights, said in (
        ({"unit": 0.5}, "'unit'"),
        ({"unet": {"sideways": 1.0}}, "sideways"),
        ({"text_encoder": {"layers.9": 1.0}}, "layers.9"),
        ("much", "much"),
        ([1.0, 2.0], "give one for each name"),
    ):
        with pytest.raises(adaptc.ConfigError, match=said):
            ours.set_adapters("x", weights)
    assert ours.to("cpu") is ours


def test_tensors_that_a_converter_drops_are_told() -> None:
    given = {
        "a.lora_A": torch.ones(4, 3),
        "a.alpha": torch.tensor(2.0),
        "b": torch.ones(2),
        "c.alpha": torch.tensor(1.0),
    }
    followed = traced(given)
    made = {"x": torch.cat([followed["a.lora_A"][:2] * 2, followed["a.lora_A"][2:]]).chunk(2)[1]}
    assert lost_keys(given, made, {}) == ["b", "c.alpha"]
    assert lost_keys(given, {**made, "y": followed["b"].clone()}, {"c": followed["c.alpha"]}) == []
    assert type(plain(made["x"])) is Tensor
    torch.testing.assert_close(plain(made["x"]), given["a.lora_A"][2:])


def test_a_tensor_that_a_converter_writes_to_is_the_one_it_wrote() -> None:
    given = {name: torch.ones(2, 3) for name in "abcd"}
    followed = traced(given)
    followed["b"].mul_(2)
    followed["c"].data = torch.full((4,), 3.0)
    followed["d"] *= 5
    for name, wanted in {"a": torch.ones(2, 3), "b": torch.full((2, 3), 2.0), "c": torch.full((4,), 3.0)}.items():
        assert type(plain(followed[name])) is Tensor
        torch.testing.assert_close(plain(followed[name]), wanted, msg=name)
    torch.testing.assert_close(plain(followed["d"]), torch.full((2, 3), 5.0))
    assert plain(followed["a"]).data_ptr() == given["a"].data_ptr()
