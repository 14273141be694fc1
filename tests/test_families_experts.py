"""Mixtures of experts against PEFT: stacked expert weights and routers through target_parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import adaptc
from tests.oracle import Oracle, assert_differs, assert_same, base, run

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
#: Two adapted parameters of one module are wrapped twice by PEFT, and the inner one has another key.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("mixtral", {"target_modules": [], "target_parameters": BOTH}),
    "in the other order": ("mixtral", {"target_modules": [], "target_parameters": BOTH[::-1]}),
    "one, and attention": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": BOTH[1:]}),
    "the other": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": BOTH[:1], "use_rslora": True}),
    "router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}),
    "ranks by parameter": (
        "mixtral",
        {
            "target_modules": [],
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 9},
        },
    ),
    "qwen3": ("qwen3_moe", {"target_modules": ["k_proj"], "target_parameters": BOTH}),
}


def config_of(kind: type, options: dict[str, Any]) -> Any:
    return kind(r=3, lora_alpha=5, init_lora_weights=False, **options)


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    name, options = CASES[request.param]
    made = Oracle.of(name, config_of(peft.LoraConfig, options), tmp_path_factory.mktemp("adapter"))
    made.options = options  # type: ignore[attr-defined]
    return made


def test_loaded(oracle: Oracle):
    program = adaptc.compile(base(oracle.name), oracle.path)
    for batch, seq in ((2, 5), (3, 7)):
        assert_same(run(program, oracle.family, batch, seq), oracle(batch, seq))
    assert_differs(oracle(), run(base(oracle.name), oracle.family))


def test_merged(oracle: Oracle):
    oracle.check_merged(adaptc.compile(base(oracle.name), oracle.path))


def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    program = adaptc.compile(base(oracle.name), config_of(adaptc.LoraConfig, oracle.options))
    oracle.check_trained(program, tmp_path / "adapter")
