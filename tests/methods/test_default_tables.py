"""Default targets by type of model: the tables next to PEFT's, and what a config looks like once it is completed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants

import adaptc
from adaptc.adapter_files.directory import read_config
from adaptc.errors import ConfigError, TargetError
from adaptc.methods._shared.default_targets import (
    DEFAULT_TABLES,
    NO_GRAPH_DEFAULTS,
    adds_default_modules,
    default_modules,
)
from adaptc.methods._shared.registry import CONFIGS, config_class
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle, assert_same, file_tensors, load_peft, run

LORA: dict[str, Any] = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
#: PEFT's name of a table -> the method's type
TYPES = {"LNTUNING": "LN_TUNING"}

#: method, model type -> why the table's names are not those of LoRA's table, which stands for the graph here
EXPLAINED = {
    **{
        (kind, "phi"): "for this type the graph gives these; LoRA's table adds the feed-forward layers"
        for kind in ("SHIRA", "VERA", "FROD", "PVERA")
    },
    ("ADAMSS", "vit"): "no entry in LoRA's table; the graph gives these",
    ("FROD", "vit"): "no entry in LoRA's table; the graph gives these",
    ("PVERA", "dinov2"): "no entry in LoRA's table; the graph gives these",
}


def tables() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, field, PEFT's table)."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            kind, _, field = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MAPPING").partition("_")
            yield TYPES.get(kind, kind), field.lower(), table


def names(entry: Any) -> Any:
    return sorted(entry) if isinstance(entry, (list, tuple, set)) else entry


@pytest.mark.parametrize(("kind", "field", "table"), list(tables()), ids=lambda v: v if isinstance(v, str) else "")
def test_tables(kind, field, table):
    """An entry per model type where a method means other layers than query and value, else only where it differs."""
    ours = DEFAULT_TABLES.get(kind, {}).get(field, {})
    assert set(ours) <= set(table)
    for model_type, entry in table.items():
        found = default_modules(kind, model_type).get(field)
        if found is None and kind not in NO_GRAPH_DEFAULTS:
            found = LORA.get(model_type)
        assert (names(found) == names(entry)) != ((kind, model_type) in EXPLAINED), model_type


def test_every_table_is_peft_s():
    known = {(kind, field) for kind, field, _ in tables()}
    assert {(kind, field) for kind, fields in DEFAULT_TABLES.items() for field in fields} <= known
    assert {kind for kind, _ in known} >= NO_GRAPH_DEFAULTS - {"TRAINABLE_TOKENS"}


def test_names_a_variant_lacks_are_left_out():
    """T5's gated feed-forward layers are not called wi."""
    paths = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wi_0", "x.kwi"]
    assert default_modules("ADALORA", "t5", paths) == {"target_modules": ["q"]}
    assert default_modules("ADALORA", "t5", ["nothing"]) == {}
    assert default_modules("IA3", "llama", ["model.layers.0.mlp.down_proj"]).get("feedforward_modules") == ["down_proj"]
    assert default_modules("IA3", "mt5").get("feedforward_modules") == []
    assert default_modules("IA3", "smollm3").get("feedforward_modules") is None
    assert default_modules("IA3", None).get("feedforward_modules") is None


#: what a method's config needs beside its defaults to be planned for a family
NEEDED: dict[str, dict[str, Any]] = {
    **{key: {"num_virtual_tokens": 3} for key in ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"]},
    **{key: {"num_virtual_tokens": 3} for key in ["PREFIX_TUNING", "CARTRIDGE"]},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [5, 7]},
    "ADALORA": {"total_step": 10},
    "XLORA": {"hidden_size": 16, "adapters": {"0": "one"}},
    "C3A": {"block_size": 4},
    "VBLORA": {"vector_length": 4},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
}


@cache
def base(name: str) -> adaptc.AdaptedProgram:
    family = FAMILIES[name]
    model = family.build()
    return adaptc.unload(adaptc.compile(model, adaptc.LoraConfig(target_modules="all-linear")))


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
@pytest.mark.parametrize("kind", [k for k in DEFAULT_TABLES if k in CONFIGS])
def test_completed_configs(kind, name):
    """What is planned, and saved, has the names that PEFT fills in."""
    from adaptc.methods import ModelFacts
    from adaptc.targets.plan_layers import plan_layers

    model = FAMILIES[name].build()
    types = {n: f"{type(m).__module__}.{type(m).__qualname__}" for n, m in model.named_modules()}
    facts = ModelFacts(types, model.config.model_type)
    config = config_class(kind)(**NEEDED.get(kind, {}))
    if kind in NO_GRAPH_DEFAULTS - {"OSF"} and facts.model_type not in DEFAULT_TABLES[kind]["target_modules"]:
        with pytest.raises(TargetError, match=f"{kind} has no default for model type '{facts.model_type}'"):
            plan_layers(config, base(name), facts)
        return
    found = plan_layers(config, base(name), facts).config
    peft_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    model_class = peft.PEFT_TYPE_TO_TUNER_MAPPING[kind]
    wanted = model_class._prepare_adapter_config(
        *((object.__new__(model_class),) if kind != "IA3" else ()),
        peft_class(**NEEDED.get(kind, {})),
        {"model_type": model.config.model_type},
    )
    if isinstance(wanted.target_modules, str):  # OSF adapts all linear layers of a model that its table lacks
        assert found.target_modules == wanted.target_modules == "all-linear"
        return
    present = {t for t in wanted.target_modules if any(n == t or n.endswith(f".{t}") for n in types)}
    assert set(found.target_modules) == present
    if kind == "IA3":
        assert set(found.feedforward_modules) == set(wanted.feedforward_modules)
    assert config.target_modules is None


