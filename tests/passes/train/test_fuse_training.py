"""The passes of training modules on graphs: where they fire, where they do not, and gradients to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from adaptc.errors import AdaptcError
from adaptc.passes.graph.pass_infra import GraphPass
from adaptc.passes.optimize.canonicalize import Canonicalize
from adaptc.passes.train.fused_cross_entropy import FuseCrossEntropy
from adaptc.passes.train.fused_gated_activation import FuseGatedActivations, gated_activation
from adaptc.passes.train.fused_lora_linear import FuseLoraLayers, lora_linears
from adaptc.passes.train.head_loss import linear_cross_entropy
from adaptc.passes.train.training_pipeline import fuse_training
from tests.support.cover import examples
from tests.support.pass_checks import export

WIDTHS = (5, 3, 2)


def same(found: Any, expected: Any, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Net(nn.Module):
    """Layers with LoRA written out; ``body(self, x)`` reads them."""

    def __init__(self, body: Callable[[Any, Tensor], Any], dtype: torch.dtype = torch.float64, bias: bool = True):
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.ModuleList(nn.Linear(7, w, bias) for w in WIDTHS).to(dtype).requires_grad_(False)
        high = torch.promote_types(dtype, torch.float32)
        self.a = nn.ParameterList(torch.randn(2 + i, 7, dtype=high) for i in range(3))
        self.b = nn.ParameterList(torch.randn(w, 2 + i, dtype=high) for i, w in enumerate(WIDTHS))
        for i in range(3):
            self.register_buffer(f"s{i}", torch.tensor(0.5 + i, dtype=high))
        self.head = nn.Linear(7, 11, bias).to(dtype).requires_grad_(False)
        self.body = body

    def delta(self, i: int, low: Tensor) -> Tensor:
        low = low if low.dtype == self.a[i].dtype else low.to(self.a[i].dtype)
        return F.linear(F.linear(low, self.a[i]), self.b[i]) * getattr(self, f"s{i}")

    def y(self, i: int, x: Tensor, low: Tensor | None = None) -> Tensor:
        out = self.layers[i](x)
        total = out + self.delta(i, x if low is None else low)
        return total if total.dtype == out.dtype else total.to(out.dtype)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def module_of(body: Callable[[Any, Tensor], Any], **options: Any) -> fx.GraphModule:
    dtype = options.get("dtype", torch.float64)
    rows = torch.export.Dim("rows", min=2, max=50)
    shapes = ({0: rows} if options.pop("free", True) else None,)
    module = export(Net(body, **options), inputs(4, dtype), dynamic_shapes=shapes).module()
    trained = {n for n, _ in module.named_parameters() if n.split(".")[0] in "ab"}
    for name, p in module.named_parameters():
        p.requires_grad_(name in trained)
    return module  # type: ignore[return-value]


def inputs(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 7, generator=torch.Generator().manual_seed(n)).to(dtype)


def weighed(out: Any) -> Tensor:
    """A number that weighs every output differently."""
    outs = out if isinstance(out, (tuple, list)) else [out]
    weights = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).reshape(o.shape) for o in outs]
    return torch.stack([(o.double() * w).sum() for o, w in zip(outs, weights, strict=True)]).sum()


def gradients(module: nn.Module, x: Tensor, seed: int = 0) -> list[Any]:
    """Outputs, and the gradients of the input and of every parameter that has one."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = module(x)
    weighed(out).backward()
    return [out, x.grad, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}]


def both(
    body: Callable[[Any, Tensor], Any], rewrite: GraphPass, **options: Any
) -> tuple[nn.Module, fx.GraphModule, int]:
    """(the module as exported, the same rewritten, how much was)."""
    module = module_of(body, **options)
    Canonicalize(["x"], differentiable=True)(module.graph)
    count = rewrite(module.graph).count
    module.recompile()
    return module_of(body, **options), module, count


def calls(module: fx.GraphModule, function: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=function))


def same_dropout(m: Any, x: Tensor) -> Any:
    low = F.dropout(x, 0.3)
    return m.y(0, x, low), m.y(2, x, low)


def read_twice(m: Any, x: Tensor) -> Any:
    y = m.layers[0](x)
    return y + m.delta(0, x), y


def written(m: Any, x: Tensor) -> Any:
    y = x + 1
    y.mul_(2)
    return m.y(0, y)


def written_in_between(m: Any, x: Tensor) -> Any:
    h = x.detach() + 1
    first = m.layers[0](h)
    h.view(-1).mul_(2)
    return first + m.delta(0, h), m.layers[1](h)


LAYERS: dict[str, tuple[Callable[[Any, Tensor], Any], int, int]] = {
    "siblings": (lambda m, x: tuple(m.y(i, x).tanh() for i in range(3)), 3, 1),
    "one behind another": (lambda m, x: (m.y(0, x), m.y(1, x.cos())), 2, 2),
    "dropout": (lambda m, x: (m.y(0, x, F.dropout(x, 0.3)), m.y(2, x, F.dropout(x, 0.3))), 2, 2),
    "the same dropout": (same_dropout, 2, 1),
    "the sum the other way round": (lambda m, x: m.delta(1, x) + m.layers[1](x), 1, 1),
    "an output that nothing reads": (lambda m, x: (m.y(0, x), m.y(1, x).detach())[0], 1, 1),
}


