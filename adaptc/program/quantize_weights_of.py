"""Choose the weights that ``adaptc.quantize`` stores in few bits, in a program or in a model.

Targets follow the rules of ``target_modules`` in configs: names, a regular expression, or "all-linear", which leaves
out the output layer. Experts that a model stacks in one parameter count as linear layers, and are known by the name of
that parameter. Embeddings are stored only where they are named. With a GGUF file, the targets are all weights that the
file stores in blocks, where none are named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError, TargetError
from adaptc.passes.adapt.expert_rows import is_expert_matmul, skip_views, views_of_parameter
from adaptc.passes.analysis.program_facts import all_module_types, qualified_name
from adaptc.passes.analysis.sites import find_consumers, layer_kind_of
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.ops import Op
from adaptc.passes.protocol.method import Method
from adaptc.passes.quantized.all_schemes import choose_scheme
from adaptc.passes.quantized.quantize_weights import (
    QuantizeBy,
    Quantizer,
    QuantizeWeights,
    WeightQuantization,
    check_quantizable,
    describe_quantization,
    quantize_weight,
)
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor, matrix_shape
from adaptc.passes.quantized.scheme import Scheme
from adaptc.progress import stage
from adaptc.quantized_layers.gguf_file import WeightLayout, describe_unfound, find_weights, read_gguf_matrices
from adaptc.state.core import ProgramCore
from adaptc.targets.attach_site import MATRIX_KINDS
from adaptc.targets.name_rules import TargetCandidate, select_targets
from adaptc.targets.plan_layers import guess_output_head
from adaptc.torch_typing import named_modules

P = TypeVar("P", bound=ProgramCore)


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of ``adaptc.quantize``, which says what they mean."""

    scheme: str | None = None
    group_size: int | None = None
    target_modules: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if (self.scheme is None) == (self.gguf_file is None):
            raise ConfigError("quantize takes one of the two: a scheme, or the gguf_file that the model is from")
        if self.gguf_file is not None and self.group_size is not None:
            raise ConfigError("group_size goes with a scheme: the groups of a gguf_file are those of its blocks")


@dataclass(frozen=True)
class _Weight:
    """A weight that could be quantised: the name that targets know it by, the kind of layer that reads it, its tensor.

    The name is that of the module that has it, and of the parameter itself where it is a stack of experts.
    """

    module: str
    kind: str
    tensor: Tensor
    class_name: str
    is_embedding: bool = False

    @property
    def is_transposed(self) -> bool:
        """Return whether the weight is stored as (in, out), so that its output channels are columns."""
        return self.kind in ("addmm", _EXPERTS_TRANSPOSED)

    @property
    def row_axes(self) -> int:
        """Return how many of the first axes are rows of the matrix that is quantised."""
        return 2 if self.kind in (_EXPERTS, _EXPERTS_TRANSPOSED) else 1

    @property
    def candidate(self) -> TargetCandidate:
        """Return what targets are compared with."""
        if self.row_axes == 2:
            return TargetCandidate(self.module, self.class_name, "weight", has_linear_base=True)
        return TargetCandidate(self.module, self.class_name, self.kind)

    def quantizer(self, scheme: str, group_size: int | None) -> Quantizer:
        columns = matrix_shape(self.tensor.shape, self.is_transposed, self.row_axes)[1]
        return QuantizeBy(choose_scheme(scheme, group_size, columns), self.is_transposed, self.row_axes)


def quantize_program(
    program: P, options: QuantizeOptions, progress: bool = False
) -> tuple[P, Sequence[WeightQuantization]]:
    """Return a program whose chosen weights are quantised, with its current adapter, and a row for each weight.

    Raises ConfigError or TargetError, and leaves ``program`` unchanged.
    """
    with hold_graph_lock(), stage("quantising weights", always=progress) as running:
        still = program.snapshot()
        weights = _weights_of_program(still)
        source = still.adaptation.source
        head = _guess_head(weights) if source is None else source.output_embedding
        quantizers = _choose(weights, options, head, list(all_module_types(still)))
        own = _quantized_by_adapter(still, quantizers)
        done = QuantizeWeights({**quantizers, **own}, running.track)(still)
        # The program's base is the quantised weight from now on, and no adapter brings it.
        names = {n for fqn in own for n, t in still.state_dict.items() if t is still.state_dict[fqn]}
        binding, current = still.call_state.binding, still.originals
        binding = None if binding is None else binding.without_changed_base(names)
        originals = {n: t for n, t in current.items() if n not in names}
        return type(program)(done.output, still.adaptation, binding, still.options, originals), done.data