@pytest.mark.parametrize("kind", sorted(k for k in NO_GRAPH_DEFAULTS - {"OSF"} if k in CONFIGS))
def test_unknown_types_are_asked_for(kind):
    extra = {"token_indices": [1]} if kind == "TRAINABLE_TOKENS" else {}
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 7))
    with pytest.raises(TargetError, match=r"target_modules is None.*candidates"):
        adaptc.compile(model, config_class(kind)(**extra), example_inputs=torch.randn(2, 3))


@pytest.mark.long
def test_what_the_graph_answers_is_saved_too(tmp_path):
    program = adaptc.compile(FAMILIES["phi"].build(), given := adaptc.LoraConfig(r=2))
    assert given.target_modules is None
    assert read_config(adaptc.save_adapter(program, tmp_path))["target_modules"] == ["q_proj", "v_proj"]


TOKENS: dict[str, Any] = {"trainable_token_indices": [1, 2, 3]}
#: a family, and what is trained beside the default layers
BESIDE = [
    *((name, TOKENS) for name in ("llama", "gpt2", "t5", "opt", "gpt_neox", "smollm3")),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("mixtral", {"target_parameters": ["experts.down_proj"]}),
    ("llama", {"target_parameters": ["up_proj.weight"], **TOKENS}),
    ("qwen3_moe", {"target_parameters": ["experts.down_proj"]}),
]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("name", "options"), [b for b in BESIDE if b[0] in FAMILIES], ids=str)
def test_default_layers_are_adapted_beside_tokens_modules_and_parameters(name, options, tmp_path):
    """As in PEFT, whose only exception are parameters of a model it has no defaults for."""
    given = {"r": 2, **options}
    program = adaptc.compile(FAMILIES[name].build(), adaptc.LoraConfig(**given))
    known = name != "smollm3"
    targets = {} if known else {"target_modules": program.binding.config.target_modules}
    oracle = Oracle.wrap_and_save(name, peft.LoraConfig(**given, **targets), tmp_path / "peft")
    adaptc.swap(program, tmp_path / "peft")
    assert_same(run(program, oracle.family), oracle())
    adaptc.save_adapter(program, tmp_path / "ours")
    assert file_tensors(tmp_path / "ours").keys() == file_tensors(tmp_path / "peft").keys()


def test_the_types_with_defaults_beside_parameters_are_those_of_peft_s_table():
    assert {t for t in {*LORA, *DEFAULT_TABLES["IA3"]["target_modules"], "gpt_oss"} if adds_default_modules(t)} == set(
        LORA
    )
    assert not adds_default_modules(None)


@pytest.mark.long
def test_ia3_by_default(tmp_path):
    oracle = Oracle.wrap_and_save("llama", peft.IA3Config(), tmp_path / "peft")
    program = adaptc.compile(FAMILIES["llama"].build(), adaptc.IA3Config())
    config = program.binding.config
    assert set(config.target_modules) == {"k_proj", "v_proj", "down_proj"}
    assert set(config.feedforward_modules) == {"down_proj"}
    adaptc.swap(program, tmp_path / "peft")
    assert_same(run(program, oracle.family), oracle())
    loaded = peft.PeftModel.from_pretrained(FAMILIES["llama"].build(), str(adaptc.save_adapter(program, tmp_path)))
    assert_same(run(loaded.eval(), oracle.family), oracle())


@pytest.mark.long
def test_ia3_with_targets_of_one_s_own(tmp_path):
    """The default feed-forward layers need not be among them; PEFT writes a config then that it cannot read again."""
    oracle = Oracle.wrap_and_save("gpt2", peft.IA3Config(target_modules=["c_proj"]), tmp_path / "peft")
    program = adaptc.compile(FAMILIES["gpt2"].build(), adaptc.IA3Config(target_modules=["c_proj"]))
    tensors = {k.removeprefix("base_model.model."): v for k, v in file_tensors(tmp_path / "peft").items()}
    assert {v.shape[0] == 1 for k, v in tensors.items() if ".attn." in k} == {False}
    assert {v.shape[0] == 1 for k, v in tensors.items() if ".mlp." in k} == {True}
    adaptc.swap(program, tensors)
    assert_same(run(program, oracle.family), oracle())
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_same(run(loaded, oracle.family), oracle())
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    again = load_peft(FAMILIES["gpt2"].build(), saved)
    assert_same(run(again, oracle.family), oracle())


@pytest.mark.parametrize("kind", [k for k in sorted(CONFIGS) if "bias" in config_class(k).__dataclass_fields__])
def test_bias_option(kind):
    """Every config with a bias option takes PEFT's three values, and nothing else."""
    cls = config_class(kind)
    for value in ("none", "all", f"{'lora' if kind == 'ADALORA' else kind.lower()}_only"):
        assert cls(**NEEDED.get(kind, {}), bias=value).bias == value
    for value in ("some", True, None):
        with pytest.raises(ConfigError, match="bias"):
            cls(**NEEDED.get(kind, {}), bias=value)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_files_have_no_field_peft_lacks(kind):
    """PEFT warns of such fields, and warnings are errors here."""
    config = config_class(kind)(**NEEDED.get(kind, {}))
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind if kind != "BONE" else "MISS"]
    data = {k: v for k, v in config.to_dict().items() if k != "peft_type"}
    fields = theirs.__dataclass_fields__
    assert set(data) <= set(fields)
    for name, value in theirs(**NEEDED.get(kind, {})).to_dict().items():
        # The last one is filled in when the model is known, here and in PEFT, whose CPT does so at once.
        known = ("peft_version", "auto_mapping", "runtime_config", "num_transformer_submodules")
        if name in data and name not in known:
            assert data[name] == value or not (data[name] or value), name
