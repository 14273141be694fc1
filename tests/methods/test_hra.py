"""HRA: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc.methods.orthogonal.hra import Hra
from adaptc.passes.graph.ops import Op
from tests.support.custom_models import OneLayer

X = torch.linspace(-2, 3, 45).reshape(3, 15)
LINEAR = torch.ops.aten.linear.default


def model() -> OneLayer:
    torch.manual_seed(3)
    return OneLayer(nn.Linear(15, 11)).eval()


def options(**changes: Any) -> dict[str, Any]:
    return {"target_modules": ["layer"], **changes}


def compiled(adapter: Any, **more: Any) -> adaptc.AdaptedProgram:
    return adaptc.compile(model(), adapter, example_inputs=X, **more)


def vectors(program: adaptc.AdaptedProgram) -> Tensor:
    return next(t for n, t in program.binding.values.items() if "hra_u" in n)


def reflections(u: Tensor) -> Tensor:
    """H_1 ... H_r, one after the other."""
    out = torch.eye(len(u), dtype=u.dtype)
    for column in u.T:
        if column.any():
            out = out - 2 * (out @ column).outer(column) / (column @ column)
    return out


def test_fields_and_defaults_are_pefts():
    theirs = vars(peft.HRAConfig())
    ours = {k: v for k, v in vars(adaptc.HRAConfig()).items() if k not in ("peft_version", "target_parameters")}
    assert ours == {k: theirs[k] for k in ours}
    assert set(theirs) - set(ours) == {"peft_type", "peft_version"}


@pytest.mark.long
@pytest.mark.parametrize(("r", "init"), [(4, True), (4, False), (5, False), (5, True)])
def test_one_seed_gives_what_peft_gives(r, init):
    odd = "ignore" if init and r % 2 else "error"  # both warn
    with warnings.catch_warnings():
        warnings.simplefilter(odd)
        torch.manual_seed(7)
        wrapped = peft.get_peft_model(model(), peft.HRAConfig(**options(r=r, init_weights=init)))
        torch.manual_seed(7)
        program = compiled(adaptc.HRAConfig(**options(r=r, init_weights=init)))
    expected = next(p for n, p in wrapped.named_parameters() if "hra_u" in n)
    assert torch.equal(vectors(program), expected.detach())


def test_a_start_that_changes_the_layer_is_told():
    with pytest.warns(adaptc.AdaptcWarning, match="odd r=5"):
        compiled(adaptc.HRAConfig(**options(r=5)))
    with pytest.warns(adaptc.AdaptcWarning, match="apply_GS=True"):
        program = compiled(adaptc.HRAConfig(**options(r=4, apply_GS=True)), training=True)
    # From pairs of equal vectors PEFT has gradients of 1e8 there, since it normalises what rounding leaves.
    program(X).sum().backward()
    assert float(vectors(program).grad.abs().max()) < 100
    assert torch.linalg.matrix_rank(vectors(program).detach()) == 4


@given(n=st.integers(2, 9), r=st.integers(1, 13), seed=st.integers(0, 999), zeros=st.integers(0, 3))
def test_the_product_in_one_piece_is_the_product(n, r, seed, zeros):
    """Of more vectors than entries too, in its order; zero vectors anywhere are no reflections."""
    torch.manual_seed(seed)
    u = torch.randn(n, r, dtype=torch.float64)
    u[:, torch.randint(r, (zeros,))] = 0
    u.requires_grad_()
    op, W, x = Op("linear", (7, n), LINEAR), torch.randn(7, n).double(), torch.randn(3, n).double()
    method, slots = Hra(r), {"hra_u": u}
    expected = W @ reflections(u)
    turned = method.weight(op, W, slots, None)
    torch.testing.assert_close(turned, expected, rtol=1e-9, atol=1e-9)
    outside = method.call_adapted(op, x, W, None, slots, None)
    torch.testing.assert_close(outside, x @ expected.T, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(turned)
    (found,) = torch.autograd.grad((turned * weights).sum(), u)
    (wanted,) = torch.autograd.grad((expected * weights).sum() + 0 * u.sum(), u)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_zero_vectors_mean_nothing(orthogonal):
    """In front, between and behind, as when a package pads an adapter to the rank it has room for."""
    torch.manual_seed(5)
    u = torch.randn(9, 3, dtype=torch.float64)
    padded = torch.zeros(9, 7, dtype=torch.float64)
    padded[:, [1, 3, 4]] = u
    padded.requires_grad_()
    op, W = Op("linear", (7, 9)), torch.randn(7, 9, dtype=torch.float64)
    few, many = Hra(3, orthogonal), Hra(7, orthogonal)
    out = many.weight(op, W, {"hra_u": padded}, None)
    torch.testing.assert_close(out, few.weight(op, W, {"hra_u": u}, None))
    (out**3).sum().backward()
    assert padded.grad.isfinite().all()
    assert not padded.grad[:, [0, 2, 5, 6]].any()
    none = many.weight(op, W, {"hra_u": torch.zeros(9, 7, dtype=torch.float64)}, None)
    assert torch.equal(none, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_that_depend_on_each_other(dtype):
    """Gram-Schmidt has nothing left of the second of two equal ones: it spans nothing new. PEFT has noise or NaN."""
    torch.manual_seed(5)
    u = torch.randn(9, 2, dtype=dtype)
    twice = u.repeat_interleave(2, 1).requires_grad_()
    op, W = Op("linear", (7, 9)), torch.randn(7, 9, dtype=dtype)
    out = Hra(4, True).weight(op, W, {"hra_u": twice}, None)
    rough = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(out, Hra(2, True).weight(op, W, {"hra_u": u}, None), rtol=rough, atol=rough)
    (out**3).sum().backward()
    assert twice.grad.isfinite().all()


def test_gram_schmidt_of_too_many():
    with pytest.raises(adaptc.TargetError, match="r=16 vectors orthogonal, and here they have 15 entries; r=15"):
        compiled(adaptc.HRAConfig(**options(r=16, apply_GS=True, init_weights=False)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_long_and_short_vectors(dtype, orthogonal):
    """Lengths do not matter, nor do squares that a half-precision number cannot hold."""
    torch.manual_seed(5)
    u = torch.randn(9, 4).to(dtype)
    long = u * torch.tensor([512.0, 2**-12, 1.0, 64.0], dtype=dtype)
    op, W = Op("linear", (7, 9)), torch.randn(7, 9)
    method = Hra(4, orthogonal)
    found, expected = (method.weight(op, W, {"hra_u": t}, None) for t in (long, u))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_another_rank_runs_through_the_same_code(orthogonal):
    sizes = {}
    for r in (2, 3, 12):
        program = compiled(adaptc.HRAConfig(**options(r=r, apply_GS=orthogonal, init_weights=False)))
        sizes[r] = [str(n.target) for n in program.graph.nodes]
    assert sizes[2] == sizes[3] == sizes[12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 2.0}, "r must be an integer, got 2.0"),
        ({"bias": "oft_only"}, "'hra_only'"),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(adaptc.ConfigError, match=message):
        adaptc.HRAConfig(**options(**changes))