def _quantized_by_adapter(program: ProgramCore, quantizers: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
    """Return the quantizers of weights that the first values of the current adapter quantised, by FQN.

    Raises ConfigError for weights that first values changed in another way, or quantised by another scheme.
    """
    found: dict[str, Quantizer] = {}
    originals = program.originals
    methods: Mapping[str, Method] = program.binding.methods if originals and program.adaptation.attachments else {}
    for fqn in (f for f in quantizers if f in originals):
        site = next((a for a in program.adaptation.attachments if a.fqn == fqn and a.id in methods), None)
        scheme: Scheme | None = None if site is None else methods[site.id].base_scheme()
        chosen = quantizers[fqn]
        if site is None or scheme is None:
            raise ConfigError(
                f"the adapter's initialisation changed {fqn!r}: quantise the base, with adaptc.unload(program), and "
                "compile the adapter into that; or leave the weight out with exclude="
            )
        if not isinstance(chosen, QuantizeBy) or not chosen.scheme.has_codes_of(scheme):
            other = chosen.scheme if isinstance(chosen, QuantizeBy) else "the file"
            raise ConfigError(
                f"the first values of the adapter make up for the error of {scheme} at {fqn!r}, and not for that of "
                f"{other}: quantise with the same bits and group_size, or leave the weight out with exclude="
            )
        check_quantizable(fqn, originals[fqn])
        found[fqn] = partial(_stored_base, program.ops[site.id], methods[site.id], originals[fqn])
    return found


def _stored_base(op: Op, method: Method, original: Tensor, weight: Tensor) -> QuantizedTensor:
    """Return what the first values of ``method`` make of ``original``, in few bits; ``weight`` has its values."""
    base = method.init(op, op.canonical(original.detach()), original.dtype).base
    assert isinstance(base, QuantizedTensor)
    is_transposed, row_axes = op.kind in ("addmm", _EXPERTS_TRANSPOSED), 2 if op.experts else 1
    return QuantizedTensor(base.scheme, base.stored, weight.shape, weight.dtype, is_transposed, row_axes)


def quantize_module(model: nn.Module, options: QuantizeOptions, progress: bool = False) -> Sequence[WeightQuantization]:
    """Store the chosen weights of ``model`` in few bits, in the model itself, and return a row for each.

    Raises ConfigError or TargetError, and leaves ``model`` unchanged.
    """
    modules = dict(named_modules(model))
    weights: dict[str, _Weight] = {}
    for path, module in modules.items():
        kind = next((k for c, k in _KIND_OF_CLASS.items() if qualified_name(type(module)) == c), None)
        weight = vars(module).get("_parameters", {}).get("weight")
        if kind is not None and weight is not None:
            weights[f"{path}.weight".removeprefix(".")] = _Weight(path, kind, weight, qualified_name(type(module)))
        weights |= _stacked_experts(path, module)
    getter: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    output = getter()
    head = next((n for n, m in modules.items() if m is output), None)
    made: dict[str, Tensor] = {}
    rows: list[WeightQuantization] = []
    with stage(f"quantising weights of {type(model).__name__}", always=progress) as running:
        quantizers = _choose(weights, options, head, list(modules))
        for fqn in running.track(list(quantizers)):
            old = weights[fqn].tensor
            new = made[fqn] = quantize_weight(fqn, old, quantizers[fqn])
            rows.append(describe_quantization(fqn, old, new))
    for fqn, weight in made.items():
        old = weights[fqn].tensor
        for module in modules.values():  # a tied weight is replaced in every module that has it
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter is old:
                    setattr(module, name, weight)
    return rows


def _stacked_experts(path: str, module: nn.Module) -> dict[str, _Weight]:
    """Return the stacks of experts that ``module`` has, by FQN; transformers marks such modules by a flag."""
    is_transposed = getattr(module, "is_transposed", None)
    if not isinstance(is_transposed, bool):
        return {}
    kind = _EXPERTS_TRANSPOSED if is_transposed else _EXPERTS
    named = {f"{path}.{n}".removeprefix("."): p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return {fqn: _Weight(fqn, kind, p, qualified_name(type(module))) for fqn, p in named.items()}


#: the kinds of experts that are stacked in one parameter: (experts, out, in), and (experts, in, out)
_EXPERTS, _EXPERTS_TRANSPOSED = "experts", "experts_t"
#: class of a layer -> the kind of op that reads its weight
_KIND_OF_CLASS = {
    "torch.nn.modules.linear.Linear": "linear",
    "transformers.pytorch_utils.Conv1D": "addmm",
    "torch.nn.modules.conv.Conv1d": "conv1d",
    "torch.nn.modules.conv.Conv2d": "conv2d",
    "torch.nn.modules.conv.Conv3d": "conv3d",
    "torch.nn.modules.sparse.Embedding": "embedding",
}


def _guess_head(weights: Mapping[str, _Weight]) -> str | None:
    """Return the module of a program without a model that seems to be its output layer."""
    # A tied weight also has the name that the embedding knows it by.
    linear = [w for w in weights.values() if w.kind == "linear" and not w.class_name.endswith("Embedding")]
    return guess_output_head(
        {w.tensor.shape[0] for w in weights.values() if w.is_embedding},
        {w.module: w.tensor.shape[0] for w in linear},
        lambda module: any(w.module == module and w.is_embedding for w in weights.values()),
    )


def _weights_of_program(program: ProgramCore) -> dict[str, _Weight]:
    """Return the weights of layers of a program by FQN; a tied weight has the name of the layer that it is read by."""
    lifted, types = LiftedProgram(program, edit=False), all_module_types(program)
    # The region of an adapter may read the weight first, and the layer what it makes of it.
    adapted = {a.fqn: program.ops[a.id].kind for a in program.adaptation.attachments}
    found: dict[str, _Weight] = {}
    for fqn, node in lifted.placeholders.items():
        tensor = lifted.state_dict.get(fqn)
        if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2:
            continue
        consumers = list(find_consumers(node))
        kinds = {layer_kind_of(n, source, tensor.ndim) for n, source in consumers}
        kinds.add(adapted.get(fqn, ""))
        kind = next((k for k in (*MATRIX_KINDS, _EXPERTS, _EXPERTS_TRANSPOSED) if k in kinds), None)
        module = fqn.rpartition(".")[0]
        reads = [skip_views(n, source) for n, source in consumers]
        if reads and all(is_expert_matmul(n, read) for n, read in reads):
            is_transposed = len(views_of_parameter(reads[0][1])) % 2 == 0
            kind = _EXPERTS_TRANSPOSED if is_transposed else _EXPERTS
        if kind in (_EXPERTS, _EXPERTS_TRANSPOSED):
            found[fqn] = _Weight(fqn, kind, tensor, types.get(module, ""))
        elif kind is not None:
            found[fqn] = _Weight(module, kind, tensor, types.get(module, ""), "embedding" in kinds)
    return found


def _choose(
    weights: Mapping[str, _Weight], options: QuantizeOptions, head: str | None, modules: Sequence[str]
) -> dict[str, Quantizer]:
    """Return the weights that ``options`` choose, and what makes the quantised form of each; a tied weight is named
    once."""
    if not weights:
        raise TargetError("no layer of the model has a weight of two axes or more, so there is nothing to quantise")
    if options.scheme is not None:
        names = _select(weights, options, "all-linear", head, modules)
        return {fqn: weights[fqn].quantizer(options.scheme, options.group_size) for fqn in names}
    assert options.gguf_file is not None
    matrices = read_gguf_matrices(options.gguf_file)
    matrix_like = {n: w for n, w in weights.items() if w.tensor.ndim == w.row_axes + 1}
    layouts = {n: WeightLayout(w.tensor, w.is_transposed, w.row_axes) for n, w in matrix_like.items()}
    found = find_weights(matrices, layouts)
    unfound = describe_unfound(matrices, found)
    if not found:
        raise CheckpointError(f"{options.gguf_file!r}: {unfound or 'the file stores no matrix in blocks'}")
    if unfound:
        warnings.warn(f"{options.gguf_file!r}: {unfound}; these stay as they are", AdaptcWarning, stacklevel=2)
    names = _select(weights, options, [weights[fqn].module for fqn in found], head, modules)
    if absent := [fqn for fqn in names if fqn not in found]:
        raise TargetError(
            f"{absent[0]!r} has not the values of any matrix that {options.gguf_file!r} stores in blocks: leave it out "
            "with exclude=, or load the model from this file"
        )
    return {fqn: found[fqn].quantized for fqn in names}


def _select(
    weights: Mapping[str, _Weight],
    options: QuantizeOptions,
    default: str | Sequence[str],
    head: str | None,
    modules: Sequence[str],
) -> list[str]:
    """Return the names of the weights that the targets of ``options`` select."""
    selection = select_targets(
        [w.candidate for w in weights.values()],
        target_modules=default if options.target_modules is None else options.target_modules,
        exclude_modules=options.exclude or None,
        output_embedding=head,
        all_names=modules,
        parameters=list(weights),
    )
    by_module = {w.module: fqn for fqn, w in weights.items()}
    chosen: dict[int, str] = {}
    for name in selection.names:
        chosen.setdefault(id(weights[by_module[name]].tensor), by_module[name])
    return list(chosen.values())
