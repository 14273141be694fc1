"""Define AdaptedProgram, the program that users hold: an exported program that knows its adapters.

It *is* a ``torch.export.ExportedProgram``: everything that takes one takes it. Beyond that it can be called, swapped,
bound, trained and moved. Its state, and how that stays consistent, is in ``core``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from torch.export import ExportedProgram

from adaptc.bank.bank import Bank
from adaptc.bank.stack_placement import make_bank
from adaptc.bank.training.training_bank import make_training_bank
from adaptc.binding.bind_adapter import bind_adapter
from adaptc.errors import ConfigError, short_repr
from adaptc.matmul_tuning import PackedWeights, memory_of_packed
from adaptc.passes.analysis.graph_view import format_graph
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, fqns_by_placeholder
from adaptc.passes.graph.pass_infra import PassTrail
from adaptc.passes.graph.torch_caches import drop_dead_code
from adaptc.passes.lower.choose_products import MatmulChoices
from adaptc.passes.quantized.expand_quantized import ExpandQuantized
from adaptc.program.add_adapter import FirstValues
from adaptc.program.module_factory import ProgramModuleFactory, warn_of_missing_data
from adaptc.program.program_scale import ScalableProgram
from adaptc.program.swap_report import SwapReport
from adaptc.runtime.calls.recorded_calls import CudaGraphs
from adaptc.runtime.executor import Executor
from adaptc.runtime.hoisted_values import HoistedMemory
from adaptc.runtime.options import checkpoint_blocks
from adaptc.runtime.variants.graph_variants import Fusion
from adaptc.state.graph_engine import bind_program, snapshot_runner
from adaptc.state.merge_program import unload_program
from adaptc.state.program_repr import attachment_ids_at, describe_as_table, describe_program
from adaptc.state.runner import Runner


class AdaptedProgram(ScalableProgram):
    """A program with adapters, made by ``adaptc.compile`` and ``adaptc.load``, not by hand.

    Example:
        >>> prog(x).shape
        torch.Size([2, 3])
    """

    def bind(self, adapter: Any, *, form: str = "apply", memory_limit: int | None = None, **options: Any) -> Runner:
        """Return a callable that keeps this adapter and can be used from any thread.

        Buffers that calls write to (a cache, a counter) are copied now and belong to the callable. Neither the program
        nor anything else that is bound to it sees what its calls write there.

        Args:
            adapter: an adapter as ``adaptc.swap`` takes it, or a :class:`Binding`. None gives the base, as :attr:`base`
                has it, and takes no options.
            form: "apply" shares the program's code and base. "weight" runs the base's graph on weights of its own: as
                fast as the base, for the memory of the adapted weights (``held``). Later writes to base tensors do not
                reach it. "auto" decides by the work that the adapter adds to a call; ``why`` gives the reason.
            memory_limit: the most bytes of "auto"; None for no limit.
            **options: the options of ``adaptc.swap``, such as ``scale=0.5``.

        Returns:
            the callable, with the inputs and outputs of the program.

        Raises:
            ConfigError: None is given with options.
            MergeError: ``form`` is "weight", and a method has no form on the weight.
            AdaptcError: what ``adaptc.swap`` raises.
        """
        if adapter is None:
            if said := [name for name, value in options.items() if value is not None]:
                raise ConfigError(f"the base has no {said[0]}: prog.bind(None) takes no options of adapters")
            bare = bind_program(self.base, None, form, memory_limit)
            self.run_state.add_bound(bare.prepared)
            return bare
        return bind_program(self, bind_adapter(self, adapter, **options), form, memory_limit)

    def swap(self, adapter: Any, **options: Any) -> SwapReport:
        """Make ``adapter`` the current one, as ``adaptc.swap`` does.

        Args:
            adapter: an adapter as ``adaptc.swap`` takes it, or the name of one of :attr:`adapters`.
            **options: the options of ``adaptc.swap``.

        Returns:
            a report of the sites, the ranks and the time that it took.

        Raises:
            AdaptcError: what ``adaptc.swap`` raises.
        """
        start = time.perf_counter()
        binding = self.swap_adapter(adapter, **options)
        return SwapReport.from_binding(self.adaptation.attachments, binding, time.perf_counter() - start)

    def snapshot_call(self) -> Runner:
        """Return a runner that keeps the current binding, for calls that belong together; see
        :func:`snapshot_runner`."""
        return snapshot_runner(self)

    def bank(self, adapters: Mapping[str, Any] | None = None, *, training: bool = False, **limits: Any) -> Bank:
        """Return a bank: adapters by name, of which each row of a batch takes its own.

        A call is ``bank(**inputs, adapters=["fr", None, {"de": 0.7, "style": 0.3}])``. The bank keeps the program as it
        is now: later swaps do not reach it.

        Args:
            adapters: name -> what :meth:`bind` takes; ``bank.add`` adds more.
            training: True gives a ``TrainingBank``, whose adapters train, each with an optimizer of its own. It
                takes the options of its ``add`` here, too.
            **limits: ``capacity`` and ``max_bytes``, how many adapters, and how many bytes of them, the bank may hold.
                ``max_rank``, the largest rank. ``evict=True`` lets the least recently used adapters go when it is full.
                ``loader``, a function of a name that gives an adapter which is not there. ``axis``, the axis of the
                inputs along which the rows lie: 1 for tokens (1, tokens, ...) that calls group with ``cu_seq_lens``.

        Returns:
            the bank.

        Raises:
            TargetError: a row's values depend on other rows of the batch (statistics over the batch, experts). The
                site, the output or the buffer is named.
            AdaptcError: what :meth:`Bank.add` raises.
        """
        given: Any = training  # callers may give anything
        if not isinstance(given, bool):
            raise ConfigError(f"training={short_repr(training)} must be True or False")
        if training:
            return make_training_bank(self, FirstValues(self), adapters, **limits)
        return make_bank(self, adapters, **limits)

    # -- how it shows itself -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Return three lines: the adapter, the inputs, and the size and options; ``adaptc.report`` says more."""
        return describe_program(self)

    def __str__(self) -> str:
        """Return the three lines of ``repr``. ``print(program.graph_view())`` is torch's dump of the graph, with the
        adapters marked."""
        return describe_program(self)

    def _repr_html_(self) -> str:
        return describe_as_table(self).html()

    def graph_view(self, site: str | None = None) -> str:
        """Return the graph as text, a line for each node, with a frame that names the site around the nodes of each
        region.

        Args:
            site: a parameter with an adapter, or its module, to see only what stands there; None for the whole graph.

        Returns:
            the text.

        Raises:
            ConfigError: there is no such site.
        """
        with hold_graph_lock():
            still = self.snapshot()
            return format_graph(
                still.graph_module, fqns_by_placeholder(still.graph_signature), attachment_ids_at(still, site)
            )

    @property
    def base(self) -> AdaptedProgram:
        """Return the program without adapters, for requests that want none. It shares the weights, and no adapter costs
        it anything.

        It equals the unadapted model up to rounding, since sibling layers share a matmul here too. ``adaptc.unload``
        gives a program that is equal to the bit. Raises MergeError as ``adaptc.unload`` does.
        """
        fuse = self.fuse
        return self.cached_base(lambda: unload_program(self).with_options(fuse=fuse))

    # -- options -------------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """Return what runs the graph: "eager" or "inductor".

        Setting it discards the code of calls, which the next call makes again. Raises BackendError for any other value,
        and where the program was made for another backend.
        """
        return self.options.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self.set_options(backend=value)

    @property
    def fuse(self) -> bool | frozenset[str]:
        """Return whether layers that read the same tensor share a matmul; False computes every layer on its own.

        It acts on the eager backend, fused kernels and :meth:`module`; code for a compiler on the CPU is never fused.
        Fused weights lie in one buffer, and the parameters are views of it, so no weight is held twice. A set names the
        weights that may be moved into such a buffer.

        Setting it discards the code of calls, which the next call makes again. Raises ConfigError for any other value.
        """
        return self.options.fuse

    @fuse.setter
    def fuse(self, value: bool | frozenset[str]) -> None:
        self.set_options(fuse=value)

    @property
    def kernels(self) -> bool | None:
        """Return whether calls run adapters as fused Triton kernels (``adaptc.kernels``), where their methods have
        them.

        None: where the base is on a GPU. True elsewhere computes what the kernels would, with torch alone. ``report``
        says which sites have none, and why. Setting it discards the code of calls, which the next call makes again.
        Raises ConfigError for any other value.
        """
        return self.options.kernels

    @kernels.setter
    def kernels(self, value: bool | None) -> None:
        self.set_options(kernels=value)

    @property
    def hoist_limit(self) -> int | None:
        """Return how many bytes the hoisted values of one binding may hold; None for any number, 0 to hoist nothing.

        Hoisted values are computed once per binding. Over the limit, those that save least work for their bytes are
        computed in every call instead. They are chosen by the sizes of the current adapter when the program is first
        called. Where an adapter has larger slots, and its values do not fit, all are computed in every call.

        Setting it discards the code of calls, which the next call makes again (inductor compiles). It frees the hoisted
        values of the program and of all that is bound to it, and limits each of them from then on. What :meth:`bind`
        gave in the weight form keeps its weights. Raises ConfigError for anything but None and integers from 0.
        """
        return self.options.hoist_limit

    @hoist_limit.setter
    def hoist_limit(self, value: int | None) -> None:
        self.set_options(hoist_limit=value)

    @property
    def pack(self) -> str | None:
        """Return the dtype of the base weights that calls may read packed copies of: "float32", "bf16", or None for
        none.

        A packed copy has the layout that oneDNN reads fastest. It lies beside the weight, which stays, so it costs
        memory. Calls read it only at numbers of rows at which it was measured to be faster. The first such call makes
        it, in the dtype of the weight; nothing is rounded. :attr:`packed` and ``report`` say what is held and why. With
        ``ADAPTC_PRODUCTS=plain`` nothing is packed.

        Setting it discards the code of calls, which the next call makes again; None frees all copies. Raises
        ConfigError for any other value, where the weights on the CPU all have another dtype, and where the program
        trains. Raises BackendError where the backend is not "eager".
        """
        return self.options.pack

    @pack.setter
    def pack(self, value: str | None) -> None:
        self.set_options(pack=value)

    @property
    def cuda_graphs(self) -> bool:
        """Return whether calls on a GPU are recorded as CUDA graphs, and replayed.

        The second call with inputs of the same shapes is recorded, and later ones replay it. A swap to another adapter
        of the same shapes copies it to where the graph reads. :attr:`recorded` says what is replayed, and why other
        calls are not. At most 32 graphs are kept. They share memory, and outputs are copies.

        Setting it discards the code of calls. Raises ConfigError for another value than a bool, and where the program
        trains. Raises BackendError where the base is not on a CUDA device.
        """
        return self.options.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self.set_options(cuda_graphs=value)

    @property
    def checkpoint(self) -> int | Literal["auto"] | None:
        """Return how many repeated blocks at a time the modules of :meth:`module` recompute in the backward: a number,
        or "auto" for one.

        None keeps all activations for the backward. Raises ConfigError for any other value.
        """
        return self.options.checkpoint

    @checkpoint.setter
    def checkpoint(self, value: int | Literal["auto"] | None) -> None:
        self.set_options(checkpoint=value)

    # -- what calls do -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> HoistedMemory:
        """Return the memory of the current binding's hoisted values; nothing before its first call."""
        arguments = self.call_state.arguments
        return HoistedMemory() if arguments is None else arguments.hoisted_memory

    @property
    def fusion(self) -> Fusion:
        """Return which layers that read the same tensor share a matmul; nothing before the first call."""
        executor = self.call_state.executor
        return Fusion() if executor is None else executor.fusion

    @property
    def products(self) -> MatmulChoices:
        """Return what computes the matmuls of the base's linear layers, and why (see ``report``).

        It is empty before the first call, and where ``ADAPTC_PRODUCTS=plain`` is set. Modules to train have their own,
        ``prog.module().products``, with those of the gradients of inputs.
        """
        executor = self.call_state.executor
        return MatmulChoices() if executor is None else executor.matmuls

    @property
    def packed(self) -> PackedWeights:
        """Return the packed copies that calls of the program and of its parts have made so far, where :attr:`pack`
        allows them."""
        executor = self.call_state.executor
        if executor is None:
            return PackedWeights()
        return memory_of_packed(e.packed_layers for e in self._all_code(executor))

    @property
    def recorded(self) -> CudaGraphs:
        """Return which calls of the program and of its parts are CUDA graphs so far (:attr:`cuda_graphs`)."""
        executor = self.call_state.executor
        made = [] if executor is None else [e.recorded_calls for e in self._all_code(executor)]
        return sum((calls.graphs for calls in made if calls is not None), CudaGraphs())

    def _all_code(self, executor: Executor) -> list[Executor]:
        return [executor, *self.run_state.part_executors.get(executor, {}).values()]

    @property
    def passes(self) -> dict[str, PassTrail]:
        """Return the passes that the program went through, with how much each changed: "program" for its graph.

        The other keys are the variants of the graph that calls have made so far.
        """
        executor = self.call_state.executor
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
        """Return an ``nn.Module`` to train. Its parameters are the program's own, and only adapter parameters require
        grad.

        Its ``state_dict`` is the adapter in PEFT's keys. For a program that was captured from a transformers model it
        is a ``PreTrainedModel``, which trainers take as they take PEFT's.

        ``train()`` and ``eval()`` switch dropout and batch norm, for programs compiled with ``training=True``. Where
        there is something to train and :attr:`fuse` is on, three things run as one step each, with backwards of their
        own: layers with LoRA, gated activations, and the cross entropy of a head. Their gradients are equal, and of
        first order alone. Under ``torch.autocast`` the module computes what the model would, and adapters keep float32
        gradients.

        On a CPU, whatever is fastest there computes the matmuls of frozen layers and the gradients of their inputs. It
        is measured once on each computer; ``products`` of the module says what was chosen. ``ADAPTC_PRODUCTS=plain``,
        or :attr:`fuse` off, leaves these matmuls to torch.

        Args:
            check_guards: False, which torch's compilers pass, gives the plain ``fx.GraphModule`` that they work on.
            gradient_checkpointing: True recomputes each repeated block in the backward, to save memory, and a number
                that many blocks at a time. It acts in training mode, and gradients are equal. None does as
                :attr:`checkpoint` says. A warning tells of blocks that cannot be recomputed.
            logits: "labelled" leaves the rows whose label is the ignored index out of the head. Loss and gradients are
                equal, and these rows are zero in the logits that are returned. "all" computes all.

        Returns:
            the module, with the inputs and outputs of the program.

        Raises:
            ConfigError: an option has another value, or the program's loss does not allow "labelled", or nothing is
                fused.
            AdaptcError: checkpointing is asked of a program captured for inference, or one without a repeated block.
        """
        with hold_graph_lock():
            still = self.snapshot()
            if not check_guards:
                return ProgramModuleFactory(False, logits).make_graph(still)
            warn_of_missing_data(still)
            again = still.options.checkpoint
            if gradient_checkpointing is not None:
                again = checkpoint_blocks(gradient_checkpointing, "gradient_checkpointing")
            made = ProgramModuleFactory(check_guards, logits)(still, self)
            if again is not None:
                made.checkpoint(again)
            drop_dead_code()
            return made

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        """Return a plain program in other operators, as ``ExportedProgram.run_decompositions`` does.

        Quantised weights become plain tensors and the operators that dequantise them. Exporters to other runtimes call
        this method, so they need to know no scheme.

        Args:
            *args: the arguments of torch's method.
            **kwargs: the keyword arguments of torch's method.

        Returns:
            the program.
        """
        with hold_graph_lock():
            plain = ExpandQuantized(with_records=False)(LiftedProgram(self.snapshot()).finish()).output
            program: Any = plain  # torch types this method by halves
            return program.run_decompositions(*args, **kwargs)
