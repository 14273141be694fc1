"""What `export_adapter` writes means in PEFT and by SGLang's formula what the original meant; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adaptc
from adaptc.engines.engine_table import ENGINES
from adaptc.errors import CheckpointError, ConfigError
from tests.engines.adapter_directories import (
    ALL,
    IDS,
    adapter_directory,
    load_model,
    model_directory,
    peft_logits,
    write_directory,
)
from tests.support.diffusion import sd3

pytestmark = pytest.mark.usefixtures("no_progress_bars")
#: engines that read a PEFT directory
DIRECTORIES = ("vllm", "sglang", "openvino", "onnxruntime-genai")
EXPORT = adaptc.engines.export_adapter


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


def sglang_logits(path: Path) -> Tensor:
    """The logits with B A of every module times lora_alpha / r of the config: SGLang's formula, written out."""
    config, tensors = read(path)
    model = load_model()
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight.data += config["lora_alpha"] / config["r"] * (up @ down)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["patterns", "expression"])
def test_lora_of_any_options_is_written_out_exactly(name: str, tmp_path: Path) -> None:
    original = adapter_directory(name)
    report = EXPORT(original, tmp_path / "out", engine="sglang")
    assert report.fit is not None
    assert report.fit.error == 0
    torch.testing.assert_close(peft_logits(report.path), peft_logits(original), rtol=1e-12, atol=1e-12)
    config, tensors = read(report.path)
    assert config["r"] == config["lora_alpha"] == report.rank == (5 if name == "patterns" else 3)
    assert not any(config[option] for option in ("use_rslora", "rank_pattern", "alpha_pattern"))
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {report.rank}
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    assert adaptc.engines.check_adapter(report.path, "sglang").is_as_meant


