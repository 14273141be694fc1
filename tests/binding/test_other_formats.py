"""Adapters in the formats of others: where they are taken, and which component and modules of a model they mean."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, LoHaConfig, LoraConfig
from adaptc.adapter_files.directory import write_adapter
from tests.support.component_nets import (
    CONV,
    LINEAR,
    LOHA,
    SHAPES,
    TO_OUT,
    TO_Q,
    check_program_output,
    image,
    kohya,
    kohya_changes,
    lora_change,
    output_with_changes,
    peft_keys,
    program,
    random_lora_factors,
    write_safetensors,
)

# --- where a file is taken --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_file_is_taken_wherever_a_directory_is(model: nn.Module, wide: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    file, changes = write_safetensors(tmp_path / "some.safetensors", kohya()), kohya_changes()
    made = program(model, file)
    check_program_output(made, model, changes)
    assert "kohya (unet)" in str(adaptc.report(made))
    report = adaptc.swap(wide, str(file))
    check_program_output(wide, model, changes)
    assert (report.origin.format, report.origin.component, report.sites) == ("kohya", "unet", len(SHAPES))
    assert "[kohya (unet)]" in str(report)
    bound = wide.bind(file)
    wanted = output_with_changes(model, changes)
    with torch.no_grad():
        torch.testing.assert_close(bound(image()), wanted, rtol=1e-5, atol=1e-5)
        both = program(model, [LoraConfig(target_modules=["conv_in"]), file])
        adaptc.swap(both, file)
        check_program_output(both, model, changes)
        together = program(model, {"one": file, "two": LoraConfig(target_modules=["conv_in"])})
        check_program_output(together, model, changes)
    assert "kohya" in str(adaptc.report(together))
    check_program_output(adaptc.merge(made), model, changes)
    assert adaptc.verify(made, model).ok


def test_a_directory_with_one_file_is_that_file(model: nn.Module, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "anything.safetensors", kohya())
    check_program_output(program(model, tmp_path), model, kohya_changes())
    write_safetensors(tmp_path / "more.safetensors", kohya())
    with pytest.raises(CheckpointError, match=r"several files of tensors.*anything.safetensors.*more.safetensors"):
        program(model, tmp_path)


def test_files_of_torch_save_are_read_and_never_run(model: nn.Module, tmp_path: Path) -> None:
    torch.save(kohya(), tmp_path / "some.pt")
    check_program_output(program(model, tmp_path / "some.pt"), model, kohya_changes())

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('run')",)

    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps({"lora_unet_conv_in.alpha": Bomb()}))
    with pytest.raises(CheckpointError, match="refused"):
        program(model, tmp_path / "bomb.ckpt")


@pytest.mark.long
def test_a_state_dict_is_read_as_a_file_and_owned(model: nn.Module, wide: adaptc.AdaptedProgram) -> None:
    given = kohya()
    made = program(model, given)
    adaptc.swap(wide, given)
    for t in given.values():
        t.fill_(7)
    check_program_output(made, model, kohya_changes())
    check_program_output(wide, model, kohya_changes())


def test_what_a_file_says_may_be_said_instead(model: nn.Module, wide: adaptc.AdaptedProgram) -> None:
    given = kohya(rank=3, alpha=None)
    scaled = {m: lora_change(*random_lora_factors(m, 3), 5 / 3) for m in SHAPES}
    check_program_output(program(model, given, config=LoraConfig(r=3, lora_alpha=5)), model, scaled)
    adaptc.swap(wide, given, config=LoraConfig(r=3, lora_alpha=5))
    check_program_output(wide, model, scaled)
    with pytest.raises(ConfigError, match="goes with one directory, file or state dict"):
        program(model, LoraConfig(target_modules=["conv_in"]), config=LoraConfig())
    with pytest.raises(CheckpointError, match=r"shape \(3, .*expected \(4"):
        program(model, given, config=LoraConfig(r=4))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("as_file", [False, True])
def test_pefts_keys_alone_need_a_scale_and_give_the_targets(
    prefix: str, as_file: bool, model: nn.Module, tmp_path: Path
) -> None:
    given: object = peft_keys(prefix)
    given = write_safetensors(tmp_path / "w.safetensors", peft_keys(prefix)) if as_file else given
    changes = {m: lora_change(*random_lora_factors(m, 3), 5 / 3) for m in (TO_Q, CONV)}
    made = program(model, given, config=LoraConfig(r=3, lora_alpha=5))
    check_program_output(made, model, changes)
    assert set(made.binding.config.target_modules) == {TO_Q, CONV}
    with pytest.raises(CheckpointError, match=r"config="):
        program(model, given)


@pytest.mark.parametrize("as_file", [False, True])
def test_pefts_keys_name_no_component(
    as_file: bool, model: nn.Module, wide: adaptc.AdaptedProgram, tmp_path: Path
) -> None:
    given: object = write_safetensors(tmp_path / "w.safetensors", peft_keys("")) if as_file else peft_keys("")
    options = {"config": LoraConfig(r=3), "component": "unet"}
    for call in (lambda: program(model, given, **options), lambda: adaptc.swap(wide, given, **options)):
        with pytest.raises(ConfigError, match=r"component=.unet.: .*name no component"):
            call()


def test_a_config_for_a_directory_leaves_the_targets_to_the_keys(model: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=3, target_modules=[TO_Q, CONV])
    folder = write_adapter(tmp_path / "d", config.to_dict(), peft_keys(""))
    made = program(model, folder, config=LoraConfig(r=3, lora_alpha=5))
    check_program_output(made, model, {m: lora_change(*random_lora_factors(m, 3), 5 / 3) for m in (TO_Q, CONV)})
    assert set(made.binding.config.target_modules) == {TO_Q, CONV}


def test_other_methods_take_their_targets_from_keys_too(model: nn.Module) -> None:
    config = LoHaConfig(r=2, alpha=3, target_modules=[TO_Q])
    made = program(model, config)
    torch.manual_seed(1)
    given = {f"{TO_Q}.{n}": torch.randn(*s) for n, s in zip(LOHA, ((12, 2), (2, 6)) * 2, strict=True)}
    adaptc.swap(made, given, config=config)
    new = program(model, given, config=LoHaConfig(r=2, alpha=3))
    assert new.binding.config.target_modules == [TO_Q]
    with torch.no_grad():
        torch.testing.assert_close(new(image()), made(image()), rtol=1e-5, atol=1e-5)


def test_a_file_of_pefts_weights_is_its_directory(model: nn.Module, tmp_path: Path) -> None:
    made = program(model, kohya())
    adaptc.save_adapter(made, tmp_path / "peft")
    check_program_output(program(model, tmp_path / "peft" / "adapter_model.safetensors"), model, kohya_changes())


# --- which component, which module ------------------------------------------------------------------------------------


class Text(nn.Module):
    """Named as transformers' CLIP is today, without an outer ``text_model``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            [nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(width, 5)})})]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.layers[0]["self_attn"]["q_proj"](x)


