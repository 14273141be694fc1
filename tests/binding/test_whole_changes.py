"""Whole changes of weights, biases and norms, and IA3, as LyCORIS defines them: the changed model is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError, LoHaConfig, LoraConfig
from adaptc.adapter_files.formats.full_rank import full_rank_factors
from adaptc.adapter_files.load import load
from adaptc.binding.sources.other_formats import translate_to_peft


class Net(nn.Module):
    """Layers of each kind: with and without a bias, a convolution with groups, an embedding and two kinds of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 7)
        self.fc = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.out = nn.Linear(11, 5, bias=False)
        self.conv = nn.Conv2d(3, 10, 3)
        self.grouped = nn.Conv2d(10, 6, (1, 3), groups=2)
        self.group_norm = nn.GroupNorm(3, 6)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        text = self.out(torch.relu(self.norm(self.fc(self.table(ids)))))
        return text, self.group_norm(self.grouped(torch.relu(self.conv(image))))


@lru_cache
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@lru_cache
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"ids": torch.randint(0, 13, (2, 5)), "image": torch.randn(2, 3, 9, 8)}


def program(adapter: object, **options: object) -> adaptc.AdaptedProgram:
    return adaptc.compile(net(), adapter, example_inputs=inputs(), **options)


NORMS = ("norm", "group_norm")


def changes(*modules: str, seed: int = 2, biases: bool = True) -> dict[str, Tensor]:
    """Parameter -> what is added to it."""
    torch.manual_seed(seed)
    params = dict(net().named_parameters())
    return {
        n: torch.randn_like(p) / 2
        for n, p in params.items()
        if n.rpartition(".")[0] in modules and (biases or not n.endswith("bias"))
    }


def lycoris(added: Mapping[str, Tensor], prefix: str = "lycoris_") -> dict[str, Tensor]:
    """The keys that LyCORIS gives changes of parameters."""
    names = {"weight": "diff", "bias": "diff_b"}, {"weight": "w_norm", "bias": "b_norm"}
    out = {}
    for param, t in added.items():
        module, _, end = param.rpartition(".")
        out[f"{prefix}{module}.{names[module in NORMS][end]}"] = t
    return out


def changed(added: Mapping[str, Tensor]) -> Net:
    other = copy.deepcopy(net())
    with torch.no_grad():
        for name, t in added.items():
            other.get_parameter(name).add_(t)
    return other


@torch.no_grad()
def check(subject: object, added: Mapping[str, Tensor]) -> None:
    compare(subject, changed(added))


@torch.no_grad()
def compare(subject: object, model: nn.Module) -> None:
    for got, wanted in zip(subject(**inputs()), model(**inputs()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


ALL = ("table", "fc", "norm", "out", "conv", "grouped", "group_norm")


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "diffusion_model."])
def test_every_layer_as_the_changed_model(prefix: str) -> None:
    added = changes(*ALL)
    made = program(lycoris(added, prefix))
    check(made, added)
    with torch.no_grad():
        assert all((a - b).abs().max() > 0.1 for a, b in zip(made(**inputs()), net()(**inputs()), strict=True))
    assert made.binding.config.peft_type == "LORA"


def test_merged_weights_are_the_sums_to_the_bit() -> None:
    """One factor is the identity, and the other the change."""
    added = changes("fc", "out", "conv", "norm")
    merged = adaptc.merge(program(lycoris(added)))
    wanted = changed(added)
    for name in added:
        assert torch.equal(merged.state_dict[name], wanted.get_parameter(name).detach()), name


@pytest.mark.parametrize(("out", "into"), [(11, 7), (5, 11)])
def test_the_identity_is_of_the_smaller_size(out: int, into: int) -> None:
    change = torch.randn(out, into)
    factors = full_rank_factors(change)
    small, large = sorted(factors.values(), key=Tensor.numel)
    assert torch.equal(small, torch.eye(min(out, into)))
    assert torch.equal(large, change)


