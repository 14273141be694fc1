"""Spare inductor what it would do again and again, for the same code.

Inside the contexts of this file, AOTInductor lowers equal ops of a program once, and checks the vector instructions of
one kind. Where either cannot be had, torch does as it always does, and the reason is logged at level INFO. The
garbage collector passes over what existed before.

They patch torch, or Python's garbage collector, for as long as they last, and restore it however they end. Other
threads that compile meanwhile get code of the same kind. Only one thread at a time may enter them, as holders of the
lock on graphs do.

Private torch use, with the public route that was tried:
- ``torch._inductor.compile_fx.aot_export_module`` lowers a program before inductor compiles it, and traces all of it
  twice. Public: ``ExportedProgram.run_decompositions`` beforehand, after which it traces that result as well.
- ``supported_vec_isa_list`` and ``valid_vec_isa_list`` of ``torch._inductor.cpu_vec_isa``. Public:
  ``torch._inductor.config.cpp.vec_isa_ok``, which takes for granted what the compiler was not asked.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaptc.passes.graph.lifted import fake_maker
from adaptc.passes.lower.functional_writes import without_writes
from adaptc.passes.lower.lower_once import NotOnce, lower_once
from adaptc.progress import LOGGER


@contextmanager
def equal_ops_once() -> Generator[None]:
    """Run the block with programs lowered by ``lower_once`` where AOTInductor compiles them in this thread."""
    from torch._inductor import compile_fx as module

    compile_fx: Any = module
    usual, thread = getattr(compile_fx, "aot_export_module", None), threading.get_ident()
    if usual is None or not hasattr(compile_fx, "fake_tensor_prop"):
        LOGGER.info("lowering the program as a whole: this torch lowers programs in another way")
        yield
        return

    def export(module: Any, args: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            try:
                return _exported(usual, module, args, options)
            except NotOnce as reason:
                LOGGER.info("lowering the program as a whole: %s", reason)
            except Exception as error:  # whatever is wrong with the program, the usual way reports it
                LOGGER.info("lowering the program as a whole, after %s: %s", type(error).__name__, error)
        return usual(module, args, **options)

    compile_fx.aot_export_module = export
    try:
        yield
    finally:
        compile_fx.aot_export_module = usual


def _exported(usual: Any, module: fx.GraphModule, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return what ``aot_export_module`` returns: a lowered module whose tensors are inputs, and its signature."""
    if options.get("trace_joint") is not False or not options.keys() <= {"trace_joint", "decompositions"}:
        raise NotOnce("it is not lowered for inference")
    signatures: list[Any] = []

    def lower(graph: fx.Graph, values: Sequence[Any]) -> fx.Graph:
        made, signature = usual(fx.GraphModule({}, graph), tuple(values), **options)
        signatures.append(signature)
        return made.graph

    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    graph, written = without_writes(module.graph)
    found = lower_once(graph, _fakes(graph, {**parameters, **buffers}), lower)
    (signature,) = signatures
    if signature.input_tokens or signature.user_inputs_to_mutate:
        raise NotOnce("ops have effects")
    names = [node.name for node in found.graph.find_nodes(op="placeholder")]
    own, first = names[len(parameters) :], len(parameters) + len(buffers)
    (results,) = found.graph.output_node().args
    assert isinstance(results, (tuple, list))
    signature = dataclasses.replace(
        signature,
        parameters=list(parameters),
        buffers=list(buffers),
        user_inputs=names[first:],
        user_outputs=[r.name if isinstance(r, fx.Node) else None for r in results[len(written) :]],
        user_inputs_to_mutate={str(r): names[first + i] for r, i in zip(results, written, strict=False)},
        inputs_to_parameters=dict(zip(names, parameters, strict=False)),
        inputs_to_buffers=dict(zip(own, buffers, strict=False)),
    )
    LOGGER.debug("lowered %d ops, %d of them distinct", found.ops, found.distinct)
    return fx.GraphModule({}, found.graph), signature


def _fakes(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fake, made = fake_maker(graph), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            raise NotOnce(f"{name} is a tensor of a special kind")
        made[name] = fake(tensor.detach())
    return made


@contextmanager
def one_check_of_instructions() -> Generator[None]:
    """Run the block with inductor checking vector instructions up to the first kind that works, which it uses.

    Each check compiles and loads a small library. Nothing is checked less, or otherwise, than inductor does. It checks
    all kinds where somebody chose one, since that need not be the first.
    """
    from torch._inductor import config, cpu_vec_isa

    every: Any = getattr(cpu_vec_isa, "supported_vec_isa_list", None)
    valid: Any = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    chosen = config.cpp.simdlen is not None or os.environ.get("ATEN_CPU_CAPABILITY")
    if not every or not hasattr(valid, "cache_info") or valid.cache_info().currsize or chosen:
        yield
        return
    try:
        for kind in every:
            cpu_vec_isa.supported_vec_isa_list = [kind]
            valid.cache_clear()
            if valid():
                break
        yield
    finally:
        cpu_vec_isa.supported_vec_isa_list = every
        valid.cache_clear()


# Python 3.12 itself begins with a few hundred frozen objects; whoever freezes a process with torch in it has far more.
_FROZEN_AT_START = 1000


@contextmanager
def older_objects_spared() -> Generator[None]:
    """Run the block with the garbage collector passing over the objects that exist already.

    It is off under the lock on graphs, but torch collects by itself while it compiles, each time over every object of
    the process. Where somebody froze objects before, nothing is done, since unfreezing knows no subsets.
    """
    if gc.get_freeze_count() > _FROZEN_AT_START:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
