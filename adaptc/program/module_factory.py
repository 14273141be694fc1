"""Make modules to train of programs, and what such a module needs of the program room: its pickle, and its module for
packed sequences."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from adaptc.binding.bind import FIRST_VALUES
from adaptc.binding.binding import Binding
from adaptc.capture.capture import PretrainedFacts
from adaptc.errors import AdaptcError, AdaptcWarning
from adaptc.matmul_tuning import choose_for_gradient, choose_matmul, chooses_matmuls
from adaptc.passes.graph.module_paths import program_module_paths
from adaptc.passes.lower.choose_products import MatmulChoices
from adaptc.passes.optimize.direct_calls import CallSizesDirectly
from adaptc.passes.train.split_head import cut_at_head
from adaptc.passes.train.training_pipeline import fuse_training
from adaptc.program.files.program_file import load_program, save_program
from adaptc.program.packing import find_bounds_read, make_packed_module
from adaptc.runtime.options import RunOptions
from adaptc.state.adaptation import ModuleGenerate
from adaptc.state.core import ProgramCore
from adaptc.training.pretrained_module import PretrainedModule, pretrained_class
from adaptc.training.program_module import MATMULS_META, ProgramModule, plain_class


@dataclass(frozen=True)
class ProgramModuleFactory:
    """The arguments of :meth:`AdaptedProgram.module` that say how a module is made of a program."""

    check_guards: bool
    logits: str

    def __call__(self, program: ProgramCore, owner: ProgramCore) -> ProgramModule:
        source, inputs = program.adaptation.source, program.adaptation.inputs(program)
        takes = inputs.n_args, tuple(inputs.names), frozenset(inputs.fills)
        kind = plain_class(*takes) if source is None else pretrained_class(source.model_class, *takes)
        return kind(program, owner, self.make_graph(program), self)

    def make_graph(self, program: ProgramCore, head_path: str | None = None) -> fx.GraphModule:
        """Return the graph module that a :class:`ProgramModule` runs; with ``head_path``, only as far as the linear
        layer of that path.

        Raises AdaptcError where the program does not end in one linear layer ``head_path``.
        """
        graph = ExportedProgram.module(program, check_guards=self.check_guards)
        values: Mapping[str, Tensor] = {} if program.current is None else program.current.values
        trainable = {id(t) for t in values.values() if t.requires_grad}
        for p in graph.parameters():
            p.requires_grad_(id(p) in trainable)
        if head_path is not None and not cut_at_head(graph, head_path, program_module_paths(program)):
            raise AdaptcError(
                f"the program does not end in one linear layer {head_path!r}, so it has no part before it"
            )
        fuse = bool(trainable and program.options.fuse)
        logits = self.logits if head_path is None else "all"
        # Torch's compilers and the writer of packages ask without guards: they can only take torch's own operators.
        chosen = (choose_matmul, choose_for_gradient) if fuse and self.check_guards and chooses_matmuls() else None
        result = fuse_training(graph, fuse=fuse, logits=logits, choose=chosen)
        found: dict[str, Any] = {} if chosen is None else result.data[-1]
        if self.check_guards:  # the graph that a compiler asks for, without guards, keeps its sizes as operators
            CallSizesDirectly()(graph.graph)
            graph.recompile()
        graph.meta[MATMULS_META] = tuple(MatmulChoices(choices, what) for what, choices in found.items())
        return graph

    def pickle(self, module: ProgramModule) -> tuple[Any, ...]:
        program = module.program
        with tempfile.TemporaryDirectory() as folder:
            data = save_program(program, Path(folder) / "module.pt2").read_bytes()
        adaptation = program.adaptation
        how = adaptation.source, adaptation.generate, program.options, self.logits, module.training
        return unpickle_module, (type(program), data, *how, module.checkpoint_every)

    def make_packed_module(self, module: PretrainedModule, has_mask: bool) -> PretrainedModule:
        return make_packed_module(module, has_mask)

    def find_bounds_read(self, module: PretrainedModule) -> Collection[str]:
        return find_bounds_read(module)


def warn_of_missing_data(program: ProgramCore) -> None:
    """Warn of an adapter to train whose first values were to be made of data, and have seen none."""
    parts: Mapping[str, Binding] = {} if program.current is None else program.current.adapters_by_name
    for name, part in parts.items():
        scheme = part.config.data_scheme() if part.source == FIRST_VALUES else None
        if scheme is not None and any(t.requires_grad for t in part.values.values()):
            warnings.warn(
                f"the adapter {name!r} has init_lora_weights={scheme!r} and no data yet, so it begins as with True: "
                "call adaptc.methods.initialize_from_data(program, batches) before module()",
                AdaptcWarning,
                stacklevel=3,
            )


def unpickle_module(
    program_class: type[ProgramCore],
    data: bytes,
    source: PretrainedFacts | None,
    generate: ModuleGenerate | None,
    options: RunOptions,
    logits: str,
    training: bool,
    checkpoint_every: Any,
) -> ProgramModule:
    """Return the module that :meth:`ProgramModuleFactory.pickle` took apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt2"
        path.write_bytes(data)
        loaded = load_program(program_class, path, options)
    adaptation = replace(loaded.adaptation, source=source, generate=generate)
    program: Any = program_class(loaded, adaptation, loaded.current, options)
    module: ProgramModule = program.module(logits=logits)
    if checkpoint_every is not None:
        module.checkpoint(checkpoint_every)
    return module.train(training)
