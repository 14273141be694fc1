"""Every method on real architectures, against PEFT: files of PEFT run, swap and merge; files of adaptc load in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_differs, assert_same, load_peft, run, shared_base_program

#: method -> PEFT's config and its options for layers whose sizes are multiples of eight
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "lora_alpha": 5, "total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 5}),
    "randlora": ("RandLoraConfig", {"r": 5, "randlora_alpha": 7}),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 7, "vector_length": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 37}),
    "waveft": ("WaveFTConfig", {"n_frequency": 37, "wavelet_family": "db2"}),
    "hra": ("HRAConfig", {"r": 4}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "miss": ("MissConfig", {"r": 3}),
    "gralora": ("GraloraConfig", {"r": 4, "hybrid_r": 3, "alpha": 5}),
    "deft": ("DeftConfig", {"r": 3, "alpha": 5}),
    "glora": ("GloraConfig", {"r": 3}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 3}),
    "road": ("RoadConfig", {"group_size": 8}),
    "hira": ("HiraConfig", {"r": 3}),
    "delora": ("DeloraConfig", {"r": 3, "delora_lambda": 2}),
    "peanut": ("PeanutConfig", {"r": 3, "depth": 1}),
    "ln_tuning": ("LNTuningConfig", {}),
}

#: family -> targets; of modules trained as a whole; methods that PEFT has for its layers, where not all
TARGETS: dict[str, tuple[list[str], list[str], tuple[str, ...]]] = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["input_layernorm"], tuple(METHODS)),
    "bert": (["query", "value"], ["LayerNorm"], tuple(METHODS)),
    "vit": (["q_proj", "v_proj"], ["layernorm_before"], tuple(METHODS)),
    "t5": (["q", "v", "wo"], ["layer_norm"], tuple(METHODS)),
    "resnet": (["convolution"], ["normalization"], ("dora", "adalora", "ia3", "loha", "lokr", "hira", "ln_tuning")),
}

#: of the largest output: the whole model in float32, with sums (RandLoRA's over its bases) in another order than PEFT's
TOLERANCE = 5e-5

CASES = [(f, m) for f, (_, _, methods) in TARGETS.items() for m in methods]


def options(family: str, method: str) -> dict[str, Any]:
    targets, norms, _ = TARGETS[family]
    return {"target_modules": norms if method == "ln_tuning" else targets, **METHODS[method][1]}


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_as_peft(family: str, method: str, tmp_path: Path):
    name = METHODS[method][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        oracle = Oracle.wrap_and_save(family, getattr(peft, name)(**options(family, method)), tmp_path / "peft")
        expected, untouched = oracle(3, 7), oracle.base_output(3, 7)
    assert_differs(expected, untouched, 1e-3)
    program = adaptc.compile(shared_base_program(family), tmp_path / "peft")
    assert {a.key for a in program.adaptation.attachments} == oracle.adapted_modules()
    assert_same(run(program, oracle.family, 3, 7), expected, TOLERANCE)
    merged = adaptc.merge(program)
    assert_same(run(merged, oracle.family, 3, 7), expected, TOLERANCE)
    assert_same(run(adaptc.unload(program), oracle.family, 3, 7), untouched, 0)
    saved = adaptc.save_adapter(program, tmp_path / "adaptc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_peft(FAMILIES[family].build(), saved)
        assert_same(run(loaded, oracle.family, 3, 7), expected, TOLERANCE)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", list(METHODS))
def test_a_fresh_adapter_swaps_for_peft_s(method: str, tmp_path: Path):
    """A program compiled from a config takes the file of PEFT, and what it reports names the method."""
    name = METHODS[method][0]
    program = adaptc.compile(shared_base_program("llama"), getattr(adaptc, name)(**options("llama", method)))
    assert str(adaptc.report(program)).startswith(f"{getattr(adaptc, name).peft_type} adapter 'default'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        oracle = Oracle.wrap_and_save("llama", getattr(peft, name)(**options("llama", method)), tmp_path / "peft")
        expected = oracle(3, 7)
    adaptc.swap(program, tmp_path / "peft")
    assert_same(run(program, oracle.family, 3, 7), expected, TOLERANCE)
