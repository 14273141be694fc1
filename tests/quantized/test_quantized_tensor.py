"""A quantised weight as a tensor: what reads it, what keeps it, and what may not write to it."""

from __future__ import annotations

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from adaptc.errors import AdaptcError, ConfigError
from adaptc.passes.quantized import quantized_linear
from adaptc.passes.quantized.all_schemes import SCHEME_NAMES, choose_scheme
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor, rebuild_quantized_tensor
from adaptc.passes.quantized.table_scheme import TableScheme

ROWS = torch.tensor([2, 5])
#: without rounded inputs, which a matmul with the values does not have
PLAIN = [n for n in SCHEME_NAMES if n != "int8_dynamic"]


def quantized(name: str, rows: int = 15, columns: int = 32, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    torch.manual_seed(0)
    return QuantizedTensor.quantize(torch.randn(rows, columns).to(dtype), choose_scheme(name, None, columns))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rows", [15, 8200])
def test_linear(name, rows):
    """Also where the matrix is so large that its values are made in blocks of rows."""
    q = quantized(name, rows)
    w, x, bias = q.dequantize(), torch.randn(2, 3, 32), torch.randn(rows)
    expected = F.linear(x, w, bias)
    for found in (F.linear(x, q, bias), torch.ops.aten.linear.default(x, q, bias)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert type(found) is torch.Tensor


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rows", [15, 8200])
def test_gradients_of_inputs_and_biases(name, rows):
    q = quantized(name, rows)
    grads = []
    for weight in (q, q.dequantize()):
        torch.manual_seed(1)
        x, bias = torch.randn(2, 3, 32, requires_grad=True), torch.randn(rows, requires_grad=True)
        F.linear(x, weight, bias).sin().sum().backward()
        grads.append((x.grad, bias.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in make_dual
def test_derivatives_other_than_backward():
    q = quantized("nf4")
    w, x = q.dequantize(), torch.randn(4, 32)
    loss = lambda weight: lambda x: F.linear(x, weight).sin().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss(q))(x), torch.func.grad(loss(w))(x))
    torch.testing.assert_close(torch.func.jvp(loss(q), (x,), (x,)), torch.func.jvp(loss(w), (x,), (x,)))
    batched = torch.func.vmap(lambda row: F.linear(row, q))(x)
    torch.testing.assert_close(batched, F.linear(x, w))


def test_nothing_float_is_kept_for_the_backward():
    """Only the stored tensors are, which are the weight's own."""
    q = quantized("nf4", 64, 64)
    kept: list[torch.Tensor] = []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        F.linear(x, q).sum().backward()
    own = {t.data_ptr() for t in q.stored.values()}
    assert {t.data_ptr() for t in kept if t.data_ptr() != x.data_ptr()} <= own


@pytest.mark.parametrize("name", PLAIN)
def test_embedding(name):
    q = quantized(name)
    ids = torch.tensor([[3, 14, 0], [3, 3, 7]])
    assert torch.equal(F.embedding(ids, q), q.dequantize()[ids])


def test_an_embedding_whose_rows_share_blocks():
    torch.manual_seed(0)
    q = QuantizedTensor.quantize(torch.randn(5, 7), TableScheme(block_size=4))
    ids = torch.tensor([4, 0])
    assert torch.equal(F.embedding(ids, q), q.dequantize()[ids])


@given(
    name=st.sampled_from([n for n in PLAIN if n != "fp4"]),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)),
    block=st.sampled_from([1, 64, 1 << 18]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_matmuls_with_it_on_the_right(name, sizes, block, transposed, dtype):
    """Whatever the blocks are; sums over blocks are rounded to the dtype once."""
    count, rows, columns = sizes[0], 5 * sizes[1], 64 * sizes[2]
    q = quantized(name, rows, columns, dtype)
    q = q.t() if transposed else q
    w, x, bias = q.dequantize(), torch.randn(count, q.shape[0]).to(dtype), torch.randn(q.shape[1]).to(dtype)
    total = torch.randn(count, q.shape[1]).to(dtype)
    with mock.patch.object(quantized_linear, "BLOCK_ELEMENTS", block):
        found = [x @ q, torch.addmm(bias, x, q), torch.addmm(total, x, q), total.clone().addmm_(x, q)]
    exact = [t.double() + x.double() @ w.double() for t in (torch.zeros(()), bias, total, total)]
    for made, expected in zip(found, exact, strict=True):
        assert type(made) is torch.Tensor
        # Sums of up to 192 terms, each about 0.6 large.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(made.double(), expected, rtol=8 * eps, atol=64 * eps)


def test_a_matmul_adds_in_place():
    q, total = quantized("nf4"), torch.randn(3, 32)
    before, x = total.clone(), torch.randn(3, 15)
    assert total.addmm_(x, q) is total
    torch.testing.assert_close(total, before + x @ q.dequantize())


def test_matmuls_dequantise_no_whole_matrix(monkeypatch):
    monkeypatch.setattr(quantized_linear, "BLOCK_ELEMENTS", 64)
    q = quantized("nf4", 15, 64)
    monkeypatch.setattr(QuantizedTensor, "values_of", lambda *_: pytest.fail("the whole matrix"))
    for found in (torch.randn(3, 15) @ q, torch.randn(3, 64) @ q.t(), q.t().t().t()):
        assert found.shape[1] in (64, 15)


def test_sums_over_many_blocks_are_rounded_once(monkeypatch):
    q = quantized("int8", 600, 64, torch.bfloat16)
    x = torch.randn(3, 600).bfloat16()
    exact = x.double() @ q.dequantize().double()
    monkeypatch.setattr(quantized_linear, "BLOCK_ELEMENTS", 64)
    error = (x @ q - exact).norm() / exact.norm()
    assert error < torch.finfo(torch.bfloat16).eps / 2, "that of one rounding"


def test_its_transpose_is_stored_alike():
    q = quantized("nf4")
    t = q.t()
    assert isinstance(t, QuantizedTensor)
    assert t.stored["codes"] is q.stored["codes"]
    assert torch.equal(t.dequantize(), q.dequantize().t())
    assert torch.equal(t.t().dequantize(), q.dequantize())
    assert torch.equal(t + 1, q.dequantize().t() + 1)


def test_a_module_that_has_it_is_moved_shared_and_pickled():
    layer = nn.Linear(32, 15)
    layer.weight = nn.Parameter(quantized("nf4"), requires_grad=False)
    values = layer.weight.dequantize()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight.dequantize().dtype == torch.bfloat16
    layer.to(torch.float32).share_memory()
    assert all(t.is_shared() for t in layer.weight.stored.values())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    states = [torch.load(file, weights_only=True), pickle.loads(pickle.dumps(layer)).state_dict()]
    for state in states:
        assert isinstance(state["weight"], QuantizedTensor)
        assert torch.equal(state["weight"].dequantize(), values)
    assert isinstance(pickle.loads(pickle.dumps(layer)).weight, nn.Parameter)
    assert layer.to("meta").weight.device == layer.weight.stored["codes"].device == torch.device("meta")


def test_its_data_are_replaced_by_quantised_ones_alone():
    q, other = quantized("int8"), quantized("nf4")
    with pytest.raises(AdaptcError, match=r"int8.*is frozen"):
        q.data = torch.zeros(15, 32)
    assert q.scheme.name == "integer"
    q.data = other
    assert q.scheme == other.scheme
    assert torch.equal(q.dequantize(), other.dequantize())


def test_a_file_whose_tensors_do_not_fit_is_refused():
    q = quantized("nf4")
    broken = copy.copy(q.stored) | {"codes": q.stored["codes"][:-1]}
    _, (text, _, *rest) = q.__reduce_ex__(2)
    with pytest.raises(ConfigError, match=r"'codes'.*\(239,\)"):
        rebuild_quantized_tensor(text, broken, *rest)


def test_autocast():
    q, bias = quantized("nf4"), torch.randn(15)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 32).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.linear(x, q.dequantize().to(dtype), bias.to(dtype))
            found = F.linear(x, q.to(dtype), bias.to(dtype) if dtype == torch.float64 else bias)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_other_operations_read_the_values():
    q = quantized("int8")
    w = q.dequantize()
    for op in (lambda t: t + 1, lambda t: t.sum(0), lambda t: t[2:4, 1], lambda t: t.reshape(-1)):
        found = op(q)
        assert type(found) is torch.Tensor
        assert torch.equal(found, op(w))
    assert torch.equal(torch.einsum("oi,bi->bo", q, w), torch.einsum("oi,bi->bo", w, w))


def test_swapped_axes_share_what_is_stored():
    matrix, kernel = quantized("int8"), QuantizedTensor.quantize(torch.randn(6, 3, 5), IntegerScheme())
    experts = QuantizedTensor.quantize(torch.randn(3, 6, 5), IntegerScheme(), row_axes=2)
    for t in (matrix, experts):
        for swapped in (t.mT, t.transpose(-1, -2), t.transpose(t.ndim - 2, -1)):
            assert isinstance(swapped, QuantizedTensor)
            assert swapped.stored["codes"] is t.stored["codes"]
            assert torch.equal(swapped.dequantize(), t.dequantize().mT)
            assert torch.equal(swapped.mT.dequantize(), t.dequantize())
    # The matrix of a kernel has its first axis for rows, and no weight is stored in the order of these axes.
    for t, axes in ((kernel, (1, 2)), (experts, (0, 1)), (experts, (0, 2))):
        found = t.transpose(*axes)
        assert type(found) is torch.Tensor
        assert torch.equal(found, t.dequantize().transpose(*axes))


def test_a_convolution_and_a_transposed_weight():
    torch.manual_seed(0)
    kernel, image = torch.randn(6, 3, 3, 5), torch.randn(2, 3, 7, 9)
    q = QuantizedTensor.quantize(kernel, IntegerScheme())
    assert q.stored["codes"].shape == (6, 45)
    torch.testing.assert_close(F.conv2d(image, q), F.conv2d(image, q.dequantize()))
    weight = torch.randn(7, 15)  # (in, out), as Conv1D of transformers stores it
    q = QuantizedTensor.quantize(weight, IntegerScheme(), is_transposed=True)
    assert q.stored["codes"].shape == (15, 7)
    assert float((q.dequantize() - weight).abs().max()) < 0.02
    x = torch.randn(3, 7)
    torch.testing.assert_close(torch.addmm(torch.ones(15), x, q), torch.addmm(torch.ones(15), x, q.dequantize()))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_copies(name):
    q = quantized(name, dtype=torch.bfloat16)
    w = q.dequantize()
    buffer = io.BytesIO()
    pickle.dump(q, buffer)
    for made in (copy.deepcopy(q), q.clone(), pickle.loads(buffer.getvalue()), nn.Parameter(q, requires_grad=False)):
        assert isinstance(made, QuantizedTensor)
        assert made.dtype == torch.bfloat16
        assert torch.equal(made.dequantize(), w)
    assert copy.deepcopy(q).stored["codes"].data_ptr() != q.stored["codes"].data_ptr()
    assert q.detach().stored["codes"].data_ptr() == q.stored["codes"].data_ptr()
    parameter = copy.deepcopy(nn.Parameter(q, requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    wide = q.to(torch.float32)
    assert isinstance(wide, QuantizedTensor)
    assert torch.equal(wide.dequantize().bfloat16(), w)
    assert q.stored_bytes == sum(t.nbytes for t in q.stored.values())


def test_nothing_writes_to_it():
    q = quantized("int8")
    before = q.dequantize()
    ones = torch.ones(15, 32)
    writes = [
        *(lambda: q.copy_(before), lambda: q.add_(1), lambda: q.zero_(), lambda: q.mul_(2), lambda: q.fill_(1)),
        *(lambda: q.sub_(ones), lambda: q.clamp_(max=0), lambda: q.normal_(), lambda: q.index_fill_(0, ROWS, 1)),
        *(lambda: torch.add(ones, ones, out=q), lambda: torch.nn.init.ones_(q)),
        *(lambda: q.__setitem__(0, 1), lambda: q.__setitem__((ROWS, 2), ones[0, 0])),
    ]
    for write in writes:
        with pytest.raises(AdaptcError, match=r"int8.*is frozen.*dequantize\(\)"):
            write()
    assert torch.equal(q.dequantize(), before)


def test_its_text_names_the_scheme_and_no_values():
    assert repr(quantized("int4")) == "QuantizedTensor(int4 in groups of 32, shape=(15, 32), dtype=torch.float32)"
