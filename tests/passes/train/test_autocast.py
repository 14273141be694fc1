"""Training graphs under autocast: the types that the model itself would have there, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from adaptc.errors import AdaptcError, ConfigError
from adaptc.passes.train.autocast import check_dtype, dtype_limit
from adaptc.passes.train.training_pipeline import fuse_training
from tests.passes.train.test_fuse_training import Net, calls, gradients, inputs, labels_of, module_of

HALF = [torch.bfloat16, torch.float16]


def some_labels(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] * x.shape[1]).remainder(11)


def gate_and_loss(m: Any, x: Tensor) -> Any:
    y = F.silu(m.y(0, x)) * m.y(0, x.cos()) + m.layers[1](x)[..., :1]
    logits = m.head(y @ m.a[0].new_ones(5, 7))
    return F.cross_entropy(logits.view(-1, 11), some_labels(x)), logits


def casting(m: Any, x: Tensor) -> Any:
    """As models do that normalise and take their loss in float32: casts that do nothing at capture."""
    mixing = torch.linspace(-1, 2, 35, dtype=x.dtype).reshape(5, 7).sin()
    h = (m.y(0, x) @ mixing + x).to(torch.float32)
    h = h * h.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    logits = m.head(h.to(torch.float32))
    return F.cross_entropy(logits.float().view(-1, 11), some_labels(x)), logits, m.layers[1](h).float()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def pair(body: Callable[[Any, Tensor], Any], dtype: torch.dtype = torch.float32) -> tuple[Net, fx.GraphModule, dict]:
    """(the model itself, what it is as a training module, how much of that is fused)."""
    module = module_of(body, dtype=dtype)
    model = Net(body, dtype)
    return model, module, dict(fuse_training(module).trail)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", [gate_and_loss, casting])
def test_fused_steps_are_what_the_model_is_under_autocast(body: Any, base: torch.dtype, dtype: torch.dtype) -> None:
    model, module, fused = pair(body, base)
    assert fused["fuse_lora_layers"] > 0
    assert fused["fuse_cross_entropy"] > 0
    x = inputs(5, base)
    with torch.autocast("cpu", dtype):
        found, expected = gradients(module, x), gradients(model, x)
    exact = gradients(copy.deepcopy(model).float(), x.float())
    assert [t.dtype for t in found[0]] == [t.dtype for t in expected[0]]
    assert {g.dtype for g in found[2].values()} == {torch.float32}
    # Rounded in other places, and no further away than the model itself is; a type's eps where that is lucky.
    slack = 4 * max(torch.finfo(dtype).eps, torch.finfo(base).eps)
    for f, e, right in zip(*map(flat, (found, expected, exact)), strict=True):
        assert relative(f, right) <= 2 * relative(e, right) + slack


def flat(found: list[Any]) -> list[Tensor]:
    return [*found[0], found[1], *(found[2][n] for n in sorted(found[2]) if n[0] in "ab")]


@pytest.mark.parametrize("dtype", HALF)
def test_a_backward_left_under_autocast_is_the_same(dtype: torch.dtype) -> None:
    _, module, _ = pair(gate_and_loss)
    found = []
    for on in (True, False):
        module.zero_grad()
        with torch.autocast("cpu", dtype):
            loss, logits = module(inputs(5, torch.float32))
        with torch.autocast("cpu", dtype, enabled=on):
            torch.autograd.backward([loss, logits], [torch.ones(()), torch.ones_like(logits)])
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert found[0]
    # What stands between the fused steps is torch's own, and follows the caller.
    torch.testing.assert_close(found[0], found[1], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_gradients_of_float32_steps_are_float32_whoever_calls_backward() -> None:
    module = module_of(lambda m, x: m.y(0, x), dtype=torch.float32)
    fuse_training(module)
    found = []
    for on in (True, False):
        module.zero_grad()
        out = module(inputs(3, torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out.backward(torch.ones_like(out))
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_without_autocast_casts_change_nothing() -> None:
    model, module, _ = pair(casting)
    for found, expected in zip(
        gradients(module, inputs(4, torch.float32)), gradients(model, inputs(4, torch.float32)), strict=True
    ):
        names = expected if not isinstance(expected, dict) else {n: expected[n] for n in found}
        torch.testing.assert_close(found, names, rtol=1e-5, atol=1e-5)


def test_double_precision_stays_under_autocast() -> None:
    model, module, _ = pair(gate_and_loss, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(module, inputs(3)), gradients(model, inputs(3))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def written_after_a_cast(m: Any, x: Tensor) -> Any:
    h = m.y(0, x)
    h.to(torch.float32).mul_(2)
    return h


def a_view_of_bits(m: Any, x: Tensor) -> Any:
    return m.y(0, x), m.layers[0](x).view(torch.int32)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("body", [written_after_a_cast, a_view_of_bits])
def test_memory_of_another_type_is_refused_by_name(body: Any, fuse: bool) -> None:
    module = module_of(body, dtype=torch.float32)
    fuse_training(module, fuse=fuse)
    assert calls(module, check_dtype) > 0
    module(inputs(3, torch.float32))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(AdaptcError, match="float32 when it was captured and is torch"),
    ):
        module(inputs(3, torch.float32))


def masked(m: Any, x: Tensor) -> Any:
    y = m.y(0, x)
    least = torch.finfo(y.dtype).min
    mask = torch.ones_like(y, dtype=torch.bool).tril()
    mask[..., 2, :] = True
    return y.masked_fill(mask, least).softmax(-1)


@pytest.mark.parametrize("dtype", HALF)
def test_masks_are_filled_with_the_least_number_of_their_own_type(dtype: torch.dtype) -> None:
    """Which torch refuses to fill with float32's, and which makes rows that are masked as a whole uniform."""
    model, module, _ = pair(masked)
    assert calls(module, dtype_limit) == 1
    x = inputs(4, torch.float32)
    with torch.autocast("cpu", dtype):
        found, expected = module(x), model(x)
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=2 * torch.finfo(dtype).eps)