@pytest.mark.few(7)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_one_step(case: str, bias: bool) -> None:
    body, layers, steps = LAYERS[case]
    plain, fused, count = both(body, FuseLoraLayers(), bias=bias)
    assert (count, calls(fused, lora_linears)) == (layers, steps)
    for n in (2, 5):
        same(gradients(fused, inputs(n)), gradients(plain, inputs(n)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_have_adapters_in_float32(dtype: torch.dtype) -> None:
    body = LAYERS["siblings"][0]
    plain, fused, count = both(body, FuseLoraLayers(), dtype=dtype)
    assert count == 3
    eps = torch.finfo(dtype).eps
    for found, expected in zip(gradients(fused, inputs(5, dtype)), gradients(plain, inputs(5, dtype)), strict=True):
        # The gradient of x is a sum of terms that are each rounded in the plain module.
        torch.testing.assert_close(found, expected, rtol=4 * eps, atol=8 * eps)


def result_is_written_to(m: Any, x: Tensor) -> Any:
    y = m.y(0, x)
    return F.relu(y, inplace=True)


NOT_LAYERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "no adapter": lambda m, x: m.layers[0](x),
    "the layer's output is read too": read_twice,
    "another formula": lambda m, x: m.layers[0](x) + m.delta(0, x) * x.sum(),
    "a factor that is no number": lambda m, x: m.layers[0](x) + F.linear(F.linear(x, m.a[0]), m.b[0]) * x[..., :1],
    "a weighted sum": lambda m, x: torch.add(m.layers[0](x), m.delta(0, x), alpha=2),
    "a weight that is computed": lambda m, x: F.linear(x, m.layers[0].weight * 2) + m.delta(0, x),
    "an input that is written to": written,
    "an input that is written to in between": written_in_between,
    "a result that is written to": result_is_written_to,
    "an input of other rows": lambda m, x: m.layers[0](x) + m.delta(0, x[:1]),
}


@pytest.mark.parametrize("case", NOT_LAYERS)
def test_other_layers_stay(case: str) -> None:
    plain, fused, count = both(NOT_LAYERS[case], FuseLoraLayers())
    assert (count, calls(fused, lora_linears)) == (0, 0)
    same(gradients(fused, inputs(3)), gradients(plain, inputs(3)))


@settings(max_examples=examples(40), deadline=None)
@given(st.sets(st.sampled_from(["x", "low", "layers", "a", "b", "s"])), st.booleans(), st.integers(0, 2))
def test_whatever_requires_grad_gets_it(wanted: set[str], apart: bool, unused: int) -> None:
    """Of the function itself: every subset of inputs, and outputs that take no part in the loss."""
    net = Net(lambda m, x: x)
    x, low = inputs(3), inputs(4)[:3]
    known = {"x": [x], "low": [low], "layers": list(net.layers.parameters()), "a": list(net.a), "b": list(net.b)}
    known["s"] = [getattr(net, f"s{i}") for i in range(3)]
    for name, tensors in known.items():
        for t in tensors:
            t.requires_grad_(name in wanted)
    w, bias = [m.weight for m in net.layers], [m.bias for m in net.layers]
    kept = range(3 - unused)
    plain = [net.layers[i](x) + net.delta(i, low if apart else x) for i in kept]
    fused = lora_linears(x, low if apart else None, w, bias, list(net.a), list(net.b), known["s"])
    used = [t for name in wanted for t in known[name] if name != "low" or apart]
    same(list(fused)[: len(kept)], plain)
    if used:
        loss = weighed(plain)
        assert loss.requires_grad
        expected = torch.autograd.grad(loss, used, allow_unused=True)
        found = torch.autograd.grad(weighed(list(fused)[: len(kept)]), used, allow_unused=True)
        zero = [torch.zeros_like(t) for t in used]
        fill = lambda gs: [z if g is None else g for g, z in zip(gs, zero, strict=True)]  # noqa: E731
        same(fill(found), fill(expected))


def test_steps_are_of_first_order_and_say_so() -> None:
    _, fused, _ = both(LAYERS["siblings"][0], FuseLoraLayers())
    x = inputs(2).requires_grad_()
    (first,) = torch.autograd.grad(weighed(fused(x)), x, create_graph=True)
    for by in (None, x):
        with pytest.raises(AdaptcError, match=r"first order alone: set prog\.fuse = False"):
            first.sum().backward(retain_graph=True) if by is None else torch.autograd.grad(first.sum(), by)


def labels_of(x: Tensor) -> Tensor:
    return (x[..., 0] * 1000).long().remainder(11).reshape(-1)


def head(reduction: str = "mean", ignored: int = -100, **options: Any) -> Callable[[Any, Tensor], Any]:
    def body(m: Any, x: Tensor) -> Any:
        logits = m.head(m.y(0, x) @ torch.ones(5, 7, dtype=x.dtype) * 0.1 + x).to(m.a[0].dtype)
        labels = labels_of(x)
        labels = labels.where(labels != 3, ignored)
        loss = F.cross_entropy(logits.view(-1, 11), labels, reduction=reduction, ignore_index=ignored, **options)
        return loss, logits

    return body


@pytest.mark.parametrize("piece", [1, 2**21])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 4])
def test_a_cross_entropy_is_one_step(reduction: str, ignored: int, piece: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("adaptc.passes.train.head_loss.CHUNK_ELEMENTS", piece)
    monkeypatch.setattr("adaptc.passes.train.head_loss.MIN_CHUNK_COLUMNS", 4)
    plain, fused, count = both(head(reduction, ignored), FuseCrossEntropy())
    assert (count, calls(fused, linear_cross_entropy)) == (1, 1)
    for n in (2, 5):
        same(gradients(fused, inputs(n)), gradients(plain, inputs(n)))


def test_the_gradients_of_loss_and_logits_each_alone() -> None:
    plain, fused, _ = both(head(), FuseCrossEntropy())
    for i in (0, 1):
        found = []
        for m in (fused, plain):
            m.zero_grad()
            weighed(m(inputs(3))[i]).backward()
            found.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
        assert found[0]
        same(found[0], found[1])


def head_of_what_changes(m: Any, x: Tensor) -> Any:
    h = x.sin() + 1
    logits = m.head(h)
    h.view(-1).mul_(2)
    return F.cross_entropy(logits.view(-1, 11), labels_of(x)), logits, h


NOT_LOSSES = {
    "an input that is written to": head_of_what_changes,
    "smoothing": head(label_smoothing=0.1),
    "no reduction": head(reduction="none"),
    "weights": lambda m, x: F.cross_entropy(m.head(x).view(-1, 11), labels_of(x), m.b[0].new_ones(11)),
    "no layer": lambda m, x: F.cross_entropy(m.head(x).tanh().view(-1, 11), labels_of(x)),
    "probabilities": lambda m, x: F.cross_entropy(m.head(x).view(-1, 11), m.head(x).softmax(-1).view(-1, 11)),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_LOSSES)
def test_other_losses_stay(case: str) -> None:
    # Some torch releases capture a cross entropy with probabilities for one size only.
    plain, fused, count = both(NOT_LOSSES[case], FuseCrossEntropy(), free=False)
    assert (count, calls(fused, linear_cross_entropy)) == (0, 0)
    same(gradients(fused, inputs(4)), gradients(plain, inputs(4)))


def gate_read_twice(m: Any, x: Tensor) -> Any:
    a = F.silu(x)
    return a * x.cos() + a


def gate_with_itself(m: Any, x: Tensor) -> Any:
    y = x.sin()
    return F.silu(y) * y


def gate_written(m: Any, x: Tensor) -> Any:
    y = x.sin()
    y.add_(3)
    return F.silu(y) * x.cos()


GATES: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "silu": (lambda m, x: F.silu(x.sin()) * x.cos(), 1),
    "gelu": (lambda m, x: x.cos() * F.gelu(x.sin()), 1),
    "gelu by tanh": (lambda m, x: F.gelu(x.sin(), approximate="tanh") * x.cos(), 1),
    "another activation": (lambda m, x: torch.tanh(x.sin()) * x.cos(), 0),
    "an activation that is read twice": (gate_read_twice, 0),
    "one that is broadcast": (lambda m, x: F.silu(x.sin()) * x[:1].cos(), 0),
    "a number": (lambda m, x: F.silu(x.sin()) * 2, 0),
    "one of another type": (lambda m, x: F.silu(x.sin()) * x.cos().float(), 0),
    "with itself": (gate_with_itself, 0),
    "one that is written to": (gate_written, 0),
}


