"""From an attention back to its projections: how it may be written, and what may stand in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from adaptc.passes.analysis.attention.attention_targets import default_targets
from tests.support.attention_nets import (
    HEADS,
    INNER,
    SEPARATE,
    SIZE,
    WIDTH,
    Net,
    Scale,
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
from tests.support.cover import examples

# -- the ways to write one attention -----------------------------------------------------------------------------------


def _manual(m: Any, x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), -1e9).triu(1)
    return m.o(join(manual(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), mask)))


def _einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).view(x.shape[0], x.shape[1], HEADS, SIZE) for f in (m.q, m.k, m.v))
    weights = F.dropout(torch.einsum("bind,bjnd->bnij", q, k).softmax(-1), 0.1, m.training)
    return m.o(torch.einsum("bnij,bjnd->bind", weights, v).flatten(2))


def _einsum_keys_first(m: Any, x: Tensor) -> Tensor:
    weights = torch.einsum("bjd,bid->bji", m.k(x), m.q(x)).softmax(1)
    return m.o(torch.einsum("bji,bjd->bid", weights, m.v(x)))


def _keys_first(m: Any, x: Tensor) -> Tensor:
    """Scores laid out keys by queries, weights on the right of the values."""
    scores = heads(m.k(x)) @ heads(m.q(x)).transpose(-1, -2)
    return m.o(join((heads(m.v(x)).mT @ scores.softmax(-2)).mT))


def _transposed_scores(m: Any, x: Tensor) -> Tensor:
    scores = torch.bmm(m.k(x), m.q(x).permute(0, 2, 1)).permute(0, 2, 1)
    return m.o(torch.bmm(F.softmax(scores, -1), m.v(x)))


def _baddbmm(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(f(x)).flatten(0, 1) for f in (m.q, m.k, m.v))
    alibi = torch.arange(x.shape[1]).to(x.dtype).expand(q.shape[0], 1, -1)
    scores = alibi.baddbmm(q, k.transpose(1, 2), beta=0.5, alpha=0.5).view(x.shape[0], HEADS, x.shape[1], -1)
    weights = F.softmax(scores.float(), -1, dtype=torch.float32).view(-1, x.shape[1], x.shape[1])
    return m.o(join(torch.bmm(weights, v).view(x.shape[0], HEADS, x.shape[1], -1)))


def _sinks(m: Any, x: Tensor) -> Tensor:
    scores = heads(m.q(x)) @ heads(m.k(x)).mT
    sinks = m.sinks.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return m.o(join(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ heads(m.v(x))))


def _landmarks(m: Any, x: Tensor) -> Tensor:
    """Nystrom: three softmaxes, of which only the last weighs the values itself."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    ql, kl = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    left, middle, right = (F.softmax(a @ b.mT, -1) for a, b in ((q, kl), (ql, kl), (ql, k)))
    return m.o((left @ (2 * middle - middle @ middle)) @ (right @ v))


def _convolved(m: Any, x: Tensor) -> Tensor:
    return m.o(sdpa(*(f(x.mT).mT for f in (m.q, m.k, m.v))))


def _functional(m: Any, x: Tensor) -> Tensor:
    """The weights of held modules applied by their holder, one through a cast and one made on the way."""
    q = F.linear(x, m.q.weight.double().float(), m.q.bias)
    return m.o(sdpa(q, x @ (2 * m.k.weight).t(), F.linear(x, m.v.weight)))


def _cached(m: Any, x: Tensor) -> Tensor:
    """Keys and values read back from a buffer they are written to."""
    m.keys[:, : x.shape[1]] = m.k(x)
    m.values.index_copy_(1, torch.arange(x.shape[1]), m.v(x))
    return m.o(sdpa(m.q(x), m.keys[:1], m.values))


def _cache() -> dict[str, Any]:
    return {n: nn.Buffer(torch.zeros(1, 9, INNER)) for n in ("keys", "values")}


