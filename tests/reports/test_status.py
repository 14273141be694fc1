"""The status of adapters, field by field what PEFT says of its model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError
from tests.support.subject import quiet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 11)
        self.layers = nn.ModuleList(nn.Linear(11, 11) for _ in range(3))
        self.head = nn.Linear(11, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


IDS = torch.randint(13, (3, 4), generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "style": ("LoraConfig", {"r": 3, "target_modules": ["layers.0", "layers.1", "embed"]}),
    "task": ("LoraConfig", {"r": 2, "target_modules": ["layers.1", "layers.2"]}),
}


def twins(training: bool, **configs: tuple[str, dict[str, Any]]) -> tuple[adaptc.AdaptedProgram, Any]:
    torch.manual_seed(0)
    model, theirs = Net(), None
    made = {n: getattr(adaptc, cls)(**c, inference_mode=not training) for n, (cls, c) in configs.items()}
    ours = adaptc.compile(model, made, example_inputs=IDS, training=training)
    with quiet():
        for name, (cls, c) in configs.items():
            config = getattr(peft, cls)(**c, inference_mode=not training)
            if theirs is None:
                theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
            else:
                theirs.add_adapter(name, config)
        assert theirs is not None
        theirs.base_model.set_adapter(list(configs), inference_mode=not training)
    return ours, theirs


def same(ours: adaptc.AdaptedProgram, theirs: Any) -> None:
    """Field by field; ``scales`` is adaptc's own."""
    found, expected = adaptc.debug.get_model_status(ours), theirs.get_model_status()
    for f in dataclasses.fields(expected):
        # PEFT knows the class of a model that it has, adaptc of one of transformers.
        if f.name != "base_model_type":
            assert getattr(found, f.name) == getattr(expected, f.name), f.name
    layers = {s.name: s for s in adaptc.debug.get_layer_status(ours)}
    wanted = {s.name.removeprefix("model."): s for s in theirs.get_layer_status()}
    assert layers.keys() == wanted.keys()
    for name, layer in wanted.items():
        assert layers[name].module_type.endswith(layer.module_type)  # PEFT leaves the method of some out
        for f in dataclasses.fields(layer)[2:]:
            assert getattr(layers[name], f.name) == getattr(layer, f.name), (name, f.name)


@pytest.mark.parametrize("training", [False, True])
def test_fields_are_those_of_peft(training: bool) -> None:
    ours, theirs = twins(training, **CONFIGS)
    same(ours, theirs)
    ours.set_active(["task"])
    with quiet():
        theirs.base_model.set_adapter(["task"], inference_mode=not training)
    same(ours, theirs)
    with ours.disabled(), theirs.disable_adapter():
        status = adaptc.debug.get_model_status(ours)
        assert status.enabled is theirs.get_model_status().enabled is False
        assert "disabled" in repr(adaptc.debug.get_layer_status(ours))
    assert adaptc.debug.get_model_status(ours).enabled is True


@pytest.mark.parametrize(("cls", "options"), [("IA3Config", {"feedforward_modules": []}), ("LoHaConfig", {"r": 3})])
def test_of_other_methods(cls: str, options: dict[str, Any]) -> None:
    same(*twins(True, one=(cls, {"target_modules": ["layers.1", "head"], **options})))


def test_scales_and_tables() -> None:
    ours, _ = twins(False, **CONFIGS)
    ours.set_active({"style": 0.5}, "layers.0")
    ours.set_active({"style": 0.5})
    ours.set_active({"style": 2}, "embed")
    status = adaptc.debug.get_model_status(ours)
    assert status.scales == {"style": "irregular", "task": 1.0}
    layers = adaptc.debug.get_layer_status(ours)
    assert {s.name: s.scales for s in layers} == {
        "embed": {"style": 2.0},
        "layers.0": {"style": 0.5},
        "layers.1": {"style": 0.5, "task": 1.0},
        "layers.2": {"task": 1.0},
    }
    text = repr(layers)
    assert "style: 0.5, task: 1.0" in text
    assert "lora.Embedding" in text
    assert "irregular" in repr(status)
    assert isinstance(layers, list)


def test_programs_without_adapters_are_refused() -> None:
    ours, _ = twins(False, **CONFIGS)
    for program in (adaptc.merge(ours), adaptc.unload(ours)):
        for status in (adaptc.debug.get_model_status, adaptc.debug.get_layer_status):
            with pytest.raises(AdaptcError, match="merged or unloaded"):
                status(program)
