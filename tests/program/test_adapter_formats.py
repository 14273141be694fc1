"""Adapters written in the formats of others: read again bit for bit; what a format cannot hold is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import adaptc
from adaptc import CheckpointError, ConfigError, IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from adaptc.cli import app
from tests.support.component_nets import (
    CONV,
    SHAPES,
    TO_Q,
    image,
    kohya,
    net,
    peft_keys,
    program,
    program_with_all_sites,
    write_safetensors,
)

CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=7, target_modules=list(SHAPES), init_lora_weights=False),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=list(SHAPES),
        init_lora_weights=False,
        rank_pattern={"to_q": 2, "conv1": 1},
        alpha_pattern={"conv_in": 0.3},
    ),
    "rslora": LoraConfig(r=4, lora_alpha=7, target_modules=[TO_Q], init_lora_weights=False, use_rslora=True),
    "dora": LoraConfig(r=2, target_modules=[TO_Q, CONV], use_dora=True, init_lora_weights=False),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=[TO_Q, CONV], init_weights=False),
    "lokr": LoKrConfig(r=1, alpha=3, target_modules=[TO_Q, CONV], init_weights=False),
    "lokr, both in parts": LoKrConfig(
        r=1, alpha=3, target_modules=[TO_Q], init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "loha, kernel": LoHaConfig(r=2, alpha=3, target_modules=[CONV], init_weights=False, use_effective_conv2d=True),
}
PAIRS = [(c, f) for c in CONFIGS for f in ("kohya", "diffusers") if not (f == "diffusers" and c.startswith("loha"))]


@pytest.mark.long
@pytest.mark.parametrize(("name", "form"), PAIRS)
@torch.no_grad()
def test_what_is_written_is_read_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = program(net(), CONFIGS[name])
    file = adaptc.save_adapter(made, tmp_path / "x.safetensors", format=form, component="unet")
    again = program(net(), file)
    assert again.binding.values.keys() == made.binding.values.keys()
    for fqn, value in made.binding.values.items():
        assert torch.equal(again.binding.values[fqn], value), fqn
    torch.testing.assert_close(again(image()), made(image()))
    # A second time the file is the same, and PEFT's directory in between changes nothing.
    adaptc.save_adapter(again, tmp_path / "peft")
    third = program(net(), tmp_path / "peft")
    twice = adaptc.save_adapter(third, tmp_path / "y.safetensors", format=form, component="unet")
    one, two = load_file(file), load_file(twice)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], t) for k, t in two.items())


@pytest.mark.long
def test_the_published_layout_is_written(tmp_path: Path) -> None:
    wide = program_with_all_sites()
    adaptc.swap(wide, kohya())
    written = load_file(adaptc.save_adapter(wide, tmp_path / "x.safetensors", format="kohya", component="unet"))
    assert written.keys() == kohya().keys()
    assert all(torch.equal(written[k], t) for k, t in kohya().items())


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    wide = program_with_all_sites()
    adaptc.swap(wide, kohya())
    for _ in range(2):
        adaptc.save_adapter(wide, tmp_path / "deep" / "er", format="diffusers", component="unet")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["pytorch_lora_weights.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        adaptc.save_adapter(wide, tmp_path / "file" / "x.safetensors", format="kohya", component="unet")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a file"):
        adaptc.save_adapter(wide, tmp_path / "taken.safetensors", format="kohya", component="unet")


def test_a_failed_write_leaves_no_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = program_with_all_sites()
    adaptc.swap(wide, kohya())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaptc.adapter_files.safe_load.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        adaptc.save_adapter(wide, tmp_path / "deep" / "x.safetensors", format="kohya", component="unet")
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    (LoraConfig(target_modules=[TO_Q], modules_to_save=["time_emb_proj"]), "kohya", "time_emb_proj"),
    (LoraConfig(target_modules=[TO_Q], bias="all"), "diffusers", "bias"),
    (LoraConfig(target_modules=[TO_Q], lora_bias=True), "kohya", r"'lora_B\.bias'"),
    (LoHaConfig(target_modules=[TO_Q]), "diffusers", "hada_w1_a"),
    (LoKrConfig(target_modules=[TO_Q], r=64, alpha=3), "kohya", "two whole factors"),
    (IA3Config(target_modules=[TO_Q], feedforward_modules=[]), "kohya", "ia3_l"),
    (LoraConfig(target_modules=[TO_Q], init_lora_weights="pissa", r=2), "diffusers", "changed the base"),
]


@pytest.mark.parametrize(("config", "form", "match"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(config: object, form: str, match: str, tmp_path: Path) -> None:
    made = program(net(), config)
    with pytest.raises(CheckpointError, match=match):
        adaptc.save_adapter(made, tmp_path / "x.safetensors", format=form, component="unet")
    assert list(tmp_path.iterdir()) == []


def test_options_are_taken_or_refused(tmp_path: Path) -> None:
    wide, to = program_with_all_sites(), tmp_path / "x.safetensors"
    adaptc.swap(wide, kohya())
    with pytest.raises(ConfigError, match=r"format='onnx' is not one of peft, kohya, diffusers"):
        adaptc.save_adapter(wide, to, format="onnx")
    with pytest.raises(ConfigError, match=r"component='unet'.*leave it out"):
        adaptc.save_adapter(wide, to, component="unet")
    with pytest.raises(CheckpointError, match=r"say component=, one of .*unet"):
        adaptc.save_adapter(wide, to, format="kohya")
    with pytest.raises(CheckpointError, match="component='vae'"):
        adaptc.save_adapter(wide, to, format="diffusers", component="vae")
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        adaptc.save_adapter(wide, tmp_path, format="kohya", component="unet")
    for option in ({"base_model": "a/b"}, {"safe_serialization": False}, {"save_embedding_layers": True}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            adaptc.save_adapter(wide, to, format="diffusers", component="unet", **option)
    assert list(tmp_path.iterdir()) == []


def test_names_that_underscores_make_one_are_not_written(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_q = nn.Linear(5, 4)
            self.add_module("in", nn.ModuleDict({"q": nn.Linear(5, 4)}))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.in_q(x) + self.get_submodule("in.q")(x)

    made = adaptc.compile(Twins(), LoraConfig(target_modules=["in_q"]), example_inputs=torch.randn(2, 5))
    with pytest.raises(CheckpointError, match="cannot tell 'in_q' from another module"):
        adaptc.save_adapter(made, tmp_path / "x.safetensors", format="kohya", component="unet")


# --- packages and the command line ------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_line(tmp_path: Path) -> None:
    wide = program_with_all_sites()
    adaptc.swap(wide, peft_keys(), config=LoraConfig(r=3, lora_alpha=3))
    adaptc.save(wide, tmp_path / "p.pt2")
    file = write_safetensors(tmp_path / "k.safetensors", kohya())

    def run(*args: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == 0, result.output
        return result.output

    shown = run("show", file)
    assert "kohya adapter in" in shown
    assert "tensors of unet" in shown
    assert "[kohya (unet)]" in run("swap", tmp_path / "p.pt2", file, tmp_path / "q.pt2", "--component", "unet")
    run("merge", tmp_path / "p.pt2", tmp_path / "m.pt2", "--adapter", file)
    run("export-adapter", tmp_path / "q.pt2", tmp_path / "d", "--format", "diffusers", "--component", "unet")
    written = load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    assert f"unet.{TO_Q}.lora_A.weight" in written
    assert json.dumps(sorted(written)).count("lora_B") == len(SHAPES)
    with torch.no_grad():
        adaptc.swap(wide, file)
        torch.testing.assert_close(adaptc.load(tmp_path / "m.pt2")(image()), wide(image()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_package_takes_them_too(tmp_path: Path) -> None:
    wide = program_with_all_sites()
    adaptc.swap(wide, kohya())
    runner = adaptc.load_package(adaptc.package(wide, tmp_path / "p.pt2"))
    file = write_safetensors(tmp_path / "k.safetensors", kohya(rank=2, alpha=3.0))
    with torch.no_grad():
        report = runner.swap(file)
        adaptc.swap(wide, file)
        torch.testing.assert_close(runner(image()), wide(image()), rtol=1e-4, atol=1e-5)
    assert report.origin.format == "kohya"