WRITTEN: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "sdpa": (causal_attention, {}),
    "manual": (_manual, {}),
    "einsum": (_einsum, {}),
    "einsum, keys first": (_einsum_keys_first, {}),
    "keys first": (_keys_first, {}),
    "transposed scores": (_transposed_scores, {}),
    "baddbmm": (_baddbmm, {}),
    "sinks": (_sinks, {"sinks": nn.Parameter(torch.randn(HEADS))}),
    "landmarks": (_landmarks, {}),
    "convolutions": (_convolved, {n: nn.Conv1d(WIDTH, INNER, 1) for n in "qkv"}),
    "functional": (_functional, {}),
    "cache": (_cached, _cache()),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("decompose", [False, True], ids=["training", "decomposed"])
@pytest.mark.parametrize("way", WRITTEN)
def test_every_way_to_write_it(way: str, decompose: bool) -> None:
    forward, layers = WRITTEN[way]
    dynamic = way != "cache"  # a buffer has a fixed size
    program = capture(Net(forward, **qkv(**layers)), torch.randn(1 + dynamic, 5, WIDTH), dynamic=dynamic)
    program = program.run_decompositions() if decompose else program
    found = operands(program)
    # Of the landmark kernels, those that are multiplied into the values are listed: one or more, all alike.
    assert set(found) == set(SEPARATE)
    assert len(found) == 1 or way == "landmarks"
    assert default_targets(program) == ["q", "v"]


# -- what may stand between a projection and its attention -------------------------------------------------------------


def _repeat(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], HEADS, x.shape[-2], SIZE)


@pytest.mark.parametrize("repeat", [_repeat, partial(torch.repeat_interleave, repeats=2, dim=1), None])
def test_grouped_queries(repeat: Callable[[Tensor], Tensor] | None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x), 1), heads(m.v(x), 1)
        return m.o(join(sdpa(q, repeat(k), repeat(v)) if repeat else sdpa(q, k, v, enable_gqa=True)))

    layers = {"k": nn.Linear(WIDTH, SIZE, bias=False), "v": nn.Linear(WIDTH, SIZE)}
    assert operands(capture(Net(forward, **qkv(**layers)))) == SEPARATE


STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "norm": lambda m, x: m.norm(x),
    "layer norm": lambda m, x: F.layer_norm(x, (SIZE,)),
    "rotary": lambda m, x: rotate(x),
    "cat": lambda m, x: torch.cat([x.new_zeros(x.shape[0], HEADS, 2, SIZE), x], 2),
    "cast": lambda m, x: x.double().to(x.dtype),
    "clip": lambda m, x: x.clamp(-3, 3),
    "bias": lambda m, x: x + m.bias,
    "pool": lambda m, x: F.avg_pool2d(x, (2, 1), ceil_mode=True),
    "gate": lambda m, x: x * x.sigmoid(),
    "in place": lambda m, x: x.clone().mul_(0.5),
    "masked": lambda m, x: x.masked_fill(x > 2, 0.0),
    "masked by a layer": lambda m, x: x.masked_fill(m.gate(x) > 0, 0.0),
    "typed by a layer": lambda m, x: torch.cat([x, x.new_ones(1).type_as(m.gate(x)).expand_as(x)], 2),
}


@pytest.mark.long
@example(sorted(STEPS), True)
@settings(max_examples=examples(8))
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.booleans())
def test_steps_between(steps: list[str], by_hand: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
        for step in steps:
            q, k, v = STEPS[step](m, q), STEPS[step](m, k), STEPS[step](m, v)
        return m.o(join(manual(q, k, v) if by_hand else sdpa(q, k, v)))

    bias = nn.Parameter(torch.ones(SIZE))
    program = capture(Net(forward, **qkv(norm=Scale(SIZE), gate=nn.Linear(SIZE, SIZE), bias=bias)))
    assert operands(program) == SEPARATE


def _chunk(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(*map(heads, m.Wqkv(x).chunk(3, -1)))))


def _split(m: Any, x: Tensor) -> Tensor:
    return m.o(join(manual(*map(heads, m.Wqkv(x).split([INNER] * 3, -1)))))