def text_tensors(prefix: str, width: int) -> dict[str, Tensor]:
    torch.manual_seed(width)
    name = f"{prefix}text_model_encoder_layers_0_self_attn_q_proj"
    return {f"{name}.lora_down.weight": torch.randn(2, width), f"{name}.lora_up.weight": torch.randn(5, 2)}


def test_of_several_components_the_models_own_is_taken_and_the_others_are_told(
    model: nn.Module, wide: adaptc.AdaptedProgram, tmp_path: Path
) -> None:
    both = kohya() | text_tensors("lora_te1_", 6) | text_tensors("lora_te2_", 9)
    file = write_safetensors(tmp_path / "sdxl.safetensors", both)
    report = adaptc.swap(wide, file)
    check_program_output(wide, model, kohya_changes())
    assert report.origin.other_components == {"text_encoder": 2, "text_encoder_2": 2}
    assert "not of this program: text_encoder (2 tensors), text_encoder_2 (2 tensors)" in str(report)
    assert "text_encoder_2 (2 tensors)" in str(adaptc.report(wide))
    for width, name, prefix in ((6, "text_encoder", "lora_te1_"), (9, "text_encoder_2", "lora_te2_")):
        encoder, x = Text(width), torch.randn(3, width)
        made = adaptc.compile(encoder, file, example_inputs=x)
        assert made.binding.origin.component == name
        down, up = text_tensors(prefix, width).values()
        with torch.no_grad():
            torch.testing.assert_close(made(x), encoder(x) + x @ down.T @ up.T)


def test_where_two_components_fit_one_is_asked_for() -> None:
    both, x = (
        text_tensors("lora_te1_", 6) | {k: t + 1 for k, t in text_tensors("lora_te2_", 6).items()},
        torch.randn(3, 6),
    )
    encoder = Text(6)
    with pytest.raises(CheckpointError, match=r"cannot be told: text_encoder .*component="):
        adaptc.compile(encoder, both, example_inputs=x)
    made = adaptc.compile(encoder, both, example_inputs=x, component="text_encoder_2")
    _, _, down, up = both.values()
    with torch.no_grad():
        torch.testing.assert_close(made(x), encoder(x) + x @ down.T @ up.T)
        adaptc.swap(made, both, component="text_encoder")
        down, up, *_ = both.values()
        torch.testing.assert_close(made(x), encoder(x) + x @ down.T @ up.T)
    with pytest.raises(CheckpointError, match=r"no component 'unet'; it has 'text_encoder', 'text_encoder_2'"):
        adaptc.swap(made, both, component="unet")
    with pytest.raises(ConfigError, match=r"component='unet'.*leave it out"):
        adaptc.swap(made, {"encoder.layers.0.self_attn.q_proj.lora_A.weight": down}, component="unet")
    with pytest.raises(ConfigError, match=r"component='unet'.*leave it out"):
        adaptc.compile(encoder, LoraConfig(target_modules=["q_proj"]), example_inputs=x, component="unet")