@pytest.mark.parametrize("absent", [torch.full((11,), float("nan")), torch.ones(11, device="meta")])
def test_a_package_without_the_base_says_what_is_missing(absent: Tensor) -> None:
    """A package has NaN for a weight that is not in its file."""
    for missing in ("weight", "bias"):
        weights = {"norm.weight": torch.ones(11), "norm.bias": torch.ones(11)} | {f"norm.{missing}": absent}
        with pytest.raises(CheckpointError, match=rf"'norm'.* The base's {missing}, to which .* is not here\."):
            translate_to_peft(load({"lycoris_norm.w_norm": torch.ones(11)}), weights, None)


@pytest.mark.long
def test_swapped_saved_loaded_in_a_bank_and_unloaded(tmp_path: Path) -> None:
    one, two = changes(*ALL), changes(*ALL, seed=3)
    made = program(lycoris(one))
    adaptc.swap(made, lycoris(two))
    check(made, two)
    adaptc.save_adapter(made, tmp_path / "peft")
    check(program(tmp_path / "peft"), two)
    adaptc.save(made, tmp_path / "p.pt2")
    loaded = adaptc.load(tmp_path / "p.pt2")
    check(loaded, two)
    adaptc.swap(loaded, lycoris(one))
    check(loaded, one)
    merged = adaptc.merge(made)
    check(merged, two)
    check(adaptc.unmerge(merged), two)
    compare(adaptc.unload(made), net())


def test_rows_of_a_batch_have_changes_of_their_own() -> None:
    one, two = changes("fc", "norm", "out"), changes("fc", "norm", "out", seed=3)
    bank = program(lycoris(one)).bank({"one": lycoris(one), "two": lycoris(two)})
    with torch.no_grad():
        text, _ = bank(**inputs(), adapters=["one", "two"])
        for row, added in enumerate((one, two)):
            torch.testing.assert_close(text[row], changed(added)(**inputs())[0][row], rtol=1e-4, atol=1e-5)


def test_a_change_goes_into_any_program_with_lora_and_has_a_scale() -> None:
    added = changes("fc", "conv", biases=False)
    made = program(LoraConfig(target_modules=["fc", "conv", "out"]))
    adaptc.swap(made, lycoris(added))
    check(made, added)
    adaptc.swap(made, lycoris(added), scale=0.5)
    check(made, {n: t / 2 for n, t in added.items()})


def test_beside_lora_each_keeps_its_own_scale() -> None:
    added = changes("fc", "norm")
    a, b = torch.randn(3, 11), torch.randn(5, 3)
    factors = {
        "lycoris_out.lora_down.weight": a,
        "lycoris_out.lora_up.weight": b,
        "lycoris_out.alpha": torch.tensor(2.0),
    }
    made = program(lycoris(added) | factors)
    check(made, added | {"out.weight": b @ a * 2 / 3})
    assert made.binding.config.modules_to_save == ["norm"]
    # An alpha beside a whole change means nothing to LyCORIS.
    check(
        program(lycoris(added) | factors | {"lycoris_fc.alpha": torch.tensor(3.0)}),
        added | {"out.weight": b @ a * 2 / 3},
    )
    no_alpha = {k: t for k, t in (lycoris(added) | factors).items() if not k.endswith("alpha")}
    said = program(no_alpha, config=LoraConfig(r=3, lora_alpha=2))
    check(said, added | {"out.weight": b @ a * 2 / 3})
    rooted = program(no_alpha, config=LoraConfig(r=3, lora_alpha=2, use_rslora=True))
    check(rooted, added | {"out.weight": b @ a * 2 / 3**0.5})


def test_beside_loha_a_change_is_a_whole_module(tmp_path: Path) -> None:
    added = changes("fc", "norm")
    w = {n: torch.randn(*s) / 2 for n, s in (("w1_a", (5, 2)), ("w1_b", (2, 11)), ("w2_a", (5, 2)), ("w2_b", (2, 11)))}
    loha = {f"lycoris_out.hada_{n}": t for n, t in w.items()}
    made = program(lycoris(added) | loha)
    assert type(made.binding.config) is LoHaConfig
    full = added | {"out.weight": (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])}
    check(made, full)
    adaptc.save_adapter(made, tmp_path / "peft")
    check(program(tmp_path / "peft"), full)


