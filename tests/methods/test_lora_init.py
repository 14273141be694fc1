"""Initial LoRA tensors against PEFT's layers under the same seed, and what no seed may change."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptc.errors import ConfigError
from adaptc.methods.lora_family.lora_init import init_lora
from tests.support.cover import examples

MATRIX = ["orthogonal", "pissa", "pissa_niter_3", "olora", "mica"]
RANDOM = [True, False, "gaussian"]
LAYERS = {
    "tall": ("linear", lambda: nn.Linear(11, 17)),
    "wide": ("linear", lambda: nn.Linear(19, 7, bias=False)),
    "addmm": ("addmm", lambda: Conv1D(17, 11)),
    "embedding": ("embedding", lambda: nn.Embedding(23, 13)),
    "conv1d": ("conv1d", lambda: nn.Conv1d(3, 10, 5)),
    "conv2d": ("conv2d", lambda: nn.Conv2d(6, 10, (3, 5), groups=2)),
    "conv3d": ("conv3d", lambda: nn.Conv3d(3, 7, (1, 2, 3))),
}


def canonical(layer):
    weight = layer.weight.detach().clone()
    return weight.T if isinstance(layer, (nn.Embedding, Conv1D)) else weight


def shapes(layer, r):
    if isinstance(layer, nn.modules.conv._ConvNd):
        ones = (1,) * len(layer.kernel_size)
        return (r, layer.in_channels, *layer.kernel_size), (layer.out_channels, r // layer.groups, *ones)
    out, inner = canonical(layer).shape
    return (r, inner), (out, r)


def ours(scheme, layer, kind, r, *, alpha=5, dtype=torch.float32, generator=None):
    a_shape, b_shape = shapes(layer, r)
    W = canonical(layer)
    before = W.clone()
    found = init_lora(
        scheme, W, r, alpha / max(r, 1), kind=kind, a_shape=a_shape, b_shape=b_shape, dtype=dtype, generator=generator
    )
    assert torch.equal(W, before)
    assert (found[0].shape, found[1].shape) == (a_shape, b_shape)
    assert found[0].dtype == found[1].dtype == dtype
    return found


def by_peft(scheme, layer, r, *, alpha=5, autocast=True):
    """PEFT's A, B and weight for the same layer, in canonical layout."""
    model = nn.Sequential()
    model.add_module("target", layer)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=scheme, target_modules=["target"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set|LoRA adapter added to ConvNd")
        config.fan_in_fan_out = isinstance(layer, Conv1D)
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast).base_model.model.target
    if isinstance(layer, nn.Embedding):
        return wrapped.lora_embedding_A["default"].data, wrapped.lora_embedding_B["default"].data, canonical(layer)
    return wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data, canonical(layer)


# PEFT takes the QR of a Conv1D's weight without turning it, and fails.
CASES = [
    pytest.param(name, scheme, id=f"{name}-{scheme}")
    for name, (kind, _) in LAYERS.items()
    for scheme in [*RANDOM, *MATRIX]
    if (scheme in RANDOM or kind in ("linear", "addmm") or (name, scheme) == ("embedding", "mica"))
    and (name, scheme) != ("addmm", "olora")
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_seed_gives_what_peft_gives(name, scheme, dtype):
    kind, make = LAYERS[name]
    torch.manual_seed(3)
    layer = make().to(dtype)
    W = canonical(layer)
    torch.manual_seed(7)
    A, B, rest = ours(scheme, layer, kind, 4)
    after = torch.rand(3)
    torch.manual_seed(7)
    peft_A, peft_B, peft_W = by_peft(scheme, layer, 4)
    assert torch.equal(after, torch.rand(3))
    # PEFT rounds the factors to the dtype of the weight before it widens them again.
    eps = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(A, peft_A.float(), rtol=eps, atol=1e-6)
    torch.testing.assert_close(B, peft_B.float(), rtol=eps, atol=1e-6)
    if rest is None:
        assert torch.equal(W, peft_W)
    else:
        assert rest.dtype == dtype
        torch.testing.assert_close(rest, peft_W, rtol=torch.finfo(dtype).eps, atol=1e-6)


@settings(max_examples=examples(40))
@given(
    scheme=st.sampled_from(["pissa", "olora", "pissa_niter_2"]),
    out=st.sampled_from([3, 5, 11, 17]),
    inner=st.sampled_from([2, 7, 13, 19]),
    data=st.data(),
)
def test_weight_is_conserved(scheme, out, inner, data):
    r = data.draw(st.integers(1, min(out, inner)))
    alpha = data.draw(st.sampled_from([1, 3, 2 * r]))
    layer = nn.Linear(inner, out, dtype=torch.float64)
    W = canonical(layer)
    A, B, rest = ours(scheme, layer, "linear", r, alpha=alpha, dtype=torch.float64)
    torch.testing.assert_close(rest + alpha / r * B @ A, W, rtol=1e-14, atol=5e-15)
    assert not torch.equal(rest, W)
    if scheme == "pissa":
        S = torch.linalg.svdvals(W)
        left = torch.linalg.svdvals(rest)
        # Singular vectors are orthogonal to a few of float64's steps (2e-16) for each of up to 19 terms.
        torch.testing.assert_close(left[: len(S) - r], S[r:], rtol=1e-13, atol=4e-14)
        torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-13, atol=4e-14)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["tall", "wide", "addmm"])
