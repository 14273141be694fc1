"""WaveFT: wavelets, PEFT's first values, the share of each layer, options that need code of their own."""

from __future__ import annotations

import sys
import warnings

import hypothesis.strategies as st
import numpy as np
import peft
import peft.tuners.waveft.layer as peft_layer
import pytest
import pywt
import torch
from hypothesis import given, settings
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning, ConfigError, SwapError
from adaptc.methods.sparse.waveft import FAMILIES, WaveFT
from adaptc.passes.graph.ops import Op
from tests.support.cover import examples
from tests.support.spectral import compile_blocks, differing_fields, make_blocks, peft_wrapped

BAD = [
    {"n_frequency": 0},
    {"n_frequency_pattern": {"up": 1.5}},
    {"random_loc_seed": None},
    {"wavelet_family": "haar"},
    {"wavelet_family": "sym1"},
    {"wavelet_family": None},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_illegal_options_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"WaveFTConfig\.{name}"):
        adaptc.WaveFTConfig(**bad)


def test_fields_and_defaults_are_pefts():
    assert differing_fields(peft.WaveFTConfig(), adaptc.WaveFTConfig()) == {}


def test_without_pywavelets(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(ConfigError, match=r"pip install 'adaptc\[wavelets\]'"):
        adaptc.WaveFTConfig()
    config = adaptc.WaveFTConfig(target_modules=["up"], n_frequency=5, use_idwt=False, init_weights=False)
    assert compile_blocks(config)(make_blocks()[1]).isfinite().all()


# -- wavelets ---------------------------------------------------------------------------------------------------------

#: of all the families PEFT takes, those of which it has filters, and has them right
RIGHT = [*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3"]


def test_families_are_pefts():
    assert list(FAMILIES) == list(WAVELET_REDUCTIONS)
    for family, room in WAVELET_REDUCTIONS.items():
        assert room == (pywt.Wavelet(family).rec_len - 2,) * 2


def test_filters_are_pefts_where_it_has_them():
    for family in FAMILIES:
        ours = pywt.Wavelet(family)
        if family in RIGHT:
            theirs = Wavelet(family)
            np.testing.assert_allclose(theirs.rec_lo, ours.rec_lo, rtol=0, atol=1e-11)
            np.testing.assert_allclose(theirs.rec_hi, ours.rec_hi, rtol=0, atol=1e-11)
        elif family in ("coif4", "coif5"):
            lo = np.asarray(Wavelet(family).rec_lo)
            assert abs((lo**2).sum() - 1) > 1e-3  # not of norm one, as the filters of these wavelets are
        else:
            with pytest.raises(ValueError, match="Unknown wavelet name"):
                Wavelet(family)


def test_a_family_that_peft_has_wrong_is_warned_of():
    with pytest.warns(AdaptcWarning, match="coif4.*wrong filters"):
        adaptc.WaveFTConfig(wavelet_family="coif4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.WaveFTConfig(wavelet_family="coif4", use_idwt=False)


@settings(max_examples=examples(40), deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(1, 14), st.integers(1, 14), st.integers(0, 99), st.data())
def test_transform_is_pefts(family, rows, columns, seed, data):
    """PEFT's layer, given the filters it lacks: the same places, quarters, room and cuts for all sizes."""
    n = data.draw(st.integers(1, rows * columns))
    config = peft.WaveFTConfig(n_frequency=n, wavelet_family=family, random_loc_seed=seed, scaling=3.0)
    layer = peft_layer.WaveFTLinear(nn.Linear(columns, rows).double(), "default", config, n_frequency=n)
    spectrum = torch.randn(n, dtype=torch.float64)
    layer.waveft_spectrum["default"] = nn.Parameter(spectrum)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_layer, "waverec2d", lambda bands, name: waverec2d(bands, pywt.Wavelet(name)))
        expected = layer.get_delta_weight("default").detach()
    op = Op("weight", (rows, columns))
    method = WaveFT(r=n, seed=seed, family=family, taps=pywt.Wavelet(family).rec_len // 2)
    W = torch.randn(rows, columns, dtype=torch.float64)
    slots = {"waveft_spectrum": spectrum, **method.files.derived(op, W, torch.float64, {})}
    assert {k: tuple(v.shape) for k, v in slots.items()} == {k: s.shape for k, s in method.slots(op).items()}
    found = method.weight(op, W, slots, torch.tensor(3.0))
    torch.testing.assert_close(found, W + expected, rtol=1e-12, atol=1e-12)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [True, False])
def test_first_values_are_pefts(zeros):
    options = {"target_modules": ["up"], "n_frequency": 13, "init_weights": zeros}
    theirs = peft_wrapped(peft.WaveFTConfig(**options), seed=4)
    after = torch.rand(3)
    torch.manual_seed(4)
    program = compile_blocks(adaptc.WaveFTConfig(**options))
    assert torch.equal(torch.rand(3), after)
    for a, layer in zip(program.adaptation.attachments, theirs.base_model.model.layers, strict=True):
        spectrum = program.binding.values[a.slots["waveft_spectrum"]]
        assert torch.equal(spectrum, layer.up.waveft_spectrum["default"])
        assert bool(spectrum.any()) is not zeros


@pytest.mark.long
@pytest.mark.parametrize("proportional", [True, False])
def test_share_of_each_layer(tmp_path, proportional):
    """PEFT's numbers: by size, or by pattern; a file of PEFT's swaps in, and out again."""
    options = {
        "target_modules": ["up", "down", "head"],
        "n_frequency": 9,
        "n_frequency_pattern": {"up": 5, "layers.1.down": 6},
        "proportional_parameters": proportional,
        "wavelet_family": "db2",
    }
    theirs = peft_wrapped(peft.WaveFTConfig(**options), random=True)
    expected = {
        n: m.waveft_n_frequency["default"]
        for n, m in theirs.base_model.model.named_modules()
        if hasattr(m, "waveft_n_frequency")
    }
    assert len(set(expected.values())) > 1
    config, x = adaptc.WaveFTConfig(**options), make_blocks()[1]
    program = compile_blocks(config)
    assert {a.module: a.method.r for a in program.adaptation.attachments} == expected
    theirs.save_pretrained(str(tmp_path / "peft"))
    for p in (compile_blocks(tmp_path / "peft"), compile_blocks(config.replace(n_frequency=3, n_frequency_pattern={}))):
        adaptc.swap(p, tmp_path / "peft")
        torch.testing.assert_close(p(x), theirs(x), rtol=1e-4, atol=1e-4)
        loaded = adaptc.load(adaptc.save(p, tmp_path / "program.pt2"))
        adaptc.swap(loaded, adaptc.save_adapter(p, tmp_path / "again"))
        torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_more_frequencies_than_entries():
    options = {"target_modules": ["up", "head"], "n_frequency": 56}
    with pytest.raises(ConfigError, match=r"site 'head\.weight'.*n_frequency=56 is more than the 55 entries"):
        compile_blocks(adaptc.WaveFTConfig(**options))
    compile_blocks(adaptc.WaveFTConfig(**options, proportional_parameters=True))
    with pytest.raises(ConfigError, match="more than the"):
        compile_blocks(adaptc.WaveFTConfig(**{**options, "n_frequency": 75}, proportional_parameters=True))


@pytest.mark.long
def test_families_of_one_length_share_code(tmp_path):
    """Another wavelet of the same length swaps; one of another length, or none, is refused, or has code of its own."""
    base = adaptc.WaveFTConfig(target_modules=["up"], n_frequency=13, init_weights=False, wavelet_family="sym4")
    changes = ({"wavelet_family": "db4"}, {"wavelet_family": "db2"}, {"use_idwt": False})
    paths = [adaptc.save_adapter(compile_blocks(base.replace(**c)), tmp_path / str(i)) for i, c in enumerate(changes)]
    x, program = make_blocks()[1], compile_blocks(base)
    adaptc.swap(program, paths[0])
    torch.testing.assert_close(program(x), compile_blocks(paths[0])(x), rtol=1e-6, atol=1e-6)
    for path in paths[1:]:
        with pytest.raises(SwapError):
            adaptc.swap(program, path)
    several = compile_blocks([base, *paths])
    assert len(several.adaptation.attachments) == 2 * 3
    for path in (*paths, paths[0]):
        adaptc.swap(several, path)
        torch.testing.assert_close(several(x), compile_blocks(path)(x), rtol=1e-6, atol=1e-6)
