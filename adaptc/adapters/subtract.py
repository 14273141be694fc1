"""Make an adapter from what fine-tuning changed: the difference of two models, cut to a rank (``subtract_adapter``).

The models are read tensor by tensor, so memory holds one weight of each, and the factors. Every tensor that differs is
accounted for. Matrices become LoRA, biases of such layers LoRA's own, and other tensors (norms, lengths) are trained
whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapters.adapter import Adapter
from adaptc.adapters.combining.truncated_svd import Truncation, truncate
from adaptc.adapters.deltas.deltas_to_lora import parse_rank
from adaptc.adapters.fit_report import FitReport, SiteFit
from adaptc.adapters.model_tensors import ModelLayers, ModelTensors, find_layers, open_model_tensors
from adaptc.errors import CheckpointError, ConfigError, did_you_mean, listing, short_repr
from adaptc.methods import exact_names_regex
from adaptc.methods.lora_family.lora_config import LoraConfig
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.parts.low_rank import LowRank
from adaptc.patterns import compile_pattern


@torch.no_grad()
def subtract_adapter(
    model_a: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    model_b: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    rank: float,
    target_modules: str | list[str] | None = None,
) -> Adapter:
    """Return the adapter that turns ``model_b`` into ``model_a``: LoRA of what a fine-tuned model changed of its base.

    Files are read one tensor at a time. Modules, and directories with a ``config.json``, tell which layers are
    embeddings or have a transposed weight (GPT-2's). Otherwise every matrix counts as a linear layer's. Changed tensors
    that are no matrices (norms) are in the adapter whole (``modules_to_save``).

    Args:
        model_a: the fine-tuned model: a module, a state dict, a ``.safetensors`` file, or a directory of such files as
            transformers writes them. Several files need ``model.safetensors.index.json``.
        model_b: its base, in one of the same forms.
        rank: an integer, or the part of the energy to keep of each weight, as for :func:`convert_to_lora`.
        target_modules: the modules to take, by endings of names, or by an expression for whole names; None for every
            module that changed. Changed tensors that are no matrices then raise.

    Returns:
        the adapter, whose ``report`` has the error of each weight.

    Raises:
        CheckpointError: a file is damaged, or tensors differ in name or shape or are not finite.
        ConfigError: nothing changed, or the change of a layer has no form in LoRA.

    Example:
        >>> base = {"0.weight": torch.randn(7, 5)}
        >>> tuned = {"0.weight": base["0.weight"] + torch.randn(7, 1) @ torch.randn(1, 5)}
        >>> adaptc.subtract_adapter(tuned, base, rank=1).config.r
        1
    """
    cut = parse_rank(rank)
    is_chosen = _module_filter(target_modules)
    layers = find_layers(model_b, model_a)
    with open_model_tensors(model_a) as a, open_model_tensors(model_b) as b:
        _check_same_names(a, b)
        _check_targets(target_modules, [k.rpartition(".")[0] for k in b.entries])
        found = _ModelDifference(f"{a.source} - {b.source}", layers, cut)
        for key in b.entries:
            module, _, param = key.rpartition(".")
            if is_chosen(module):
                found.add_tensor(key, module, param, a, b, target_modules is None)
    return found.build_adapter()


def _equal_codes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal dtypes and values, where one is of integers or of 8-bit floats."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(t.view(torch.uint8) if t.is_floating_point() else t for t in (a, b)))


class _ModelDifference:
    """A collector of the tensors that differ, layer by layer."""

    def __init__(self, source: str, layers: ModelLayers, cut: Truncation) -> None:
        self.source, self.layers, self.truncation = source, layers, cut
        self.low_ranks: dict[str, LowRank] = {}
        self.ops: dict[str, Op] = {}
        self.fits: list[SiteFit] = []
        self.biases: dict[str, Tensor] = {}
        self.saved_tensors: dict[str, Tensor] = {}

    def add_tensor(
        self, key: str, module: str, param: str, a: ModelTensors, b: ModelTensors, saves_modules: bool
    ) -> None:
        new, old = a[key], b[key]
        if new.shape != old.shape:
            raise CheckpointError(
                f"{key!r} has shape {tuple(new.shape)} in {a.source} and {tuple(old.shape)} in {b.source}: the two are "
                "not one model trained on (a resized vocabulary has to be cut first)"
            )
        stored = [t.dtype for t in (new, old) if not t.is_floating_point() or t.itemsize == 1]
        # A separate scale turns such codes into numbers, and the scales of the two models may differ.
        if stored and not _equal_codes(new, old):
            raise CheckpointError(
                f"{key!r} is stored as {stored[0]} and differs, and LoRA is for real weights: dequantise models that "
                "are quantised first (model.dequantize(), then save_pretrained)"
            )
        if stored or torch.equal(new, old):
            return
        for value, source in ((new, a.source), (old, b.source)):
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{source}: {key!r} holds values that are NaN or infinite")
        op = self.layers.op_of_weight(module, param, tuple(old.shape))
        if op is not None:
            high = torch.float64 if old.dtype == torch.float64 else torch.float32
            change = op.canonical(new.to(high)) - op.canonical(old.to(high))
            matrix = op.dense(change).reshape(op.groups, op.out_features // op.groups, -1)
            cut = (
                self.truncation
                if self.truncation.rank is None
                else replace(self.truncation, rank=-(-self.truncation.rank // op.groups))
            )
            part, error = truncate(matrix, cut)
            self.low_ranks[module], self.ops[module] = part, op
            norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
            self.fits.append(SiteFit(key, part.rank * op.groups, min(matrix.shape[1:]) * op.groups, norm, error))
            for twin in self.layers.tied_modules(key):
                self._add_tied(twin, op, part, tuple(old.shape))
        elif param == "bias" and self._has_lora_weight(module, b):
            self.biases[module] = new - old
        elif saves_modules:
            self._add_saved_module(key, module, a)
        else:
            raise ConfigError(
                f"{key!r} {tuple(old.shape)} changed, and is no matrix that LoRA has a form for; leave its module out "
                "of target_modules"
            )

    def _add_tied(self, module: str, op: Op, low_rank: LowRank, shape: tuple[int, ...]) -> None:
        """Record the same change at another layer that reads the weight.

        A head and an embedding read one weight in transposed layouts, so the factors swap between them.
        """
        other = self.layers.op_of_weight(module, "weight", shape)
        if other is not None:
            turned = LowRank(low_rank.up.mT.contiguous(), low_rank.down.mT.contiguous())
            self.low_ranks[module], self.ops[module] = (low_rank if other.kind == op.kind else turned), other

    def _has_lora_weight(self, module: str, b: ModelTensors) -> bool:
        weight = f"{module}.weight".removeprefix(".")
        return weight in b.entries and self.layers.op_of_weight(module, "weight", tuple(b[weight].shape)) is not None

    def _add_saved_module(self, key: str, module: str, a: ModelTensors) -> None:
        """Record all tensors of a module, as PEFT stores a module that is trained whole."""
        inside = [k for k in a.entries if k.startswith(f"{module}.")]
        if not module or any("." in k.removeprefix(f"{module}.") for k in inside):
            raise ConfigError(
                f"{key!r} changed, and is no matrix that LoRA has a form for, nor in a module of its own that could be "
                "trained whole; name the modules to take in target_modules"
            )
        self.saved_tensors |= {k: a[k] for k in inside}

    def build_adapter(self) -> Adapter:
        if not self.low_ranks:
            raise ConfigError(
                f"{self.source}: no weight differs"
                + (
                    f" but for {listing(self.saved_tensors, 3)}"
                    if self.saved_tensors
                    else ", so an adapter would do nothing"
                )
                + ". Are the two the models that were meant, and target_modules those that were trained?"
            )
        for module in self.biases.keys() - self.low_ranks.keys():
            raise ConfigError(
                f"the bias of {module!r} changed, and its weight did not; LoRA has biases at its own layers alone. "
                "Name others in target_modules"
            )
        has_bias = bool(self.biases)
        if has_bias and (bare := [m for m, op in self.ops.items() if op.kind == "embedding"]):
            raise ConfigError(f"biases changed (lora_bias=True), which {bare[0]!r} has none of: name target_modules")
        ranks = {m: p.rank * self.ops[m].groups for m, p in self.low_ranks.items()}
        saved_modules = sorted({k.rpartition(".")[0] for k in self.saved_tensors})
        turned = any(op.kind == "addmm" for op in self.ops.values())
        config = LoraConfig(
            target_modules=exact_names_regex(list(self.low_ranks)), modules_to_save=saved_modules or None
        )
        config = config.as_plain_lora(ranks, has_bias).replace(fan_in_fan_out=turned)
        tensors: dict[str, Tensor] = dict(self.saved_tensors)
        for module, part in self.low_ranks.items():
            op, method = self.ops[module], config.method(module, "linear")
            bias = self.biases.get(module, part.up.new_zeros(op.out_features)) if has_bias else None
            like = {n: torch.empty(s.shape, device="meta") for n, s in method.slots(op).items()}
            made = method.files.with_low_rank(replace(part, bias=bias), like)
            tensors |= {f"{module}.{n}".removeprefix("."): t.contiguous() for n, t in made.items()}
        return Adapter(config, tensors, self.source, FitReport(self.source, tuple(self.fits), tuple(saved_modules)))


def _check_same_names(a: ModelTensors, b: ModelTensors) -> None:
    for one, other in ((a, b), (b, a)):
        if missing := [k for k in one.entries if k not in other.entries]:
            raise CheckpointError(
                f"{one.source} has {listing(map(repr, missing), 3)}, and {other.source} has not: the two are not one "
                "model trained on"
            )


def _check_targets(targets: str | list[str] | None, modules: list[str]) -> None:
    """Raise ConfigError for an entry that chooses none of the ``modules``."""
    entries = [] if targets is None else [targets] if isinstance(targets, str) else [[t] for t in targets]
    for entry in entries:
        if not any(map(_module_filter(entry), modules)):
            name = entry if isinstance(entry, str) else entry[0]
            near = did_you_mean(name, dict.fromkeys(m.rpartition(".")[2] for m in modules))
            raise ConfigError(f"target_modules: {short_repr(name)} chooses no module that has tensors{near}")


def _module_filter(targets: str | list[str] | None) -> Any:
    if targets is None:
        return lambda module: True
    if isinstance(targets, str):
        pattern = compile_pattern("target_modules", targets)
        return lambda module: pattern.fullmatch(module) is not None
    if isinstance(targets, (list, tuple, set)) and all(isinstance(t, str) for t in targets):
        return lambda module: any(module == t or module.endswith(f".{t}") for t in targets)
    raise ConfigError(f"target_modules={targets!r} must be a list of endings of names, or a regular expression")
