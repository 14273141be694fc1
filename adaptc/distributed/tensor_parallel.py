"""Shard the linear layers of a program over processes that compute each batch together: tensor parallelism.

Base weights and adapters become tensors of ``torch.distributed.tensor`` in a module to train. The graph stays as it
is.

Private torch use, with the public route that was tried: ``FakeTensorMode``, in which all ops are tried once. Public:
the device ``meta``, on which a graph that makes tensors on another device cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from adaptc.distributed.sharded_calls import ShardedCall, ShardedOps
from adaptc.distributed.sharding_plan import check_not_quantized, resolve_plan, tensor_axes
from adaptc.errors import AdaptcError, ConfigError, errors_name, short_repr
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.module_paths import module_path, program_module_paths
from adaptc.passes.graph.pytree import pytree
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.module_factory import ProgramModuleFactory


def shard_tensors(program: AdaptedProgram, mesh: Any, plan: str | Mapping[str, str] = "auto") -> Any:
    """Return a module of ``program`` whose linear layers are divided among the processes of ``mesh``.

    Every process makes the same calls with the same inputs, and gets whole outputs and losses. They are those of one
    process up to the order of sums, and so are the gradients. ``lora_A`` and ``lora_B`` are sharded as in PEFT; all
    other tensors of adapters, and layers outside the plan, are whole in each process.

    The program keeps its whole tensors. Where no process has room for them, make it with
    :func:`compile_from_config`, and read the weights into the module with :func:`load_base`.

    Args:
        program: a program with or without an adapter. Its option ``fuse`` does not act on the module.
        mesh: a device mesh of one axis (``torch.distributed.init_device_mesh``).
        plan: module name -> "colwise" (outputs are divided) or "rowwise" (inputs are). A name is the end of a module
            path; ``*`` stands for any component. "auto" takes the plan that transformers has for the model, in which
            layers that are tied to others stay whole.

    Returns:
        the module. Its parameters are DTensors. ``adaptc.save_adapter``, ``load_state_dict``, optimizers,
        ``clip_grad_norm_`` and ``save_state`` take it, called in every process.

    Raises:
        ConfigError: the plan does not fit the program: it names what is no linear layer, or sizes or heads that the
            processes cannot divide; or the base is quantised.
        AdaptcError: there are no processes, or an op of the model or of an adapter's method does not work on sharded
            tensors; the site is named.

    Example:
        >>> mesh = torch.distributed.init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> module = adaptc.distributed.shard_tensors(prog, mesh)  # doctest: +SKIP
        >>> module(input_ids=ids, labels=ids).loss.backward()  # doctest: +SKIP
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise AdaptcError("tensor parallelism needs its processes: call torch.distributed.init_process_group first")
    if getattr(mesh, "ndim", None) != 1:
        raise ConfigError(
            f"mesh={short_repr(mesh)} must be a device mesh of one axis, such as mesh['tp'] of a larger one"
        )
    check_not_quantized(program)
    axes = tensor_axes(program, resolve_plan(program, plan), mesh.size())
    with hold_graph_lock():
        still = program.with_options(fuse=False).snapshot()
        module = ProgramModuleFactory(True, "all")(still, program)
    own = dict(module.named_parameters(remove_duplicate=False))
    _check_ops(program, module, mesh, axes)
    _replace_parameters(module, _all_sharded(own, mesh, axes))
    module.sharded_call = ShardedCall(mesh)
    return module


def _sharded(p: Tensor, mesh: Any, axis: int | None) -> nn.Parameter:
    """Return a parameter of which each process has its part along ``axis``, or all of it."""
    placement = Replicate() if axis is None else Shard(axis)
    made = nn.Parameter(
        distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None), requires_grad=p.requires_grad
    )
    if p.requires_grad:
        # Else an optimizer would get parts of a sum, and keep its state in that form.
        made.register_hook(lambda grad: grad.redistribute(placements=[placement]))
    return made


def _all_sharded(parameters: Mapping[str, Tensor], mesh: Any, axes: Mapping[str, int]) -> dict[str, nn.Parameter]:
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for name, p in parameters.items():
        if id(p) not in made:
            made[id(p)] = _sharded(p, mesh, axes.get(name))
    return {name: made[id(p)] for name, p in parameters.items()}


def _replace_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, new in parameters.items():
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, new)


class _NamedNodes(fx.Interpreter):
    """An interpreter whose errors begin with the module that the failing op comes from."""

    def __init__(self, graph: fx.GraphModule, paths: Any) -> None:
        super().__init__(graph)
        self.paths, self.extra_traceback = paths, False

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        with errors_name(module_path(n, self.paths) or n.name):
            return super().run_node(n)


def _check_ops(program: AdaptedProgram, module: Any, mesh: Any, axes: Mapping[str, int]) -> None:
    """Raise AdaptcError for an op that does not work on the sharded tensors, found without any values."""
    if program.example_inputs is None:
        return  # the first call finds out
    graph, paths = module.graph_module, program_module_paths(program)
    own, device = dict(module.named_parameters(remove_duplicate=False)), mesh.device_type
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fakes = {n: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device) for n, p in own.items()}
            _replace_parameters(module, _all_sharded(fakes, mesh, axes))
            inputs = pytree.tree_map_only(Tensor, mode.from_tensor, pytree.tree_leaves(program.example_inputs))
            with ShardedOps(mesh):
                _NamedNodes(graph, paths).run(*inputs, enable_io_processing=False)
    finally:
        _replace_parameters(module, own)
