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

from adaptc.bank.base_program import Bare
from adaptc.bank.find_batch_axis import Rows, locate, rows_of
from adaptc.bank.row_independence import ends_of
from adaptc.bank.stack_adapters import with_starts
from adaptc.binding.binding import Binding
from adaptc.errors import AdaptcError, ConfigError, TargetError
from adaptc.passes.adapt.inject_rows import InjectRows, around, check_site, read_at
from adaptc.passes.adapt.row_counts import any_number
from adaptc.passes.graph.graph_lock import exclusive
from adaptc.passes.graph.lifted import Lifted, user_inputs
from adaptc.passes.graph.ops import operands
from adaptc.passes.graph.pytree import pytree
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.bank_method import InRows, RowAxis, grouped
from adaptc.progress import stage
from adaptc.runtime.calls.call_inputs import Inputs
from adaptc.runtime.executor import Executor
from adaptc.runtime.options import RunOptions

#: the name of the input that takes the coefficients
KEYWORD = "adapter_coefficients"


@dataclass(frozen=True, eq=False)
class RowsSource(Bare):
    """A program without adapters, with its sites and where the rows are: what code for rows is made of.

    ``axes``: name of a node -> where the rows are in its value.
    """

    rows: Rows
    axes: Mapping[str, RowAxis]

    @classmethod
    @exclusive
    def of(cls, bare: Bare, probes: Sequence[Mapping[str, Any]] = ()) -> RowsSource:
        """Return ``bare`` with where its rows are. ``probes``: as for :func:`locate`.

        Raises TargetError, which names the site, the output or the buffer, where rows cannot have adapters of their
        own.
        """
        program, ops = bare.program, bare.ops
        _check_names(program)
        rows, lifted = rows_of(program), Lifted(program, edit=False)
        wanted: dict[str, Attachment] = {}
        for a in bare.attachments:
            check_site(lifted, a)
            op = ops[a.id]
            for node, _ in read_at(lifted, a):
                if not around(a, op) or a.method.has_apply(op.at(node)):
                    wanted.setdefault(node.name, a)
                if around(a, op) and a.method.has_input(op.at(node)):
                    wanted.setdefault(operands(node)[0].name, a)
        ends = ends_of(program)
        with stage("finding the rows of the batch in the program"):
            axes, why = locate(program, rows, wanted, probes, ends, {a.fqn for a in bare.attachments})
        for name, reason in why.items():
            if name not in wanted:
                raise TargetError(
                    f"the rows of a batch cannot have adapters of their own: {ends[name].name}: {reason}. Run the rows "
                    "of each adapter as a batch of their own, with prog.bind"
                )
            raise TargetError(
                f"{wanted[name].fqn!r} cannot have another adapter for each row of a batch: {reason}. Leave the module "
                "out of the targets, or run the rows of each adapter as a batch of their own, with prog.bind"
            )
        return cls(**vars(bare), rows=rows, axes=axes)

    def check_call(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise AdaptcError for a call whose batch does not have ``count`` rows, the number of entries in ``adapters``.

        It also refuses coefficients given by the caller. What else is wrong with a call, the call itself says.
        """
        if KEYWORD in kwargs:
            raise AdaptcError(f"{KEYWORD!r} is made of adapters=[...], and is not given to a bank")
        first = self.first(args, kwargs)
        if first is not None and first.shape[self.axis] != count:
            raise AdaptcError(
                f"adapters has {count} entries, and {self.rows.of[0]!r} has {first.shape[self.axis]} rows: give one "
                "for each row, None for the base"
            )

    @property
    def axis(self) -> int:
        """Return the axis of the rows in :meth:`first`."""
        return self.rows.of[1]

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the input of a call whose size along :attr:`axis` is the number of rows; None where the call has
        none."""
        value = self._given(self.rows.of[0], args, kwargs)
        return value if isinstance(value, Tensor) and value.ndim > self.axis else None

    def _given(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a call has for the input ``name``; None where that is not found.

        Where inputs are nested, it is found by its place among all their leaves.
        """
        if name in kwargs:
            return kwargs[name]
        if name in (places := list(self.takes)) and places.index(name) < len(args):
            return args[places.index(name)]
        spec = self.program.call_spec.in_spec
        names = [] if spec is None else spec.children()[1].context or []
        flat, found = pytree.tree_flatten((args, {n: kwargs[n] for n in names if n in kwargs}))
        return flat[list(user_inputs(self.program)).index(name)] if found == spec else None

    @property
    def groupable(self) -> frozenset[str]:
        """Return the ids of the sites that GPU kernels can compute."""
        lifted, out = Lifted(self.program, edit=False), set[str]()
        for a in self.attachments:
            op = self.ops[a.id]
            fits = (
                grouped(a.method, op.at(n), self.axes[n.name]) for n, _ in read_at(lifted, a) if n.name in self.axes
            )
            if around(a, op) and a.scale_slot is not None and all(fits):
                out.add(a.id)
        return frozenset(out)

    @property
    def side_by_side(self) -> bool:
        """Return whether the adapters of some site lie side by side in matmuls."""
        return any(a.method.has_rows() for a in self.attachments)

    @exclusive
    def any_number(self, grouped: Collection[str] = ()) -> bool:
        """Return whether one code serves every number of adapters. ``grouped``: as for :meth:`code`."""
        lifted = Lifted(self.program, edit=False)
        return any_number(lifted, self.attachments, self.ops, self.axes, self.rows.size, grouped)

    def exported(
        self, stack: Binding, count: int, at_once: bool = False, grouped: Collection[str] = ()
    ) -> ExportedProgram:
        """Return the program with coefficients as an input, and the adapters of ``stack`` as buffers.

        It is plain ATen. With ``at_once``, or with ids of sites that are ``grouped`` in ``stack``, it has operators of
        adaptc.
        """
        sites = [with_starts(a) if a.id in grouped else a for a in self.attachments]
        return InjectRows(sites, stack.values, self.axes, self.rows.of, count, KEYWORD, at_once, grouped)(
            self.program
        ).output

    @exclusive
    def code(
        self,
        stack: Binding,
        count: int,
        options: RunOptions,
        long: bool,
        grouped: Collection[str] = (),
        free: bool = False,
    ) -> Executor:
        """Return code for ``count`` adapters. Only the shapes in ``stack`` matter, not its values.

        ``long``: for rows of many positions, with operators that compute each row's own adapters alone. ``grouped``:
        ids of the sites whose tensors in ``stack`` lie as GPU kernels read them. ``free``: calls may have any number of
        adapters (:meth:`any_number`).
        """
        with stage(f"making the code of a bank for {'any number of' if free else count} adapters"):
            program = self.exported(stack, count, long, grouped)
        pairs = []
        for i, a in enumerate(self.attachments):
            of, lies = with_starts(a) if a.id in grouped else a, a.id in grouped
            # All methods are called "rows" here, so the ids of several at one weight differ by the number alone.
            pairs.append((replace(of, method=InRows(a.method, count, lies), variant=i), a))
        many, ops = [new for new, _ in pairs], {new.id: self.ops[a.id] for new, a in pairs}
        inputs = Inputs.of(program, self.fills, self.takes, {(KEYWORD, 1)} if free else ())
        return Executor(program, many, ops, replace(options, kernels=False), inputs, self.training, self.base)


def _check_names(program: ExportedProgram) -> None:
    """Raise ConfigError for a program with an input that has the name of ``adapters`` or of the coefficients."""
    spec = program.call_spec.in_spec
    keywords = () if spec is None else spec.children()[1].context or ()
    taken = ({"adapters"} & set(keywords)) | ({KEYWORD} & set(user_inputs(program)))
    for name in sorted(taken):
        raise ConfigError(
            f"the program has an input called {name!r}, and calls of a bank have another of that name: capture the "
            "model with that input under another name"
        )
