"""Make the code that gives each row of a batch adapters of its own.

It takes a program without adapters, its sites, and where the rows are. Calls of the executor that it gives take one
more keyword, the coefficients (rows, count). Nothing in the code is of any one adapter. Where adapters lie side by side
in matmuls, one code serves every number of them. Where they are computed one after the other, there is one code for
each number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from adaptc.bank.base_program import BaseProgram
from adaptc.bank.find_batch_axis import Batch, TokenInputs, find_batch, find_row_axes
from adaptc.bank.row_independence import program_outputs
from adaptc.bank.stack_adapters import with_rank_starts
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, TargetError
from adaptc.passes.adapt.expert_rows import find_routing
from adaptc.passes.adapt.inject_rows import InjectRows, acts_around_layer, check_row_site, site_consumers
from adaptc.passes.adapt.row_counts import is_count_independent
from adaptc.passes.graph.graph_lock import with_graph_lock
from adaptc.passes.graph.lifted import LiftedProgram, user_inputs
from adaptc.passes.graph.ops import operands
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import PerRowMethod, RowAxis, uses_bank_kernel
from adaptc.progress import stage
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.executor import Executor
from adaptc.runtime.options import RunOptions

#: the name of the input that takes the coefficients
COEFFICIENTS_INPUT = "adapter_coefficients"


@dataclass(frozen=True, eq=False)
class RowProgram(BaseProgram):
    """A program without adapters, with its sites and where the rows are: what code for rows is made of.

    ``axes``: name of a node -> where the rows are in its value.
    """

    batch: Batch
    row_axes: Mapping[str, RowAxis]

    @classmethod
    @with_graph_lock
    def locate_rows(
        cls,
        base: BaseProgram,
        probes: Sequence[Mapping[str, Any]] = (),
        row_inputs: TokenInputs | int = 0,
    ) -> RowProgram:
        """Return ``base`` with where its rows are. ``probes``: as for :func:`find_row_axes`.

        ``row_inputs`` is the axis of the inputs that has the rows. It is :class:`TokenInputs` for a program whose rows
        are tokens of packed texts. The tokens of a text read each other there. So nothing checks that outputs keep rows
        apart, and ``probes`` have texts of one token.

        Raises TargetError, which names the site, the output or the buffer, where rows cannot have adapters of their
        own.
        """
        program, ops = base.program, base.ops
        _check_input_names(program)
        is_batch = isinstance(row_inputs, int)
        rows = find_batch(program, row_inputs) if isinstance(row_inputs, int) else row_inputs.batch(program)
        lifted = LiftedProgram(program, edit=False)
        site_nodes: dict[str, Attachment] = {}
        routing: dict[str, str] = {}
        for a in base.attachments:
            check_row_site(lifted, a)
            op = ops[a.id]
            for node, _ in site_consumers(lifted, a):
                if op.experts and (by := find_routing(node)) is not None:
                    routing[node.name] = by.name
                if not acts_around_layer(a, op) or a.method.has_apply(op.as_called_by(node)):
                    site_nodes.setdefault(node.name, a)
                if acts_around_layer(a, op) and a.method.has_input(op.as_called_by(node)):
                    site_nodes.setdefault(operands(node)[0].name, a)
        ends = program_outputs(program) if is_batch else {}
        with stage("finding the rows of the batch in the program"):
            fqns = {a.fqn for a in base.attachments}
            axes, why = find_row_axes(program, rows, site_nodes, probes, ends, fqns, routing)
        for name, reason in why.items():
            if name not in site_nodes:
                raise TargetError(
                    f"the rows of a batch cannot have adapters of their own: {ends[name].name}: {reason}. Run the rows "
                    "of each adapter as a batch of their own, with prog.bind"
                )
            raise TargetError(
                f"{site_nodes[name].fqn!r} cannot have another adapter for each row of a batch: {reason}. Leave the "
                "module out of the targets, or run the rows of each adapter as a batch of their own, with prog.bind"
            )
        return cls(**vars(base), batch=rows, row_axes=axes)

    def check_call(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise AdaptcError for a call whose batch does not have ``count`` rows, the number of entries in ``adapters``.

        It also refuses coefficients given by the caller. What else is wrong with a call, the call itself says.
        """
        if COEFFICIENTS_INPUT in kwargs:
            raise AdaptcError(f"{COEFFICIENTS_INPUT!r} is made of adapters=[...], and is not given to a bank")
        first = self.batch_input(args, kwargs)
        if first is not None and first.shape[self.batch_axis] != count:
            raise AdaptcError(
                f"adapters has {count} entries, and {self.batch.first_input[0]!r} has {first.shape[self.batch_axis]} "
                "rows: give one for each row, None for the base"
            )

    @property
    def batch_axis(self) -> int:
        """Return the axis of the rows in :meth:`first`."""
        return self.batch.first_input[1]

    def batch_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the input of a call whose size along :attr:`batch_axis` is the number of rows; None where the call has
        none."""
        value = self._input_value(self.batch.first_input[0], args, kwargs)
        return value if isinstance(value, Tensor) and value.ndim > self.batch_axis else None

    def _input_value(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a call has for the input ``name``; None where that is not found.

        Where inputs are nested, it is found by its place among all their leaves.
        """
        if name in kwargs:
            return kwargs[name]
        if name in (places := list(self.forward_arg_names)) and places.index(name) < len(args):
            return args[places.index(name)]
        spec = self.program.call_spec.in_spec
        names: list[str] = [] if spec is None else spec.children()[1].context or []
        flat, found = pytree.tree_flatten((args, {n: kwargs[n] for n in names if n in kwargs}))
        return flat[list(user_inputs(self.program)).index(name)] if found == spec else None

    @property
    def sites_with_kernels(self) -> frozenset[str]:
        """Return the ids of the sites that GPU kernels can compute."""
        lifted, out = LiftedProgram(self.program, edit=False), set[str]()
        for a in self.attachments:
            op = self.ops[a.id]
            fits = (
                uses_bank_kernel(a.method, op.as_called_by(n), n.meta["val"], self.row_axes[n.name])
                for n, _ in site_consumers(lifted, a)
                if n.name in self.row_axes
            )
            if acts_around_layer(a, op) and a.scale_slot is not None and all(fits):
                out.add(a.id)
        return frozenset(out)

    @property
    def is_side_by_side(self) -> bool:
        """Return whether the adapters of some site lie side by side in matmuls."""
        return any(a.method.bank.is_defined() for a in self.attachments)

    @with_graph_lock
    def serves_any_count(self, kernel_sites: Collection[str] = ()) -> bool:
        """Return whether one code serves every number of adapters. ``kernel_sites``: as for :meth:`make_executor`."""
        lifted = LiftedProgram(self.program, edit=False)
        return is_count_independent(lifted, self.attachments, self.ops, self.row_axes, self.batch.size, kernel_sites)

    def export_program(
        self,
        stack: Binding,
        count: int,
        at_once: bool = False,
        kernel_sites: Collection[str] = (),
        tag_regions: bool = False,
    ) -> ExportedProgram:
        """Return the program with coefficients as an input, and the adapters of ``stack`` as buffers.

        It is plain ATen. With ``at_once``, or with ids of sites that are ``kernel_sites`` in ``stack``, it has
        operators of adaptc. ``tag_regions``: as for :class:`InjectRows`.
        """
        sites = [with_rank_starts(a) if a.id in kernel_sites else a for a in self.attachments]
        return InjectRows(
            sites,
            stack.values,
            self.row_axes,
            self.batch.first_input,
            count,
            COEFFICIENTS_INPUT,
            at_once,
            kernel_sites,
            tag_regions,
        )(self.program).output

    @with_graph_lock
    def make_executor(
        self,
        stack: Binding,
        count: int,
        options: RunOptions,
        has_long_rows: bool,
        kernel_sites: Collection[str] = (),
        any_count: bool = False,
    ) -> Executor:
        """Return code for ``count`` adapters. Only the shapes in ``stack`` matter, not its values.

        ``has_long_rows``: for rows of many positions, with operators that compute each row's own adapters alone.
        ``kernel_sites``: ids of the sites whose tensors in ``stack`` lie as GPU kernels read them. ``any_count``: calls
        may have any number of adapters (:meth:`serves_any_count`).
        """
        with stage(f"making the code of a bank for {'any number of' if any_count else count} adapters"):
            program = self.export_program(stack, count, has_long_rows, kernel_sites, tag_regions=True)
        pairs: list[tuple[Attachment, Attachment]] = []
        for a in self.attachments:
            of, lies = with_rank_starts(a) if a.id in kernel_sites else a, a.id in kernel_sites
            pairs.append((replace(of, method=PerRowMethod(a.method, count, lies)), a))
        many, ops = [new for new, _ in pairs], {new.id: self.ops[a.id] for new, a in pairs}
        inputs = Inputs.from_program(
            program, self.fills, self.forward_arg_names, {(COEFFICIENTS_INPUT, 1)} if any_count else ()
        )
        # No graphs: kernels group the rows of a selection on the CPU, which a replay would not do again.
        options = replace(options, kernels=False, cuda_graphs=False)
        return Executor(program, many, ops, options, inputs, self.training, self.base)


def _check_input_names(program: ExportedProgram) -> None:
    """Raise ConfigError for a program with an input that has the name of ``adapters`` or of the coefficients."""
    spec = program.call_spec.in_spec
    keywords = () if spec is None else spec.children()[1].context or ()
    taken = ({"adapters"} & set(keywords)) | ({COEFFICIENTS_INPUT} & set(user_inputs(program)))
    for name in sorted(taken):
        raise ConfigError(
            f"the program has an input called {name!r}, and calls of a bank have another of that name: capture the "
            "model with that input under another name"
        )
