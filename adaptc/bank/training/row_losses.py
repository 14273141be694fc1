"""Compute a loss for each adapter of a batch from its own rows, and its gradients, in one forward and backward.

An adapter whose loss or gradients are not finite, or whose loss function raises, gets no gradients. The others then get
those of a batch without its rows, which is run for that. A value that is not finite may spread to other rows, since
zero times infinity is not zero. So where one is found, each adapter in question runs alone, which tells whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from adaptc.bank.row_adapters import parse_row_adapters
from adaptc.bank.training.adapter_trainer import AdapterTrainer
from adaptc.bank.training.step_report import AdapterLoss
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.passes.graph.pytree import pytree
from adaptc.torch_typing import is_list_or_tuple, is_mapping, to_python

#: a function of the outputs and the targets of an adapter's rows that gives a scalar
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class RowBatch:
    """A batch with the adapter of each of its rows, None for the base.

    ``run``: calls the bank with inputs and adapters. ``inputs``: name -> value. ``targets``: what loss functions read
    beside the outputs. ``losses``: adapter -> its loss function. ``axes``: input -> the axis that has its rows.
    """

    run: Callable[[Mapping[str, Any], Sequence[str | None]], Any]
    inputs: Mapping[str, Any]
    adapters: Sequence[str | None]
    targets: Any
    losses: Mapping[str, Loss]
    axes: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """Return the adapters, in the order in which rows name them first."""
        return [n for n in dict.fromkeys(self.adapters) if n is not None]

    def only(self, names: Sequence[str]) -> RowBatch:
        """Return the rows of these adapters alone, those of one adapter together."""
        rows = [i for name in names for i, n in enumerate(self.adapters) if n == name]
        inputs = {n: take_rows(v, rows, len(self.adapters), self.axes.get(n, 0)) for n, v in self.inputs.items()}
        targets = take_rows(self.targets, rows, len(self.adapters))
        return replace(self, inputs=inputs, adapters=[self.adapters[i] for i in rows], targets=targets)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One forward and backward. ``losses``: adapter -> loss. ``gradients``: adapter -> one for each parameter.
    ``errors``: adapter -> why it failed. ``is_spread``: other adapters may have failed by it. ``call_failed``: the call
    raised."""

    losses: Mapping[str, Tensor]
    gradients: Mapping[str, Sequence[Tensor | None]]
    errors: Mapping[str, Exception]
    is_spread: bool = False
    call_failed: bool = False


def add_row_gradients(batch: RowBatch, trainers: Mapping[str, AdapterTrainer]) -> dict[str, AdapterLoss]:
    """Run ``batch``, and add the gradients of each adapter to its parameters.

    Returns what it gave each adapter. Raises what the call raises where no adapter's rows can be run.
    """
    done = _run_isolated(batch.only(batch.names), trainers)
    if done.call_failed:
        raise next(iter(done.errors.values()))
    for name, gradients in done.gradients.items():
        trainers[name].add_gradients(gradients)
    return {
        name: AdapterLoss(name, done.losses[name].detach())
        if name not in done.errors
        else AdapterLoss(name, error=done.errors[name])
        for name in batch.names
    }


def _run_isolated(batch: RowBatch, trainers: Mapping[str, AdapterTrainer]) -> _Attempt:
    names = batch.names
    if not names:
        raise AdaptcError("no row of the batch has an adapter, so there is nothing to train")
    first = _run_once(batch, trainers)
    if not first.errors or len(names) == 1:
        return first
    suspects = [n for n in names if n in first.errors]
    alone = {n: _run_once(batch.only([n]), trainers) for n in suspects} if first.is_spread else {}
    failed = {n: alone[n].errors[n] if alone else first.errors[n] for n in suspects if not alone or alone[n].errors}
    rest = [n for n in names if n not in failed]
    if not failed:  # alone all are finite
        others = [n for n in names if n not in alone]
        parts = [*alone.values(), *([_run_once(batch.only(others), trainers)] if others else [])]
    else:
        parts = [_run_isolated(batch.only(rest), trainers)] if rest else []
    call_failed = len(failed) == len(names) and all(alone[n].call_failed for n in alone) and first.call_failed
    joined = _Attempt({}, {}, failed, call_failed=call_failed)
    for part in parts:
        joined = _Attempt(
            {**joined.losses, **part.losses},
            {**joined.gradients, **part.gradients},
            {**joined.errors, **part.errors},
            call_failed=call_failed,
        )
    return joined