def test_of_several_files_a_component_is_of_those_that_have_some(tmp_path: Path) -> None:
    both, x = text_tensors("lora_te1_", 6) | text_tensors("lora_te2_", 6), torch.randn(3, 6)
    encoder = Text(6)
    own = adaptc.compile(encoder, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), example_inputs=x)
    plain = adaptc.save_adapter(own, tmp_path / "plain")
    _, _, down, up = both.values()
    change = (own(x) - encoder(x)).detach()

    def second(x: Tensor) -> Tensor:
        return encoder(x) + x @ down.T @ up.T

    files = {"a": both, "b": plain}
    with torch.no_grad():
        made = adaptc.compile(encoder, files, example_inputs=x, component="text_encoder_2")
        torch.testing.assert_close(made(x), second(x) + change)
        assert [p.origin.component for p in made.binding.joint_adapters.values()] == ["text_encoder_2", ""]
        listed = adaptc.compile(encoder, [both, plain], example_inputs=x, component="text_encoder_2")
        torch.testing.assert_close(listed(x), second(x))
        adaptc.swap(made, files, component="text_encoder")
        first_down, first_up, *_ = both.values()
        torch.testing.assert_close(made(x), encoder(x) + x @ first_down.T @ first_up.T + change)
    for call in (
        lambda given: adaptc.compile(encoder, given, example_inputs=x, component="unet"),
        lambda given: adaptc.swap(made, given, component="unet"),
    ):
        with pytest.raises(CheckpointError, match=r"no component 'unet'; it has 'text_encoder', 'text_encoder_2'"):
            call(files)
        with pytest.raises(ConfigError, match=r"component='unet'.*leave it out"):
            call({"a": plain, "b": plain})


def test_a_component_of_no_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"name no module of the model.*component 'text_encoder'"):
        program(model, text_tensors("lora_te1_", 6))
    two = text_tensors("lora_te1_", 6) | text_tensors("lora_te2_", 6)
    with pytest.raises(CheckpointError, match=r"the model is none of them: text_encoder \(0 of 2"):
        program(model, two)


def test_flat_names_that_two_modules_have_are_refused() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_q = nn.Linear(5, 5)
            self.add_module("in", nn.ModuleDict({"q": nn.Linear(5, 5)}))

        def forward(self, x: Tensor) -> Tensor:
            return self.in_q(x) + self.get_submodule("in.q")(x)

    given = {"lora_unet_in_q.lora_down.weight": torch.randn(2, 5), "lora_unet_in_q.lora_up.weight": torch.randn(5, 2)}
    with pytest.raises(CheckpointError, match=r"'in_q', 'in\.q'"):
        adaptc.compile(Twins(), given, example_inputs=torch.randn(2, 5))


def test_original_names_of_a_unet(model: nn.Module) -> None:
    """The net has one layer a block, as the names tell."""
    original = {
        "conv_in": "input_blocks_0_0",
        CONV: "input_blocks_1_0_in_layers_2",
        "down_blocks.0.attentions.0.proj_in": "input_blocks_1_1_proj_in",
        TO_Q: "middle_block_1_transformer_blocks_0_attn1_to_q",
        TO_OUT: "middle_block_1_transformer_blocks_0_attn1_to_out_0",
        LINEAR: "output_blocks_0_0_emb_layers_1",
    }
    given = {}
    for module, name in original.items():
        a, b = random_lora_factors(module, 3)
        given |= {f"lora_unet_{name}.lora_down.weight": a, f"lora_unet_{name}.lora_up.weight": b}
    check_program_output(program(model, given), model, kohya_changes(3, None))


def test_key_mapping_is_for_the_keys_of_the_file(model: nn.Module, wide: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    odd = {k.replace("lora_unet_conv_in", "lora_unet_first"): t for k, t in kohya().items()}
    file = write_safetensors(tmp_path / "odd.safetensors", odd)
    with pytest.raises(CheckpointError, match=r"lora_unet_first.*name no module|name no module.*lora_unet_first"):
        program(model, file)
    check_program_output(program(model, file, key_mapping={"unet_first": "unet_conv_in"}), model, kohya_changes())
    adaptc.swap(wide, file, key_mapping={"unet_first": "unet_conv_in"})
    check_program_output(wide, model, kohya_changes())


def test_layers_that_are_several_in_diffusers_are_refused_with_the_way_out(model: nn.Module) -> None:
    given = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{w}.weight": torch.randn(3, 3) for w in ("down", "up")}
    with pytest.raises(CheckpointError, match=r"lora_state_dict\(file\)"):
        program(model, given)
