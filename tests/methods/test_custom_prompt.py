"""A method of the program that a user wrote: it computes, trains, generates, and is held to what it promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import adaptc
from adaptc import PromptTuningConfig
from adaptc.errors import ConfigError, MethodError
from adaptc.methods import (
    ExtraInput,
    ExtraInputs,
    InitialValues,
    ProgramConfig,
    ProgramMethod,
    Slot,
    VirtualTokens,
)
from adaptc.methods._shared import registry as _registry
from tests.generation.test_prefixes import continued
from tests.support.families import FAMILIES
from tests.support.oracle import assert_same, shared_base_program
from tests.support.prompts import run_quietly, text

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class LeanedInputs(ExtraInputs):
    def extras(self):
        return {"side": ExtraInput(torch.int64)}


@dataclass(frozen=True)
class Leaned(VirtualTokens):
    """Rows of which each row of a batch leans to one of two sides."""

    name: ClassVar[str] = "leaned"
    extra_inputs = LeanedInputs()

    def slots(self, op):
        return {**super().slots(op), "sides": Slot((2, op.out_features), fill=1.0)}

    def prompt(self, slots, given):
        return slots["prompt_embeddings"] * torch.index_select(slots["sides"], 0, given["side"])[:, None]

    def init(self, op, W, dtype, generator=None):
        shapes = {n: s.shape for n, s in self.slots(op).items()}
        return InitialValues({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()})


@dataclass
class LeanedConfig(ProgramConfig):
    peft_type: ClassVar[str] = "LEANED"

    def method(self, name, kind):
        return Leaned(self.num_virtual_tokens)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Registered for one test."""
    for table in ("CONFIGS", "METHODS", "_registered_classes"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))


@pytest.mark.long
def test_it_computes_trains_and_generates(tmp_path):
    adaptc.methods.register_method(LeanedConfig, Leaned)
    made = adaptc.compile(FAMILIES["llama"].build(), LeanedConfig(num_virtual_tokens=5), training=True)
    inputs = {**text(3, 7, "left"), "side": torch.tensor([1, 0, 1])}
    module = made.module().eval()
    module(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters() if p.requires_grad)
    adapter = adaptc.save_adapter(made, tmp_path / "adapter")
    program = adaptc.compile(shared_base_program("llama"), adapter)
    values = {n.rpartition(".")[2]: t for n, t in program.binding.values.items()}
    rows = next(t for n, t in program.binding.values.items() if "sides" not in n)
    for side in (0, 1):
        plain = adaptc.compile(shared_base_program("llama"), PromptTuningConfig(num_virtual_tokens=5))
        adaptc.swap(plain, {"prompt_embeddings": (rows * values["sides"][side]).detach()})
        one = {n: t[:1] for n, t in inputs.items() if n != "side"}
        assert_same(run_quietly(program, {**one, "side": torch.tensor([side])}), run_quietly(plain, one))
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), LeanedConfig(num_virtual_tokens=2), max_length=40)
    adaptc.swap(gen, adapter)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "gen.pt2"))
    ids = text(1, 6, None)["input_ids"]
    for one in (gen, loaded):
        found = one.generate(ids, side=torch.tensor([1]), max_new_tokens=5, **GREEDY)
        assert torch.equal(found, continued(plain, ids, 5))


def test_what_it_promises():
    @dataclass(frozen=True)
    class Fixed(Leaned):
        name: ClassVar[str] = "fixed"

        def prompt(self, slots, given):
            return super().prompt(slots, given)[:, : self.count]

    @dataclass(frozen=True)
    class Louder(Leaned):
        name: ClassVar[str] = "louder"

        def inputs_embeds(self, value, slots, given):
            return 2 * super().inputs_embeds(value, slots, given)

    @dataclass(frozen=True)
    class Always(Leaned):
        name: ClassVar[str] = "always"

        def identity(self, op, W, dtype):
            return self.filled(op, W, dtype)

    for cls, message in (
        (Fixed, r"prompt\(\) must give rows \(..., 5, 24\)"),
        (Louder, "must change the first rows to those of prompt"),
        (Always, r"identity\(\) must put no token in front"),
    ):

        @dataclass
        class Config(ProgramConfig):
            peft_type: ClassVar[str] = cls.__name__.upper()
            made: ClassVar[Any] = cls

            def method(self, name, kind):
                return self.made(self.num_virtual_tokens)

        adaptc.methods.register_method(Config, cls)
        with pytest.raises(MethodError, match=message):
            adaptc.compile(shared_base_program("llama"), Config(num_virtual_tokens=3))


def test_what_cannot_be_registered():
    @dataclass(frozen=True)
    class Nothing(ProgramMethod):
        name: ClassVar[str] = "nothing"

        def slots(self, op):
            return {}

    with pytest.raises(ConfigError, match="must define what it makes of a program value: tokens, attention_mask"):
        adaptc.methods.register_method(LeanedConfig, Nothing)
    with pytest.raises(ConfigError, match="are not of one kind"):
        adaptc.methods.register_method(adaptc.LoraConfig, Leaned)
    with pytest.raises(ConfigError, match="check_method tries methods of layers"):
        adaptc.methods.check_method(LeanedConfig(num_virtual_tokens=3))
