"""Which layers get which adapter, on transformers models, against PEFT: patterns, indices, exclusions, replication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_differs, assert_same, load_peft, run, shared_base_program

pytestmark = pytest.mark.few(4)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks and alphas": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2, "^model.layers.0.self_attn.v_proj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 11, "mlp.up_proj": 1},
        },
    ),
    "root scale of each rank": (
        "bert",
        {"target_modules": ["query", "value"], "rank_pattern": {"layer.1.attention.self.query": 5}, "use_rslora": True},
    ),
    "one layer": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1}),
    "layers of a named list": (
        "t5",
        {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": "block"},
    ),
    "full names are of every layer": (
        "opt",
        {"target_modules": ["model.decoder.layers.0.fc1", "q_proj"], "layers_to_transform": [1]},
    ),
    "all but some": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}),
    "all but a pattern": ("gpt_neox", {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    "a pattern": ("t5", {"target_modules": r"decoder\..*(SelfAttention|EncDecAttention)\.(q|v)"}),
}


def config_of(kind: type, options: dict[str, Any]) -> Any:
    return kind(r=3, lora_alpha=5, init_lora_weights=False, **options)


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    name, options = CASES[request.param]
    made = Oracle.wrap_and_save(name, config_of(peft.LoraConfig, options), tmp_path_factory.mktemp("adapter"))
    made.options = options  # type: ignore[attr-defined]
    return made


@pytest.mark.long
def test_loaded(oracle: Oracle):
    program = adaptc.compile(shared_base_program(oracle.name), oracle.path)
    assert {a.key for a in program.adaptation.attachments} == oracle.adapted_modules()
    assert_same(run(program, oracle.family, 3, 7), oracle(3, 7))
    assert_differs(oracle(), oracle.base_output())
    oracle.check_merged(program)


@pytest.mark.long
def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    program = adaptc.compile(shared_base_program(oracle.name), config_of(adaptc.LoraConfig, oracle.options))
    oracle.check_trained(program, tmp_path / "adapter")


@pytest.mark.long
def test_the_first_pattern_that_matches_rules_in_files_too(tmp_path: Path):
    """PEFT sorts the keys when it saves, and then another one comes first: it cannot load such files of its own."""
    options = {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"h.1.attn.c_proj": 2, "c_proj": 6}}
    oracle = Oracle.wrap_and_save("gpt2", config_of(peft.LoraConfig, options), tmp_path / "peft")
    program = adaptc.compile(shared_base_program("gpt2"), config_of(adaptc.LoraConfig, options))
    oracle.check_trained(program, tmp_path / "adaptc")
    again = adaptc.compile(shared_base_program("gpt2"), tmp_path / "adaptc")
    assert_same(run(again, oracle.family, 3, 7), oracle(3, 7))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    adaptc.swap(loaded, tmp_path / "adaptc")
    assert list(loaded.binding.config.rank_pattern) == list(options["rank_pattern"])
    with pytest.raises(adaptc.CheckpointError, match=r"h\.1\.attn\.c_proj.*\(2, 24\), expected \(6, 24\)"):
        adaptc.compile(shared_base_program("gpt2"), oracle.path)


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_replicated_layers(name: str, tmp_path: Path):
    """Layers repeated over shared weights, each with an adapter of its own. PEFT merges all of one into one weight."""
    targets = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"]}[name]
    options = {"target_modules": targets, "layer_replication": [(0, 1), (0, 2), (1, 2)]}
    oracle = Oracle.wrap_and_save(name, config_of(peft.LoraConfig, options), tmp_path / "peft")
    program = adaptc.compile(oracle.family.build(), oracle.path)
    assert {a.key for a in program.adaptation.attachments} == oracle.adapted_modules()
    for batch, seq in ((2, 5), (3, 7)):
        assert_same(run(program, oracle.family, batch, seq), oracle(batch, seq))
    assert_differs(oracle(), oracle.base_output())
    assert_same(run(adaptc.merge(program), oracle.family, 3, 7), oracle(3, 7))
    assert_same(run(adaptc.unload(program), oracle.family, 3, 7), oracle.base_output(3, 7))
    saved = adaptc.save_adapter(program, tmp_path / "adaptc")
    assert_same(run(load_peft(FAMILIES[name].build(), saved), oracle.family, 3, 7), oracle(3, 7))


def test_replication_needs_the_model():
    config = adaptc.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(adaptc.ConfigError, match=r"layer_replication.*nn\.Module"):
        adaptc.compile(shared_base_program("llama"), config)
