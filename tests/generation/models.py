"""Tiny models that generate, with adapters of PEFT beside them, and what both say to the same prompts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import torch
from torch import Tensor

import adaptc
from tests.support.families import FAMILIES, VOCAB
from tests.support.model_state import changed_paths, state_of

#: positions that the tiny models have
POSITIONS = 64


@dataclass(eq=False)
class Case:
    """A model, two adapters of different rank for it, as PEFT wrote them, and PEFT's own model with both."""

    model: Any
    oracle: Any
    adapters: dict[str, Path]

    def expected(self, name: str | None, ids: Any, **how: Any) -> Any:
        """What PEFT generates with the adapter called ``name``, None for the base."""
        if name is None:
            with self.oracle.disable_adapter():
                return generated(self.oracle, ids, **how)
        self.oracle.set_adapter(name)
        return generated(self.oracle, ids, **how)


@cache
def case(family: str) -> Case:
    return case_of(FAMILIES[family].build(), "all-linear")


def case_of(model: Any, targets: Any) -> Case:
    """The case of ``model`` with adapters at the layers ``targets``."""
    oracle: Any = None
    folder = Path(mkdtemp())
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        for name, rank in (("first", 3), ("second", 5)):
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
            if oracle is None:
                oracle = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
            else:
                oracle.add_adapter(name, config)
        oracle.save_pretrained(str(folder))
    return Case(model, oracle.eval(), {name: folder / name for name in ("first", "second")})


def check_tokens(of: Case, gen: Any, prompts: Sequence[Mapping[str, Tensor]]) -> None:
    """Assert that ``gen``, with the first adapter, says what PEFT says: greedy, drawn, in beams, swapped, the base."""
    for text in prompts:
        for how in ({}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
            assert torch.equal(generated(gen, text, **how), of.expected("first", text, **how))
    text = prompts[-1]
    try:
        adaptc.swap(gen, of.adapters["second"])
        assert torch.equal(generated(gen, text, do_sample=True), of.expected("second", text, do_sample=True))
    finally:
        adaptc.swap(gen, of.adapters["first"])
    assert torch.equal(generated(gen.base, text), generated(of.model, text))
    assert not torch.equal(gen.base.forward(text["input_ids"]).logits, gen.forward(text["input_ids"]).logits)


@cache
def generator(family: str = "llama", backend: str = "eager", adapter: str = "first") -> Any:
    """One that the tests of a process share: those that swap it give its adapter back. Of each family that is met here
    the model must be as it was."""
    found = case(family)
    before = state_of(found.model)
    gen = adaptc.compile_for_generation(
        found.model, found.adapters[adapter], max_batch=12, max_length=48, backend=backend
    )
    assert changed_paths(before, state_of(found.model)) == []
    return gen


def prompt(rows: int = 3, length: int = 7, padding: tuple[int, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    """Ids and a mask, with so many positions of each row padded on the left."""
    ids = torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n], ids[row, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, ids: Any, seed: int = 5, new: int = 9, **how: Any) -> Any:
    """``model.generate``, with random numbers of its own."""
    given = ids if isinstance(ids, dict) else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0, **how}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(**given, **how)
