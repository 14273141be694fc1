"""Attention in modules that nest, repeat, share and reach across; softmaxes that are no attention; and the cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.passes.analysis.attention.attention_targets import Attention, default_targets, find_attention
from tests.support.attention_nets import (
    HEADS,
    INNER,
    SEPARATE,
    WIDTH,
    Block,
    Net,
    capture,
    causal_attention,
    heads,
    join,
    manual,
    operands,
    qkv,
    rotate,
    sdpa,
)

# -- modules -----------------------------------------------------------------------------------------------------------


def test_a_module_called_twice_is_listed_twice() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.block(m.block(x))

    program = capture(Net(forward, block=Block()))
    found = find_attention(program)
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    names = ("block.attn.q",), ("block.attn.k",), ("block.attn.v",)
    assert found == [Attention(call.name, *names) for call in calls]
    assert len(found) == 2
    assert default_targets(program) == ["q", "v"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 3}], ids=["packed", "separate"])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention(batch_first: bool, sizes: dict[str, int], grad: bool) -> None:
    def forward(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return m.mlp(m.attn(x, k, v, need_weights=grad)[0])

    attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **sizes)
    inputs = [torch.randn(2, 7, n) for n in (WIDTH, *(sizes.values() or (WIDTH, WIDTH)))]
    with torch.set_grad_enabled(grad):
        program = torch.export.export(Net(forward, attn=attn, mlp=nn.Linear(WIDTH, 3)).eval(), tuple(inputs))
    assert operands(program) == [(("attn",),) * 3]
    assert default_targets(program) == ["attn"]


def test_op_with_its_projections_inside() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.attn
        weights = (a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
        return torch._native_multi_head_attention(x, x, x, WIDTH, HEADS, *weights, need_weights=False)[0]

    with torch.no_grad():
        net = Net(forward, attn=nn.MultiheadAttention(WIDTH, HEADS)).eval()
        program = torch.export.export(net, (torch.randn(3, 5, WIDTH),))
    assert default_targets(program) == ["attn"]


def test_cross_attention() -> None:
    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        memory = memory + m.encoder(memory)
        x = x + m.decoder(x)
        return m.cross.o(join(manual(heads(m.cross.q(x)), heads(m.cross.k(memory)), heads(m.cross.v(memory)))))

    net = Net(forward, encoder=Block(), decoder=nn.Linear(WIDTH, WIDTH), cross=Block().attn)
    program = capture(net, torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH))
    names = ["encoder.attn", "cross"]
    assert operands(program) == [((f"{n}.q",), (f"{n}.k",), (f"{n}.v",)) for n in names]


def test_layers_that_share_keys_and_values() -> None:
    def borrow(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return m.o(join(manual(heads(m.q(x)), k, v)))

    def forward(m: Any, x: Tensor) -> Tensor:
        k, v = heads(m.first.k(x)), heads(m.first.v(x))
        return m.second(x + m.first(x, k, v), k, v)

    second = {"q": nn.Linear(WIDTH, INNER), "o": nn.Linear(INNER, WIDTH)}
    program = capture(Net(forward, first=Net(borrow, **qkv()), second=Net(borrow, **second)))
    assert operands(program) == [
        (("first.q",), ("first.k",), ("first.v",)),
        (("second.q",), ("first.k",), ("first.v",)),
    ]


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")  # nn.LSTM flattens its weights as it runs
def test_what_is_behind_a_recurrent_layer_is_not_near() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(sdpa(m.lstm(m.q(x))[0], m.k(x), m.v(x)))

    program = capture(Net(forward, **qkv(lstm=nn.LSTM(INNER, INNER, batch_first=True))), dynamic=False)
    assert operands(program) == [((), ("k",), ("v",))]


def test_operand_from_the_residual_stream_has_no_projection() -> None:
    def pool(m: Any, x: Tensor) -> Tensor:
        return sdpa(m.q(x), m.k(x), x)

    layers = {n: nn.Linear(WIDTH, WIDTH) for n in "qk"}
    program = capture(nn.Sequential(Block(), Block(), Net(pool, **layers)))
    assert operands(program)[-1] == (("2.q",), ("2.k",), ())
    assert default_targets(program) == ["q", "v"]


def test_ambiguous_names_become_paths() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.q(m.block(x)))

    program = capture(Net(forward, block=Block(), q=nn.LayerNorm(WIDTH), head=nn.Linear(WIDTH, 3)))
    assert default_targets(program) == ["block.attn.q", "v"]


class Adapted(nn.Linear):
    """A projection and a second weight, as an adapter leaves them: applied in the projection's own module."""

    def __init__(self) -> None:
        super().__init__(WIDTH, INNER)
        self.lora = nn.Linear(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.lora.weight)


