"""A factor on the scale of every method that has one, and every method on and off: the table, held against PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import adaptc
from adaptc import ConfigError
from tests.support.method_table import ENTRIES
from tests.support.subject import assert_close, assert_valid, quiet, subject

#: which float32 holds exactly, as PEFT's scales of LoHa are then
FACTOR = -0.375
#: where PEFT keeps the factor of a method's change
SCALINGS = ("scaling", "waveft_scaling", "fourierft_scaling")
#: methods that have none, which PEFT warns of or does not offer
WITHOUT = (
    *("oft", "boft", "hra", "ia3", "road", "miss", "vera", "vblora", "c3a", "trainable_tokens"),
    *("hira", "beft", "deft", "glora", "pvera", "unilora", "tinylora", "frod", "osf", "supertuning", "adamss"),
)
#: methods that have one here alone, of which their own tests tell
OURS = ("delora",)

CASES = [(e.name, layer) for e in ENTRIES for layer in e.layers() if layer in e.peft]
WITH = [(e, layer) for e, layer in CASES if not e.startswith((*WITHOUT, *OURS))]


def scaled_by_peft(model: Any, factor: float) -> Any:
    """PEFT's model with the scale of its adapter multiplied: by its own function, where it has one that does it (that
    of LoRA passes embeddings over)."""
    model = copy.deepcopy(model)
    found = 0
    for module in model.modules():
        scaling = next((getattr(module, n) for n in SCALINGS if getattr(module, n, None)), None)
        if scaling is None:
            continue
        before, found = scaling["default"], found + 1
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)
        if scaling["default"] == before:
            scaling["default"] *= factor
    assert found == 1
    return model


@pytest.mark.few(7)
@pytest.mark.parametrize(("entry", "layer"), WITH)
def test_a_factor_is_peft_s(entry: str, layer: str) -> None:
    s = subject(entry, layer)
    program, args = s.compile(), s.args(5)
    before = program(*args)
    with quiet(), torch.no_grad():
        theirs = scaled_by_peft(s.wrapped, FACTOR)
        expected = theirs(*args)
        merged = theirs.merge_and_unload()(*args) if s.entry.has_weight_form else None
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    with adaptc.debug.assert_no_recompiles():
        program.set_active({"default": 99.0})
        program.set_active({"default": FACTOR})  # what counts is the last one
        assert_close(program(*args), expected, s.tolerance)
    assert_valid(program)
    if merged is not None:
        assert_close(adaptc.merge(program)(*args), merged, s.tolerance * 10)
    assert_close(program.bind(s.directory, scale=FACTOR)(*args), expected, s.tolerance)
    program.set_active({"default": 1})
    assert torch.equal(program(*args), before)
    for block in (program.scaled(FACTOR), program.scaled({"default": FACTOR})):
        with block:
            assert_close(program(*args), expected, s.tolerance)
    assert torch.equal(program(*args), before)
    adaptc.swap(program, s.directory, scale=FACTOR)
    assert_close(program(*args), expected, s.tolerance)


@pytest.mark.parametrize("entry", [e.name for e in ENTRIES if e.name.startswith(WITHOUT)])
def test_methods_without_a_scale_are_refused_by_name(entry: str) -> None:
    s = subject(entry, "linear" if "linear" in s_layers(entry) else "embedding")
    program, args = s.compile(), s.args(5)
    before = program(*args)
    for attempt in (
        lambda: program.bind(s.directory, scale=0.5),
        lambda: adaptc.swap(program, s.directory, scale=0.5),
        lambda: program.set_active({"default": 0.5}),
        lambda: program.scaled(0.5),
        lambda: program.scaled({"default": 0.5}),
    ):
        with pytest.raises(ConfigError, match=program.binding.config.peft_type):
            attempt()
    program.set_active({"default": 1.0})  # as it was made
    assert torch.equal(program(*args), before)


def s_layers(entry: str) -> list[str]:
    return next(e for e in ENTRIES if e.name == entry).layers()


@pytest.mark.few(7)
@pytest.mark.parametrize(("entry", "layer"), [(e.name, layer) for e in ENTRIES for layer in e.layers()])
def test_on_and_off(entry: str, layer: str) -> None:
    s = subject(entry, layer)
    program, args = s.compile(), s.args(5)
    on, base = program(*args), s.base(*args)
    assert not torch.allclose(on, base, rtol=1e-3, atol=1e-3)
    with program.disabled():
        assert_close(program(*args), base, 1e-9)
    assert torch.equal(program(*args), on)
    program.set_active([])
    assert_close(program(*args), base, 1e-9)
    assert program.active_adapters == []
    assert_valid(program)
    assert_close(adaptc.merge(program)(*args), base, 1e-9)
    program.set_active("default")
    assert torch.equal(program(*args), on)
