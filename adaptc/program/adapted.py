"""AdaptedProgram: the program users hold. An exported program that knows its adapters.

It *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. On top it is callable, can be swapped,
bound, trained and moved; its state, and how it keeps itself consistent, is in ``core``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx
from torch.export import ExportedProgram

from adaptc.binding.source import as_binding
from adaptc.errors import AdaptcError, ConfigError
from adaptc.passes.analysis.graph_view import graph_view
from adaptc.passes.ir.exclusive import on_graphs
from adaptc.passes.ir.forgetting import forget_code
from adaptc.passes.ir.lifted import Lifted, lifted_names
from adaptc.passes.ir.module_paths import owners_of
from adaptc.passes.ir.pass_infra import Trail
from adaptc.passes.lower.choose_products import Products
from adaptc.passes.optimize.bind_calls import BindSizes
from adaptc.passes.train.backbone import cut_at_head
from adaptc.passes.train.fuse_training import fuse_training
from adaptc.program.bank import Bank
from adaptc.program.bound import Bound
from adaptc.program.core import ProgramCore
from adaptc.program.describe import described, sites_at, table_of
from adaptc.program.pretrained_module import pretrained
from adaptc.program.program_module import PRODUCTS, ProgramModule, plain
from adaptc.program.strength import Strengths
from adaptc.program.unload import unloaded
from adaptc.runtime.held_values import Held
from adaptc.runtime.options import blocks_at_a_time
from adaptc.runtime.packed_weights import PackedWeights, held_by
from adaptc.runtime.product_table import choose, choose_for_gradient, wanted
from adaptc.runtime.variants import Fusion


class AdaptedProgram(Strengths):
    """A program with adapters. Made by ``adaptc.compile`` and ``adaptc.load``, not by hand."""

    def bind(self, adapter: Any, *, form: str = "apply", memory_limit: int | None = None, **options: Any) -> Bound:
        """A callable that keeps this adapter and can be used from any thread.

        ``adapter``: a directory, a file or a state dict as ``adaptc.swap`` takes them, or a :class:`Binding`; errors
        and ``options`` as there (``scale=0.5``). None gives the base, as :attr:`base` has it.
        ``form``: "apply" shares the program's code and base; "weight" runs the base's graph on weights of its own, as
        fast as the base, for the memory of the adapted weights (``held`` says how much); "auto" decides by the work
        that the adapter adds to a call and by ``memory_limit``, in bytes, None for any (``why`` gives the reason).
        In the weight form later writes to base tensors are not followed. Raises MergeError where a method has none.

        Buffers that calls write to (a cache, a counter) are copied now and belong to the callable: neither the program
        nor anything else that is bound sees what its calls write there.
        """
        if adapter is None:
            if said := [name for name, value in options.items() if value is not None]:
                raise ConfigError(f"the base has no {said[0]}: prog.bind(None) takes no options of adapters")
            bare = Bound(self.base, None, form, memory_limit)
            self.memory.join(bare)
            return bare
        return Bound(self, as_binding(self, adapter, **options), form, memory_limit)

    def bank(self, adapters: Mapping[str, Any] | None = None, **limits: Any) -> Bank:
        """Adapters by name, of which each row of a batch takes its own: ``bank(**inputs, adapters=["fr", None, {"de":
        0.7, "style": 0.3}])``.

        ``adapters``: what :meth:`bind` takes, by name; more come with ``bank.add``. ``capacity``, ``max_bytes``: how
        many it may hold, and how many bytes of them; with ``evict=True`` those used least recently go when it is full,
        and ``loader``, a function of a name, gives an adapter that is not there. ``max_rank``: the largest rank it
        takes. The bank keeps the program as it is now: a later swap is nothing to it.

        Raises TargetError, which names the site, the output or the buffer, where the rows of a batch are not apart
        (statistics over the batch, experts), and what :meth:`Bank.add` raises.
        """
        return Bank(self, adapters, **limits)

    # -- how it shows itself -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Three lines: the adapter, the inputs, and the size and options; ``adaptc.report`` says more."""
        return described(self)

    def __str__(self) -> str:
        """The same: torch's dump of the graph is ``print(program.graph_view())``, with the adapters marked."""
        return described(self)

    def _repr_html_(self) -> str:
        return table_of(self).html()

    def graph_view(self, site: str | None = None) -> str:
        """The graph as text, a line for each node, with what adapters added in a frame that names the site.

        ``site``: the parameter of one, or its module; then it is only what stands there. Raises ConfigError where
        there is no such site.
        """
        with on_graphs():
            still = self.snapshot()
            return graph_view(still.graph_module, lifted_names(still.graph_signature), sites_at(still, site))

    @property
    def base(self) -> AdaptedProgram:
        """The program without adapters, for requests that want none: it shares the weights, and pays for nothing else.

        Equal to the unadapted model up to rounding, since siblings share a product here too; ``adaptc.unload`` gives
        the one that is equal to the bit. Raises MergeError as ``adaptc.unload`` does.
        """
        fuse = self.fuse
        return self.remembered_base(lambda: unloaded(self).with_options(fuse=fuse))

    # -- options -------------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What runs the graph: "eager" or "inductor". Setting it makes the code anew. Raises BackendError for any other
        value, and where the program was made for another backend."""
        return self.options.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self.set_options(backend=value)

    @property
    def fuse(self) -> bool | frozenset[str]:
        """Whether layers that read one tensor share a product; False computes every layer on its own.

        It is for the eager backend, fused kernels, and :meth:`module`; code for a compiler on the CPU is never fused.

        Fused weights lie in one buffer, of which the parameters are views: nothing is held twice. A set names the
        weights that may be moved. Setting it makes the code anew. Raises ConfigError for any other value.
        """
        return self.options.fuse

    @fuse.setter
    def fuse(self, value: bool | frozenset[str]) -> None:
        self.set_options(fuse=value)

    @property
    def kernels(self) -> bool | None:
        """Whether calls run adapters as fused Triton kernels (``adaptc.kernels``), where their methods have them.

        None: where the base is on a GPU. True elsewhere computes what the kernels would, with torch alone. ``report``
        says which sites have none, and why. Setting it makes the code anew. Raises ConfigError for any other value.
        """
        return self.options.kernels

    @kernels.setter
    def kernels(self, value: bool | None) -> None:
        self.set_options(kernels=value)

    @property
    def hoist_limit(self) -> int | None:
        """Bytes that values computed once per binding may hold; None for any number, 0 to compute all in every call.

        Over the limit, values that save least work for their bytes are computed in every call. Which these are goes by
        the sizes of the current adapter when the program is first called; of an adapter with larger slots, whose values
        do not fit, all are. Setting it makes the code anew (inductor compiles), frees what the program and all that is
        bound to it hold, and is the limit of each of them from then on; what :meth:`bind` gave in the weight form keeps
        its weights. Raises ConfigError for anything but None and numbers from 0.
        """
        return self.options.hoist_limit

    @hoist_limit.setter
    def hoist_limit(self, value: int | None) -> None:
        self.set_options(hoist_limit=value)

    @property
    def pack(self) -> str | None:
        """The type of the base's weights that calls may read packed copies of: "float32", "bf16", or None for none.

        A packed copy lies as oneDNN reads it fastest, beside the weight, which stays: memory for time, and only at the
        numbers of rows at which it was measured to be faster. It is made in the first such call, in the type that the
        weight has; nothing is rounded. :attr:`packed` and ``report`` say what is held and why. Setting it makes the
        code anew; None frees all copies. With ``ADAPTC_PRODUCTS=plain`` nothing is packed. Raises ConfigError for any
        other value, where no weight has this type, and where the program trains; BackendError where the backend is not
        "eager".
        """
        return self.options.pack

    @pack.setter
    def pack(self, value: str | None) -> None:
        self.set_options(pack=value)

    @property
    def checkpoint(self) -> int | Literal["auto"] | None:
        """How many repeated blocks the modules that :meth:`module` makes compute again at a time, "auto" for one; None
        where they keep all for the backward. Raises ConfigError for any other value."""
        return self.options.checkpoint

    @checkpoint.setter
    def checkpoint(self, value: int | Literal["auto"] | None) -> None:
        self.set_options(checkpoint=value)

    # -- what calls do -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> Held:
        """What is computed once for the current binding; nothing before its first call."""
        arguments = self.running.arguments
        return Held() if arguments is None else arguments.held

    @property
    def fusion(self) -> Fusion:
        """Which layers that read one tensor share a product; nothing before the first call."""
        executor = self.running.executor
        return Fusion() if executor is None else executor.fusion

    @property
    def products(self) -> Products:
        """What computes the products of the base's linear layers, and why (see ``report``); nothing before the first
        call, and where ``ADAPTC_PRODUCTS=plain`` is set. Modules to train have their own:
        ``prog.module().products``."""
        executor = self.running.executor
        return Products() if executor is None else executor.products

    @property
    def packed(self) -> PackedWeights:
        """The packed copies that calls have made so far, those of its parts too, where :attr:`pack` allows them."""
        executor = self.running.executor
        if executor is None:
            return PackedWeights()
        parts = list(self.memory.parts.get(executor, {}).values())
        return held_by(e.packing for e in (executor, *parts))

    @property
    def passes(self) -> dict[str, Trail]:
        """The passes it went through, with how much each changed: "program" for its graph, and those of
        each variant of it that calls have made so far."""
        executor = self.running.executor
        return {
            "program": tuple((n, c) for n, c in self.adaptation.trail),
            **({} if executor is None else executor.trails),
        }

    # -- training ------------------------------------------------------------------------------------------------------

    def module(  # type: ignore[override]  # torch's is a GraphModule, of which this has all
        self,
        check_guards: bool = True,
        gradient_checkpointing: bool | int | Literal["auto"] | None = None,
        logits: str = "all",
    ) -> Any:
        """An ``nn.Module`` to train: its parameters are the program's own; only adapter parameters require grad.

        Its ``state_dict`` is the adapter in PEFT's keys. Of a program that was captured from a transformers model it is
        a ``PreTrainedModel``, which trainers take as they take PEFT's.

        ``train()`` and ``eval()`` switch dropout and batch norm, for programs compiled with ``training=True``. Where
        there is something to train and :attr:`fuse` is on, layers with LoRA, gated activations and the cross entropy of
        a head run as one step each, with backwards of their own: equal gradients, of first order alone. Under
        ``torch.autocast`` it computes what the model would, and adapters keep float32 gradients. On a CPU the products
        of frozen layers and the gradients of their inputs are computed by what is fastest there, which is measured once
        for each machine, in a second each (``products`` of the module says what; ``ADAPTC_PRODUCTS=plain``, or
        :attr:`fuse` off, leaves them to torch).

        ``gradient_checkpointing``: True to compute each repeated block again in the backward, for less memory, a number
        for as many blocks at a time; in training mode, and with equal gradients; None as :attr:`checkpoint` says.
        Raises ConfigError for any other value, and AdaptcError for programs captured for inference, which are never in
        training mode, and where no block is repeated or can be computed twice. An AdaptcWarning tells of blocks that
        cannot.

        ``logits``: "labelled" leaves the rows whose label is the ignored index out of the head: loss and gradients are
        equal, and these rows are zero in the logits it returns. Raises ConfigError for values other than "all" and
        "labelled", and for the latter where the program's loss does not allow it or nothing is fused.

        With ``check_guards=False``, as torch's compilers ask, it is the plain ``fx.GraphModule`` that they work on, and
        else a :class:`ProgramModule`.
        """
        with on_graphs():
            still = self.snapshot()
            if not check_guards:
                return ModuleOf(False, logits).graph(still)
            again = still.options.checkpoint
            if gradient_checkpointing is not None:
                again = blocks_at_a_time(gradient_checkpointing, "gradient_checkpointing")
            made = ModuleOf(check_guards, logits)(still, self)
            if again is not None:
                made.checkpoint(again)
            forget_code()
            return made

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        """As torch's: a plain program in other operators."""
        with on_graphs():
            return Lifted(self.snapshot()).finish().run_decompositions(*args, **kwargs)


