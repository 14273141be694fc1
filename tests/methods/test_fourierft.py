"""FourierFT: illegal options, PEFT's first values and places, its rule for patterns, the transform of any matrix."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import torch

import adaptc
from adaptc.errors import ConfigError, TargetError
from adaptc.methods.sparse.fourierft import FourierFT
from adaptc.passes.graph.ops import Op
from tests.support.spectral import compile_blocks, differing_fields, make_blocks, peft_wrapped

BAD = [
    {"n_frequency": 0},
    {"n_frequency": True},
    {"n_frequency": 3.0},
    {"n_frequency_pattern": {"up": -1}},
    {"random_loc_seed": None},
    {"bias": "some"},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_illegal_options_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"FourierFTConfig\.{name}"):
        adaptc.FourierFTConfig(**bad)


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.FourierFTConfig(), adaptc.FourierFTConfig()) == {}


def test_more_frequencies_than_entries():
    with pytest.raises(ConfigError, match=r"site 'layers\.0\.up\.weight'.*n_frequency=78 is more than the 77 entries"):
        compile_blocks(adaptc.FourierFTConfig(target_modules=["up"], n_frequency=78))
    compile_blocks(adaptc.FourierFTConfig(target_modules=["up"], n_frequency=77))


@pytest.mark.parametrize("zeros", [True, False])
def test_first_values_and_places_are_pefts(zeros):
    options = {"target_modules": ["up"], "n_frequency": 13, "random_loc_seed": 3, "init_weights": zeros}
    theirs = peft_wrapped(peft.FourierFTConfig(**options), seed=4)
    after = torch.rand(3)
    torch.manual_seed(4)
    program = compile_blocks(adaptc.FourierFTConfig(**options))
    assert torch.equal(torch.rand(3), after)
    for a, layer in zip(program.adaptation.attachments, theirs.base_model.model.layers, strict=True):
        spectrum, places = (program.binding.values[f] for f in a.slots.values())
        assert torch.equal(spectrum, layer.up.fourierft_spectrum["default"])
        rows, columns = layer.up.indices["default"]
        assert torch.equal(places, rows * 11 + columns)
        assert bool(spectrum.any()) is not zeros


PATTERNS = [
    {"up": 5},
    {"layers.1.up": 5},
    {r"1\.(up|down)": 5},
    {r"1\.\w+": 5, "up": 6},
    {"up|down": 5},
    {"layers.0.up": 4, "up": 6},
    {"head": 5},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_read_as_peft_reads_them(pattern):
    options = {"target_modules": ["up", "down", "head"], "n_frequency": 9, "n_frequency_pattern": pattern}
    theirs = peft_wrapped(peft.FourierFTConfig(**options))
    expected = {
        n: m.fourierft_n_frequency["default"]
        for n, m in theirs.base_model.model.named_modules()
        if hasattr(m, "fourierft_n_frequency")
    }
    program = compile_blocks(adaptc.FourierFTConfig(**options))
    assert {a.module: a.method.r for a in program.adaptation.attachments} == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("key", ["hea.", "model.layers.0.up", "layers.[0-9].up"])
def test_patterns_that_would_be_ignored(key):
    """PEFT's keys follow a dot, and it says nothing of those that match no module."""
    with pytest.raises(TargetError, match=r"n_frequency_pattern: .*matches no adapted module"):
        compile_blocks(
            adaptc.FourierFTConfig(target_modules=["up", "head"], n_frequency=9, n_frequency_pattern={"up": 3, key: 5})
        )


def test_bad_expression():
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        compile_blocks(adaptc.FourierFTConfig(target_modules=["up"], n_frequency=9, n_frequency_pattern={"(up": 3}))


@pytest.mark.parametrize("shape", [(7, 5), (6, 4), (5, 3, 2, 3), (1, 9)])
def test_transform(shape):
    """Of the weight as one matrix, whatever its sizes; by NumPy."""
    op, method = Op("weight", shape), FourierFT(r=4, seed=8)
    W, values = torch.randn(shape, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    places = method.files.derived(op, W, torch.float64, {})["fourierft_indices"]
    assert len(set(places.tolist())) == 4
    spectrum = np.zeros(op.matrix_shape)
    spectrum.reshape(-1)[places.numpy()] = values.numpy()
    expected = W + 3.0 * torch.from_numpy(np.fft.ifft2(spectrum).real).reshape(shape)
    slots = {"fourierft_spectrum": values, "fourierft_indices": places}
    torch.testing.assert_close(method.weight(op, W, slots, torch.tensor(3.0)), expected, rtol=1e-12, atol=1e-12)


def test_half_precision():
    """The transform, which has no half-precision form, is made in float32, and only its result is rounded."""
    op, method = Op("weight", (9, 7)), FourierFT(r=5)
    W = torch.randn(9, 7).bfloat16()
    slots = {"fourierft_spectrum": torch.randn(5).bfloat16(), **method.files.derived(op, W, torch.bfloat16, {})}
    scale = torch.tensor(40.0)
    found = method.weight(op, W, slots, scale)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in slots.items()}
    assert torch.equal(found, method.weight(op, W.float(), wide, scale).bfloat16())


@pytest.mark.long
def test_places_belong_to_the_adapter(tmp_path):
    """Two adapters with seeds of their own in one program; saved configs keep their seeds."""
    one = adaptc.FourierFTConfig(target_modules=["up"], n_frequency=13)
    two = dataclasses.replace(one, random_loc_seed=5, scaling=9.0, n_frequency=20)
    programs = [compile_blocks(c) for c in (one, two)]
    paths = [adaptc.save_adapter(p, tmp_path / str(i)) for i, p in enumerate(programs)]
    x = make_blocks()[1]
    for i in (1, 0, 1):
        adaptc.swap(programs[0], paths[i])
        expected = compile_blocks(paths[i])(x)
        torch.testing.assert_close(programs[0](x), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(expected, compile_blocks(paths[1 - i])(x), atol=1e-3)


def test_a_vector_is_no_matrix():
    with pytest.raises(TargetError, match="two axes"):
        FourierFT(r=2).slots(Op("weight", (5,)))
