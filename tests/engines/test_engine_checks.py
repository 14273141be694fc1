"""What `check_adapter` says of configs and tensors, for each engine; damaged directories; and what it leaves unread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from adaptc.engines.engine_table import ENGINES
from adaptc.engines.limits import ANOTHER_MEANING, AS_MEANT, REFUSED
from adaptc.engines.traits import PROMPT_TYPES, WEIGHT_TYPES
from adaptc.errors import AdaptcError, CheckpointError, ConfigError
from tests.engines.adapter_directories import adapter_directory, write_directory

Q, K, V = (f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
SIGNS = {"+": AS_MEANT, "~": ANOTHER_MEANING, "-": REFUSED}
ORDER = ("vllm", "sglang", "llama.cpp", "openvino", "onnxruntime-genai", "diffusers", "peft")


def factors(module: str, down: tuple[int, ...], up: tuple[int, ...], names: str = "lora_A.weight lora_B.weight") -> Any:
    """The two factors of a module by their keys, with these shapes."""
    a, b = names.split()
    return {f"{module}.{a}": torch.ones(down), f"{module}.{b}": torch.ones(up)}


EMBEDDING = factors("model.embed", (3, 11), (5, 3), "lora_embedding_A lora_embedding_B")
DOUBLE = {k: t.double() for k, t in factors(K, (3, 5), (7, 3)).items()}
#: options, further arguments of write_directory -> the verdicts in ORDER
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({}, {}, "+++++~+"),
    "alpha": ({"lora_alpha": 6}, {}, "+++~+~+"),
    "rslora": ({"use_rslora": True}, {}, "+~~~+~+"),
    "rslora of rank 1": ({"use_rslora": True, "r": 1}, {"ranks": {Q: 1, V: 1}}, "+++~+~+"),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 4}}, {}, "+~~~+~+"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, {"ranks": {Q: 2, V: 3}}, "+-+~+~+"),
    "dora": ({"use_dora": True}, {f"{Q}.lora_magnitude_vector": torch.ones(7)}, "---~~~+"),
    "lora_bias": ({"lora_bias": True}, {f"{Q}.lora_B.bias": torch.ones(7)}, "-~-~~~+"),
    "bias": ({"bias": "all"}, {f"{Q}.base_layer.bias": torch.ones(7)}, "-~-~+~+"),
    "bias without tensors": ({"bias": "lora_only"}, {}, "-~-~+~+"),
    "saved head": ({"modules_to_save": ["lm_head"]}, {"lm_head.weight": torch.ones(7, 5)}, "-~-+~~+"),
    "saved score": ({"modules_to_save": ["score"]}, {"score.weight": torch.ones(7, 5)}, "+~-~~~+"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, {}, "-~+~~~+"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "-~~~+~+"),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}, "+++++~+"),
    "expression": ({"target_modules": ".*proj"}, {}, "+-+++~+"),
    "all-linear": ({"target_modules": "all-linear"}, {}, "+++++~+"),
    "q alone": ({}, {"ranks": {Q: 3}}, "+-+++~+"),
    "v alone": ({}, {"ranks": {V: 3}}, "+~+++~+"),
    "k alone": ({}, {"ranks": {K: 3}}, "+~+++~+"),
    "up alone": ({}, {"ranks": {UP: 3, DOWN: 3}}, "+~+++~+"),
    "rank 513": ({"r": 513, "lora_alpha": 513}, {"ranks": {Q: 513, V: 513}}, "-++++~+"),
    "float64": ({}, DOUBLE, "+++-+~+"),
    "convolution": ({}, factors(DOWN, (3, 5, 3), (7, 3, 1)), "----+~+"),
    "pointwise": ({}, factors(DOWN, (3, 5, 1), (7, 3, 1)), "---++~+"),
    "embedding": ({}, EMBEDDING, "+++~~~+"),
    "another tensor": ({}, {f"{Q}.lora_C": torch.ones(3)}, "-~-~~~+"),
    "LoHa": ({"peft_type": "LOHA"}, {}, "---~--+"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, {}, "---~~-+"),
    "unknown method": ({"peft_type": "SOON"}, {}, "---~---"),
}


@pytest.mark.parametrize("engine", ORDER)
@pytest.mark.parametrize("name", TABLE)
def test_each_engine_takes_what_its_sources_say(name: str, engine: str, tmp_path: Path) -> None:
    options, more, signs = TABLE[name]
    expected = SIGNS[signs[ORDER.index(engine)]]
    report = adaptc.engines.check_adapter(write_directory(tmp_path, options, **more), engine)
    assert report.verdict == expected, str(report)
    assert report.is_as_meant == (report.verdict == AS_MEANT)
    assert report.verdict in report.to_dict()["verdict"]
    for finding in report.to_dict()["findings"]:
        assert all(finding[k] for k in ("what", "found", "why", "source", "verdict"))


def test_every_engine_is_in_the_table_and_every_type_of_peft_is_known() -> None:
    assert {*ENGINES} == {*ORDER}
    assert {t.value for t in peft.PeftType} == PROMPT_TYPES | WEIGHT_TYPES
    assert not PROMPT_TYPES & WEIGHT_TYPES
    for engine in ENGINES.values():
        assert all(limit.verdict in (ANOTHER_MEANING, REFUSED) for limit in engine.limits.values())


def test_the_report_names_module_option_and_the_engines_file() -> None:
    report = adaptc.engines.check_adapter(adapter_directory("patterns"), "sglang")
    text = " ".join(str(report).split())
    assert "sglang 0.5.23 refuses it" in text
    assert {f.trait for f in report.findings} == {"ranks", "strength"}
    strength = next(f for f in report.findings if f.trait == "strength")
    # 7 / sqrt(3) is meant, 7 / 3 given.
    assert "4.041 is meant and 2.333 given at" in strength.found
    assert strength.limit.source == "sglang/srt/lora/lora.py LoRAAdapter.__init__"
    assert "adaptc convert" in text


def test_what_is_refused_comes_first(tmp_path: Path) -> None:
    directory = write_directory(tmp_path, {"lora_bias": True, "use_qalora": True})
    found = adaptc.engines.check_adapter(directory, "sglang").findings
    assert [(f.trait, f.limit.verdict) for f in found] == [("use_qalora", REFUSED), ("lora_bias", ANOTHER_MEANING)]


def test_llama_cpp_needs_a_family_that_is_written(tmp_path: Path) -> None:
    adapter = write_directory(tmp_path / "adapter")
    model = tmp_path / "model"
    model.mkdir()
    for kind, verdict in (("llama", AS_MEANT), ("mamba", REFUSED)):
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
        assert adaptc.engines.check_adapter(adapter, "llama.cpp", model=model).verdict == verdict
    (model / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no model_type"):
        adaptc.engines.check_adapter(adapter, "llama.cpp", model=model)
    with pytest.raises(ConfigError, match=r"goes with llama\.cpp"):
        adaptc.engines.check_adapter(adapter, "vllm", model=model)


def test_an_unknown_engine_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vlm' is no engine .*nearest are 'vllm'"):
        adaptc.engines.check_adapter(write_directory(tmp_path), "vlm")


def damage(path: Path, how: str) -> str:
    """Damage a directory; returns what the error says."""
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    data = json.loads(config.read_text())
    if how in ("r", "lora_alpha", "rank_pattern"):
        data[how] = {"r": 0, "lora_alpha": "3", "rank_pattern": [3]}[how]
        config.write_text(json.dumps(data))
        return f"{how} must be"
    if how == "another rank":
        config.write_text(json.dumps(data | {"r": 2}))
        return "has rank 2 by the config"
    if how == "no config":
        config.unlink()
        return "has no adapter_config.json"
    if how == "no JSON":
        config.write_text("{")
        return "is not valid JSON"
    if how == "no method":
        config.write_text("{}")
        return "'peft_type' must name the method"
    if how == "no tensors":
        weights.unlink()
        return "has no adapter_model.safetensors"
    if how == "a pickle":
        weights.rename(path / "adapter_model.bin")
        return "is a pickle"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
        return "is no readable safetensors file"
    if how == "no B":
        write_directory(path, **{f"{DOWN}.lora_A.weight": torch.ones(3, 5)})
        return rf"no '{DOWN}.lora_B.weight' beside it"
    assert how == "a vector"
    write_directory(path, **{f"{DOWN}.lora_A.weight": torch.ones(3), f"{DOWN}.lora_B.weight": torch.ones(3, 3)})
    return "is no matrix"


DAMAGES = ("r", "lora_alpha", "rank_pattern", "another rank", "no config", "no JSON", "no method", "no tensors")


@pytest.mark.parametrize("how", [*DAMAGES, "a pickle", "cut", "no B", "a vector"])
def test_damage_is_an_error_that_says_what_it_is(how: str, tmp_path: Path) -> None:
    said = damage(write_directory(tmp_path), how)
    with pytest.raises(CheckpointError, match=said):
        adaptc.engines.check_adapter(tmp_path, "vllm")


def test_a_pattern_that_hangs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match="takes too long"):
        adaptc.engines.check_adapter(
            write_directory(tmp_path, {"alpha_pattern": {"(a|aa)+b": 3}}, {"a" * 99: 3}), "vllm"
        )


def test_neither_torch_nor_an_engine_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, adaptc\n"
        f"report = adaptc.engines.check_adapter({str(write_directory(tmp_path))!r}, 'vllm')\n"
        "assert report.verdict == 'as meant' and str(report)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'vllm'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
