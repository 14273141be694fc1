"""Files for FLUX and SD3 with the names of the original code: each means what diffusers makes of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError
from adaptc.adapter_files.formats.mmdit import original_transformer_layers
from adaptc.adapter_files.load import load
from adaptc.binding.sources.other_formats import translate_to_peft
from tests.support import diffusion
from tests.support.diffusion import output_tensor

RANK = 3


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The oracle's own warnings are no matter here, and what transformers asks of peft is none here either."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)
    }


def original_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Original name -> the shape of its weight, without norms and XLabs' names."""
    layers = original_transformer_layers(layer_shapes(model))
    return {n: x.shape for n, x in layers.items() if len(x.shape) > 1 and "processor" not in n}


def random_factors(shapes: Mapping[str, tuple[int, ...]], rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    ones = {n: (1,) * (len(s) - 2) for n, s in shapes.items()}
    return {n: (torch.randn(rank, *s[1:]) / 3, torch.randn(s[0], rank, *ones[n]) / 3) for n, s in shapes.items()}


def kohya(factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        out |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    return out


def comfy(factors: Mapping[str, tuple[Tensor, Tensor]], prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    return {f"{prefix}{n}.lora_{s}.weight": t for n, (a, b) in factors.items() for s, t in (("A", a), ("B", b))}


def changes(factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    return {n: (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) * scale for n, (a, b) in factors.items()}


def compiled(name: str, adapter: object, **options: object) -> adaptc.AdaptedProgram:
    return adaptc.compile(diffusion.model(name), adapter, example_inputs=diffusion.inputs(name), **options)


def check(name: str, adapter: object, wanted: Tensor, **options: object) -> adaptc.AdaptedProgram:
    program = compiled(name, adapter, **options)
    torch.testing.assert_close(output_tensor(program, name), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - output_tensor(diffusion.model(name), name)).abs().max() > 1e-2, "the adapter does nothing"
    return program


# --- FLUX -------------------------------------------------------------------------------------------------------------


def large_flux(**options: object) -> dict[str, Tensor]:
    """The weights of a FLUX of the published sizes, without values: diffusers' converters know no other ones."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True, **options).state_dict()


def translated(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(translate_to_peft(load(tensors), weights, None).tensors)


def test_parts_have_memory_of_their_own(small_layers: dict[str, Tensor]) -> None:
    """Layers share the first factor in the file, and training writes to each."""
    made = translated(
        {f"{FLAT}.lora_down.weight": torch.ones(2, 3072), f"{FLAT}.lora_up.weight": torch.ones(9216, 2)}
        | {f"{FLAT}.alpha": torch.tensor(2.0)},
        small_layers,
    )
    assert len(made) == 6
    assert len({t.untyped_storage().data_ptr() for t in made.values()}) == 6


def equal_to(converted: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    theirs = {k.removeprefix("transformer."): t for k, t in converted.items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], t) for k, t in ours.items())


@pytest.fixture(scope="module")
def small_layers() -> dict[str, Tensor]:
    return large_flux(num_layers=1, num_single_layers=1)


def factors_for(weights: Mapping[str, Tensor], rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    layers = original_transformer_layers(
        {k.removesuffix(".weight"): tuple(t.shape) for k, t in weights.items() if k.endswith(".weight")}
    )
    shapes = {n: x.shape for n, x in layers.items() if len(x.shape) > 1 and "processor" not in n}
    return random_factors({n: s for n, s in shapes.items() if "joint" not in n and "embedder" not in n}, rank)


def test_kohya_of_all_layers_as_diffusers_converts_it(small_layers: dict[str, Tensor]) -> None:
    given = kohya(factors_for(small_layers), 2.0)
    # It reads these as text encoders only; the alphas are one, so that it does not fold them into A.
    theirs = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(given))
    equal_to(theirs, translated(given, small_layers))


def test_xlabs_as_diffusers_converts_it(small_layers: dict[str, Tensor]) -> None:
    layers = original_transformer_layers(
        {k.removesuffix(".weight"): tuple(t.shape) for k, t in small_layers.items() if k.endswith(".weight")}
    )
    factors = random_factors({n: x.shape for n, x in layers.items() if "processor" in n}, 2)
    assert len(factors) == 6
    given = {f"{n}.{w}.weight": t for n, (a, b) in factors.items() for w, t in (("down", a), ("up", b))}
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(given))
    equal_to(theirs, translated(given, small_layers))


@pytest.mark.long
def test_control_as_diffusers_converts_it() -> None:
    """Black Forest Labs' own adapters have biases, and the weights of norms as they are."""
    weights = large_flux()
    factors = factors_for(weights)
    given = comfy(factors, "")
    given |= {f"{n}.lora_B.bias": torch.randn(b.shape[0]) for n, (_, b) in factors.items()}
    norms = {
        n: x.parts[0].module
        for n, x in original_transformer_layers(
            {k.removesuffix(".weight"): tuple(t.shape) for k, t in weights.items() if k.endswith(".weight")}
        ).items()
        if len(x.shape) == 1 and "ln_" not in n
    }
    given |= {f"{n}.scale": torch.randn(128) for n in norms}
    assert len(norms) == 19 * 4 + 38 * 2
    theirs = lora_conversion_utils._convert_bfl_flux_control_lora_to_diffusers(dict(given))
    # It exchanges the halves of A as well as those of B's rows, and their product is then another one.
    theirs["transformer.norm_out.linear.lora_A.weight"] = given["final_layer.adaLN_modulation.1.lora_A.weight"]
    equal_to(theirs, translated(given, weights))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_names_of_the_original_code_say_that_the_scale_is_one(prefix: str, small_layers: dict[str, Tensor]) -> None:
    given = comfy(factors_for(small_layers), prefix)
    made = translate_to_peft(load(given), small_layers, None)
    assert (made.config["r"], made.config["lora_alpha"], made.config["alpha_pattern"]) == (2, 2, {})
    with pytest.raises(CheckpointError, match="does not say its alpha"):
        translate_to_peft(
            load({"x.lora_A.weight": torch.ones(2, 7), "x.lora_B.weight": torch.ones(5, 2)}),
            {"x.weight": torch.ones(5, 7)},
            None,
        )


def flux_shapes() -> dict[str, tuple[int, ...]]:
    shapes = original_shapes(diffusion.model("flux"))
    return {n: s for n, s in shapes.items() if not re.match(r"joint_blocks|[txy]_embedder", n)}


@pytest.mark.long
def test_kohya_as_diffusers_loads_it(tmp_path: Path) -> None:
    """Without the first layer of single blocks, whose size diffusers' converter has as a number."""
    factors = random_factors({n: s for n, s in flux_shapes().items() if "blocks" in n and "linear1" not in n})
    save_file(kohya(factors, 5.0), tmp_path / "flux.safetensors")
    model, loader = diffusion.model("flux"), lora_pipeline.FluxLoraLoaderMixin
    converted, alphas = loader.lora_state_dict(str(tmp_path / "flux.safetensors"), return_alphas=True)
    loader.load_lora_into_transformer(converted, network_alphas=alphas, transformer=model)
    program = check("flux", tmp_path / "flux.safetensors", output_tensor(model, "flux"))
    assert (program.binding.origin.format, program.binding.origin.component) == ("kohya", "unet")


def with_changes(name: str, by_original: Mapping[str, Tensor]) -> nn.Module:
    """The model with these changes of original layers, by the order of rows that its code has."""
    model = diffusion.model(name)
    layers = original_transformer_layers(layer_shapes(model))
    with torch.no_grad():
        for original, change in by_original.items():
            for part in layers[original].parts:
                rows = torch.cat([change[start:stop] for start, stop in part.rows])
                model.get_submodule(part.module).weight += rows
    return model


@pytest.mark.long
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_comfyui_of_all_layers(prefix: str) -> None:
    """The order of rows is what the tests above compare with diffusers'."""
    factors = random_factors(flux_shapes())
    wanted = output_tensor(with_changes("flux", changes(factors)), "flux")
    made = check("flux", comfy(factors, prefix), wanted)
    assert made.binding.origin.format == "diffusers"


@pytest.mark.long
def test_merged_swapped_saved_and_unloaded(tmp_path: Path) -> None:
    one, two = random_factors(flux_shapes()), random_factors(flux_shapes(), 2)
    program = compiled("flux", kohya(one, 2.0))
    base = output_tensor(diffusion.model("flux"), "flux")
    adaptc.swap(program, kohya(two, 3.0))
    wanted = output_tensor(with_changes("flux", changes(two, 1.5)), "flux")
    torch.testing.assert_close(output_tensor(program, "flux"), wanted, rtol=1e-4, atol=1e-5)
    again = compiled("flux", adaptc.save_adapter(program, tmp_path / "peft"))
    torch.testing.assert_close(output_tensor(again, "flux"), output_tensor(program, "flux"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output_tensor(adaptc.merge(program), "flux"), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_tensor(adaptc.unload(program), "flux"), base)


# --- SD3 --------------------------------------------------------------------------------------------------------------


def sd3_shapes() -> dict[str, tuple[int, ...]]:
    shapes = original_shapes(diffusion.model("sd3")) | {"context_embedder": (12, 10)}
    return {n: s for n, s in shapes.items() if not re.match(r"double_blocks|img_in|txt_in|time_in|vector_in", n)}


def sd3_as_diffusers_converts(by_original: Mapping[str, Tensor]) -> nn.Module:
    """The model with these changes, converted as checkpoints are: the converter only moves rows."""
    model = diffusion.model("sd3")
    checkpoint = {f"{n}.weight": t for n, t in by_original.items()}
    checkpoint |= {f"{n}.bias": torch.zeros(t.shape[0]) for n, t in by_original.items()}
    checkpoint |= {"pos_embed": torch.zeros(1)}
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    with torch.no_grad():
        for key, change in converted.items():
            if key.endswith(".weight"):
                model.get_parameter(key).add_(change)
    return model


def test_rows_of_sd3_5_are_those_of_diffusers_converter() -> None:
    """With norms of q and k, and a second attention in the first block. Each row of each layer has a number."""
    sizes = {"attention_head_dim": 6, "num_attention_heads": 2, "joint_attention_dim": 10, "caption_projection_dim": 12}
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=8,
            num_layers=3,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            pooled_projection_dim=14,
            **sizes,
        )
    layers = original_transformer_layers(layer_shapes(model))
    layers = {n: x for n, x in layers.items() if not re.match(r"double_blocks|img_in|txt_in|time_in|vector_in", n)}
    given = {f"{n}.weight": torch.arange(x.shape[0]) + 1000 * i for i, (n, x) in enumerate(layers.items())}
    filler = {f"{n}.bias": torch.zeros(x.shape[0]) for n, x in layers.items()}
    filler |= {"context_embedder.weight": torch.zeros(12), "context_embedder.bias": torch.zeros(12)}
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        dict(given) | filler | {"pos_embed": torch.zeros(1)}
    )
    ours = {
        f"{part.module}.weight": torch.cat([given[f"{n}.weight"][start:stop] for start, stop in part.rows])
        for n, x in layers.items()
        for part in x.parts
    }
    assert {"transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.2.norm1_context.linear.weight"} <= ours.keys()
    theirs = {k: t for k, t in theirs.items() if k.endswith(".weight") and k != "context_embedder.weight"}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], t) for k, t in ours.items())


