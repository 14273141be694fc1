"""Let a model be traced that takes a list of time series, for a tensor that has one in each row.

TimesFM goes over its series one by one: it takes the last entries of each, pads it in front to the context length, and
stacks all of them again. A trace would fix the number of series, and on which side of the context length theirs is.
Here the rows are padded all at once, and the model gets them as one series whose entries are those of all rows.

A model is known by its parts: ``past_values``, ``context_len``, ``horizon_len`` and the method ``_preprocess``. It is
first run both ways, on series as long as the example's, shorter, and longer than the context. One whose outputs differ
is left as it is.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.capture.model_state import can_run, own_attribute, patch_forward, preserve_state
from adaptc.passes.graph.pytree import pytree

_SERIES, _FREQUENCIES = "past_values", "freq"


@contextlib.contextmanager
def stacked_series(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run the block, which traces ``model``, with a forward that takes any number of series at once, of any length.

    ``args`` and ``kwargs`` are example inputs.
    """
    signature = inspect.signature(model.forward)
    try:
        given = _by_name(signature, args, kwargs)
    except TypeError:
        given = {}
    if not _takes_rows_of_series(model, given):
        yield
        return
    rows: list[tuple[Tensor, Tensor]] = []  # the padded series (rows, context), and where they are padded
    with own_attribute(model, "_preprocess", _preprocess_with(rows)):
        forward = _forward_with(model, rows)
        with patch_forward(model, forward, list(signature.parameters.values())):
            is_equal = _is_equal(model, given)
            if is_equal:
                yield
    if not is_equal:
        yield


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, also those that the signature does not name."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    return given | given.pop(next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""), {})


def _takes_rows_of_series(model: nn.Module, given: Mapping[str, Any]) -> bool:
    sizes = [getattr(model, name, None) for name in ("context_len", "horizon_len")]
    series, frequencies = given.get(_SERIES), given.get(_FREQUENCIES)
    return (
        isinstance(series, Tensor)
        and series.ndim == 2
        and series.is_floating_point()
        and all(type(n) is int for n in sizes)
        and callable(getattr(model, "_preprocess", None))
        and (frequencies is None or isinstance(frequencies, Tensor))
        and given.get("window_size") is None
    )


def _forward_with(model: Any, rows: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    original, signature = model.forward, inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(signature, args, kwargs)
        series = given.pop(_SERIES)
        context, length = given.get("forecast_context_len") or model.context_len, series.shape[1]
        padding = series.new_zeros(1, length)
        # A slice from the length on has the context's size whatever the length is, where one from behind has not.
        padded = nn.functional.pad(series, (context, 0))[:, length:]
        is_padding = nn.functional.pad(padding, (context, 0), value=1.0)[:, length:]
        horizon = is_padding.new_zeros(1, model.horizon_len)
        rows[:] = [(padded, torch.cat([is_padding, horizon], 1).expand(padded.shape[0], -1))]
        return original(**{_SERIES: [padded.mT]}, **given)

    return forward


def _preprocess_with(rows: list[tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    def preprocess(inputs: Any, freq: Any = None, context_len: int | None = None) -> tuple[Tensor, ...]:
        ((padded, is_padding),) = rows
        if freq is None:
            return padded, is_padding
        if not isinstance(freq, Tensor):  # the model's default, one number for all
            freq = torch.full((padded.shape[0], 1), freq[0], device="cpu")
        return padded, is_padding, freq.to(torch.int32).reshape(padded.shape[0], 1)

    return preprocess


def _is_equal(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Return whether the model's own forward gives the same for lists of series, of several lengths."""
    own, context = type(model), int(getattr(model, "context_len"))  # noqa: B009  # a module's attributes have no types
    series = given[_SERIES]
    if not can_run(model, (), given):
        return False
    with preserve_state(model) as restore, torch.no_grad():
        for length in (series.shape[1], max(series.shape[1] // 2, 1), context + 3):
            repeated = series.repeat(1, -(-length // series.shape[1]))[:, :length]
            call = {**given, _SERIES: repeated}
            try:
                found = _tensors(model(**call))
                restore()
                hidden = {n: vars(model).pop(n) for n in ("forward", "_preprocess")}
                try:
                    wanted = _tensors(own.forward(model, **{**call, _SERIES: list(repeated)}))
                finally:
                    vars(model).update(hidden)
                restore()
            except Exception:  # a model of another kind may refuse these inputs
                return False
            if len(wanted) != len(found) or not all(map(_close, wanted, found)):
                return False
    return True


def _tensors(output: Any) -> list[Tensor]:
    return [t.clone() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=torch.finfo(a.dtype).eps ** 0.5 * max(float(a.abs().max()), 1e-30))