@pytest.mark.parametrize("modules", [("norm",), ("norm", "group_norm")])
def test_norms_alone_are_ln_tuning(modules: tuple[str, ...], tmp_path: Path) -> None:
    added = changes(*modules)
    made = program(lycoris(added))
    assert made.binding.config.peft_type == "LN_TUNING"
    check(made, added)
    adaptc.save_adapter(made, tmp_path / "peft")
    check(program(tmp_path / "peft"), added)
    with pytest.raises(ConfigError, match="has no LORA, and config= is a LoraConfig: leave it out"):
        program(lycoris(added), config=LoraConfig(r=3))


def test_parts_of_a_module_leave_the_others_as_they_are() -> None:
    only = {"norm.bias": torch.ones(11), "fc.bias": torch.ones(11), "out.weight": torch.ones(5, 11)}
    check(program(lycoris(only)), only)
    check(program(lycoris({"norm.weight": torch.ones(11)})), {"norm.weight": torch.ones(11)})
    check(program(lycoris({"fc.bias": torch.ones(11)})), {"fc.bias": torch.ones(11)})


def test_half_precision_is_added_in_float32_and_rounded_once() -> None:
    model = copy.deepcopy(net()).to(torch.bfloat16)
    x = {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in inputs().items()}
    change = torch.randn(11).half()
    made = adaptc.compile(model, {"lycoris_norm.w_norm": change}, example_inputs=x)
    (value,) = (t for n, t in made.binding.values.items() if n.endswith("weight"))
    assert torch.equal(value.detach(), (model.norm.weight.float() + change.float()).to(torch.bfloat16))