def blocks(m: Any, x: Tensor) -> Any:
    y = m.y(0, x) * 2
    with torch.autocast("cpu", enabled=False):
        inner = y.float() @ y.float().transpose(1, 2)
    with torch.no_grad():
        frozen = y.float().cos()
    return y, inner, frozen


@pytest.mark.parametrize("fuse", [True, False])
def test_blocks_of_the_model_cast_inside(fuse: bool) -> None:
    module, model = module_of(blocks, dtype=torch.float32), Net(blocks, torch.float32)
    others = module_of(blocks, dtype=torch.float32)
    fuse_training(module, fuse=fuse)
    x = inputs(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = module(x), model(x)
        # What is shared between modules is not written to.
        with pytest.raises(RuntimeError, match="dtype mismatch"):
            others(x)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in expected[1:]] == [torch.float32, torch.float32]
    for f, e in zip(found, expected, strict=True):
        assert relative(f, e) <= 8 * torch.finfo(torch.bfloat16).eps


def test_checks_of_what_the_caller_gives_stay() -> None:
    module = module_of(lambda m, x: m.y(0, x.to(torch.float32)), dtype=torch.float32)
    fuse_training(module)
    with pytest.raises(RuntimeError, match="dtype mismatch"):
        module(inputs(3, torch.float64))


def head(read: Callable[[Any], Any] = lambda logits: logits, options: dict[str, Any] | None = None) -> Any:
    def body(m: Any, x: Tensor) -> Any:
        logits = m.head(m.y(0, x) @ x.new_ones(5, 7) + x)
        labels = labels_of(x)
        labels = labels.where(labels > 4, -100)
        loss = F.cross_entropy(logits.float().view(-1, 11), labels, **(options or {}))
        return loss, read(logits)

    return body


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_without_a_label_are_left_out_where_asked(autocast: bool) -> None:
    both = {}
    x = inputs(5, torch.float32)
    for rows in ("all", "labelled"):
        module = module_of(head(), dtype=torch.float32)
        fuse_training(module, logits=rows)
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, logits = module(x)
        loss.backward()
        both[rows] = (loss, logits, [p.grad for p in module.parameters() if p.grad is not None])
    kept = (labels_of(x) > 4).reshape(5, 3, 1)
    assert 0 < kept.sum() < 15
    assert not both["labelled"][1].masked_select(~kept).any()
    # A library may sum in another order for fewer rows, as MKL does on some processors.
    rounding = {"rtol": 2**-7, "atol": 2**-7} if autocast else {"rtol": 1e-6, "atol": 4e-6}
    torch.testing.assert_close(both["labelled"][1], both["all"][1] * kept, **rounding)
    torch.testing.assert_close(both["labelled"][0], both["all"][0], rtol=2**-7 if autocast else 1e-6, atol=0)
    torch.testing.assert_close(both["labelled"][2], both["all"][2], rtol=1e-5, atol=1e-5)


def tanh(m: Any, x: Tensor) -> Any:
    return F.cross_entropy(m.head(x + m.y(0, x).sum()).tanh().view(-1, 11), labels_of(x))


REFUSED = {
    "logits that something else reads": head(lambda logits: (logits, logits.logsumexp(-1))),
    "smoothing": head(options={"label_smoothing": 0.1}),
    "no layer": tanh,
    "no loss": lambda m, x: m.y(0, x),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_rows_cannot_be_left_out_it_says_so(case: str) -> None:
    with pytest.raises(ConfigError, match="right behind a linear head"):
        fuse_training(module_of(REFUSED[case], dtype=torch.float32), logits="labelled")
    with pytest.raises(ConfigError, match="fuse=True"):
        fuse_training(module_of(head(), dtype=torch.float32), logits="labelled", fuse=False)
    with pytest.raises(ConfigError, match=r"'all', 'labelled'"):
        fuse_training(module_of(head(), dtype=torch.float32), logits="some")


def test_a_head_in_half_precision_is_multiplied_once() -> None:
    """The loss takes its logits in float32, and the caller gets them as they are."""
    module = module_of(head(), dtype=torch.bfloat16)
    assert dict(fuse_training(module).trail)["fuse_cross_entropy"] == 1
    assert calls(module, torch.ops.aten.linear.default) == 0
    _, logits = module(inputs(3, torch.bfloat16))
    assert logits.dtype == torch.bfloat16


# Dynamo instantiates functions that it traces.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiler_takes_the_fused_steps_whole(autocast: bool) -> None:
    _, module, fused = pair(gate_and_loss)
    assert all(fused[n] for n in ("fuse_lora_layers", "fuse_cross_entropy", "fuse_gated_activations"))
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, found = inputs(5, torch.float32), []
    for m in (compiled, module):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = m(x)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
