"""Every op under ``adaptc::`` in transforms of ``torch.func`` and in forward mode: as its definition, or an error.

The definitions are written out here. An op without an entry fails :func:`test_every_op_has_a_case`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import adaptc
from adaptc.errors import BackendError
from adaptc.kernels import sibling_table_op
from adaptc.kernels._row_chunks import cut_into_chunks
from adaptc.kernels.packed_lora import packed_factors, sibling_table
from adaptc.op_rules import OPS_WITH_RULES
from adaptc.passes.protocol import low_rank_rows
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, ONEDNN
from adaptc.passes.quantized import quantized_linear
from adaptc.passes.quantized.all_schemes import scheme_text
from adaptc.passes.quantized.table_scheme import TableScheme
from adaptc.passes.train import compressed_linear
from adaptc.tuning import compiled_matmuls as compiled_products

# torch's own, in make_dual
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
#: which make torch know ops
MODULES = low_rank_rows, compiled_products, quantized_linear, compressed_linear
_DRAW = torch.Generator().manual_seed(0)


def of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_DRAW, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """``definition``: of the same arguments; ``learned``: positions of those that have a derivative."""

    args: tuple[Any, ...]
    learned: Sequence[int]
    definition: Callable[..., Tensor]


def linear(x: Tensor, W: Tensor, b: Tensor | None, *_: Any) -> Tensor:
    return F.linear(x, W, b)


def compressed(x: Tensor, W: Tensor, v: Tensor, scale: float, _: bool) -> Tensor:
    """The value and the derivative in x of x W^T, and in W the derivative of the same for other inputs."""
    groups = F.pad(x.detach(), (0, 2)).unflatten(-1, (3, 3))
    change = scale * torch.einsum("...gi,i,j->...gj", groups, v, v).flatten(-2)[..., :7] @ W.t()
    return x @ W.detach().t() + change - change.detach()


def rows(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    c = c.masked_fill(c == 0, 0)  # what a row does not want has no part in it, and no derivative
    return y + torch.einsum("rk,k,rpi,kji,koj->rpo", c, scale, x, A, B)


def siblings(
    x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, table: Tensor, scales: Tensor, widths: Any
) -> Tensor:
    first, second = B[: 5 * 2].view(2, 5), B[5 * 2 :].view(3, 7)
    h = x @ A.t()
    return x @ W.t() + b + torch.cat([scales[0] * h[:, :2] @ first, scales[1] * h[:, 2:] @ second], 1)


# Of a bank of two adapters, of ranks 2 and 1; of the four rows the third is the base's.
STARTS, INDEX = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 0, -1, 0])
TABLE = tuple(cut_into_chunks(INDEX, 2, 16))
SORTED, OWN = torch.tensor([-1, 0, 0, 1]), torch.tensor([[0, 0], [1, 1], [1, 1], [1, 0]]).bool()
BANKS = [torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 2])]


def shrunk(x: Tensor, bank: Tensor, *_: Any) -> Tensor:
    at = torch.stack([BANKS[0], BANKS[0], BANKS[1], BANKS[2]])
    return torch.einsum("pk,prk->pr", x[TABLE[0].long()], bank[at]).where(OWN, 0)


def expanded(y: Tensor, h: Tensor, bank: Tensor, starts: Tensor, scales: Tensor, *_: Any) -> Tensor:
    at = torch.stack([BANKS[0], BANKS[0], BANKS[1], BANKS[2]])
    change = torch.einsum("pr,prn->pn", h.where(OWN, 0), bank[at])
    scaled = change * torch.cat([scales.new_zeros(1), scales])[SORTED + 1][:, None]
    return y + scaled[TABLE[0].long().argsort()]


def outer(h: Tensor, v: Tensor, *_: Any) -> Tensor:
    v, h = v[TABLE[0].long()], h.where(OWN, 0)
    return torch.cat([h[1:3].t() @ v[1:3], h[3:, :1].t() @ v[3:]])


def grouped(x: Tensor, y: Tensor, A: Tensor, B: Tensor, starts: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    own = (torch.arange(2) < torch.tensor([[2], [1]]))[:, :, None]
    return rows(x, y, A.where(own, 0), B.where(own.mT, 0), scale[::2], c)


C = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -0.5]], dtype=torch.float64)
NARROW = {"dtype": torch.float32}
NF4 = TableScheme(block_size=4)
_DRAWN = NF4.quantize(of(5, 8))
STORED = {role: _DRAWN[role] for role in NF4.layout(5, 8)}
CASES = {
    "product": Case(
        (of(3, 7, **NARROW), of(5, 7, **NARROW), of(5, **NARROW), ONEDNN, ALL_ROW_CLASSES, []), range(3), linear
    ),
    "product_called": Case(
        (of(3, 7, **NARROW), of(5, 7, **NARROW), None, ONEDNN, ALL_ROW_CLASSES, []), range(2), linear
    ),
    "qlinear": Case(
        (of(3, 8), list(STORED.values()), of(5), scheme_text(NF4), 5, 8),
        (0, 2),
        lambda x, _, b, *__: F.linear(x, NF4.dequantize(STORED, 5, 8).double(), b),
    ),
    "packed_linear": Case(
        (of(3, 8), list(STORED.values()), of(5), scheme_text(NF4), 5, 8, [of(2), of(3)]),
        (0, 2),
        lambda x, _, b, *__: F.linear(x, NF4.dequantize(STORED, 5, 8).double(), b),
    ),
    "compressed_linear": Case((of(3, 7), of(5, 7), of(3), 0.7, True), range(2), compressed),
    # Of many positions, whose products are those of each adapter alone.
    "low_rank_rows": Case((of(3, 9, 7), of(3, 9, 5), of(2, 2, 7), of(2, 5, 2), of(2), C), range(6), rows),
    "lora_linear": Case(
        (of(3, 7), of(5, 7), of(5), of(2, 7), of(5, 2), of()),
        range(6),
        lambda x, W, b, A, B, s: x @ W.t() + b + s * (x @ A.t()) @ B.t(),
    ),
    "lora_down": Case((of(3, 7), of(2, 7), of()), range(3), lambda x, A, s: s * x @ A.t()),
    "lora_up_add": Case((of(3, 5), of(3, 2), of(5, 2), of()), range(4), lambda y, h, B, s: y + s * h @ B.t()),
    "packed_lora": Case(
        (
            *(of(4, 6), of(12, 6), of(12), of(5, 6), packed_factors([of(5, 2), of(7, 3)])),
            *(sibling_table([5, 7], [2, 3]), of(2), [5, 7]),
        ),
        (0, 1, 2, 3, 4, 6),
        siblings,
    ),
    "dora_epilogue": Case(
        (of(3, 5), of(3, 2), of(5, 2), of(5), of(), of(5)),
        range(6),
        lambda y, h, B, g, s, b: g * (y + s * h @ B.t()) + b,
    ),
    "grouped_shrink": Case((of(4, 7), of(3, 7), STARTS, *TABLE, 16, 2), (0, 1), shrunk),
    "grouped_expand": Case((of(4, 5), of(4, 2), of(3, 5), STARTS, of(2), *TABLE, 16), (0, 1, 2, 4), expanded),
    "grouped_outer": Case((of(4, 2), of(4, 7), STARTS, *TABLE, 16, 3), (0, 1), outer),
    "grouped_rows": Case(
        (
            *(of(3, 9, 7), of(3, 9, 5), of(2, 2, 7), of(2, 2, 5).mT),
            *(torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32), of(4), C),
        ),
        (0, 1, 2, 3, 5, 6),
        grouped,
    ),
}
#: a constant to whoever differentiates
CONSTANT = {"dora_norm": (of(5, 7), of(2, 7), of(5, 2), of())}
REFUSED = {name: (of(5, 7), of(2, 7), of(5, 2), of()) for name in ("merge_", "merge_saving_")}
#: of shapes alone
SHAPES = {"sibling_table": ([of(5, 2), of(7, 3)],)}


def second(f: Callable[..., Any], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    (first,) = torch.autograd.grad((f(t) ** 3).sum(), t, create_graph=True)
    return torch.autograd.grad((first**2).sum(), t)[0]


def tangent(f: Callable[..., Any], t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(t, torch.ones_like(t)))).tangent.clone()


def both(t: Tensor) -> Tensor:
    return torch.stack([t, 2 * t])


def cubed(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda t: (f(t) ** 3).sum()


WAYS: dict[str, Callable[..., Any]] = {
    "backward": lambda f, t: torch.autograd.grad((f(q := t.clone().requires_grad_()) ** 2).sum(), q)[0],
    "double backward": second,
    "forward mode": tangent,
    "grad": lambda f, t: grad(cubed(f))(t),
    "vjp": lambda f, t: vjp(f, t)[1](torch.ones_like(f(t)))[0],
    "jvp": lambda f, t: jvp(f, (t,), (torch.ones_like(t),))[1],
    "jacrev": lambda f, t: jacrev(f)(t),
    "jacfwd": lambda f, t: jacfwd(f)(t),
    "hessian": lambda f, t: hessian(cubed(f))(t),
    "vmap": lambda f, t: vmap(f)(both(t)),
    "vmap of grad": lambda f, t: vmap(grad(cubed(f)))(both(t)),
    "grad of vmap": lambda f, t: grad(lambda t: (vmap(f)(t) ** 2).sum())(both(t)),
}


def at(call: Callable[..., Any], args: Sequence[Any], place: int) -> Callable[[Tensor], Any]:
    return lambda t: call(*args[:place], t, *args[place + 1 :])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_as_the_definition(name: str, way: str) -> None:
    case, op = CASES[name], getattr(torch.ops.adaptc, name).default
    torch.testing.assert_close(op(*case.args), case.definition(*case.args), rtol=1e-5, atol=1e-5)
    for place in case.learned:
        found = WAYS[way](at(op, case.args, place), case.args[place])
        expected = WAYS[way](at(case.definition, case.args, place), case.args[place])
        assert float(expected.abs().max()) > 0 or way == "double backward"
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4, msg=lambda m, p=place: f"argument {p}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_as_its_schema_says(name: str) -> None:
    op, case = getattr(torch.ops.adaptc, name).default, CASES[name]
    torch.library.opcheck(op, case.args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("way", ["grad", "jvp", "jacrev", "jacfwd", "hessian", "forward mode"])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_is_one_everywhere(name: str, way: str) -> None:
    args, op = CONSTANT[name], getattr(torch.ops.adaptc, name).default
    for place, t in enumerate(args):
        call = at(op, args, place)
        found = WAYS[way](lambda t, call=call: call(t) + t.flatten()[0], t)
        expected = WAYS[way](lambda t: op(*args) + t.flatten()[0], t)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["backward", "forward mode", "grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, way: str) -> None:
    args, op = REFUSED[name], getattr(torch.ops.adaptc, name).default
    for place, t in enumerate(args):
        with pytest.raises(BackendError, match=f"adaptc::{name} has no derivative.*Merge outside"):
            WAYS[way](at(op, args, place), t)
    assert op(*(a.clone() for a in args)) is None or name == "merge_saving_"


def test_what_is_made_of_shapes() -> None:
    a, b = SHAPES["sibling_table"][0]
    expected = sibling_table_op([a, b])
    made: list[Tensor] = []
    grad(lambda t: (made.append(sibling_table_op([t, b]) + 0), t.sum())[1])(a)
    jvp(lambda t: (made.append(sibling_table_op([t, b]) + 0), t.sum())[1], (a,), (a,))
    found = vmap(lambda t: sibling_table_op([t, b]))(both(a))
    assert torch.equal(found, both(expected) // torch.tensor([1, 2])[:, None, None])
    assert len(made) == 2


def test_every_op_has_a_case() -> None:
    for module in pkgutil.walk_packages(adaptc.__path__, "adaptc."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    names = {n.removeprefix("adaptc::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("adaptc::")}
    assert names == {*CASES, *CONSTANT, *REFUSED, *SHAPES}
    assert names == OPS_WITH_RULES