@pytest.mark.parametrize("case", GATES)
def test_gates(case: str) -> None:
    body, count = GATES[case]
    plain, fused, found = both(body, FuseGatedActivations())
    assert (found, calls(fused, gated_activation)) == (count, count)
    same(gradients(fused, inputs(3)), gradients(plain, inputs(3)))


def test_less_is_kept_for_the_backward() -> None:
    """Of a gate its inputs, of a loss the logits it returns, of layers their input and columns of their ranks."""

    def body(m: Any, x: Tensor) -> Any:
        y = F.silu(m.y(0, x)) * m.y(0, x.cos())
        logits = m.head(y @ torch.ones(5, 7, dtype=x.dtype))
        return F.cross_entropy(logits.view(-1, 11), labels_of(x)), logits

    def kept() -> int:
        sizes: list[int] = []

        def note(t: Tensor) -> Tensor:
            sizes.append(0 if isinstance(t, nn.Parameter) else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module(inputs(50))
        return sum(sizes)

    module = module_of(body)
    before = kept()
    done = fuse_training(module)
    assert [dict(done.trail)[n] for n in ("fuse_lora_layers", "fuse_cross_entropy", "fuse_gated_activations")] == [
        2,
        1,
        1,
    ]
    # The activation of the gate, and the log softmax of eleven columns but for its sums, of 150 rows each.
    assert before - kept() >= 150 * (5 + 11 - 1)