def _run_once(batch: RowBatch, trainers: Mapping[str, AdapterTrainer]) -> _Attempt:
    names = batch.names
    counts = [sum(n == name for n in batch.adapters) for name in names]
    losses: dict[str, Tensor] = {}
    errors: dict[str, Exception] = {}
    with torch.enable_grad():
        try:
            outputs = batch.run(batch.inputs, batch.adapters)
        except Exception as error:
            return _Attempt({}, {}, dict.fromkeys(names, error), len(names) > 1, True)
        for name, *own in zip(names, _split_rows(outputs, counts), _split_rows(batch.targets, counts), strict=True):
            try:
                losses[name] = _checked_loss(batch.losses[name](*own))
            except Exception as error:
                errors[name] = error
        finite = [v.detach().isfinite().all() for v in losses.values()]
        flags: list[bool] = to_python(torch.stack(finite)) if finite else []
        wrong = [n for n, is_finite in zip(losses, flags, strict=True) if not is_finite]
        if errors or wrong:
            not_finite = {n: AdaptcError(f"the loss of adapter {n!r} is {losses[n].item()}") for n in wrong}
            return _Attempt({}, {}, {**errors, **not_finite}, bool(wrong))
        owners = [(n, p) for n in names for p in trainers[n].parameters.values()]
        total = torch.stack([v.float() if v.dtype.itemsize < 4 else v for v in losses.values()]).sum()
        try:
            found: Sequence[Tensor | None] = torch.autograd.grad(total, [p for _, p in owners], allow_unused=True)
        except Exception as error:
            return _Attempt({}, {}, dict.fromkeys(names, error), len(names) > 1)
    gradients: dict[str, list[Tensor | None]] = {
        n: [g for (owner, _), g in zip(owners, found, strict=True) if owner == n] for n in names
    }
    sums = torch.stack([_size_of(gradients[n], total) for n in names])
    for name, is_finite in zip(names, to_python(sums.isfinite()), strict=True):
        if not is_finite and not all(g is None or bool(g.isfinite().all()) for g in gradients[name]):
            errors[name] = AdaptcError(f"the gradients of adapter {name!r} are not finite")
    return _Attempt(losses, gradients if not errors else {}, errors, bool(errors))


def _size_of(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return the norm of the gradients, a float64 scalar that is not finite where one of them is not."""
    known = [g for g in gradients if g is not None]
    return get_total_norm(known).double() if known else like.new_zeros((), dtype=torch.float64)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else short_repr(loss)
        raise AdaptcError(f"the loss function gave {found}: it must give a scalar tensor")
    if not loss.requires_grad:
        raise AdaptcError("the loss does not depend on the adapter: make it of the outputs that the function gets")
    return loss.reshape(())


def _split_rows(tree: Any, counts: Sequence[int]) -> list[Any]:
    """Return ``tree`` for each adapter, with its stretch of the rows of each tensor that has all of them; all else as
    it is.

    One split has a cheap backward, where a slice for each adapter would each fill a gradient of all rows with zeros.
    """
    leaves, spec = pytree.tree_flatten(tree)
    total, parts = sum(counts), list[Sequence[Any]]()
    for t in leaves:
        has_rows = isinstance(t, Tensor) and t.ndim and t.shape[0] == total
        parts.append(torch.split(t, list(counts)) if has_rows and len(counts) > 1 else [t] * len(counts))
    return [pytree.tree_unflatten([own[i] for own in parts], spec) for i in range(len(counts))]


def take_rows(tree: Any, rows: Sequence[int], count: int, axis: int = 0) -> Any:
    """Return ``tree`` with the rows ``rows`` of its tensors that have ``count`` of them along ``axis``; all else as it
    is."""
    if list(rows) == list(range(count)):
        return tree
    begin = rows[0] if rows else 0
    is_range = list(rows) == list(range(begin, begin + len(rows)))

    def take(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.ndim <= axis or t.shape[axis] != count:
            return t
        if is_range:
            return t.narrow(axis, begin, len(rows))
        return t.index_select(axis, torch.tensor(rows, device=t.device))

    return pytree.tree_map(take, tree)


def names_of_rows(adapters: Any) -> list[str | None]:
    """Return the name of each row, None for the base. Raises AdaptcError for a mix, whose loss would be of several."""
    names: list[str | None] = []
    for row, mix in enumerate(parse_row_adapters(adapters)):
        if len(mix) > 1 or any(weight != 1 for weight in mix.values()):
            raise AdaptcError(f"adapters[{row}] is a mix, and a row trains one adapter: give its name, or None")
        names.append(next(iter(mix), None))
    return names


def losses_by_name(loss: Any, names: Sequence[str | None]) -> dict[str, Loss]:
    """Return the loss function of each adapter in ``names``. Raises ConfigError where one has none."""
    wanted = [n for n in dict.fromkeys(names) if n is not None]
    by_name: Any = loss if is_mapping(loss) else dict.fromkeys(wanted, loss)
    for name in wanted:
        if not callable(by_name.get(name)):
            raise ConfigError(
                f"loss of adapter {name!r} is {short_repr(by_name.get(name))}: expected a function of its outputs and "
                "targets that gives a scalar tensor"
            )
    return {n: by_name[n] for n in wanted}


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of ``inputs``, as callers write them."""
    if is_mapping(inputs):
        return (), {**inputs}
    return ((*inputs,) if is_list_or_tuple(inputs) else (inputs,)), {}
