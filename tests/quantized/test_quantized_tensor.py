"""A quantised weight as a tensor: what reads it, what keeps it, and what may not write to it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptc.errors import AdaptcError
from adaptc.passes.quantized.all_schemes import SCHEME_NAMES, choose_scheme
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
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


def test_other_operations_read_the_values():
    q = quantized("int8")
    w = q.dequantize()
    for op in (lambda t: t + 1, lambda t: t.mT, lambda t: t.sum(0), lambda t: t[2:4, 1], lambda t: t.reshape(-1)):
        found = op(q)
        assert type(found) is torch.Tensor
        assert torch.equal(found, op(w))
    assert torch.equal(torch.einsum("oi,bi->bo", q, w), torch.einsum("oi,bi->bo", w, w))


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
