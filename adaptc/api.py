"""The functions a user calls. Each is short: it names the steps, and the steps live in the files they are about.

All of them leave their inputs as they were, except ``swap``, whose whole effect is the new current binding, and
``merge(..., keep_base=False)``, which gives up the program it is handed. A call that raises changed nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaptc import merging
from adaptc.adapters import as_binding, as_config, fitted
from adaptc.binding import Binding, Slate, bind, embedding_tensors, file_tensors, first_values, joined
from adaptc.checkpoint import AdapterFile, write_adapter
from adaptc.errors import AdaptcError, ConfigError, MergeError
from adaptc.methods._base import AdapterConfig, TargetedConfig
from adaptc.packing import alias
from adaptc.passes._kinds import op_of
from adaptc.passes._lifted import Lifted
from adaptc.passes._method import Attachment
from adaptc.passes.inject import Inject
from adaptc.passes.merge import Merge
from adaptc.passes.set_mode import SetMode
from adaptc.passes.unload import Unload
from adaptc.passes.unmerge import Unmerge
from adaptc.program import Adaptation, AdaptedProgram, check_limit
from adaptc.runtime import check_backend
from adaptc.several import FORMS, joint_slate, named, part_of, together, union
from adaptc.targets import ModelFacts, Plan, plan

if TYPE_CHECKING:
    from adaptc.reports import CoverageReport, SwapReport, VerifyReport


def compile(
    model: nn.Module | ExportedProgram | Any,
    config: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    adapter_name: str = "default",
    training: bool = False,
    backend: str = "eager",
    form: str = "auto",
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    generator: torch.Generator | None = None,
    hoist_limit: int | None = None,
    fuse: bool = True,
) -> AdaptedProgram:
    """Capture ``model`` and adapt it.

    ``model``: an nn.Module (with ``example_inputs``: a tensor, a tuple, or a dict of keywords), a transformers model,
    an ExportedProgram, or what ``transformers.exporters`` returns. ``config``: a config, a ``peft`` config, a PEFT
    adapter directory (its weights are loaded too), or a list of these: then the program gets the union of their sites
    and is bound to the first. A dict of these by name makes adapters that act together, each on what the ones before it
    made of the weights. ``training=True`` captures the training behaviour (dropout, and the loss of a
    transformers model). ``backend``: "eager" or "inductor". ``form``: "apply" puts adapters around the layers, "weight"
    in front of their weights, "auto" chooses per site what costs less (``report`` says why).
    ``autocast_adapter_dtype``: adapters of half-precision bases are float32. ``key_mapping``: regular expression ->
    replacement, applied to the keys of adapter directories (PEFT's rule). ``generator`` draws first values; by default
    torch's global generator. ``hoist_limit``: bytes of memory for what calls of the program, in inference, compute once
    per adapter instead of every time; None for any number (see :attr:`AdaptedProgram.hoist_limit`). ``fuse``: layers
    that read one tensor share a product in calls of the program (see :attr:`AdaptedProgram.fuse`).

    The values of the model are not modified, and its parameters are shared, not copied; at the first call of a program
    that fuses, the memory of sibling weights moves into one buffer, so let no other thread run the model then.
    Raises CaptureError, ConfigError, TargetError, CheckpointError or BackendError.
    """
    from adaptc.capture import capture

    check_backend(backend)
    check_limit(hoist_limit)
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is not one of {', '.join(FORMS)}")
    by_name = named(config)
    several = list(config) if isinstance(config, (list, tuple)) else [config]
    several = several if by_name is None else list(by_name.values())
    if not several:
        raise ConfigError("config is an empty list: give a config, an adapter directory, or a list of them")
    parsed = [as_config(c, key_mapping) for c in several]
    model = _replicated(model, [c for c, _ in parsed])
    captured = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, training=training)
    facts = ModelFacts(
        captured.module_types,
        captured.model_type,
        captured.output_embedding,
        captured.input_embedding,
        _transposed(model),
        bare=not isinstance(model, nn.Module),
    )
    base = Lifted(captured.program, edit=False)
    parsed = [fitted(c, f, base.state_dict) for c, f in parsed]
    names = [adapter_name] * len(parsed) if by_name is None else list(by_name)
    plans = [plan(_targeted(c), captured.program, facts, n, base) for n, (c, _) in zip(names, parsed, strict=True)]
    parsed = [(p.config, f) for p, (_, f) in zip(plans, parsed, strict=True)]
    attachments = union(plans, training, backend, form, apart=by_name is not None)
    slate = _slate(base, attachments, autocast_adapter_dtype, _trainable(parsed[0], training), plans)
    slate = joint_slate(slate)
    attachments = list(slate.attachments)
    if by_name is None:
        binding = _first_binding(slate, plans[0], parsed[0], generator)
    else:
        own = zip(names, parsed, strict=True)
        binding = together({n: _first_binding(part_of(slate, n), None, c, generator) for n, c in own})
    adaptation = Adaptation(
        attachments,
        matches={k: v for p in plans for k, v in p.matches.items()},
        left_out=plans[0].left_out,
        fills=captured.fills,
        training=captured.training,
        autocast=autocast_adapter_dtype,
        unread=slate.unread,
    )
    header = adaptation.header(binding)
    inject = Inject(attachments, binding.values, header, captured.training, AdaptedProgram)
    injected = inject(captured.program)
    adaptation = replace(adaptation, attachments=injected.data)
    adapted = AdaptedProgram.adopt(injected.program, adaptation, binding, backend)
    adapted.hoist_limit, adapted.fuse = hoist_limit, fuse
    alias([*captured.program.state_dict.values(), *injected.program.state_dict.values()])
    return adapted


def _targeted(config: AdapterConfig) -> TargetedConfig:
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"{type(config).__name__} does not choose layers, so it cannot be compiled into a program")
    return config


def _replicated(model: Any, configs: Sequence[AdapterConfig]) -> Any:
    wanted = {str(getattr(c, "layer_replication", None)) for c in configs}
    ranges = getattr(configs[0], "layer_replication", None)
    if wanted == {"None"}:
        return model
    if len(wanted) > 1:
        raise ConfigError(
            f"layer_replication differs between the adapters: {sorted(wanted)}; they need programs of their own"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "layer_replication restacks the model's layers, so it needs the nn.Module, not a program of it"
        )
    from adaptc.replicate import replicate_layers

    return replicate_layers(model, [(int(a), int(b)) for a, b in ranges])  # type: ignore[union-attr]


def _transposed(model: Any) -> frozenset[str]:
    """Modules that store stacked experts as (experts, in, out), by transformers' own flag."""
    if not isinstance(model, nn.Module):
        return frozenset()
    return frozenset(n for n, m in model.named_modules() if getattr(m, "is_transposed", False))


def _trainable(parsed: tuple[AdapterConfig, AdapterFile | None], training: bool) -> bool:
    """Files always say inference_mode; what says whether their adapter is to be trained is the program's purpose."""
    config, file = parsed
    return not config.inference_mode if file is None else training


def _slate(
    base: Lifted, attachments: Sequence[Attachment], autocast: bool, trainable: bool, plans: Sequence[Plan]
) -> Slate:
    ops = {a.id: op_of(a.kind, base.tensor(a.fqn), base.nodes[a.consumers[0]]) for a in attachments}
    unread = {key: fqn for p in plans for key, fqn in p.unread.items()}
    return Slate(attachments, ops, base.state_dict, autocast, trainable, unread)


def _first_binding(
    slate: Slate,
    first: Plan | None,
    parsed: tuple[AdapterConfig, AdapterFile | None],
    generator: torch.Generator | None,
) -> Binding:
    """What an adapter starts with; ``first`` is its plan, None when the slate is its own."""
    config, file = parsed
    if file is not None:
        return bind(slate, config, file.tensors, str(file.path), fit=False)
    if first is None:
        return first_values(slate, config, generator)
    own = joined({a.id: a.method for a in first.attachments}, slate.ops)
    return first_values(slate, config, generator, only=own)


def swap(
    program: AdaptedProgram,
    adapter: Any,
    *,
    config: Any = None,
    adapter_name: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
) -> SwapReport:
    """Make ``adapter`` the current one: a PEFT adapter directory, a state dict with PEFT's keys, or a binding.

    Any rank, alpha, and any subset of the program's sites (the others take identity values); nothing is compiled or
    copied but the adapter's own tensors. For a bare state dict the scale follows ``config`` if given, else the
    program's alpha and the tensors' ranks. Atomic: calls that have begun finish with the adapter they began with.

    Raises SwapError (naming the site) when the adapter needs a site the program was not compiled for, CheckpointError
    for damaged files, wrong shapes, missing keys or NaN; the program is then unchanged.
    """
    from adaptc.reports import SwapReport

    start = time.perf_counter()
    binding = as_binding(
        program,
        adapter,
        config=config,
        adapter_name=adapter_name,
        key_mapping=key_mapping,
        trainable=program.adaptation.training,
    )
    program._set(binding)
    return SwapReport.of(program, binding, time.perf_counter() - start)


def merge(
    program: AdaptedProgram, *, safe: bool = True, keep_base: bool = True, progress: bool = False
) -> AdaptedProgram:
    """A plain ATen program with the current adapter folded into the weights; ``.merge_report`` tells each site's error.

    Changes are computed in float32 (float64 for float64 weights) and rounded once. ``safe`` refuses results that are
    not finite. With ``keep_base`` the result keeps a reference to what it replaced and ``unmerge`` gives it back bit
    for bit; without it, each old weight is freed before the next new one is made (fused siblings, which have one
    memory, with the last of them) and ``program`` must not be used any more.
    Raises MergeError, with ``program`` unchanged.
    """
    from adaptc.reports import MergeReport, bar

    binding = program.binding
    ids, values, source = set(binding.methods), dict(binding.values), binding.source
    origin = (program, binding) if keep_base else None
    release = None if keep_base else program._release
    del binding  # it may hold base tensors
    attachments = [a for a in program.adaptation.attachments if a.id in ids]
    rest = tuple(a.id for a in program.adaptation.attachments if a.id not in ids)
    fold = Merge(attachments, values, safe, release, bar("merging", progress), rest, AdaptedProgram)
    new, rows = merging.merge(program, fold)
    new.hoist_limit = program.hoist_limit
    new._origin = origin
    new.merge_report = MergeReport(rows, source)
    return new


def _bare(program: AdaptedProgram) -> Adaptation:
    return Adaptation(fills=program.adaptation.fills)


def unmerge(program: AdaptedProgram) -> AdaptedProgram:
    """The adapted program ``program`` was merged from, with the adapter it had then: every bit as it was."""
    origin = program._origin if isinstance(program, AdaptedProgram) else None
    result = Unmerge(None if origin is None else origin[0].clone(origin[1])).apply(program).program
    assert isinstance(result, AdaptedProgram)
    return result


def unload(program: AdaptedProgram) -> AdaptedProgram:
    """The base: no adapter, every base tensor the object it was before compile."""
    a = program.adaptation
    if a.residual:
        raise MergeError(
            f"the file this program came from holds only the adapter's own version of {list(a.residual)[:3]} (its "
            "initialisation changed the base), so the base cannot be given back. Compile the original model instead."
        )
    originals = dict(program.base_tensors)
    result = Unload({k: originals[k] for k in program._originals}, AdaptedProgram)(program).program
    if a.training:
        result = SetMode(training=False)(result).program
    new = AdaptedProgram.adopt(result, _bare(program), None, program.backend)
    new.hoist_limit = program.hoist_limit
    return new


def lower(program: AdaptedProgram) -> AdaptedProgram:
    """The program with its adapters as fused Triton kernels in its graph, for files and artifacts that run on a GPU.

    Calls need no lowering: those of a program on a GPU run kernels anyhow (:attr:`AdaptedProgram.kernels`). Where a
    site has no kernels its region stays ATen, and ``report`` says why. The result swaps, merges, unloads and saves as
    ``program`` does; ``program`` stays plain ATen. Loading it needs adaptc, triton and a GPU.
    Raises BackendError where the base is not on a GPU, or triton is not installed.
    """
    from adaptc.lowering import lowered

    return lowered(program)


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write a program as ``.pt2`` (torch.export's format), aside first and then moved into place.

    An adapted program carries its sites, slots and config in its graph; a merged or unloaded one is plain ATen and
    needs no adaptc to run.
    """
    from adaptc.files import save_program

    return save_program(program, Path(path))


def load(
    path: str | os.PathLike[str], *, backend: str = "eager", hoist_limit: int | None = None, fuse: bool = True
) -> AdaptedProgram:
    """Read a ``.pt2`` written by :func:`save` or ``torch.export.save``; adapters are known again from the graph.

    ``hoist_limit`` and ``fuse`` as for :func:`compile`; a program without adapters is never fused unasked.
    """
    from adaptc.files import load_program

    check_limit(hoist_limit)
    program = load_program(Path(path), backend)
    program.hoist_limit, program.fuse = hoist_limit, program.fuse and fuse
    return program


def save_adapter(
    program: AdaptedProgram,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    base_model: str | None = None,
    save_embedding_layers: bool = False,
) -> Path:
    """Write the current adapter as a PEFT adapter directory; returns the directory that holds it.

    Of adapters that act together the one called ``adapter_name`` is written, under its name as PEFT does.
    ``peft.PeftModel.from_pretrained(model, path)`` loads it. ``base_model`` is recorded as base_model_name_or_path.
    ``save_embedding_layers`` adds the base weights of ``embed_tokens`` and ``lm_head``, which an adapter needs whose
    vocabulary was resized (PEFT also adds them whenever one of the two is targeted).
    """
    binding, slate = program.binding, program.slate()
    if binding.parts:
        if adapter_name not in binding.parts:
            raise ConfigError(
                f"the program has no adapter called {adapter_name!r}; say which of {list(binding.parts)} to write with "
                "adapter_name"
            )
        binding, slate = binding.parts[adapter_name], part_of(slate, adapter_name)
    tensors: dict[str, Tensor] = file_tensors(slate, binding)
    if save_embedding_layers:
        found = embedding_tensors(slate, binding)
        if not found:
            raise ConfigError(
                "save_embedding_layers=True, but the program has no module called embed_tokens or lm_head"
            )
        tensors = {**found, **tensors}
    config: Mapping[str, Any] = binding.config.to_dict()
    return write_adapter(
        path,
        config,
        tensors,
        adapter_name=adapter_name,
        safe_serialization=safe_serialization,
        base_model=base_model,
    )


def report(program: AdaptedProgram) -> CoverageReport:
    """What was adapted and what was left out; prints as a table."""
    from adaptc.reports import CoverageReport

    return CoverageReport.of(program)


def verify(program: AdaptedProgram, model: nn.Module | None = None, **options: Any) -> VerifyReport:
    """Run the program against the model it came from on random inputs of several shapes; see ``adaptc.verifying``."""
    from adaptc.verifying import verify_program

    return verify_program(program, model, **options)


def package(program: AdaptedProgram, path: str | os.PathLike[str], *, max_rank: int | None = None) -> Path:
    """Compile ahead of time with AOTInductor into one file with swappable adapters; see ``adaptc.packaging``."""
    from adaptc.packaging import package_program

    return package_program(program, Path(path), max_rank=max_rank)


def load_package(path: str | os.PathLike[str]) -> Any:
    """A runner for a file written by :func:`package`: call it, and ``swap`` adapters on it."""
    from adaptc.packaging import PackagedProgram

    return PackagedProgram(Path(path))


__all__ = [
    "AdaptcError",
    "compile",
    "load",
    "load_package",
    "lower",
    "merge",
    "package",
    "report",
    "save",
    "save_adapter",
    "swap",
    "unload",
    "unmerge",
    "verify",
]
