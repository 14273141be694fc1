"""Odd values in every field of every config, as an object, as a dict and as a file: refused by name, or equal in all
three, and what is accepted compiles or is refused in an AdaptcError."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, ConfigError
from adaptc.methods import TargetedConfig, config_class
from adaptc.methods._shared.registry import CONFIGS
from adaptc.value_types import field_rules

DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


class Speechless:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


#: values with names, so that a test's id says which it was
ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "7": 7,
    "10**15": 10**15,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "0.5": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e39": 1e39,
    "empty": "",
    "x": "x",
    "open": "(",
    "surrogate": "\udc80",
    "bytes": b"x",
    "[]": [],
    "[[]]": [[]],
    "[None]": [None],
    "[7]": [7],
    "[nan]": [float("nan")],
    "['up']": ["up"],
    "{}": {},
    "{1: 2}": {1: 2},
    "{'up': nan}": {"up": float("nan")},
    "{'up': '7'}": {"up": "7"},
    "{'up': 10**15}": {"up": 10**15},
    "{'(': 7}": {"(": 7},
    "deep": DEEP,
    "{'up': deep}": {"up": DEEP},
    "object": object(),
    "speechless": Speechless(),
    "complex": 1 + 2j,
    "sympy": sympy.Symbol("r"),
    "tensor": torch.tensor([1.0, 2.0]),
    "numpy": np.arange(3),
    "type": int,
}
#: what can be written to a file
JSON = {
    n: v
    for n, v in ODD.items()
    if n not in ("10**5000", "bytes", "{1: 2}")
    and "deep" not in n
    and (v is None or isinstance(v, (bool, int, float, str, list, dict)))
}
KINDS = sorted(CONFIGS)


def least(cls: Any) -> dict[str, Any]:
    """The fields without which a config cannot be made."""
    targets = {"target_modules": ["up"]} if issubclass(cls, TargetedConfig) else {}
    return {**targets, **dict(getattr(cls, "samples", ({},))[0])}


def outcome(make: Any) -> Any:
    """The fields of a config, or the words it was refused with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adaptc.errors.AdaptcWarning)
        try:
            config = make()
        except ConfigError as error:
            return str(error)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def raised(call: Any) -> type[Exception] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_rule(kind: str) -> None:
    """A field whose annotation nobody can read would take any value, and fail somewhere else."""
    cls = config_class(kind)
    # These are configs of their own, which check themselves.
    groups = {"arrow_config", "loftq_config", "kasa_config", "use_bdlora", "velora_config", "monteclora_config"}
    groups |= {"eva_config", "corda_config", "lora_ga_config"}
    assert {f.name for f in dataclasses.fields(cls)} - groups <= {*field_rules(cls)}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_values_of_every_field_mean_the_same_by_every_route(kind, tmp_path):
    cls: Any = config_class(kind)
    for field in [f.name for f in dataclasses.fields(cls)]:
        for name, value in ODD.items():
            options = {**least(cls), field: value}
            extra = {"oft_block_size": options.get("oft_block_size", 32)} if kind == "OFT" else {}
            data = {"peft_type": kind, **extra, **options}
            by_object = outcome(lambda options=options: cls(**options))
            found = [outcome(lambda data=data: cls.from_dict(data))]
            if name in JSON:
                found.append(outcome(lambda data=data: cls.from_dict(json.loads(json.dumps(data)))))
            assert all(repr(other) == repr(by_object) for other in found), (field, name, by_object, found)
            if isinstance(by_object, str):
                assert field in by_object, f"{field}={name} is not named: {by_object}"
                assert len(by_object) < 2000


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