@pytest.mark.parametrize(("module", "on_input"), [("fc", True), ("conv", True), ("grouped", True), ("out", False)])
def test_ia3_is_lycoris_formula(module: str, on_input: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    layer = net().get_submodule(module)
    weight = layer.weight.detach()
    channels = getattr(layer, "in_channels", weight.shape[1]) if on_input else weight.shape[0]
    w = torch.randn(channels) / 2
    flag = torch.tensor(int(on_input))
    stored = w.reshape(1, -1, *[1] * (weight.ndim - 2)) if weight.ndim > 2 else w
    made = program({f"lycoris_{module}.weight": stored, f"lycoris_{module}.on_input": flag})
    # Each group of a convolution has channels of its own.
    columns = w.reshape(getattr(layer, "groups", 1), -1).repeat_interleave(
        weight.shape[0] // getattr(layer, "groups", 1), 0
    )
    factor = columns.reshape(*columns.shape, *[1] * (weight.ndim - 2)) if on_input else w.reshape(-1, 1)
    check(made, {f"{module}.weight": weight * factor})
    adaptc.save_adapter(made, tmp_path / "peft")
    check(program(tmp_path / "peft"), {f"{module}.weight": weight * factor})


def test_ia3_of_several_layers_scales_inputs_where_the_file_says_so() -> None:
    wide, narrow = torch.randn(7) / 2, torch.randn(5) / 2
    given = {"lycoris_fc.weight": wide, "lycoris_fc.on_input": torch.tensor(1)}
    given |= {"lycoris_out.weight": narrow.half(), "lycoris_out.on_input": torch.tensor(0)}
    weights = {"fc.weight": net().fc.weight * wide, "out.weight": net().out.weight * narrow.half().float().unsqueeze(1)}
    check(program(given), {n: t.detach() for n, t in weights.items()})


def test_sizes_tell_of_which_component_a_change_is() -> None:
    """Two text encoders have layers of the same names."""
    added = changes("fc", "norm", biases=False)
    other = {
        k.replace("te1", "te2"): torch.ones(t.shape[0] + 2, *t.shape[1:])
        for k, t in lycoris(added, "lora_te1_").items()
    }
    made = program(lycoris(added, "lora_te1_") | other)
    check(made, added)
    assert made.binding.origin.component == "text_encoder"


LOHA = {f"lycoris_fc.hada_{n}": torch.ones(2, 2) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
BROKEN = {
    "shape": ({"lycoris_fc.diff": torch.ones(11, 8)}, r"'fc'.*\(11, 8\), and the model's weight has \(11, 7\)"),
    "shape of a bias": ({"lycoris_fc.diff_b": torch.ones(12)}, r"'fc'.*\(12,\), and the model's bias has \(11,\)"),
    "no bias there": (
        {"lycoris_out.diff_b": torch.ones(5)},
        r"'out'.* trains its bias, and the model's module has none",
    ),
    "weight and factors": (
        {"lycoris_fc.diff": torch.ones(11, 7), "lycoris_fc.lora_up.weight": torch.ones(11, 2)},
        r"'fc' has a whole weight beside the tensors of a method, lora_B.weight",
    ),
    "norm spelled twice": (
        {"lycoris_norm.diff": torch.ones(11), "lycoris_norm.w_norm": torch.ones(11)},
        "are both diff of 'norm'",
    ),
    "bias beside LoHa": (
        {"lycoris_fc.diff_b": torch.ones(11), **LOHA},
        "'fc' has a trained bias, and LOHA trains none in PEFT",
    ),
    "not finite": ({"lycoris_fc.diff": torch.full((11, 7), float("nan"))}, "NaN"),
    "alpha alone": ({"lycoris_fc.alpha": torch.tensor(1.0)}, "an alpha and nothing else"),
    "IA3 of outputs with a bias": (
        {"lycoris_fc.weight": torch.ones(11), "lycoris_fc.on_input": torch.tensor(0)},
        "LyCORIS leaves the bias as it is.*subtract_adapter",
    ),
    "IA3 with lengths of rows": (
        {"lycoris_out.weight": torch.ones(5), "lycoris_out.dora_scale": torch.ones(5, 1)},
        "'out' has dora_scale, lengths of rows, and no LoRA beside them",
    ),
    "LoKr without values": (
        {"lycoris_out.lokr_w1": torch.ones(0, 7), "lycoris_out.lokr_w2": torch.ones(5, 1)},
        r"'lokr_w1' has shape \(0, 7\), expected a matrix",
    ),
    "half of an IA3": (
        {"lycoris_out.weight": torch.ones(5)},
        "'out' has weight and no on_input; the file is not complete",
    ),
    "IA3 of another size": (
        {"lycoris_out.weight": torch.ones(6), "lycoris_out.on_input": torch.tensor(0)},
        r"has shape \(6, 1\), expected \(5, 1\)|At 'out' the program has the method 'lora'",
    ),
    "odd flag": ({"lycoris_out.weight": torch.ones(5), "lycoris_out.on_input": torch.ones(2)}, "is no finite number"),
    "GLoRA": ({"lycoris_fc.a1.weight": torch.ones(7, 2)}, "GLoRA of LyCORIS, which multiplies .*subtract_adapter"),
    "Diag-OFT": ({"lycoris_fc.oft_blocks": torch.ones(1, 11, 11)}, "turns a layer's outputs where PEFT's OFT .*inputs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    tensors, match = BROKEN[name]
    made = wide()
    before = made.binding
    for call in (lambda: program(tensors), lambda: adaptc.swap(made, tensors)):
        with pytest.raises(AdaptcError, match=match):
            call()
    assert made.binding is before


@lru_cache
def wide() -> adaptc.AdaptedProgram:
    return program(LoraConfig(target_modules=["fc", "out"]))


def test_a_change_beside_a_quantised_weight_is_added_to_what_it_computes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    made = adaptc.quantize(adaptc.compile(model, LoraConfig(target_modules=["0"]), example_inputs=x), "nf4")
    change = torch.randn(32, 64) / 8
    with torch.no_grad():
        base = adaptc.unload(made)(x)
        adaptc.swap(made, {"lycoris_0.diff": change})
        torch.testing.assert_close(made(x), base + F.linear(x, change), rtol=1e-4, atol=1e-5)
