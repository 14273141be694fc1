"""Mixtures of experts against PEFT: stacked expert weights and routers through target_parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import adaptc
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_differs, assert_same, file_tensors, load_peft, run, shared_base_program

pytestmark = pytest.mark.few(3)

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
    made = Oracle.wrap_and_save(name, config_of(peft.LoraConfig, options), tmp_path_factory.mktemp("adapter"))
    made.options = options  # type: ignore[attr-defined]
    return made


@pytest.mark.long
def test_loaded(oracle: Oracle):
    program = adaptc.compile(shared_base_program(oracle.name), oracle.path)
    for batch, seq in ((2, 5), (3, 7)):
        assert_same(run(program, oracle.family, batch, seq), oracle(batch, seq))
    assert_differs(oracle(), run(shared_base_program(oracle.name), oracle.family))


@pytest.mark.long
def test_merged(oracle: Oracle):
    oracle.check_merged(adaptc.compile(shared_base_program(oracle.name), oracle.path))


@pytest.mark.long
@pytest.mark.few(2)
def test_trained_and_saved_for_peft(oracle: Oracle, tmp_path: Path):
    program = adaptc.compile(shared_base_program(oracle.name), config_of(adaptc.LoraConfig, oracle.options))
    oracle.check_trained(program, tmp_path / "adapter")


def old_adapter(name: str, directory: Path, skip: str = "", **options: Any) -> Path:
    """An adapter saved while each expert had layers of its own, with random tensors; ``skip`` leaves keys out."""
    mlp, (gate, up, down) = {
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }[name]
    generator = torch.Generator().manual_seed(5)
    config = FAMILIES[name].build().config
    wide = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    sizes = {gate: (wide, 24), up: (wide, 24), down: (24, wide)}
    tensors = {}
    for layer in range(2):
        modules = {f"{mlp}.experts.{e}.{p}": s for e in range(3) for p, s in sizes.items()}
        for module, (out, inside) in {**modules, f"{mlp}.gate": (3, 24), "self_attn.q_proj": (32, 24)}.items():
            for letter, shape in (("A", (3, inside)), ("B", (out, 3))):
                key = f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"
                if not skip or not re.search(skip, key):
                    tensors[key] = 0.3 * torch.randn(shape, generator=generator)
    targets = [gate, up, down, "gate", "q_proj"]
    targets = [t for t in targets if any(f".{t}.lora_" in k for k in tensors)]
    peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options).save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def with_experts_changed(name: str, path: Path, scale: float) -> Any:
    """The family's model with the change of every layer in the file added to its weights, written out by hand."""
    model = FAMILIES[name].build()
    tensors = {k.removeprefix("base_model.model."): v.double() for k, v in file_tensors(path).items()}
    wide = model.model.layers[0].mlp.experts.down_proj.shape[-1]
    with torch.no_grad():
        for key in [k for k in tensors if "lora_A" in k]:
            delta = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            place = key.partition(".lora_A")[0].replace("block_sparse_moe", "mlp")
            if ".experts." not in place:
                model.get_parameter(f"{place}.weight").add_(delta)
                continue
            home, _, (expert, layer) = *place.partition(".experts.")[:2], place.rpartition(".experts.")[2].split(".")
            experts = model.get_submodule(f"{home}.experts")
            if layer in ("w2", "down_proj"):
                experts.down_proj[int(expert)] += delta
            else:
                start = 0 if layer in ("w1", "gate_proj") else wide
                experts.gate_up_proj[int(expert), start : start + wide] += delta
    return model


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "root scale"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_file_from_before_experts_were_stacked(name: str, options: dict[str, Any], tmp_path: Path):
    old = old_adapter(name, tmp_path / "old", **options)
    family = FAMILIES[name]
    scale = 5 / 3**0.5 if options else 5 / 3
    expected = run(with_experts_changed(name, old, scale), family, 3, 7)
    program = adaptc.compile(shared_base_program(name), old)
    assert_same(run(program, family, 3, 7), expected, tol=2e-5)
    assert_differs(expected, run(shared_base_program(name), family, 3, 7))
    other = adaptc.compile(
        shared_base_program(name),
        config_of(adaptc.LoraConfig, {"target_parameters": ["gate.weight", *BOTH], "target_modules": ["q_proj"]}),
    )
    adaptc.swap(other, old)
    assert_same(run(other, family, 3, 7), run(program, family, 3, 7))
    # The adapter is saved in the new layout, which PEFT needs no conversion for.
    saved = adaptc.save_adapter(program, tmp_path / "new")
    assert_same(run(load_peft(family.build(), saved), family, 3, 7), expected, tol=2e-5)
    if not options:  # PEFT doubles alpha along with the rank, which is too much under a root
        assert_same(run(load_peft(family.build(), old), family, 3, 7), expected, tol=2e-5)


@pytest.mark.parametrize("skip", [r"layers\.0\..*w[13]", r"w[13]|gate", r"w2", r"layers\.1\..*experts|gate"])
def test_an_old_file_of_some_experts_layers(skip: str, tmp_path: Path):
    old = old_adapter("mixtral", tmp_path / "old", skip)
    family = FAMILIES["mixtral"]
    expected = run(with_experts_changed("mixtral", old, 5 / 3), family, 3, 7)
    program = adaptc.compile(shared_base_program("mixtral"), old)
    assert_same(run(program, family, 3, 7), expected, tol=2e-5)
    saved = adaptc.save_adapter(program, tmp_path / "new")
    assert_same(run(load_peft(family.build(), saved), family, 3, 7), expected, tol=2e-5)


def test_old_files_that_do_not_fit_are_refused(tmp_path: Path):
    cases = {
        r"experts\.1\.w1.*lora_B": r"layers\.0\.mlp\.experts: lora_B of the gate projection of expert 1 is missing",
        r"w3": r"lora_A of the up projection of expert 0 is missing.*gate and up",
    }
    for i, (skip, message) in enumerate(cases.items()):
        with pytest.raises(adaptc.CheckpointError, match=message):
            adaptc.compile(shared_base_program("mixtral"), old_adapter("mixtral", tmp_path / str(i), skip))
    path = old_adapter("mixtral", tmp_path / "ranks", rank_pattern={"w1": 2})
    with pytest.raises(adaptc.ConfigError, match=r"rank_pattern=.*single experts"):
        adaptc.compile(shared_base_program("mixtral"), path)
    path = old_adapter("mixtral", tmp_path / "dropout", lora_dropout=0.1)
    with pytest.warns(adaptc.AdaptcWarning, match=r"lora_dropout=0\.1 .* is dropped"):
        adaptc.compile(shared_base_program("mixtral"), path)


def test_old_targets_are_refused_by_name():
    with pytest.raises(adaptc.TargetError, match=r"\['w1', 'w3'\].*target_parameters=\['experts\.gate_up_proj'"):
        adaptc.compile(shared_base_program("mixtral"), adaptc.LoraConfig(target_modules=["q_proj", "w1", "w3"]))
