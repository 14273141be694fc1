"""Bind adapters to the description of a file, in place of the program that the file was made of.

The base weights are not known here. So an adapter with values that follow from them is refused. It can be bound to the
program, and what was bound is taken here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.binding.binding import Binding, BindingSpec
from adaptc.binding.binding_plan_cache import BindingPlanCache
from adaptc.binding.sources.configs import config_from_dict
from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.errors import CheckpointError, SwapError
from adaptc.exporters.input_description import InputDescription, parse_description
from adaptc.exporters.runtime_session import RuntimeSession
from adaptc.exporters.slot_program import as_input
from adaptc.methods import AdapterConfig
from adaptc.program.wrapper import unwrap
from adaptc.progress import stage


def check_adapter_path(path: Path, suffix: str) -> None:
    """Raise CheckpointError for a path where no adapter file whose name ends in ``suffix`` can be written."""
    if path.suffix != suffix or not path.parent.is_dir() or path.is_dir():
        raise CheckpointError(f"cannot write {path}: the name must end in {suffix}, in a directory that exists")


def facts_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Return the dtype of a tensor, such as "float32", and its shape."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def write_described_adapter(
    adapter: Any,
    path: Path,
    session: RuntimeSession,
    write: Callable[[dict[str, Tensor], Path, str], None],
    options: Mapping[str, Any],
) -> Path:
    """Write an adapter to ``path`` for the model of ``session``, and return ``path``.

    ``write`` gets the tensors by the names of the inputs, a path and the fingerprint of the base. ``options`` are those
    of ``adaptc.swap``. Raises what :func:`check_adapter_path` and :func:`described_tensors` raise, and CheckpointError
    where the file cannot be written.
    """
    check_adapter_path(path, session.adapter_suffix)
    values = described_tensors(session.text, str(session.path), adapter, **options)
    session.check_facts({n: facts_of(t) for n, t in values.items()}, f"the adapter for {path}")
    with explain_write_errors(path), stage(f"writing {path.name}"), atomic_replace(path, path.name) as new:
        write(values, new, session.fingerprint)
    return path


def described_tensors(text: str, source: str, adapter: Any, **options: Any) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names of the inputs that the description ``text`` lists.

    ``source`` names its file in messages, and ``options`` are those of ``adaptc.swap``. Raises what
    :meth:`DescribedModel.input_values` raises, and CheckpointError for a description that is damaged.
    """
    return DescribedModel(parse_description(text, source), source).input_values(adapter, **options)


class DescribedModel:
    """The model of a description, as far as adapters are bound to it. ``source`` is its file, for messages."""

    def __init__(self, described: InputDescription, source: str) -> None:
        self.described, self.source = described, source
        attachments = [s.attachment for s in described.sites]
        self._ops = {s.attachment.id: s.op for s in described.sites}
        self._binding_plans = BindingPlanCache(attachments, self._ops)
        self.device = torch.device("cpu")
        config = config_from_dict(described.header["config"])
        self._current = Binding({}, {}, config, name=attachments[0].adapter, source=source)

    @property
    def current(self) -> Binding:
        """Return a binding without values, which has the config that the file was made with."""
        return self._current

    @property
    def binding_plans(self) -> BindingPlanCache:
        return self._binding_plans

    @property
    def adapters(self) -> StoredAdapters:
        """Return no adapters: a file of another runtime holds none."""
        return StoredAdapters()

    def spec(self, trainable: bool = False) -> BindingSpec:
        """Return what a binding must fill. Base weights are NaN (0 where not floating)."""
        sites = self.described.sites
        weights = {
            s.attachment.fqn: torch.tensor(float("nan") if s.dtype.is_floating_point else 0).to(s.dtype).expand(s.shape)
            for s in sites
        }
        autocast = self.described.header["autocast"]
        return BindingSpec([s.attachment for s in sites], self._ops, weights, autocast, trainable)

    def input_values(self, adapter: Any, **options: Any) -> dict[str, Tensor]:
        """Return the tensors of an adapter by the names of the inputs; sites that it lacks have none.

        ``options`` are those of ``adaptc.swap``. Raises what that raises, and SwapError for an adapter whose values
        follow from the base.
        """
        binding = self._bind(adapter, options)
        present = {f for s in self.described.sites for f in self._own_tensors(s.attachment, binding)}
        values = {**binding.values, **binding.changed_base}
        out: dict[str, Tensor] = {}
        for i in self.described.inputs:
            # Where rows share a stack, an input that an adapter lacks needs a value there that is known.
            is_needed = self.described.has_rows and i.identity_value is None
            if i.fqn not in present and i.fqn not in binding.changed_base and not is_needed:
                continue
            value = as_input(values[i.fqn])
            if str(value.dtype) != i.dtype:
                raise SwapError(f"{binding.source}: {i.name!r} is {value.dtype}, expected {i.dtype}")
            known_infinite = i.identity_value is not None and abs(i.identity_value) == float("inf")
            if value.is_floating_point() and not known_infinite and not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"{binding.source}: {i.name!r} has values that are not finite")
            out[i.name] = value
        if not out:
            raise SwapError(f"{binding.source}: the adapter has nothing for any input of {self.source}")
        return out

    @staticmethod
    def _own_tensors(attachment: Any, binding: Binding) -> list[str]:
        return attachment.tensor_names if attachment.id in binding.methods else []

    def _bind(self, adapter: Any, options: Mapping[str, Any]) -> Binding:
        adapter = unwrap(adapter)
        bound = adapter if isinstance(adapter, Binding) else getattr(adapter, "binding", None)
        if not isinstance(bound, Binding):
            return bind_adapter(self, adapter, **options, check_config=partial(self._check_base, str(adapter)))
        bases = {i.fqn for i in self.described.inputs if i.slot == "base"}
        if strange := sorted(bound.changed_base.keys() - bases):
            raise SwapError(
                f"{bound.source}: the adapter replaces the base weight {strange[0]!r}, which is no input of "
                f"{self.source}: export a program with this adapter, or convert it with adaptc.convert_to_lora"
            )
        # The fingerprint of a base weight is of values that are not known here.
        plain = replace(bound, base_fingerprints={})
        done = bind_adapter(self, plain.to("cpu"), **options)
        return replace(done, changed_base=plain.changed_base)

    def _check_base(self, source: str, config: AdapterConfig) -> None:
        for s in self.described.sites:
            a = s.attachment
            method = a.method.rebind(config, a)
            if method.files.needs_base() or method.changes_base_at_init():
                raise SwapError(
                    f"{source}: an adapter of this {type(config).__name__} has values that follow from the base weight "
                    f"{a.fqn!r}, which {self.source} does not give. Bind it to the program, and give what "
                    "prog.bind(adapter) returns; or convert it with adaptc.convert_to_lora"
                )