def _slice(m: Any, x: Tensor) -> Tensor:
    fused = m.Wqkv(x).view(x.shape[0], x.shape[1], HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
    return m.o(join(sdpa(fused[0], fused[1], fused[2])))


@pytest.mark.parametrize("forward", [_chunk, _split, _slice])
def test_fused_projection(forward: Callable[..., Tensor]) -> None:
    program = capture(Net(forward, Wqkv=nn.Linear(WIDTH, 3 * INNER), o=nn.Linear(INNER, WIDTH)))
    assert operands(program) == [(("Wqkv",),) * 3]
    assert default_targets(program) == ["Wqkv"]


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    program = capture(Net(_chunk, Wqkv=Conv1D(3 * INNER, WIDTH), o=Conv1D(WIDTH, INNER)))
    assert any("addmm" in str(n.target) for n in program.graph.nodes)
    assert default_targets(program) == ["Wqkv"]


def test_low_rank_projections_give_the_nearest_half() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = heads(m.q_b(m.norm(m.q_a(x))))
        rope, latent = m.kv_a(x).split([SIZE, 3], -1)
        k, v = heads(m.kv_b(latent)).chunk(2, -1)
        k = torch.cat([k, rotate(rope[:, None]).expand(-1, HEADS, -1, -1)], -1)
        return m.o(join(sdpa(torch.cat([q, rotate(q)], -1), k, v)))

    net = Net(
        forward,
        q_a=nn.Linear(WIDTH, 3),
        norm=Scale(3),
        q_b=nn.Linear(3, INNER),
        kv_a=nn.Linear(WIDTH, SIZE + 3),
        kv_b=nn.Linear(3, 2 * INNER),
        o=nn.Linear(INNER, WIDTH),
    )
    program = capture(net)
    assert operands(program) == [(("q_b",), ("kv_a", "kv_b"), ("kv_b",))]
    assert default_targets(program) == ["q_b", "kv_b"]


# -- scores that are more than a product of query and key --------------------------------------------------------------


def test_relative_position_bias_is_not_a_query() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = m.table((at[:, None] - at).clamp(-3, 3) + 3).permute(2, 0, 1)[None]
        gate = m.gate(x).mT[..., None]  # a bias that is itself projected from the stream
        return m.o(join(manual(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), bias * gate)))

    layers = {"table": nn.Embedding(7, HEADS), "gate": nn.Linear(WIDTH, HEADS)}
    assert operands(capture(Net(forward, **qkv(**layers)))) == SEPARATE


@pytest.mark.parametrize("shared", [True, False])
def test_disentangled_attention(shared: bool) -> None:
    """Scores against positions, through the same projections or their own, do not change who the query is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
        at = torch.arange(x.shape[1])
        index = ((at[:, None] - at).clamp(-3, 3) + 3).expand(x.shape[0], HEADS, -1, -1)
        places = m.norm(m.places.weight)[None]
        pos_k, pos_q = (heads(f(places)) for f in ((m.k, m.q) if shared else (m.pos_k, m.pos_q)))
        c2p = (q @ pos_k.mT).gather(-1, index)
        p2c = (k @ pos_q.mT).gather(-1, index).mT
        return m.o(join(F.softmax(q @ k.mT + c2p + p2c, -1) @ v))

    more = {n: nn.Linear(WIDTH, INNER) for n in ("pos_k", "pos_q")}
    program = capture(Net(forward, **qkv(places=nn.Embedding(7, WIDTH), norm=nn.LayerNorm(WIDTH), **more)))
    assert operands(program) == SEPARATE


def test_learned_queries() -> None:
    """Queries that depend on no input are queries still, if projected; else the attention has none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        projected = m.q(m.latents).expand(x.shape[0], -1, -1)
        first = manual(projected, m.k(x), m.v(x))
        return m.o(sdpa(m.queries.expand(x.shape[0], -1, -1), first, m.v2(first)))

    layers = {"v2": nn.Linear(INNER, INNER), "queries": nn.Parameter(torch.randn(2, INNER))}
    program = capture(Net(forward, **qkv(latents=nn.Parameter(torch.randn(3, WIDTH)), **layers)))
    assert operands(program) == [*SEPARATE, ((), ("v",), ("v2",))]
