"""Call the lifted graph with base tensors, one binding's slots and the user's inputs.

Slots are inputs of the graph, so a swap only changes arguments: nothing is copied, and nothing is compiled again. A
call that has begun keeps the binding it began with. An :class:`Executor` holds the code of one program. A call changes
only its caches (code, and the hoisted values of ``hoisted_values``) and the buffers that the program itself writes to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.locks import reset_after_fork
from adaptc.matmul_tuning import (
    PackedLayers,
    PackedWeights,
    adapter_speed,
    choose_compiled,
    choose_matmul,
    choose_trained,
    chooses_matmuls,
    memory_of_packed,
)
from adaptc.passes.analysis.costs import example_sizes
from adaptc.passes.analysis.index_bounds import find_index_bounds
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, copy_graph
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import PassTrail
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.lower.choose_products import MatmulChoices
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.quantized.expand_quantized import ExpandQuantized
from adaptc.passes.train.autocast import FollowAutocast
from adaptc.passes.train.set_mode import set_mode
from adaptc.runtime.added_lengths import VirtualTokenLengths, lookup_error
from adaptc.runtime.arguments import Arguments
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.calls.check_indices import check_index_bounds, check_not_transformed
from adaptc.runtime.calls.cuda_recorder import recorder_for
from adaptc.runtime.calls.recorded_calls import RecordedCalls
from adaptc.runtime.hoisted_values import HoistedInputs
from adaptc.runtime.inductor import compile_lifted
from adaptc.runtime.mutated_buffers import copy_sharing_memory, written_placeholders
from adaptc.runtime.options import PACK_DTYPES, RunOptions
from adaptc.runtime.strides import CompiledStrides, pad_and_lay_out
from adaptc.runtime.variants.gpu_variants import GpuVariants, runs_on_gpu
from adaptc.runtime.variants.graph_variants import PLAIN, Fusion, GraphVariants, LiftedGraph, read_sizes
from adaptc.runtime.weight_buffers import SiblingBuffers, begin_reading, end_reading, is_packable
from adaptc.torch_modes import enters_autocast, leaving_autocast, outside_transforms


class Executor:
    """The callable code of a program.

    ``inputs`` flattens and checks the arguments of calls; by default they are those the program was captured with.
    ``training`` says that the program was captured for training. ``base`` maps FQNs to base tensors as they were before
    an adapter changed them; all other base tensors come from the program.
    """

    def __init__(
        self,
        program: ExportedProgram,
        attachments: Sequence[Attachment],
        ops: Mapping[str, Op],
        options: RunOptions,
        inputs: Inputs | None = None,
        training: bool = False,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.options, self.attachments, self.ops = options, attachments, ops
        if options.backend == "inductor":
            program = ExpandQuantized(fuse=True, planar=True)(program).output
        lifted_program = LiftedProgram(program)  # not kept: it refers to the program, and so to the program's binding
        self.module = fx.GraphModule(program.graph_module, lifted_program.graph)
        if training:
            set_mode(self.module, False)
        self.uses_inductor = options.backend == "inductor"
        self.is_differentiable = training and not self.uses_inductor
        signature = program.graph_signature
        lifted_specs = [s for s in signature.input_specs if s.kind != InputKind.USER_INPUT]
        self.lifted_names = [s.target for s in lifted_specs]
        # The program holds base weights as its current adapter changed them (PiSSA's residual); other bindings start
        # from the unchanged ones. Slots are left out: the code outlives the binding it was made with.
        known = base or {}
        slots = {f for a in attachments for f in a.tensor_names}
        names = [n for n in self.lifted_names if n is not None and n not in slots]
        self.base = {n: known[n] if n in known else lifted_program.tensor(n) for n in names}
        self.inputs = Inputs.from_program(program, {}) if inputs is None else inputs
        spec = program.call_spec.out_spec
        if spec is None:
            raise AdaptcError("the program has no output spec; export it with torch.export.export")
        self._out_spec = spec
        outs = signature.output_specs
        self._mutated_outputs = [
            (i, str(s.target))
            for i, s in enumerate(outs)
            if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        ]
        self._user_outputs = [i for i, s in enumerate(outs) if s.kind == OutputKind.USER_OUTPUT]
        self.placeholder_names = [s.arg.name for s in lifted_specs]
        written = written_placeholders(self.module.graph)
        found = {
            n
            for n, name in zip(self.lifted_names, self.placeholder_names, strict=True)
            if n is not None and name in written
        }
        #: base tensors that calls write to
        self.written_tensors = frozenset((found | {n for _, n in self._mutated_outputs}) & self.base.keys())
        small = {name for n, name in zip(self.lifted_names, self.placeholder_names, strict=True) if n in slots}
        self._strides = (
            CompiledStrides(self.module.graph, set(self.placeholder_names), small, written)
            if self.uses_inductor
            else None
        )
        self._arguments_lock = reset_after_fork(threading.Lock())
        pack = options.pack if chooses_matmuls() and not training else None
        self.packed_layers = None if pack is None else PackedLayers(PACK_DTYPES[pack])
        self._is_training = training
        self.variants = self._make_variants()
        # These hold the variants, not this object: a cycle would keep a base until the next garbage collection.
        names = dict(zip(self.placeholder_names, map(str, self.lifted_names), strict=True))
        self.sibling_buffers = SiblingBuffers(self.base, partial(self.variants.siblings, names))
        recorder = recorder_for(self.base.values()) if options.cuda_graphs and not self.is_differentiable else None
        positions = partial(self.variants.slots_and_written, [n in slots for n in self.lifted_names])
        self.recorded_calls = None if recorder is None else RecordedCalls(recorder, positions)
        self._size_locations = self.inputs.size_locations()
        singles = options.single_sizes
        self._single_sizes = singles if singles <= self._size_locations.keys() else frozenset[str]()
        bounds = find_index_bounds(lifted_program, small) if self.uses_inductor else {}
        self._index_bounds = [(i, n, bounds[n]) for i, (n, _) in enumerate(self.inputs.expected) if n in bounds]
        self.virtual_tokens = VirtualTokenLengths.from_graph(self.module.graph, attachments)
        self.fixed_variant = PLAIN if training else self.variants.cheapest_variant(example_sizes(program))
        self._enters_autocast = enters_autocast(self.module.graph)
        #: whether code is for single rows alone -> the compiled code
        self._compiled: dict[bool, Callable[..., Any]] = {}
        self._arguments: WeakKeyDictionary[Binding, Arguments] = WeakKeyDictionary()

    def _make_variants(self) -> GraphVariants:
        """Return the variants of the graph.

        The base is frozen, except for tensors that calls write to. Slots are frozen for each binding; a program that
        trains freezes none.
        """
        mutated = {storage_key(self.base[n]) for n in self.written_tensors}
        placeholders = dict(zip(self.lifted_names, self.placeholder_names, strict=True))
        slots = {f for a in self.attachments for f in a.tensor_names}
        tensors = {n: t for n, t in self.base.items() if isinstance(t, Tensor)}
        base = {placeholders[n]: t for n, t in tensors.items() if storage_key(t) not in mutated}
        fuse_option, kernels = self.options.fuse, self.options.kernels
        names = tensors if isinstance(fuse_option, bool) else fuse_option
        lifted_graph = LiftedGraph(
            self.module,
            self.placeholder_names,
            base,
            frozen_slots=set() if self._is_training else {placeholders[f] for f in slots if f in placeholders},
            movable={placeholders[n] for n, t in tensors.items() if n in names and is_packable(t)} & base.keys(),
            hoist_limit=self.options.hoist_limit,
            is_for_compiler=self.uses_inductor,
            may_fuse=bool(fuse_option),
            is_differentiable=self._is_training,
            make_packed_layer=None if self.packed_layers is None else self.packed_layers.make_layer,
            speed_of_dtype=adapter_speed,
            choose_matmul=None
            if self._is_training or not chooses_matmuls()
            else choose_compiled
            if self.uses_inductor
            else choose_matmul,
            choose_trained=choose_trained(base) if self.is_differentiable else None,
        )
        lowered = runs_on_gpu(tensors.values()) if kernels is None else kernels
        if not lowered or not self.attachments:
            return GraphVariants(lifted_graph)
        return GpuVariants(lifted_graph, self.attachments, self.ops, placeholders)

    @property
    def trails(self) -> dict[str, PassTrail]:
        """Return the passes that each variant made so far went through, by variant."""
        return self.variants.trails

    @property
    def matmuls(self) -> MatmulChoices:
        """Return what computes the base's matmuls in the variant that was made first."""
        return next(iter(self.variants.matmuls.values()), MatmulChoices())

    @property
    def packed_weights(self) -> PackedWeights:
        """Return the packed copies of weights that calls hold now."""
        return memory_of_packed([self.packed_layers])

    @property
    def fusion(self) -> Fusion:
        """Return which layers share a matmul."""
        return self.variants.fusion

    def arguments(self, binding: Binding) -> Arguments:
        """Return the graph's inputs for one binding, without the user's.

        They are made once per binding, and again where base tensors have moved to other memory since.
        """
        with self._arguments_lock:
            made = self._arguments.get(binding)
            if made is None or not made.has_current_memory():
                made = self._arguments[binding] = Arguments(self, binding)
            return made

    def copy_written_tensors(self, binding: Binding) -> dict[str, Tensor]:
        """Return copies of the tensors that calls write to, for a callable with its own state."""
        known = {n: t for n, t in {**self.base, **binding.changed_base}.items() if isinstance(t, Tensor)}
        return copy_sharing_memory(known, self.written_tensors) if self.written_tensors else {}

    def arguments_with_state(self, binding: Binding, state: Mapping[str, Tensor]) -> Arguments:
        """Return the arguments of a callable that writes to the tensors in ``state`` instead of the program's."""
        return Arguments(self, binding, state) if state else self.arguments(binding)

    def make_hoisted_inputs(
        self,
        values: Sequence[Any],
        own_names: Collection[str],
        variant_name: str,
        buffers: Sequence[Tensor | None],
        byte_budget: Callable[[], int | None],
        lock: threading.Lock,
    ) -> HoistedInputs:
        """Return the hoisted inputs of one variant for ``values`` of the lifted inputs.

        The inputs called ``own_names`` belong to a base that only this binding has, so values hoisted from them are not
        shared. ``buffers`` are those that ``sibling_buffers`` gave. ``byte_budget`` and ``lock`` are as for
        :class:`HoistedInputs`.
        """
        variant, names = self.variants.get(variant_name), self.placeholder_names
        at = {n: i for i, n in enumerate(names)}
        own_positions = {i for i, n in enumerate(self.lifted_names) if n in own_names}
        values = list(values)
        for p, buffer in zip(variant.sibling_packs, buffers, strict=True):
            if buffer is None:
                buffer = torch.cat([values[at[m]].detach() for m in p.parameter_names])
                own_positions.add(len(values))
            values.append(buffer)
        moving = any(values[i].requires_grad for i in variant.split.slot_inputs)
        values = self.detach_values(values)
        packs = [p.name for p in variant.sibling_packs]
        # These hold no executor: a cycle would keep a base until the next garbage collection.
        lay = partial(
            pad_and_lay_out,
            names=[*self.lifted_names, *packs],
            graph_names=[*names, *packs],
            attachments=self.attachments,
            ops=self.ops,
            strides=self._strides,
            training=self._is_training,
            in_buckets=self.recorded_calls is not None and not moving,
        )
        shared = variant.shared_values if own_positions.isdisjoint(variant.split.base_inputs) else None
        return HoistedInputs(variant.split, values, lay, moving, shared, byte_budget, lock)

    def detach_values(self, values: Sequence[Any]) -> list[Any]:
        if self.is_differentiable:
            return list(values)
        # A tensor without requires_grad stays the same object: ``tensor.data = ...`` must reach the next call.
        return [v.detach() if isinstance(v, Tensor) and v.requires_grad else v for v in values]

    def __call__(self, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = self.inputs(args, kwargs, arguments.added_tokens)
        for check in arguments.checks:
            check(flat)
        if self.uses_inductor:
            check_not_transformed(self.inputs.expected, flat)
        for i, name, bounds in self._index_bounds:
            check_index_bounds(name, flat[i], bounds)
        reading = begin_reading()
        try:
            with leaving_autocast() if self._enters_autocast else nullcontext():
                return self.inputs.call_names.convert_output(self._run(arguments, flat), args, kwargs)
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            if why := self.inputs.explain_zero_size(flat, error):
                raise AdaptcError(why) from error
            if arguments.added_tokens and "index out of" in str(error):
                raise lookup_error(arguments.added_tokens, self.inputs.describe_shapes(flat)) from error
            if why := self.inputs.explain_assertion(flat, error):
                raise AdaptcError(why) from error
            raise
        finally:
            end_reading(reading)

    def _run(self, arguments: Arguments, flat: Sequence[Any]) -> Any:
        if self.uses_inductor and not self.inputs.describe_empty(flat):
            if not self.is_compiled:
                self.compile()
            code, layouts = self._compiled[self._has_single_sizes(flat)], self._strides
            assert layouts is not None
            with outside_transforms(), torch.no_grad():
                taken = layouts.lay_out_inputs(flat)
                outputs = self._call_code(self.fixed_variant, code, arguments, taken)
                layouts.write_back(flat, taken)
        elif any(map(torch.is_autocast_enabled, self.variants.autocast_devices)):
            outputs = self._autocast_module.forward(*arguments.lifted, *flat)
        elif self.uses_inductor:  # for empty inputs, whose size compiled code may divide by
            outputs = self.module.forward(*arguments.lifted, *flat)
        else:
            kind = (
                PLAIN
                if arguments.slots_may_change
                else self.variants.for_call(read_sizes(flat, self._size_locations), arguments.sites_left_out)
            )
            if self.options.hoist_limit is not None:
                kind = arguments.variant_in_limit(kind)
            outputs = self._call_code(kind, self.variants.get(kind).call, arguments, flat)
        for i, name in self._mutated_outputs:
            with torch.no_grad():
                arguments.tensor(name).copy_(outputs[i])
        return pytree.tree_unflatten([outputs[i] for i in self._user_outputs], self._out_spec)

    def _call_code(
        self, variant_name: str, code: Callable[..., Any], arguments: Arguments, inputs: Sequence[Any]
    ) -> Sequence[Any]:
        """Call the code of a variant; its CUDA graph where calls are recorded."""
        bound = arguments.inputs_for(variant_name)
        if self.recorded_calls is None:
            return code(*bound.values(), *inputs)
        return self.recorded_calls(variant_name, code, bound, inputs)

    @cached_property
    def _autocast_module(self) -> fx.GraphModule:
        """Return the module without the dtypes of its capture. Variants are made without the caller's autocast."""
        with hold_graph_lock():
            made = fx.GraphModule(self.module, copy_graph(self.module.graph))
            FollowAutocast({n.name for n in made.graph.find_nodes(op="placeholder")})(made.graph)
            made.recompile()
        return made

    def _has_single_sizes(self, flat: Sequence[Any]) -> bool:
        """Return whether a call with the inputs ``flat`` runs the code for single rows."""
        sizes = read_sizes(flat, {n: self._size_locations[n] for n in self._single_sizes})
        return bool(self._single_sizes) and all(sizes.get(n) == 1 for n in self._single_sizes)

    def compile(self) -> None:
        """Compile now instead of at the first call: code for all sizes, and code for single rows where it is wanted."""
        with hold_graph_lock():
            variant = self.variants.get(self.fixed_variant)
            targets: dict[str, str | None] = {p.name: None for p in variant.sibling_packs}
            targets.update(zip(self.placeholder_names, self.lifted_names, strict=True))
            split = variant.split
            for is_single in [False, *([True] if self._single_sizes else [])]:
                if is_single not in self._compiled:
                    sizes = self._single_sizes if is_single else frozenset[str]()
                    self._compiled[is_single] = compile_lifted(
                        split.module, split, variant.code, targets, self.attachments, self.ops, sizes
                    )

    @property
    def is_compiled(self) -> bool:
        """Return whether no call compiles anything any more."""
        return len(self._compiled) == (2 if self._single_sizes else 1) or not self.uses_inductor