def test_float64_is_peft_at_float32_with_more_digits(scheme, name):
    kind, make = LAYERS[name]
    layer = make().double()
    # Random singular values can be so close to each other that float32 turns their vectors.
    U, S, V = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = U / torch.arange(1, len(S) + 1) @ V
    A, B, rest = ours(scheme, layer, kind, 4, dtype=torch.float64)
    narrow = nn.Linear(*reversed(canonical(layer).shape))
    narrow.weight.data = canonical(layer).float().contiguous()
    peft_A, peft_B, peft_W = by_peft(scheme, narrow, 4)
    # Singular vectors have a sign, and LAPACK's choice differs between precisions.
    sign = (A.float() * peft_A).sum(1).sign()
    torch.testing.assert_close(A.float() * sign[:, None], peft_A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B.float() * sign, peft_B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest.float(), peft_W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest + 5 / 4 * B @ A, canonical(layer), rtol=1e-14, atol=5e-15)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_rounded_factors_lose_nothing(scheme):
    """The rest is taken from A and B as they are stored, so bfloat16 factors leave W exact in float32."""
    layer = nn.Linear(13, 29)
    A, B, rest = ours(scheme, layer, "linear", 3, dtype=torch.bfloat16)
    assert rest.dtype == torch.float32
    torch.testing.assert_close(rest + 5 / 3 * B.float() @ A.float(), layer.weight.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("r", [2, 6, 8])
def test_orthogonal_cancels(r):
    A, B, rest = ours("orthogonal", nn.Linear(11, 17), "linear", r)
    assert rest is None
    assert A.abs().max() > 1e-2
    assert B.abs().max() > 1e-2
    assert (B @ A).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", [*RANDOM, "orthogonal", "mica"])
def test_schemes_that_leave_the_base_alone_make_no_weight(scheme):
    assert ours(scheme, nn.Linear(11, 17), "linear", 4)[2] is None


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_generator_decides_alone(name, scheme):
    kind, make = LAYERS[name]
    layer = make()
    state = torch.get_rng_state()
    first, again = (ours(scheme, layer, kind, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    other = ours(scheme, layer, kind, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    exact = scheme in ("pissa", "olora", "mica")
    assert (
        torch.equal(torch.cat([t.flatten() for t in first[:2]]), torch.cat([t.flatten() for t in other[:2]])) == exact
    )


@pytest.mark.parametrize("kind", ["linear", "weight", "experts"])
def test_stacked_weights_take_random_schemes_only(kind):
    # Three experts, r=2 each: A (r E, in), B (out, r E); the width of "gaussian" is that of one expert.
    W = torch.randn(3, 5, 401)
    options = {"kind": kind, "a_shape": (6, 401), "b_shape": (5, 6), "dtype": torch.float32, "generator": None}
    A, B, rest = init_lora("gaussian", W, 2, 1.0, **options)
    assert A.std().item() == pytest.approx(0.5, rel=0.1)
    assert not B.any()
    assert rest is None
    for scheme in MATRIX:
        with pytest.raises(ConfigError, match="needs one weight matrix"):
            init_lora(scheme, W, 2, 1.0, **options)


@pytest.mark.parametrize(
    ("name", "scheme", "r", "message"),
    [
        ("tall", "orthogonal", 3, "even r, found r=3"),
        ("tall", "pissa", 12, "r=12 is too large .* largest possible r is 11"),
        ("wide", "olora", 8, "largest possible r is 7"),
        ("wide", "pissa_niter_2", 8, "largest possible r is 7"),
        ("tall", "mica", 12, "r=12 is too large .* largest possible r is 11"),
        ("conv2d", "mica", 2, "'mica' has no meaning for a site of kind conv"),
        ("embedding", "pissa", 2, "'pissa' has no meaning for a site of kind embedding"),
        ("embedding", "orthogonal", 2, "'orthogonal' has no meaning"),
        ("conv2d", "olora", 2, "'olora' has no meaning for a site of kind conv2d"),
        ("conv1d", "pissa_niter_2", 2, "no meaning"),
        ("tall", "pisa", 2, "not a known scheme; known are True, False, 'gaussian'"),
        ("tall", "pissa_niter_", 2, "pissa_niter_"),
        ("tall", "pissa_niter_-1", 2, "not a known"),
        ("conv2d", "eva", 2, "'eva' has no meaning for a site of kind conv2d"),
        ("tall", None, 2, "not a known"),
        ("tall", 1, 2, "not a known"),
        ("tall", True, 0, "at least 1"),
    ],
)
def test_refusals(name, scheme, r, message):
    kind, make = LAYERS[name]
    with pytest.raises(ConfigError, match=message):
        ours(scheme, make(), kind, r)


def test_a_weight_that_is_not_finite_and_a_scale_that_is_not_positive_are_refused():
    layer = nn.Linear(11, 17)
    with pytest.raises(ConfigError, match="lora_alpha must be positive"):
        ours("pissa", layer, "linear", 2, alpha=0)
    layer.weight.data[3, 4] = torch.nan
    for scheme in ("pissa", "olora", "pissa_niter_1"):
        with pytest.raises(ConfigError, match="not finite"):
            ours(scheme, layer, "linear", 2)


@given(word=st.sampled_from(["Gaussian", "OLoRA"]))
@example(word="gaussian")
def test_case_does_not_matter(word):
    layer = nn.Linear(11, 17)
    found, expected = (
        ours(w, layer, "linear", 2, generator=torch.Generator().manual_seed(5)) for w in (word, word.lower())
    )
    assert torch.equal(found[0], expected[0])
