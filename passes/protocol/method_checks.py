"""Check what a method promises at one op, by tracing its code and by trying it on small tensors.

The input is a method and the op of a site. A broken promise raises a MethodError that names the function, what was
expected and what was found. No model is needed, and torch's random state stays as it is.

The promises are those whose failure nothing else would notice. If a region depends on the rank it was compiled with,
the program still runs with every other rank, but computes something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import AdaptcError, MethodError
from adaptc.passes.graph.ops import LAYER_OPS, Op
from adaptc.passes.graph.symbolic_fakes import fake_tensor_mode
from adaptc.passes.protocol.method import InitialValues, Method
from adaptc.passes.protocol.method_names import check_names
from adaptc.passes.protocol.parts.method_part import Slot
from adaptc.passes.protocol.trace import first_difference, trace_region
from adaptc.torch_typing import fork_rng

#: the free sizes of example inputs: a linear layer gets (*FREE, in_features)
EXAMPLE_SIZES = (3, 5)
OUTSIDE_TENSOR = "uses a tensor that is none of its arguments: make it a slot"
#: the largest error in float64 that counts as rounding, relative to the larger of 1 and the largest expected value
TOLERANCE = 1e-7


@lru_cache(maxsize=1024)
def check_promises(method: Method, op: Op, half_precision: bool = True, with_values: bool = True) -> None:
    """Raise MethodError for the first promise that is broken.

    ``half_precision=False`` skips the promises about a base in half precision. ``with_values=False`` skips those that
    need tensors with values.
    """
    check_names(method)
    code = [p for p in TRACED_PROMISES if half_precision or p is not code_keeps_dtypes]
    for promise in (*code, *(VALUE_PROMISES if with_values else ())):
        try:
            promise(method, op)
        except AdaptcError:
            raise
        except Exception as error:  # the method's own code may raise anything
            what = promise.__name__.replace("_", " ")
            raise MethodError(
                f"{_method_name(method)} failed where it was tried whether {what}, at {_describe_op(op)}: "
                f"{type(error).__name__}: {error}"
            ) from error


def code_has_right_sizes(method: Method, op: Op) -> None:
    """Raise MethodError unless every function can be traced and returns a tensor of the required shape."""
    for region in _example_regions(method, op, torch.float32):
        region.trace_with(method)


def code_keeps_dtypes(method: Method, op: Op) -> None:
    """Raise MethodError unless a base in half precision gives results in half precision, with adapters in float32."""
    for region in _example_regions(method, op, torch.bfloat16):
        region.trace_with(method)


def code_serves_all_sizes(method: Method, op: Op) -> None:
    """Raise MethodError if traced code depends on a ``swappable`` field: one code must serve adapters of all sizes."""
    graphs = {r.region_kind: r.trace_with(method) for r in _example_regions(method, op, torch.float32)}
    for field, other in _resized_variants(method, op):
        for region in _example_regions(other, op, torch.float32):
            found = first_difference(graphs[region.region_kind], region.trace_with(other))
            if found:
                raise MethodError(
                    f"{_method_name(method)}.{region.function}() depends on {field}, which is swappable: at "
                    f"{_describe_op(op)} it computes {found[0]} for {_describe_options(method)}, and {found[1]} for "
                    f"{_describe_options(other)}. An adapter of another size would run through the wrong code. Put "
                    "what depends on it into scale(), and write -1 for such sizes in a reshape"
                )


def first_values_fit(method: Method, op: Op) -> None:
    """Raise MethodError unless init() returns what slots() announces and leaves the given weight unchanged."""
    slots = method.slots(op)
    with fork_rng([]):
        W = _example_weight(op)
        before = W.clone()
        first = _example_initial(method, op, W).slots
        _check_slots(method, op, "init", slots, first)
        wrong = {n: t.dtype for n, t in first.items() if t.dtype != (slots[n].dtype or W.dtype)}
        if wrong:
            raise MethodError(
                f"{_method_name(method)}.init() was asked for values of {W.dtype} and gave {wrong}: pass its dtype on "
                "to what makes them"
            )
        # The runtime needs identity values of one size only, whatever the rank.
        _check_slots(method, op, "identity", slots, method.identity(op, W, W.dtype), any_free_size=True)
        if not torch.equal(W, before):
            raise MethodError(f"{_method_name(method)}.init() changed the weight it was given; it must leave it alone")


def identity_is_the_base(method: Method, op: Op) -> None:
    """Raise MethodError unless the layer with identity values computes what it does without an adapter."""
    with fork_rng([]):
        W, b = _example_weight(op), torch.randn(op.out_features, dtype=torch.float64)
        slots, scale = method.identity(op, W, W.dtype), _scale_tensor(method, op)
        if method.has_weight():
            _check_equal(method, op, "identity", "weight", method.weight(op, W, slots, scale), W)
        if method.has_bias() and op.callable:
            _check_equal(method, op, "identity", "bias", method.bias_over(op, W, b, b, slots, scale), b)
        if method.has_apply_form(op):
            x = _example_input(op, torch.float64)
            _check_equal(method, op, "identity", "output", method.call_adapted(op, x, W, None, slots, scale), op(x, W))


def first_values_learn(method: Method, op: Op) -> None:
    """Raise MethodError unless some gradient at the first values is not zero, so that training can start."""
    with fork_rng([]), torch.enable_grad():
        W = _example_weight(op)
        first = _example_initial(method, op, W)
        base, slots = W if first.base is None else first.base.to(W.dtype), dict(first.slots)
        trained = {
            n: slots[n].detach().clone().requires_grad_()
            for n, slot in method.slots(op).items()
            if slot.trainable and slots[n].is_floating_point()
        }
        if not trained:
            return
        slots.update(trained)
        scale = _scale_tensor(method, op)
        if method.has_weight():
            out = method.weight(op, base, slots, scale)
        else:
            out = method.call_adapted(op, _example_input(op, torch.float64), base, None, slots, scale)
        outputs = [out]
        if method.has_bias() and op.callable:
            b = torch.randn(op.out_features, dtype=torch.float64)
            new = method.bias_over(op, base, b, b, slots, scale)
            outputs += [] if new is None else [new]
        loss = sum((p.double() * torch.randn(p.shape, dtype=torch.float64)).sum() for p in outputs)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            grads: list[Any] = []
        else:
            grads = list(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    gradients = [g for g in grads if g is not None]
    if any(not g.isfinite().all() for g in gradients):
        raise MethodError(f"{_method_name(method)}: gradients at the first values are not finite at {_describe_op(op)}")
    if not any(g.any() for g in gradients):
        zero = [n for n, t in trained.items() if not t.any()]
        raise MethodError(
            f"{_method_name(method)}.init() gives first values at {_describe_op(op)} from which nothing can be "
            f"learned: the gradient of {', '.join(map(repr, trained))} is zero"
            + (f" (zero at the start: {', '.join(map(repr, zero))})" if zero else "")
            + ". Start one factor of a product at random values; define init() for that"
        )


def forms_agree(method: Method, op: Op) -> None:
    """Raise MethodError unless the form around the layer equals the layer with the changed weight and bias.

    The slot values are random ones near the first values.
    """
    if not method.has_weight() or not (method.has_apply_form(op) or method.looks_at_base()):
        return
    with fork_rng([]):
        W = _example_weight(op)
        first = _example_initial(method, op, W)
        base = W if first.base is None else first.base.to(W.dtype)
        moved_slots = {n for n, s in method.slots(op).items() if s.trainable and first.slots[n].is_floating_point()}
        slots = {n: t + 0.1 * torch.randn_like(t) if n in moved_slots else t for n, t in first.slots.items()}
        scale = _scale_tensor(method, op)
        changed = method.weight(op, base, slots, scale)
        _check_equal(method, op, "weight_over", "weight", method.weight_over(op, base, base, slots, scale), changed)
        if not method.has_apply_form(op):
            return
        x = _example_input(op, torch.float64)
        takes_bias = LAYER_OPS[op.target][3] is not None
        b = torch.randn(op.out_features, dtype=torch.float64) if takes_bias else None
        new = method.bias_over(op, base, b, b, slots, scale) if takes_bias else None
        around = method.call_adapted(op, x, base, b, slots, scale)
        _check_equal(method, op, "apply", "output", around, op(x, changed, new))


TRACED_PROMISES = (code_has_right_sizes, code_keeps_dtypes, code_serves_all_sizes)
VALUE_PROMISES = (first_values_fit, identity_is_the_base, first_values_learn, forms_agree)


# -- regions on tensors without values ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ExampleRegion:
    """A function of a method at an op, with its example inputs; ``shapes`` are the shapes its result may have."""

    region_kind: str
    function: str
    op: Op
    slot_names: tuple[str, ...]
    has_scale: bool
    inputs: tuple[Tensor, ...]
    allowed_shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    def trace_with(self, method: Method) -> fx.Graph:
        what = f"{_method_name(method)}.{self.function}()"
        try:
            graph = trace_region(method, self.op, self.region_kind, self.slot_names, self.has_scale, self.inputs)
        except MethodError as error:
            raise MethodError(f"{what} {OUTSIDE_TENSOR} (at {_describe_op(self.op)}). {error}") from error
        except AdaptcError:
            raise
        except Exception as error:  # torch or the method's own code may raise anything
            raise MethodError(f"{what} {_explain_error(error)} (at {_describe_op(self.op)})") from error
        (out,) = graph.find_nodes(op="output")
        found = out.args[0].meta["val"] if isinstance(out.args[0], fx.Node) else out.args[0]  # type: ignore[union-attr]
        if not isinstance(found, Tensor):
            raise MethodError(f"{what} must return a tensor, got {type(found).__name__} (at {_describe_op(self.op)})")
        if tuple(found.shape) not in self.allowed_shapes or found.dtype != self.dtype:
            raise MethodError(
                f"{what} must return a tensor of shape {' or '.join(map(str, self.allowed_shapes))} and dtype "
                f"{self.dtype}, got {tuple(found.shape)} and {found.dtype} (at {_describe_op(self.op)})"
            )
        return graph


def _explain_error(error: Exception) -> str:
    kind, text = type(error).__name__, (str(error).strip() or "no message").splitlines()[0]
    if kind.startswith(("DataDependent", "GuardOnDataDependent", "UserError")):
        return "chooses by values, and a graph has one way only: use torch.where, or options instead of tensors"
    if "convert all Tensors to FakeTensors" in text:
        return OUTSIDE_TENSOR
    return f"cannot be traced: {kind}: {text}"


def _example_regions(method: Method, op: Op, dtype: torch.dtype) -> Iterator[_ExampleRegion]:
    """Yield every function that the method has at this op, with slots as announced and a base of ``dtype``."""
    with fake_tensor_mode():
        slots = {n: torch.empty(s.shape, dtype=s.dtype or torch.float32) for n, s in method.slots(op).items()}
        W = torch.empty(op.stored(torch.empty(op.shape)).shape, dtype=dtype)
        has_scale = method.scale(op) is not None
        slot_inputs = [*slots.values(), *([torch.empty((), dtype=torch.float32)] if has_scale else [])]
        b = torch.empty(op.out_features, dtype=dtype) if op.callable and LAYER_OPS[op.target][3] is not None else None
        x = _example_input(op, dtype) if op.callable else W
        y = op(x, op.canonical(W), b) if op.callable else W

    def region(kind: str, inputs: list[Tensor], *like: Tensor) -> _ExampleRegion:
        shapes = tuple(dict.fromkeys(tuple(t.shape) for t in like))
        bias = "bias_over" if method.bias_reads_weight() else "bias"
        function = {"apply_bias": "apply", "new_bias": bias, "bias": bias}.get(kind, kind)
        return _ExampleRegion(
            kind, function, op, tuple(slots), has_scale, (*inputs, *slot_inputs), shapes, like[0].dtype
        )

    if method.has_weight():
        dense = op.stored(op.dense(torch.empty(op.shape, device="meta")))
        yield region("weight", [W], W, *([dense] if op.groups > 1 else []))
        if method.looks_at_base():
            yield region("weight_over", [W, W], W, *([dense] if op.groups > 1 else []))
    if method.has_input(op):
        yield region("input", [x], x)
    if method.has_apply(op):
        yield region("apply", [x, y, W], y)
        if b is not None:
            yield region("apply_bias", [x, y, W, b], y)
    if method.has_bias() and b is not None:
        own = [W] if method.bias_reads_weight() else []
        yield region("bias", [y, b, *own], y)
        yield region("new_bias", [y, *own], y)


def _resized_variants(method: Method, op: Op) -> Iterator[tuple[str, Method]]:
    """Yield (what differs, method) for methods with other options, which the same regions must serve as well."""
    rank = method.sizes.rank()
    candidates: list[tuple[str, Any]] = [("its sizes", method.sizes.minimal(op))]
    if rank is not None:
        candidates.append(("the rank", method.sizes.with_rank(op, rank + 3)))
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if f.name in method.swappable and isinstance(value, (int, float)) and not isinstance(value, bool):
            candidates += [(f"the field {f.name!r}", v) for v in _with_other_values(method, f.name, value)]
    for what, other in candidates:
        if isinstance(other, Method) and other != method and _accepts_op(other, op):
            yield what, other


def _with_other_values(method: Method, name: str, value: int | float) -> Iterator[Method]:
    for new in (value + 1, 2 * value + 2) if isinstance(value, int) else (value / 2 + 0.25,):
        try:
            yield replace(method, **{name: new})  # type: ignore[arg-type]
        except AdaptcError:  # not a legal value
            continue


def _accepts_op(method: Method, op: Op) -> bool:
    try:
        method.slots(op)
    except AdaptcError:  # a size that this op cannot have
        return False
    return True


# -- tensors -----------------------------------------------------------------------------------------------------------


def _example_weight(op: Op) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(op.shape, dtype=torch.float64, generator=generator) * 0.3


def _example_input(op: Op, dtype: torch.dtype) -> Tensor:
    """Return an example input of the layer: random values, or none under a fake mode."""
    if op.kind == "embedding":
        return torch.randint(op.in_features, EXAMPLE_SIZES)
    if not op.is_conv:
        return torch.randn(*EXAMPLE_SIZES, op.in_features, dtype=dtype)
    stride, dilation = op.other_args[0], op.other_args[2]
    sizes = [(k - 1) * dilation[i % len(dilation)] + 1 + 2 * stride[i % len(stride)] for i, k in enumerate(op.kernel)]
    return torch.randn(EXAMPLE_SIZES[0], op.in_features, *sizes, dtype=dtype)


def _example_initial(method: Method, op: Op, W: Tensor) -> InitialValues:
    return method.init(op, W, torch.float64, torch.Generator().manual_seed(1))


def _scale_tensor(method: Method, op: Op) -> Tensor | None:
    value = method.scale(op)
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def _check_slots(
    method: Method,
    op: Op,
    function: str,
    expected: Mapping[str, Slot],
    found: Mapping[str, Tensor],
    any_free_size: bool = False,
) -> None:
    if set(expected) != set(found):
        raise MethodError(
            f"{_method_name(method)}.{function}() must give the slots {sorted(expected)}, got {sorted(found)} (at "
            f"{_describe_op(op)})"
        )
    for name, slot in expected.items():
        shape, free = tuple(found[name].shape), slot.free if any_free_size else ()
        wanted = tuple(shape[i] if i in free and i < len(shape) else n for i, n in enumerate(slot.shape))
        if shape != wanted:
            raise MethodError(
                f"{_method_name(method)}.{function}() must give {name!r} the shape {tuple(slot.shape)}, as slots() "
                f"says, got {shape} (at {_describe_op(op)})"
            )


def _check_equal(method: Method, op: Op, function: str, what: str, found: Tensor | None, expected: Tensor) -> None:
    if found is not None and op.groups > 1 and what == "weight" and found.shape != expected.shape:
        expected = op.dense(expected)
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if found is not None and found.shape == expected.shape:
        error = float((found.double() - expected.double()).abs().max()) / size
        if error <= TOLERANCE:
            return
        how = f"they differ by {error:.2e}"
    else:
        how = f"expected {tuple(expected.shape)}, got {None if found is None else tuple(found.shape)}"
    claims: Mapping[str, str] = {
        "identity": f"with the values of identity() the {what} must be that of the layer without an adapter",
        "apply": "the form around the layer (input, apply) must be the layer with the weight that weight() makes",
        "weight_over": "weight_over() of a base that is the weight itself must be what weight() makes of it",
    }
    advice = {"identity": ". Give each Slot the fill for which it has no effect, or define identity()"}
    raise MethodError(
        f"{_method_name(method)}: {claims[function]}; at {_describe_op(op)} {how}{advice.get(function, '')}"
    )


def _method_name(method: Method) -> str:
    return type(method).__name__


def _describe_op(op: Op) -> str:
    return f"a {op.kind} with a weight {tuple(op.shape)}"


def _describe_options(method: Method) -> str:
    chosen = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name in method.swappable}
    return ", ".join(f"{k}={v!r}" for k, v in chosen.items()) or "these sizes"