FILES: dict[str, Callable[[Mapping[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]] = {
    "kohya": lambda factors: kohya(factors, float(RANK)),
    "comfyui": comfy,
}


@pytest.mark.long
@pytest.mark.parametrize("form", FILES)
def test_sd3(form: str) -> None:
    factors = random_factors(sd3_shapes())
    wanted = output_tensor(sd3_as_diffusers_converts(changes(factors)), "sd3")
    check("sd3", FILES[form](factors), wanted)


# --- other methods, and what does not fit -----------------------------------------------------------------------------

QKV = "double_blocks.0.img_attn.qkv"
FLAT = f"lora_unet_{QKV.replace('.', '_')}"


@pytest.mark.long
def test_other_methods_of_a_fused_layer() -> None:
    torch.manual_seed(6)
    out, into = flux_shapes()[QKV]
    diff, bias = torch.randn(out, into) / 5, torch.randn(out)
    model = with_changes("flux", {QKV: diff})
    with torch.no_grad():
        for name, part in zip(("to_q", "to_k", "to_v"), bias.chunk(3), strict=True):
            model.transformer_blocks[0].attn.get_submodule(name).bias += part
    check("flux", {f"{FLAT}.diff": diff, f"{FLAT}.diff_b": bias}, output_tensor(model, "flux"))
    loha = {n: torch.randn(*s) / 2 for n, s in (("w1_a", (out, 3)), ("w1_b", (3, into)))}
    loha |= {n: torch.randn(*s) / 2 for n, s in (("w2_a", (out, 3)), ("w2_b", (3, into)))}
    change = (loha["w1_a"] @ loha["w1_b"]) * (loha["w2_a"] @ loha["w2_b"])
    given = {f"{FLAT}.hada_{n}": t for n, t in loha.items()}
    check("flux", given, output_tensor(with_changes("flux", {QKV: change}), "flux"))
    first, second = torch.randn(12, 4), torch.randn(8, 8) / 3
    given = {f"{FLAT}.lokr_w1": first, f"{FLAT}.lokr_w2": second}
    check("flux", given, output_tensor(with_changes("flux", {QKV: torch.kron(first, second)}), "flux"))


@pytest.mark.long
def test_dora_of_a_fused_layer() -> None:
    torch.manual_seed(6)
    out, into = flux_shapes()[QKV]
    a, b, lengths = torch.randn(3, into), torch.randn(out, 3), torch.rand(out) + 0.5
    given = {f"{FLAT}.lora_down.weight": a, f"{FLAT}.lora_up.weight": b, f"{FLAT}.dora_scale": lengths.unsqueeze(1)}
    attention = diffusion.model("flux").transformer_blocks[0].attn
    weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).detach()
    turned = (weight + b @ a) * (lengths / (weight + b @ a).norm(dim=1)).unsqueeze(1)
    check("flux", given, output_tensor(with_changes("flux", {QKV: turned - weight}), "flux"))


def lora(rows: int, into: int = 32, name: str = FLAT) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, into), f"{name}.lora_up.weight": torch.ones(rows, 2)}