def test_sglangs_formula_gives_the_wrong_strength_before_and_the_right_one_after(tmp_path: Path) -> None:
    original = adapter_directory("patterns")
    EXPORT(original, tmp_path, engine="sglang")
    meant = peft_logits(original)
    assert float((sglang_logits(original) - meant).abs().max()) > 0.1
    torch.testing.assert_close(sglang_logits(tmp_path), meant, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", DIRECTORIES)
def test_the_check_of_each_engine_passes_on_what_was_written_for_it(engine: str, tmp_path: Path) -> None:
    report = EXPORT(adapter_directory("patterns"), tmp_path, engine=engine)
    assert adaptc.engines.check_adapter(report.path, engine).is_as_meant
    same = torch.float32 if ENGINES[engine].dtypes else torch.float64
    assert {t.dtype for t in read(tmp_path)[1].values()} == {same}


def test_values_stay_in_their_dtype_where_that_rounds_nothing(tmp_path: Path) -> None:
    ranks = {"0.q_proj": 3, "0.v_proj": 3}
    adapter = write_directory(tmp_path / "in", {"lora_alpha": 6, "alpha_pattern": {"v_proj": 7}}, ranks)
    loaded = adaptc.load_adapter(adapter)
    generator = torch.Generator().manual_seed(0)
    half = {k: torch.randn(t.shape, generator=generator).bfloat16() for k, t in loaded.tensors.items()}
    report = EXPORT(adaptc.Adapter(loaded.config, half), tmp_path / "out", engine="vllm")
    tensors = {k.removeprefix("base_model.model."): t for k, t in read(report.path)[1].items()}
    assert {k: t.dtype for k, t in tensors.items()} == {
        "0.q_proj.lora_A.weight": torch.bfloat16,
        "0.q_proj.lora_B.weight": torch.bfloat16,  # doubled
        "0.v_proj.lora_A.weight": torch.bfloat16,
        "0.v_proj.lora_B.weight": torch.float32,  # times 7 / 3
    }
    torch.testing.assert_close(tensors["0.v_proj.lora_B.weight"], half["0.v_proj.lora_B.weight"].float() * (7 / 3))


def test_a_larger_rank_is_filled_up_and_a_smaller_one_is_refused_by_its_error(tmp_path: Path) -> None:
    original = adapter_directory("patterns")
    report = EXPORT(original, tmp_path / "16", engine="vllm", rank=16)
    assert report.rank == 16
    torch.testing.assert_close(peft_logits(report.path), peft_logits(original), rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ConfigError, match=r"LoRA of rank 3 leaves out 0\.\d+ of the change of '.*q_proj'.*adaptc merge"
    ):
        EXPORT(original, tmp_path / "3", engine="vllm", rank=3)
    assert not (tmp_path / "3").exists()
    small = EXPORT(original, tmp_path / "3", engine="vllm", rank=3, max_error=0.9)
    assert small.fit is not None
    assert {s.site.rpartition(".")[2] for s in small.fit.sites if s.error} == {"q_proj"}
    before, after = (adaptc.load_adapter(p) for p in (original, small.path))
    for site in small.fit.sites:
        config = before.config
        assert isinstance(config, adaptc.LoraConfig)
        meant = (7 if "v_proj" not in site.site else 11) / config.method(site.site, "linear").r ** 0.5
        change = before.tensors[f"{site.site}.lora_B.weight"] @ before.tensors[f"{site.site}.lora_A.weight"] * meant
        written = after.tensors[f"{site.site}.lora_B.weight"] @ after.tensors[f"{site.site}.lora_A.weight"]
        assert float((written - change).norm() / change.norm()) == pytest.approx(site.error, abs=1e-12)
        assert float(change.norm()) == pytest.approx(site.change)


@pytest.mark.parametrize(("name", "rank"), [("loha", 4), ("pissa", 6)])
def test_other_methods_are_cut_to_lora_with_the_model_within_the_stated_error(
    name: str, rank: int, tmp_path: Path
) -> None:
    original = adapter_directory(name)
    with pytest.raises(ConfigError, match=r"known with the model alone: give it with model= \(--model\), or merge it"):
        EXPORT(original, tmp_path / "out", engine="vllm")
    report = EXPORT(original, tmp_path / "out", engine="vllm", model=model_directory(), max_error=1e-6)
    assert report.rank == rank
    assert report.fit is not None
    assert report.fit.error < 1e-6
    assert adaptc.engines.check_adapter(report.path, "vllm").is_as_meant
    dtype = torch.float32 if name == "pissa" else torch.float64
    torch.testing.assert_close(peft_logits(report.path, dtype), peft_logits(original, dtype), rtol=1e-4, atol=1e-4)


def test_the_error_of_the_singular_values_counts(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"engine": "sglang", "model": load_model(), "rank": 2}
    with pytest.raises(ConfigError, match=r"loha: LoRA of rank 2 leaves out 0\.\d+ of the change"):
        EXPORT(adapter_directory("loha"), tmp_path, **arguments)
    report = EXPORT(adapter_directory("loha"), tmp_path, **arguments, max_error=0.9)
    assert report.rank == 2
    assert report.fit is not None
    assert 0.01 < report.fit.error < 0.9
    assert report.to_dict()["fit"]["error"] == report.fit.error


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("dora", "vllm", r"it is LoRA with use_dora, .* give it with model=.*adaptc merge MODEL ADAPTER"),
        ("bias", "vllm", r"has lora_bias, lora_bias=True, which no file for vllm 0\.33\.0 can hold.*adaptc merge"),
        ("bias", "sglang", r"has lora_bias.*lora_B\.weight takes its place"),
        ("saved", "vllm", r"has modules_to_save, lm_head.*no whole modules but classifier and score"),
        ("saved", "sglang", r"has modules_to_save"),
        ("embedding", "openvino", r"has embedding, model\.embed_tokens"),
        ("alora", "sglang", r"alora_invocation_tokens is set.*no such adapters: serve it with llama\.cpp"),
    ],
)
def test_what_no_file_can_hold_is_refused_with_the_way_out(name: str, engine: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        EXPORT(adapter_directory(name), tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def test_qa_lora_needs_the_model_whose_sizes_tell_its_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 7)).double()
    x = torch.randn(5, 12).double()
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": 4}
    config = adaptc.LoraConfig(**options, target_modules=["0"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    adaptc.save_adapter(program, tmp_path / "in")
    with pytest.raises(ConfigError, match=r"it is LoRA with use_qalora, .* give it with model="):
        EXPORT(tmp_path / "in", tmp_path / "out", engine="vllm")
    report = EXPORT(program, tmp_path / "out", engine="vllm", model=program)
    plain = adaptc.compile(model, str(report.path), example_inputs=x)
    torch.testing.assert_close(plain(x), program(x), rtol=1e-12, atol=1e-12)


def test_a_head_that_an_engine_takes_stays(tmp_path: Path) -> None:
    head = {"score.weight": torch.ones(7, 5)}
    adapter = write_directory(tmp_path / "in", {"use_rslora": True, "modules_to_save": ["score"]}, **head)
    EXPORT(adapter, tmp_path / "out", engine="vllm")
    config, tensors = read(tmp_path / "out")
    assert config["modules_to_save"] == ["score"]
    assert torch.equal(tensors["base_model.model.score.weight"], head["score.weight"])


def test_an_adapter_without_factors_is_refused(tmp_path: Path) -> None:
    config = adaptc.LoraConfig(target_modules=["0"], modules_to_save=["score"])
    adapter = adaptc.Adapter(config, {"score.weight": torch.ones(7, 5)})
    with pytest.raises(ConfigError, match=r"has no factors of LoRA, .*: merge it into the model"):
        EXPORT(adapter, tmp_path / "out", engine="vllm")


def test_peft_takes_every_adapter_as_it_is(tmp_path: Path) -> None:
    report = EXPORT(adapter_directory("dora"), tmp_path, engine="peft")
    assert report.rank is report.fit is None
    torch.testing.assert_close(peft_logits(tmp_path), peft_logits(adapter_directory("dora")), rtol=0, atol=0)
    assert "as it is" in str(report)


def test_a_rank_above_the_limit_is_refused(tmp_path: Path) -> None:
    adapter = write_directory(tmp_path / "in", {"r": 513}, {"q_proj": 513, "v_proj": 513})
    with pytest.raises(ConfigError, match=r"needs rank 513, and 512 is the most"):
        EXPORT(adapter, tmp_path / "out", engine="vllm")
    # Its factors are all ones, so a rank of one holds them.
    assert EXPORT(adapter, tmp_path / "out", engine="vllm", rank=8, max_error=1e-5).rank == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"engine": "vlm"}, "no engine whose limits are known"),
        ({"engine": "vllm", "rank": 513}, "above 512"),
        ({"engine": "vllm", "rank": 0}, "rank=0 must be at least 1"),
        ({"engine": "vllm", "max_error": 1}, "max_error=1 must be a number from 0 up to 1"),
        ({"engine": "vllm", "max_error": True}, "max_error=True"),
        ({"engine": "vllm", "component": "unet"}, "goes with diffusers"),
        ({"engine": "llama.cpp"}, "give its directory with model="),
        ({"engine": "llama.cpp", "model": torch.nn.Linear(3, 5)}, "give its directory with model="),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        EXPORT(write_directory(tmp_path / "in"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_damaged_directory_is_an_error(tmp_path: Path) -> None:
    (write_directory(tmp_path / "in") / "adapter_model.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        EXPORT(tmp_path / "in", tmp_path / "out", engine="vllm")


def test_groups_of_a_convolution_and_programs_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3, groups=2), torch.nn.Conv2d(8, 5, 1)).double()
    x = torch.randn(2, 6, 5, 7).double()
    ranks: dict[str, Any] = {"r": 4, "rank_pattern": {"1": 3}}
    config = adaptc.LoraConfig(**ranks, lora_alpha=7, target_modules=["0", "1"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    expected = program(x)
    with pytest.raises(ConfigError, match=r"2 groups, .* rank=5 is no multiple, and 6 is"):
        EXPORT(program, tmp_path, engine="peft", rank=5)
    report = EXPORT(program, tmp_path, engine="peft", rank=6)
    adaptc.swap(program, report.path)
    torch.testing.assert_close(program(x), expected, rtol=1e-12, atol=1e-12)


def test_diffusers_loads_what_was_written_for_it(tmp_path: Path) -> None:
    def net() -> Any:
        return sd3().double()

    ranks: dict[str, Any] = {"r": 3, "rank_pattern": {"to_v": 2}}
    config = peft.LoraConfig(**ranks, lora_alpha=7, use_rslora=True, target_modules=["to_q", "to_v"])
    adapted = peft.get_peft_model(net(), config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for key, p in adapted.named_parameters():
        p.data = torch.randn_like(p) if "lora_" in key else p.data
    adapted.save_pretrained(tmp_path / "in")
    report = EXPORT(tmp_path / "in", tmp_path / "out", engine="diffusers", component="transformer")
    assert report.path.name == "pytorch_lora_weights.safetensors"
    loaded = net()
    loaded.load_lora_adapter(report.path.parent, weight_name=report.path.name, prefix="transformer")
    for (name, ours), theirs in zip(loaded.named_modules(), adapted.base_model.model.modules(), strict=True):
        if hasattr(ours, "lora_A"):
            (key,) = ours.lora_A
            torch.testing.assert_close(
                ours.get_delta_weight(key), theirs.get_delta_weight("default"), rtol=1e-6, atol=1e-6, msg=name
            )


def test_all_layers_of_the_model_are_in_the_tests() -> None:
    assert {m.rpartition(".")[2] for m, _ in load_model().named_modules() if m.endswith("_proj")} == {*ALL}