def test_an_adapter_stands_for_the_module_it_adapts() -> None:
    program = capture(Net(causal_attention, **qkv(q=Adapted())))
    assert operands(program) == [(("q", "q.lora"), ("k",), ("v",))]  # not ours: two projections make the query
    for node in program.graph.nodes:
        if node.name in ("linear_1", "add"):
            node.meta["custom"] = {"adaptc": {"role": "out" if node.name == "add" else "0"}}
    assert operands(program) == SEPARATE
    assert default_targets(program) == ["q", "v"]


def test_parametrized_projection() -> None:
    net = Net(causal_attention, **qkv())
    nn.utils.parametrizations.weight_norm(net.q)
    assert operands(capture(net)) == SEPARATE


# -- what is no attention ----------------------------------------------------------------------------------------------


def _classifier(m: Any, x: Tensor) -> Tensor:
    return m.out(m.hidden(x)).softmax(-1)


def _router(m: Any, x: Tensor) -> Tensor:
    weights, chosen = F.softmax(m.gate(x), -1).topk(2, -1)
    spread = torch.zeros_like(m.gate(x)).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
    every = torch.einsum("bsi,eio->bseo", x, m.experts)
    return (spread[..., None, :] @ every)[..., 0, :]


def _contrastive(m: Any, x: Tensor) -> Tensor:
    a, b = F.normalize(m.hidden(x).mean(1), dim=-1), F.normalize(m.out(x).mean(1), dim=-1)
    return (a @ b.t() * 3).softmax(-1)


def _pooling(m: Any, x: Tensor) -> Tensor:
    return F.softmax(m.gate(x)[..., :1], 1).mT @ m.hidden(x)


def _codebook(m: Any, x: Tensor) -> Tensor:
    return F.softmax(m.hidden(x) @ m.codes.t(), -1) @ m.codes


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    return F.softmax(m.hidden(x), -1) @ (F.softmax(m.out(x), 1).mT @ m.gate(x))


def test_softmax_over_attended_features_is_no_second_attention() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        attended = manual(m.q(x), m.k(x), m.v(x))
        return F.softmax(attended, -1) @ m.v(x).mT

    assert operands(capture(Net(forward, **qkv()))) == SEPARATE


def _convolution(m: Any, x: Tensor) -> Tensor:
    return m.conv(x.mT).relu()


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.lstm(x)[0].softmax(-1)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm")  # nn.LSTM flattens its weights as it runs
@pytest.mark.parametrize(
    "forward",
    [_classifier, _router, _contrastive, _pooling, _codebook, _linear_attention, _convolution, _recurrent],
)
def test_no_attention(forward: Callable[..., Tensor]) -> None:
    net = Net(
        forward,
        hidden=nn.Linear(WIDTH, INNER),
        out=nn.Linear(WIDTH, INNER) if forward is not _classifier else nn.Linear(INNER, 5),
        gate=nn.Linear(WIDTH, 3),
        experts=nn.Parameter(torch.randn(3, WIDTH, 5)),
        codes=nn.Parameter(torch.randn(7, INNER)),
        conv=nn.Conv1d(WIDTH, 5, 3),
        lstm=nn.LSTM(WIDTH, 5, batch_first=True),
    )
    program = capture(net, dynamic=False)
    assert find_attention(program) == []
    assert default_targets(program) == []


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_deep_models_are_cheap() -> None:
    """An attention that takes its values from the residual stream sees all of it: the worst case for a walk back."""

    def stream(m: Any, x: Tensor) -> Tensor:
        return m.o(sdpa(rotate(m.q(x)), rotate(m.k(x)), x))

    layers = [Net(stream, q=nn.Linear(6, 6), k=nn.Linear(6, 6), o=nn.Linear(6, 6)) for _ in range(40)]

    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + layer(x)
        return x

    program = capture(Net(forward, layers=nn.ModuleList(layers)), dynamic=False)
    assert len(program.graph.nodes) > 1000
    start = time.process_time()
    found = find_attention(program)
    assert time.process_time() - start < 1
    assert len(found) == 40
    assert (found[-1].query, found[-1].key, found[-1].value) == (("layers.39.q",), ("layers.39.k",), ())