#: values each of which some field takes, and that may be too much for a layer
FOR_LAYERS = ("-1", "0", "7", "10**15", "0.5", "x", "open", "[]", "['up']", "{}", "{'up': 10**15}", "{'(': 7}")
assert ODD.keys() >= set(FOR_LAYERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_a_config_takes_compiles_or_is_refused(kind):
    exported = torch.export.export(Tiny(), (torch.randn(3, 6),))
    cls: Any = config_class(kind)
    for f in dataclasses.fields(cls):
        for name in FOR_LAYERS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = {**least(cls), f.name: ODD[name]}
                found = raised(lambda options=options: adaptc.compile(exported, cls(**options)))
                assert found is None or (issubclass(found, AdaptcError) and found is not adaptc.PassError), (
                    f.name,
                    name,
                )


#: what PEFT's config objects may hold beside their defaults, per field, where the kind has the field
PEFT_TAKES: dict[str, list[Any]] = {
    "target_modules": [["up"], {"up"}, "up", ".*up", "all-linear", None],
    "exclude_modules": [["down"], "down", None],
    "modules_to_save": [["head"], None],
    "layers_to_transform": [3, [0, 2], None],
    "layers_pattern": ["layers", ["layers", "h"], None],
    "rank_pattern": [{}, {"up": 4}, {r"^layers\.\d+": 4}],
    "alpha_pattern": [{}, {"up": 4}, {"up": 0.5}],
    "n_frequency_pattern": [{}, {"up": 4}, None],
    "block_size_pattern": [{}, {"up": 2}, None],
    "lora_alpha": [16, 0.5, np.float32(0.25), np.int64(3)],
    "alpha": [16, 0.5],
    "lora_dropout": [0, 0.5],
    "r": [8, np.int64(8)],
    "init_lora_weights": [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica"],
    "task_type": ["CAUSAL_LM", None],
    "trainable_token_indices": [[1, 2], {"embed": [1, 2]}, None],
    "layer_replication": [[(0, 2), (1, 3)], [[0, 2]], None],
    "target_parameters": [["experts.gate"], None],
    "auto_mapping": [{"base_model_class": "Net", "parent_library": "here"}, None],
    "revision": ["main", None],
    "base_model_name_or_path": ["somewhere", None],
    "feedforward_modules": [["up"], "up", []],
    "init_weights": [True],
    "inference_mode": [True, False],
    "random_seed": [None, 5],
}


def as_json(value: Any) -> Any:
    """A value as a file has it, in which a set is a list in any order."""
    found = json.loads(json.dumps(value, default=sorted))
    return sorted(found) if isinstance(found, list) else found


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "BONE"])
def test_what_peft_holds_and_saves_is_taken(kind, tmp_path):
    """Objects of PEFT's, and the files it writes, in each of a field's types."""
    import peft

    theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    own: Any = config_class(kind)
    tried = 0
    for name in {f.name for f in dataclasses.fields(own)} & {f.name for f in dataclasses.fields(theirs)}:
        for value in PEFT_TAKES.get(name, []):
            needs = {"layers_to_transform": [0]} if name == "layers_pattern" and value else {}
            if kind == "IA3" and name == "feedforward_modules":
                needs = {"target_modules": ["up"]}
            if kind == "SUPERTUNING" and name in ("lora_alpha", "lora_dropout"):
                needs = {"r": 2}
            if kind == "SUPERTUNING" and name == "r" and isinstance(value, np.generic):
                continue  # which PEFT refuses
            if (kind, name) == ("PSOFT", "random_seed"):
                needs = {"psoft_svd": "lowrank"}
            start = {k: v for k, v in least(own).items() if k != "target_modules" or name != "target_modules"}
            start = {k: v for k, v in start.items() if k in {f.name for f in dataclasses.fields(theirs)}}
            if kind == "OFT" and name == "r":
                start["oft_block_size"] = 0
            if kind == "CPT" and name == "task_type":
                continue  # it is for one
            if kind == "ADALORA" and name in ("init_lora_weights", "alpha_pattern", "rank_pattern", "r"):
                continue  # of these AdaLoRA makes something else, or nothing
            if (kind, name) in (("ADAPTION_PROMPT", "target_modules"), ("PREFIX_TUNING", "init_weights")):
                continue  # a name alone, and "zero": PEFT says so and checks nothing
            if (kind, name, value) in (("PSOFT", "random_seed", None), ("ADAMSS", "random_seed", None)):
                continue  # an integer: torch has no seed of None, which PEFT would find out later
            if (kind, name) == ("ADAMSS", "init_weights"):
                continue  # "orthogonal", False or None
            config = theirs(**{**start, **needs, name: value})
            numpy = isinstance(value, np.generic)
            data = {**config.to_dict(), "peft_type": kind}
            data["task_type"] = getattr(data["task_type"], "value", data["task_type"])
            data.pop("runtime_config", None)  # no part of an adapter
            made = own.from_dict(data)
            found = getattr(made, name)
            assert found == value or sorted(found) == sorted(value), (name, value, found)
            assert type(found) in (int, float) if numpy else True
            if not numpy:
                config.save_pretrained(tmp_path)
                saved = json.loads((tmp_path / "adapter_config.json").read_text())
                again = getattr(own.from_dict({k: v for k, v in saved.items() if k != "runtime_config"}), name)
                assert as_json(again) == as_json(found), (name, value, again)
            tried += 1
    assert tried


def test_a_pattern_that_is_none_is_empty():
    for cls in (adaptc.LoraConfig, adaptc.LoHaConfig, adaptc.LoKrConfig):
        config = cls(target_modules=["up"], rank_pattern=None, alpha_pattern=None)
        assert config.method("up", "linear").sizes.rank() == config.r


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_pattern": {5: 3}}, r"rank_pattern must be a dict whose keys are each a string"),
        ({"rank_pattern": {"up": "3"}}, r"rank_pattern\['up'\] must be an integer, got '3'"),
        ({"layers_to_transform": [0, "1"]}, r"layers_to_transform\[1\] must be an integer, got '1'"),
        ({"layer_replication": [(0, 1, 2)]}, r"layer_replication\[0\] must be 2 values"),
        ({"layer_replication": [(0, 1.5)]}, r"layer_replication\[0\]\[1\] must be an integer, got 1.5"),
        ({"auto_mapping": {"a": DEEP}}, r"auto_mapping\['a'\] must be nested no deeper"),
        ({"auto_mapping": {"a": {"b": float("inf")}}}, r"auto_mapping\['a'\] must be .* finite"),
        ({"r": 2**64}, "r must be an integer of 64 bits"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be True or False, got 1"),
        ({"target_modules": ["a\udc80"]}, r"target_modules\[0\] must be a string that can be written"),
    ],
)  # fmt: skip
def test_the_message_names_the_place(options, said):
    with pytest.raises(ConfigError, match=said):
        adaptc.LoraConfig(**options)


def test_names_of_options_are_strings():
    with pytest.raises(ConfigError, match="names of options are strings, got 5"):
        adaptc.LoraConfig.from_dict({5: 3, "r": 4})
    with pytest.raises(ConfigError, match="peft_type"):
        adaptc.compile(Tiny(), {"peft_type": 10**5000}, example_inputs=torch.randn(2, 6))
