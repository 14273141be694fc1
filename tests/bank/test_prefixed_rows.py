"""Banks of programs with a KV prefix: each row gets what its adapter gives alone.

A KV prefix is no site of a bank's code, since whoever makes the cache gives each row its own. So it has no form for
rows, and whether code for long rows differs from code for short ones is up to the program's other methods.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.errors import TargetError
from adaptc.methods.prompt.key_values import KVPrefixMethod
from adaptc.state.runner import FORWARD
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle
from tests.support.prompts import prompt_oracle, text

PREFIXES = {"PrefixTuningConfig": {}, "CartridgeConfig": {"num_frozen_tokens": 0}}
#: what stands beside the prefix in the program -> how many codes calls with short and with long rows need: none for a
#: prefix alone, two for factors that lie side by side in matmuls, one for rotations one after the other
CODES = {None: 0, "LoraConfig": 2, "OFTConfig": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "OFTConfig": {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]},
}
#: positions of a row: few, for which one matmul has the factors of all adapters, and many, for which it has not
SHORT, LONG = 2, 21


@cache
def path_of(cls: str, count: int = 0) -> Path:
    """An adapter of PEFT's; ``count``: the virtual tokens of a prefix."""
    path = Path(mkdtemp())
    if cls in PREFIXES:
        return prompt_oracle("llama", path, cls, num_virtual_tokens=count, seed=count, **PREFIXES[cls]).path
    config = getattr(peft, cls)(task_type="CAUSAL_LM", **OPTIONS[cls])
    return Oracle.wrap_and_save("llama", config, path, seed=9).path


@cache
def generator(cls: str, beside: str | None) -> Any:
    configs = [getattr(adaptc, cls)(num_virtual_tokens=3, **PREFIXES[cls])]
    if beside is not None:
        configs.append(getattr(adaptc, beside)(**OPTIONS[beside]))
    return adaptc.compile_for_generation(FAMILIES["llama"].build(), configs, max_batch=4, max_length=60)


def adapters(cls: str, beside: str | None) -> dict[str, Path]:
    found = {"two": path_of(cls, 2), "seven": path_of(cls, 7)}
    return found if beside is None else {**found, "other": path_of(beside)}


def logits(callable_: Any, inputs: dict[str, Tensor]) -> Tensor:
    return callable_(**inputs).logits


@pytest.mark.long
@pytest.mark.parametrize(
    ("cls", "beside"), [*(("PrefixTuningConfig", one) for one in CODES), ("CartridgeConfig", "LoraConfig")]
)
def test_a_row_gets_what_its_adapter_gives_alone(cls: str, beside: str | None) -> None:
    gen, given = generator(cls, beside), adapters(cls, beside)
    made = gen.bank(given)
    names = ["seven", None, "two", "two" if beside is None else "other"]
    alone = {n: gen.base if n is None else gen.bind(given[n]) for n in names}
    found: list[Tensor] = []
    for length in (SHORT, LONG):
        inputs = text(4, length, None)
        out = logits(made.select(names), inputs)
        for i, name in enumerate(names):
            expected = logits(alone[name], {k: v[i : i + 1] for k, v in inputs.items()})
            torch.testing.assert_close(out[i : i + 1], expected)
        found.append(logits(made.select([None] * 4), inputs))
        # each of the adapters matters, or the comparison would say nothing
        assert all((out[i] - found[-1][i]).abs().max() > 1e-3 for i, name in enumerate(names) if name is not None)


@pytest.mark.long
@pytest.mark.parametrize("beside", CODES, ids=str)
def test_code_follows_what_stands_beside_the_prefix(beside: str | None) -> None:
    given = adapters("PrefixTuningConfig", beside)
    bank = generator("PrefixTuningConfig", beside).bank(given)
    names = ["seven", None, "two", "two" if beside is None else "other"]
    for length in (SHORT, LONG):
        logits(bank.select(names), text(4, length, None))
    rows = bank.placement.row_programs[FORWARD]
    assert not any(isinstance(a.method, KVPrefixMethod) for a in rows.attachments)
    assert rows.is_side_by_side == (beside == "LoraConfig")
    assert len(bank.placement.code_cache.executors) == CODES[beside]


@pytest.mark.long
@pytest.mark.parametrize("cls", PREFIXES)
def test_a_prefix_has_no_form_for_rows(cls: str) -> None:
    """Without a cache of the caller's there is nobody to give each row its prefix, and a bank is refused."""
    config = getattr(adaptc, cls)(num_virtual_tokens=3, **PREFIXES[cls])
    program = adaptc.compile(FAMILIES["llama"].build(), config, example_inputs=text(2, 5, None))
    (prefix,) = program.adaptation.attachments
    assert isinstance(prefix.method, KVPrefixMethod)
    assert not prefix.method.bank.is_defined()
    with pytest.raises(TargetError, match=f"{prefix.method.name} has no form there that can be given to each row"):
        program.bank()