BROKEN = {
    "rows of another model": (lora(93), r"has shape \(93, 2\), expected 96 rows: the layer is .*to_q.*to_k.*to_v"),
    "columns of another model": (lora(96, 31), r"to_q.lora_A.weight' has shape \(2, 31\), expected \(2, 32\)"),
    "half of a pair": ({f"{FLAT}.lora_up.weight": torch.ones(96, 2)}, r"to_q'.* no lora_A.weight"),
    "twice": (
        lora(96) | lora(32, name="lora_unet_transformer_blocks_0_attn_to_q"),
        "attn.to_q' is adapted by its own name, and as a part",
    ),
    "a block that is not there": (lora(96, name=FLAT.replace("0", "7")), r"names no module|name no module"),
    "LoKr across": (
        {f"{FLAT}.lokr_w1": torch.ones(2, 4), f"{FLAT}.lokr_w2": torch.ones(48, 8)},
        r"factors of 2 and 48 rows cannot be divided .*begin at 0, 32, 64",
    ),
    "half of a LoKr": ({f"{FLAT}.lokr_w1": torch.ones(12, 4)}, r"has lokr_w1 and no lokr_w2_a"),
    "a kernel": (
        {f"{FLAT}.hada_{n}": torch.ones(3, 3) for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        "is of a convolution kernel",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    tensors, match = BROKEN[name]
    program = diffusion.program("flux")
    before = program.binding
    with pytest.raises(CheckpointError, match=match):
        adaptc.swap(program, tensors)
    assert program.binding is before
