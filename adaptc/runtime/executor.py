"""Call the lifted graph with base tensors, one binding's slots and the user's inputs.

Slots are inputs of the graph, so a swap only changes arguments: nothing is copied, and nothing is compiled again. A
call that has begun keeps the binding it began with. An :class:`Executor` holds the code of one program. A call changes
only its caches (code, and the hoisted values of ``hoisted_values``) and the buffers that the program itself writes to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError
from adaptc.locks import free_in_children
from adaptc.passes.analysis.costs import example_sizes
from adaptc.passes.analysis.index_bounds import index_bounds
from adaptc.passes.graph.graph_lock import on_graphs
from adaptc.passes.graph.lifted import Lifted
from adaptc.passes.graph.ops import Op
from adaptc.passes.graph.pass_infra import Trail
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.graph.storage import storage_key
from adaptc.passes.lower.choose_products import Products
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.train.set_mode import set_mode
from adaptc.runtime.added_lengths import Lengths, out_of_rows
from adaptc.runtime.arguments import Arguments
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.calls.check_indices import check_bounds, check_followed
from adaptc.runtime.gpu_variants import GpuVariants, runs_on_gpu
from adaptc.runtime.hoisted_values import Prefix
from adaptc.runtime.inductor import compile_lifted, with_room
from adaptc.runtime.mutated_buffers import own_copies, written_to
from adaptc.runtime.options import PACKS, RunOptions
from adaptc.runtime.strides import Layouts
from adaptc.runtime.variants import PLAIN, Fusion, GraphVariants, LiftedGraph, sizes_of
from adaptc.runtime.weight_buffers import begin_reading, end_reading, pack, packable, packed
from adaptc.torch_modes import outside_transforms
from adaptc.tuning.adapter_speeds import adapter_speed
from adaptc.tuning.compiled_matmuls import choose_compiled
from adaptc.tuning.matmul_table import choose, wanted
from adaptc.tuning.packed_weights import PackedWeights, Packs, held_by


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
        opened = Lifted(program)  # not kept: it refers to the program, and so to the program's binding
        self.module = fx.GraphModule(program.graph_module, opened.graph)
        if training:
            set_mode(self.module, False)
        self.compiles = options.backend == "inductor"
        self.differentiable = training and not self.compiles
        signature = program.graph_signature
        lifted = [s for s in signature.input_specs if s.kind != InputKind.USER_INPUT]
        self.lifted_names = [s.target for s in lifted]
        # The program holds base weights as its current adapter changed them (PiSSA's residual); other bindings start
        # from the unchanged ones. Slots are left out: the code outlives the binding it was made with.
        known = base or {}
        slots = {f for a in attachments for f in a.tensor_names}
        names = [n for n in self.lifted_names if n is not None and n not in slots]
        self.base = {n: known[n] if n in known else opened.tensor(n) for n in names}
        self.inputs = Inputs.of(program, {}) if inputs is None else inputs
        spec = program.call_spec.out_spec
        if spec is None:
            raise AdaptcError("the program has no output spec; export it with torch.export.export")
        self._out_spec = spec
        outs = signature.output_specs
        self._mutated = [
            (i, str(s.target))
            for i, s in enumerate(outs)
            if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
        ]
        self._user_outs = [i for i, s in enumerate(outs) if s.kind == OutputKind.USER_OUTPUT]
        self.names = [s.arg.name for s in lifted]
        written = written_to(self.module.graph)
        found = {n for n, name in zip(self.lifted_names, self.names, strict=True) if n is not None and name in written}
        #: base tensors that calls write to
        self.state = frozenset((found | {n for _, n in self._mutated}) & self.base.keys())
        small = {name for n, name in zip(self.lifted_names, self.names, strict=True) if n in slots}
        self._layouts = Layouts(self.module.graph, set(self.names), small, written) if self.compiles else None
        self._binding = free_in_children(threading.Lock())
        pack = options.pack if wanted() and not training else None
        self.packing = None if pack is None else Packs(PACKS[pack])
        self._packs: dict[str, list[list[str]]] = {}
        self._training = training
        self.variants = self._split()
        self._where = self.inputs.where()
        bounds = index_bounds(opened, small) if self.compiles else {}
        self._bounds = [(i, n, bounds[n]) for i, (n, _) in enumerate(self.inputs.expected) if n in bounds]
        self.lengths = Lengths.of(self.module.graph, attachments)
        self.fixed_kind = PLAIN if training else self.variants.kind(example_sizes(program))
        self._compiled: Callable[..., Any] | None = None
        self._arguments: WeakKeyDictionary[Binding, Arguments] = WeakKeyDictionary()

    def _split(self) -> GraphVariants:
        """Return the variants of the graph, told which inputs are frozen and may be hoisted from.

        The base is frozen for all bindings, except for tensors that calls write to. Slots are frozen for each binding;
        a program that trains freezes none of them.
        """
        mutated = {storage_key(self.base[n]) for n in self.state}
        index = dict(zip(self.lifted_names, self.names, strict=True))
        slots = {f for a in self.attachments for f in a.tensor_names}
        tensors = {n: t for n, t in self.base.items() if isinstance(t, Tensor)}
        base = {index[n] for n, t in tensors.items() if storage_key(t) not in mutated}
        fuse, kernels = self.options.fuse, self.options.kernels
        names = tensors if isinstance(fuse, bool) else fuse
        source = LiftedGraph(
            self.module,
            self.names,
            base,
            slots=set() if self._training else {index[f] for f in slots if f in index},
            packable={index[n] for n, t in tensors.items() if n in names and packable(t)} & base,
            limit=self.options.hoist_limit,
            compiled=self.compiles,
            fuse=bool(fuse),
            differentiable=self._training,
            pack=None if self.packing is None else self.packing.layer,
            speeds=adapter_speed,
            choose=None if self._training or not wanted() else choose_compiled if self.compiles else choose,
        )
        lowered = runs_on_gpu(tensors.values()) if kernels is None else kernels
        if not lowered or not self.attachments:
            return GraphVariants(source)
        return GpuVariants(source, self.attachments, self.ops, index)

    @property
    def trails(self) -> dict[str, Trail]:
        """Return the passes that each variant made so far went through, by variant."""
        return self.variants.trails

    @property
    def products(self) -> Products:
        """Return what computes the base's matmuls in the variant that was made first."""
        return next(iter(self.variants.products.values()), Products())

    @property
    def packed(self) -> PackedWeights:
        """Return the packed copies of weights that calls hold now."""
        return held_by([self.packing])

    @property
    def fusion(self) -> Fusion:
        """Return which layers share a matmul."""
        return self.variants.fusion

    def arguments(self, binding: Binding) -> Arguments:
        """Return the graph's inputs for one binding, without the user's.

        They are made once per binding, and again where base tensors have moved to other memory since.
        """
        with self._binding:
            made = self._arguments.get(binding)
            if made is None or not made.settled():
                made = self._arguments[binding] = Arguments(self, binding)
            return made

    def own_state(self, binding: Binding) -> dict[str, Tensor]:
        """Return copies of the tensors that calls write to, as they are now, for a callable with its own state."""
        known = {n: t for n, t in {**self.base, **binding.base}.items() if isinstance(t, Tensor)}
        return own_copies(known, self.state) if self.state else {}

    def own_arguments(self, binding: Binding, state: Mapping[str, Tensor]) -> Arguments:
        """Return the arguments of a callable that writes to the tensors in ``state`` instead of the program's."""
        return Arguments(self, binding, state) if state else self.arguments(binding)

    def buffers(self, kind: str, own: Collection[str]) -> list[Tensor | None]:
        """Return the buffers that one variant reads sibling weights from, and move the weights into them.

        An entry is None, and nothing moves, where a member is in ``own``: the tensors of a base that only one binding
        has.
        """
        out: list[Tensor | None] = []
        for members in self._siblings(kind):
            if not set(own).isdisjoint(members):
                out.append(None)
                continue
            tensors = [self.base[m] for m in members]
            found = packed(tensors)
            if found is None:
                with on_graphs():  # whoever reads weights for long, as a save does, holds this lock too
                    found = pack(tensors)
            out.append(found)
        return out

    def lie_in(self, kind: str, buffers: Sequence[Tensor | None]) -> bool:
        """Return whether the sibling weights of a variant still lie in the buffers that :meth:`buffers` gave."""
        pairs = zip(self._siblings(kind), buffers, strict=True)
        return all(b is None or packed([self.base[m] for m in members]) is b for members, b in pairs)

    def _siblings(self, kind: str) -> list[list[str]]:
        """Return, for each buffer of a variant, the FQNs of the weights that lie in it."""
        known = self._packs.get(kind)
        if known is None:
            names = dict(zip(self.names, self.lifted_names, strict=True))
            known = self._packs[kind] = [[str(names[m]) for m in p.members] for p in self.variants.get(kind).packs]
        return known

    def prefix(
        self,
        values: Sequence[Any],
        own: Collection[str],
        kind: str,
        buffers: Sequence[Tensor | None],
        room: Callable[[], int | None],
        lock: threading.Lock,
    ) -> Prefix:
        """Return the prefix of one variant for ``values`` of the lifted inputs.

        The inputs called ``own`` belong to a base that only this binding has, so values hoisted from them are not
        shared. ``buffers`` are those that :meth:`buffers` gave. ``room`` and ``lock`` are as for :class:`Prefix`.
        """
        variant, names = self.variants.get(kind), self.names
        at = {n: i for i, n in enumerate(names)}
        differ = {i for i, n in enumerate(self.lifted_names) if n in own}
        values = list(values)
        for p, buffer in zip(variant.packs, buffers, strict=True):
            if buffer is None:
                buffer = torch.cat([values[at[m]].detach() for m in p.members])
                differ.add(len(values))
            values.append(buffer)
        moving = any(values[i].requires_grad for i in variant.split.slot_inputs)
        values = self.detached(values)
        lay: Callable[[list[Any]], list[Any]] = list
        if self.compiles:
            everything = [*self.lifted_names, *(p.name for p in variant.packs)]
            lay = partial(self._lay, names=everything)
        shared = variant.shared if differ.isdisjoint(variant.split.base_inputs) else None
        return Prefix(variant.split, values, lay, moving, shared, room, lock)

    def _lay(self, values: list[Any], names: Sequence[str | None]) -> list[Any]:
        """Return the lifted inputs ``names`` with ranks of one padded to two, in the layouts that were compiled for."""
        assert self._layouts is not None
        roomy = with_room(values, names=names, attachments=self.attachments, ops=self.ops, training=self._training)
        return self._layouts.lifted([*self.names, *(str(n) for n in names[len(self.names) :])], roomy)

    def detached(self, values: Sequence[Any]) -> list[Any]:
        if self.differentiable:
            return list(values)
        # A tensor without requires_grad stays the same object: ``tensor.data = ...`` must reach the next call.
        return [v.detach() if isinstance(v, Tensor) and v.requires_grad else v for v in values]

    def __call__(self, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = self.inputs(args, kwargs, arguments.longer)
        for check in arguments.checks:
            check(flat)
        if self.compiles:
            check_followed(self.inputs.expected, flat)
        for i, name, bounds in self._bounds:
            check_bounds(name, flat[i], bounds)
        outermost = begin_reading()
        try:
            return self.inputs.calls.as_asked(self._run(arguments, flat), args, kwargs)
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            if why := self.inputs.why_zero(flat, error):
                raise AdaptcError(why) from error
            if arguments.longer and "index out of" in str(error):
                raise out_of_rows(arguments.longer, self.inputs.shapes(flat)) from error
            if why := self.inputs.why_broken(flat, error):
                raise AdaptcError(why) from error
            raise
        finally:
            if outermost:
                end_reading()

    def _run(self, arguments: Arguments, flat: Sequence[Any]) -> Any:
        if self.compiles and not self.inputs.empty(flat):
            code, layouts = self._compiled or self.compile(), self._layouts
            assert layouts is not None
            with outside_transforms(), torch.no_grad():
                taken = layouts.users(flat)
                out = code(*arguments.get(self.fixed_kind).values(), *taken)
                layouts.write_back(flat, taken)
        elif self.compiles or any(map(torch.is_autocast_enabled, self.variants.devices)):
            # Compiled code may divide by a size of zero, and variants were made without the caller's autocast.
            out = self.module.forward(*arguments.lifted, *flat)
        else:
            kind = PLAIN if arguments.moving else self.variants.kind(sizes_of(flat, self._where))
            if self.options.hoist_limit is not None:
                kind = arguments.settle(kind)
            out = self.variants.get(kind).call(*arguments.get(kind).values(), *flat)
        for i, name in self._mutated:
            with torch.no_grad():
                arguments.tensor(name).copy_(out[i])
        return pytree.tree_unflatten([out[i] for i in self._user_outs], self._out_spec)

    def compile(self) -> Callable[..., Any]:
        """Compile now instead of at the first call, and return the compiled code."""
        with on_graphs():
            if self._compiled is None:
                variant = self.variants.get(self.fixed_kind)
                targets: dict[str, str | None] = {p.name: None for p in variant.packs}
                targets.update(zip(self.names, self.lifted_names, strict=True))
                split = variant.split
                self._compiled = compile_lifted(split.module, split, variant.code, targets, self.attachments, self.ops)
            return self._compiled

    @property
    def compiled(self) -> bool:
        """Return whether no call compiles anything any more."""
        return self._compiled is not None or not self.compiles
