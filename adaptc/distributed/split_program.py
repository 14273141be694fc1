"""Cut a program into stages, which are programs of the same kind, for a pipeline of several processes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, TensorArgument

from adaptc.binding.stored_adapters import StoredAdapters
from adaptc.distributed.stage_adapters import StageSites, bind_to_stages, binding_of_stage, tensors_for_file
from adaptc.errors import AdaptcError, ConfigError, short_repr
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.regions import node_tag
from adaptc.passes.stages.cut_stage import CutStage, check_inputs, tensor_outputs
from adaptc.passes.stages.plan_stages import choose_boundaries, plan_stages
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.wrapper import check_program
from adaptc.state.adapter_output import prepare_for_file, write_file_tensors
from adaptc.state.merge_program import merge_program


@dataclass(frozen=True, eq=False)
class SplitProgram:
    """The stages of a program, made by ``adaptc.split``.

    Each stage is a program with the adapters of its layers. It takes the tensors that the stage before returns, and all
    keyword inputs of the whole program. It returns a tuple of tensors. A ``TrainingPipeline`` trains the stages in
    several processes.

    Attributes:
        programs: stage -> its program, for the stages that this process keeps.
        boundaries: the paths of the modules that each stage but the first begins with.
        sites: the sites of all stages.
        outputs: the tree of the whole program's outputs, with the values of those that are no tensors.
        source: what is known of the model that the whole program was captured from; None without one.

    Example:
        >>> halves = adaptc.split(prog, boundaries=["1"])
        >>> halves(x).shape
        torch.Size([2, 3])
        >>> halves.count
        2
    """

    programs: Mapping[int, AdaptedProgram]
    boundaries: tuple[str, ...]
    sites: StageSites
    outputs: OutputTree
    source: Any = None

    @property
    def count(self) -> int:
        """Return the number of stages, kept or not."""
        return len(self.boundaries) + 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run all stages one after the other in this process; inputs and outputs are those of the whole program."""
        values: Any = args
        for program in self._all("a call"):
            values = program(*values, **kwargs)
        return self.outputs.with_tensors(values)

    def keep(self, *stages: int) -> SplitProgram:
        """Return the split with these stages alone, so that the memory of the others can be freed.

        Args:
            *stages: the numbers of the stages.

        Returns:
            another split; this one stays as it is.

        Raises:
            ConfigError: there is no such stage here.
        """
        if lost := [s for s in stages if s not in self.programs]:
            raise ConfigError(f"there is no stage {short_repr(lost[0])} here; there are {list(self.programs)}")
        return replace(self, programs={s: self.programs[s] for s in stages})

    def swap(self, adapter: Any, **options: Any) -> None:
        """Make ``adapter`` the current one of all stages that are kept here; every process calls it.

        Args:
            adapter: a PEFT directory, a state dict in PEFT's keys, an adapter object, or a binding of the whole
                program.
            **options: the options of ``adaptc.swap``.

        Raises:
            AdaptcError: what ``adaptc.swap`` raises; no stage is changed then.
        """
        for i, binding in bind_to_stages(self.programs, self.sites, adapter, **options).items():
            self.programs[i].install(binding)

    def merge(self, **options: Any) -> SplitProgram:
        """Return the split with the current adapter folded into the weights of each stage.

        Args:
            **options: ``safe`` and ``keep_base`` of ``adaptc.merge``.

        Returns:
            the merged stages, which have no adapter.

        Raises:
            MergeError: as ``adaptc.merge`` raises.
        """
        return replace(self, programs={i: merge_program(p, **options)[0] for i, p in self.programs.items()})

    def save_adapter(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the adapter of all stages as one PEFT directory, which is that of the whole program.

        Args:
            path: the directory.
            **options: ``adapter_name``, ``safe_serialization`` and ``base_model`` of ``adaptc.save_adapter``.

        Returns:
            the path of the directory.

        Raises:
            AdaptcError: a stage is not kept here. A pipeline gathers them: ``TrainingPipeline.save_adapter``.
            CheckpointError: the files cannot be written.
        """
        parts = [(p, prepare_for_file(p.current)) for p in self._all("save_adapter") if p.current is not None]
        if not parts:
            raise AdaptcError("the stages have no adapter to write: the program was merged or unloaded")
        tensors = {k: t for program, binding in parts for k, t in tensors_for_file(program, binding).items()}
        return write_file_tensors(path, parts[0][1].config, tensors, **options)

    def _all(self, what: str) -> Iterator[AdaptedProgram]:
        if len(self.programs) < self.count:
            raise AdaptcError(
                f"{what} needs all {self.count} stages, and this process keeps {sorted(self.programs)}: in several "
                "processes use adaptc.distributed.TrainingPipeline"
            )
        return (self.programs[i] for i in range(self.count))


@dataclass(frozen=True)
class OutputTree:
    """The tree of a program's outputs, as the last stage returns their tensors.

    ``spec``: the tree. ``leaves``: for each leaf the value, where it is no tensor. ``tensors``: the positions of those
    that are.
    """

    spec: Any
    leaves: Sequence[Any]
    tensors: Sequence[int]

    @classmethod
    def from_program(cls, opened: LiftedProgram) -> OutputTree:
        specs = [s for s in opened.output_specs if s.kind == OutputKind.USER_OUTPUT]
        if odd := [s.arg for s in specs if not isinstance(s.arg, (TensorArgument, ConstantArgument))]:
            raise ConfigError(f"the program returns {odd[0].name!r}, which is no tensor and differs from call to call")
        leaves = [s.arg.value if isinstance(s.arg, ConstantArgument) else None for s in specs]
        return cls(opened.program.call_spec.out_spec, leaves, tensor_outputs(opened))

    def with_tensors(self, tensors: Sequence[Any]) -> Any:
        """Return the outputs in their own form, with these tensors."""
        leaves = list(self.leaves)
        for at, t in zip(self.tensors, tensors, strict=True):
            leaves[at] = t
        return pytree.tree_unflatten(leaves, self.spec)

    def position_of(self, name: str) -> int | None:
        """Return which of the tensors is the output ``name``; None where there is none."""
        numbered = self.with_tensors(range(len(self.tensors)))
        found = numbered.get(name) if isinstance(numbered, Mapping) else getattr(numbered, name, None)
        return found if type(found) is int else None


@with_graph_lock
def split(
    program: AdaptedProgram, stages: int | None = None, *, boundaries: Sequence[str] | None = None
) -> SplitProgram:
    """Cut ``program`` into stages, each a program with the adapters of its layers.

    What crosses a cut is found from the graph: any model and any adapter will do. The stages share the tensors of the
    program. Where a stage begins inside of a residual block, two tensors cross in place of one. A base weight that two
    stages read (a tied embedding) is in both; it must be frozen.

    Args:
        program: a program with or without adapters, trained or merged.
        stages: the number of stages. The cuts lie between repeated blocks, for stages of about equal work.
        boundaries: for each stage but the first, the path of the module that it begins with, in place of ``stages``.

    Returns:
        the stages.

    Raises:
        ConfigError: not one of ``stages`` and ``boundaries`` is given, a boundary is no module that runs, or a stage
            would get what a schedule cannot send: values that are no tensors, sizes that depend on data, a trained
            parameter of another stage. The value is named.

    Example:
        >>> halves = adaptc.split(prog, boundaries=["1"])
        >>> torch.equal(halves.programs[1](*halves.programs[0](x))[0], prog(x))
        True
    """
    check_program(program, "split")
    if (stages is None) == (boundaries is None):
        raise ConfigError("give either stages=, their number, or boundaries=, the modules that they begin with")
    if stages is not None and (not isinstance(stages, int) or isinstance(stages, bool) or stages < 2):
        raise ConfigError(f"stages={short_repr(stages)} must be a number from 2")
    still = program.snapshot()
    opened = LiftedProgram(still)
    check_inputs(opened)
    paths = _check_paths(boundaries) if stages is None else choose_boundaries(opened, stages)
    values: Mapping[str, Tensor] = {} if still.current is None else still.current.values
    plans = plan_stages(opened, paths, [f for f, t in values.items() if t.requires_grad])
    cut = [CutStage(plan, i == len(plans) - 1)(still).output for i, plan in enumerate(plans)]
    _give_own_parameters(cut)
    sites = StageSites([_attachments_in(still, exported) for exported in cut])
    programs = {i: _stage_program(still, exported, sites, i) for i, exported in enumerate(cut)}
    return SplitProgram(programs, tuple(paths), sites, OutputTree.from_program(opened), still.adaptation.source)


def _check_paths(boundaries: Any) -> list[str]:
    if isinstance(boundaries, str) or not isinstance(boundaries, Collection) or not boundaries:
        raise ConfigError(f"boundaries={short_repr(boundaries)} must be a list of module paths")
    if odd := [b for b in boundaries if not isinstance(b, str)]:
        raise ConfigError(f"boundaries has {short_repr(odd[0])}, which is no module path")
    return list(boundaries)


def _give_own_parameters(cut: Sequence[ExportedProgram]) -> None:
    """Give each stage a parameter of its own, on the same memory, for one that an earlier stage has, too.

    FSDP2 shards each of them by itself, and refuses a parameter that is in two of its units.
    """
    seen: set[int] = set()
    for exported in cut:
        state: dict[str, Any] = exported.state_dict
        own = {id(t): t for t in state.values() if isinstance(t, nn.Parameter)}
        twins = {i: nn.Parameter(t.detach(), t.requires_grad) for i, t in own.items() if i in seen}
        state |= {n: twins[id(t)] for n, t in state.items() if id(t) in twins}
        seen |= own.keys()


def _attachments_in(program: AdaptedProgram, exported: ExportedProgram) -> list[Attachment]:
    """Return the attachments that have nodes in a stage, with those of their consumers that are there."""
    nodes = {n.name for n in exported.graph.nodes}
    ids = {tag["site"] for n in exported.graph.nodes if (tag := node_tag(n)) is not None and "site" in tag}
    return [
        replace(a, consumers=tuple(c for c in a.consumers if c in nodes))
        for a in program.adaptation.attachments
        if a.id in ids
    ]


def _stage_program(whole: AdaptedProgram, exported: ExportedProgram, sites: StageSites, stage: int) -> AdaptedProgram:
    state, a = exported.state_dict, whole.adaptation
    adaptation = replace(
        a,
        attachments=sites.attachments[stage],
        forward_arg_names=(),
        residual=[f for f in a.residual if f in state],
        unread={k: f for k, f in a.unread.items() if f in state},
        source=None,
        generate=None,
        stored=StoredAdapters(),
    )
    originals = {f: t for f, t in whole.originals.items() if f in state}
    binding = None
    if whole.current is not None and adaptation.attachments:
        binding = binding_of_stage(whole.current, sites, stage, state)
    return type(whole)(exported, adaptation, binding, whole.options, originals)