@dataclass(frozen=True)
class ModuleOf:
    """How :meth:`AdaptedProgram.module` was asked to make a module."""

    check_guards: bool
    logits: str

    def __call__(self, program: ProgramCore, owner: ProgramCore) -> ProgramModule:
        source, inputs = program.adaptation.source, program.adaptation.inputs(program)
        takes = inputs.n_args, tuple(inputs.names), frozenset(inputs.fills)
        kind = plain(*takes) if source is None else pretrained(source.kind, *takes)
        return kind(program, owner, self.graph(program), self)

    def graph(self, program: ProgramCore, head: str | None = None) -> fx.GraphModule:
        """See :class:`Making`."""
        graph = ExportedProgram.module(program, check_guards=self.check_guards)
        values = {} if program.current is None else program.current.values
        trainable = {id(t) for t in values.values() if t.requires_grad}
        for p in graph.parameters():
            p.requires_grad_(id(p) in trainable)
        if head is not None and not cut_at_head(graph, head, owners_of(program)):
            raise AdaptcError(f"the program does not end in one linear layer {head!r}, so it has no part before it")
        fuse = bool(trainable and program.options.fuse)
        logits = self.logits if head is None else "all"
        # What a compiler of torch's, or the writer of a package, asks for stays in operators of theirs.
        chosen = (choose, choose_for_gradient) if fuse and self.check_guards and wanted() else None
        result = fuse_training(graph, fuse=fuse, logits=logits, choose=chosen)
        found = {} if chosen is None else result.data[-1]
        if self.check_guards:  # a compiler's graph stays in operators
            BindSizes()(graph.graph)
            graph.recompile()
        graph.meta[PRODUCTS] = tuple(Products(choices, what) for what, choices in found.items())
        return graph
