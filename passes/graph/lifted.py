"""Edit an exported program's lifted inputs: the only file that touches placeholders, signature and state together.

Open a program with ``Lifted(program)``, change its ``graph`` freely, add and remove parameters here, and call
``finish()``. The given program is never modified. Its graph is copied node by node. Its state dict is copied as a dict
that shares the tensors. Every placeholder always has exactly one input spec. ``finish`` derives the signature from the
order of the placeholders, so that no code has to keep the two in step.

Private torch use, with the public route that was tried:
- ``torch._guards.detect_fake_mode`` finds the fake mode of a graph. Public: none; a FakeTensor's ``fake_mode`` is
  private too.
- ``FakeTensor`` makes a fake of a known mode. Public: none.
- ``ExportedProgram._guards_code`` has the conditions on sizes. Public: ``program.module()`` has them as a function. It
  needs example inputs, and raises an AssertionError that names no sizes.
- the ``ExportedProgram`` constructor. Public: rewriting ``program.module()`` and exporting again, which costs a full
  capture and loses ``nn_module_stack`` (the site paths).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from adaptc.errors import CaptureError, ConfigError, PassError
from adaptc.passes.graph.pytree import pytree, update_call_inputs
from adaptc.passes.graph.storage import storage_key


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of ``graph`` with the same node names, which shares ``meta`` values but not the ``meta`` dicts."""
    new = empty_graph_like(graph)
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.node_copy(node, values.__getitem__)
        # fx renames a node whose name is a builtin's, such as "input"; torch.export keeps such names.
        copied.name = node.name
        values[node] = copied
    return new


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """Return a graph without nodes that has the tracer class and code generator of ``graph``."""
    private: Any = graph  # fx has no public names for these two
    new = fx.Graph(tracer_cls=private._tracer_cls)
    new.set_codegen(private._codegen)
    return new


def user_inputs(program: ExportedProgram) -> dict[str, Any]:
    """Return the graph's values of the user's flat inputs, by name, in order: fake tensors, sizes or constants."""
    return user_inputs_of_graph(program.graph, program.graph_signature)


def user_inputs_of_graph(graph: fx.Graph, signature: ExportGraphSignature) -> dict[str, Any]:
    """Return what :func:`user_inputs` returns, for a graph and its signature."""
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    args = [s.arg for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
    return {a.name: a.value if isinstance(a, ConstantArgument) else nodes[a.name].meta.get("val") for a in args}


def fqns_by_placeholder(signature: ExportGraphSignature) -> dict[str, str]:
    """Return, for each lifted placeholder, the name of the parameter, buffer or constant that it stands for."""
    return {s.arg.name: s.target for s in signature.input_specs if s.target is not None}  # type: ignore[union-attr]


def guards_of(program: ExportedProgram) -> list[str]:
    """Return the assumptions that capture made about input sizes, as conditions such as ``L['x'].size()[0] != 1``."""
    return list(getattr(program, "_guards_code", ()))


def fake_mode_of(graph: fx.Graph) -> Any:
    """Return the fake mode of a graph's values; None when it has none."""
    return detect_fake_mode([n.meta.get("val") for n in graph.nodes])


def fake_maker(graph: fx.Graph) -> Callable[[Tensor], Tensor]:
    """Return a function that makes fakes of tensors in a graph's own mode, with static shapes."""
    mode = fake_mode_of(graph)
    return lambda tensor: _make_fake(mode, tensor)


def _make_fake(mode: Any, tensor: Tensor) -> Tensor:
    if mode is None:
        raise CaptureError("the graph has no fake values; capture it with torch.export.export")
    # mode.from_tensor takes ten times as long, since it describes the tensor's storage. Slots are plain tensors.
    meta = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, meta, tensor.device)
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


class LiftedProgram:
    """An exported program that is open for editing; the module docstring says how to use it.

    With ``edit=False`` it is open for reading only: ``graph`` is then the program's own and must not be changed.
    """

    def __init__(self, program: ExportedProgram, *, edit: bool = True) -> None:
        self.program = program
        untyped: Any = program
        self.ranges: dict[Any, Any] = dict(untyped.range_constraints)
        self.graph = copy_graph(program.graph) if edit else program.graph
        self.state_dict: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.graph.nodes}
        self.input_specs: dict[str, InputSpec] = {s.arg.name: s for s in program.graph_signature.input_specs}
        self.output_specs: list[OutputSpec] = list(program.graph_signature.output_specs)
        self.placeholders: dict[str, fx.Node] = {}
        self._first_user_input: fx.Node | None = None
        for node in self.graph.find_nodes(op="placeholder"):
            spec = self.input_specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self._first_user_input = self._first_user_input or node
            elif spec.target is not None:
                self.placeholders[spec.target] = node
        self.module_calls: list[Any] = list(program.module_call_graph)
        self.example_inputs: Any = program.example_inputs
        self.fake_mode = fake_mode_of(self.graph)
        self._map_tied_names()

    def _map_tied_names(self) -> None:
        """Map each FQN of a tied weight whose placeholder is missing or unread to the placeholder with users."""
        by_storage: dict[Any, fx.Node] = {}
        for fqn, node in self.placeholders.items():
            tensor = self.state_dict.get(fqn, self.constants.get(fqn))
            # Two placeholders may share one storage; the one with users is the right one.
            if isinstance(tensor, Tensor) and (node.users or storage_key(tensor) not in by_storage):
                by_storage[storage_key(tensor)] = node
        for fqn, tensor in self.state_dict.items():
            node = by_storage.get(storage_key(tensor)) if isinstance(tensor, Tensor) else None
            if node is not None and (fqn not in self.placeholders or not self.placeholders[fqn].users):
                self.placeholders[fqn] = node

    def tensor(self, fqn: str) -> Tensor:
        """Return the value of a parameter, buffer or constant."""
        return self.state_dict[fqn] if fqn in self.state_dict else self.constants[fqn]

    def freeze(self) -> None:
        """Replace parameters by twins that share their memory and require no gradient; the model's flags stay."""
        twins: dict[int, torch.nn.Parameter] = {}
        for fqn, tensor in self.state_dict.items():
            if isinstance(tensor, torch.nn.Parameter):
                twin = twins.setdefault(id(tensor), torch.nn.Parameter(tensor.detach(), requires_grad=False))
                self.state_dict[fqn] = twin

    def fqns_of(self, node: fx.Node) -> list[str]:
        """Return all FQNs of a placeholder; a tied weight has several."""
        return [f for f, n in self.placeholders.items() if n is node]

    def make_fake(self, tensor: Tensor) -> Tensor:
        """Return a fake of ``tensor`` in this graph's mode."""
        return _make_fake(self.fake_mode, tensor)

    def add_tensor(self, fqn: str, tensor: Tensor) -> fx.Node:
        """Add a lifted input and return its placeholder: a parameter for an ``nn.Parameter``, else a persistent buffer.

        Raises ConfigError if the program already has a tensor with this name.
        """
        if fqn in self.state_dict or fqn in self.constants:
            raise ConfigError(
                f"the program already has a tensor named {fqn!r}: another adapter's, or the model's own. Give this "
                "adapter another adapter_name, or rename the module."
            )
        return self._add_placeholder(fqn, tensor)

    def _add_placeholder(self, fqn: str, tensor: Tensor) -> fx.Node:
        is_param = isinstance(tensor, torch.nn.Parameter)
        kind = InputKind.PARAMETER if is_param else InputKind.BUFFER
        name = ("p_" if is_param else "b_") + fqn.replace(".", "_")
        with self.graph.inserting_before(self._first_call_node()):
            node = self.graph.create_node("placeholder", name, name=name)
        node.target = node.name  # fx may have made the name unique or legal
        node.meta["val"] = self.make_fake(tensor)
        persistent = None if is_param else True
        self.input_specs[node.name] = InputSpec(kind, TensorArgument(node.name), fqn, persistent)
        self.state_dict[fqn] = tensor
        self.placeholders[fqn] = node
        self.nodes[node.name] = node
        return node

    def _first_call_node(self) -> fx.Node:
        """Return the first user input, or else the first node that is no placeholder: there is an output at least."""
        return self._first_user_input or next(n for n in self.graph.nodes if n.op != "placeholder")

    def add_input(
        self, name: str, like: fx.Node, axes: Sequence[int], dtype: torch.dtype, extra_sizes: Sequence[int] = ()
    ) -> fx.Node:
        """Add a keyword input for the caller and return its placeholder.

        Its shape is made of the ``axes`` of the input ``like``, followed by the sizes ``extra_sizes``. Its example is
        zeros. Raises ConfigError if an input or a value already has this name.
        """
        if name in self.input_specs or any(n.name == name for n in self.graph.nodes):
            raise ConfigError(
                f"the program has an input or a value called {name!r} already, and one of that name is to be added"
            )
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.create_node("placeholder", name, name=name)
        model: Tensor = like.meta["val"]
        with nullcontext() if self.fake_mode is None else self.fake_mode:
            node.meta["val"] = torch.empty(
                [*(model.shape[i] for i in axes), *extra_sizes], dtype=dtype, device=model.device
            )
        self.input_specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        self.nodes[node.name] = node
        self._update_call_inputs({name: (axes, extra_sizes)}, like.name)
        return node

    def remove_input(self, name: str) -> None:
        """Erase a keyword input that nothing reads."""
        self.graph.erase_node(self.nodes.pop(name))
        del self.input_specs[name]
        self._update_call_inputs()

    def _update_call_inputs(
        self, added_inputs: Mapping[str, tuple[Any, Any]] = MappingProxyType({}), like: str = ""
    ) -> None:
        names = [n.name for n in self.graph.find_nodes(op="placeholder")]
        inputs = [self.input_specs[n].arg for n in names if self.input_specs[n].kind == InputKind.USER_INPUT]
        at = list(user_inputs(self.program)).index(like) if added_inputs else 0
        examples = {n: (at, *sizes, self.nodes[n].meta["val"].dtype) for n, sizes in added_inputs.items()}
        self.module_calls, self.example_inputs = update_call_inputs(
            self.module_calls, self.example_inputs, inputs, examples
        )

    def untie(self, fqn: str, users: Iterable[fx.Node], tensor: Tensor) -> fx.Node:
        """Untie ``fqn``: give it a placeholder of its own with value ``tensor``, which only ``users`` read; return it.

        The other users keep the old placeholder. If that one went by ``fqn``, it takes another of its names, or a new
        one.
        """
        old = self.placeholders[fqn]
        spec = self.input_specs[old.name]
        if spec.target == fqn:
            others = [f for f in self.fqns_of(old) if f != fqn]
            if not others:  # another module reads this very parameter, as functional heads do
                others = [f"{fqn}_untied"]
                self.state_dict[others[0]] = self.state_dict[fqn]
                self.placeholders[others[0]] = old
            self.input_specs[old.name] = replace(spec, target=others[0])
        node = self._add_placeholder(fqn, tensor)
        for user in users:
            user.replace_input_with(old, node)
        return node

    def set_tensor(self, fqn: str, tensor: Tensor) -> None:
        """Give a lifted input another value, under all its FQNs, so that tied weights stay tied."""
        node = self.placeholders[fqn]
        for name in self.fqns_of(node):
            for tensors in (self.state_dict, self.constants):
                if name in tensors:
                    tensors[name] = tensor
        old = node.meta["val"]
        if (old.shape, old.stride(), old.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            node.meta["val"] = self.make_fake(tensor)

    def remove_tensor(self, fqn: str) -> None:
        """Erase a lifted input under all its names. Raises PassError if a node still reads it."""
        node = self.placeholders[fqn]
        if node.users:
            raise PassError(f"{fqn!r} is still read by {[u.name for u in node.users]}")
        names = self.fqns_of(node)
        for name in names:
            del self.placeholders[name]
            self.state_dict.pop(name, None)
            self.constants.pop(name, None)
        # A tied weight can have a placeholder for each name, although only one of them had users.
        for spec in [s for s in self.input_specs.values() if s.target in names]:
            self.graph.erase_node(self.nodes.pop(spec.arg.name))
            del self.input_specs[spec.arg.name]

    def drop_mutation_outputs(self, fqn: str) -> None:
        """Drop the outputs that update this parameter or buffer."""
        out = self.graph.output_node()
        values: Any = out.args[0]
        kept = [(s, v) for s, v in zip(self.output_specs, values, strict=True) if s.target != fqn]
        self.output_specs = [s for s, _ in kept]
        out.args = (tuple(v for _, v in kept),)

    def user_outputs(self, indices: Iterable[int]) -> list[fx.Node]:
        """Return the nodes of the user's outputs at these indices."""
        values: Any = self.graph.output_node().args[0]
        users = [v for v, s in zip(values, self.output_specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
        return [users[i] for i in indices]

    def keep_only(self, nodes: Collection[fx.Node], outputs: Sequence[fx.Node]) -> None:
        """Erase all nodes but ``nodes``, inputs included, and make ``outputs`` the only user outputs.

        Other outputs, such as updates of buffers, stay if their nodes are in ``nodes``.
        """
        out_node = self.graph.output_node()
        values: Any = out_node.args[0]
        pairs = zip(values, self.output_specs, strict=True)
        others = [(v, s) for v, s in pairs if s.kind != OutputKind.USER_OUTPUT and v in nodes]
        out_node.args = ((*(v for v, _ in others), *outputs),)
        own = (OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(v.name), None) for v in outputs)
        self.output_specs = [*(s for _, s in others), *own]
        for node in reversed(list(self.graph.nodes)):
            if node not in nodes and node is not out_node:
                self.graph.erase_node(node)
        self.input_specs = {n.name: self.input_specs[n.name] for n in self.graph.find_nodes(op="placeholder")}
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.placeholders = {f: n for f, n in self.placeholders.items() if n in nodes}

    def replace_by_input(self, node: fx.Node) -> fx.Node:
        """Replace a value by a positional input, before the program's own inputs; return its placeholder.

        The value stays in the graph."""
        name = f"from_{node.name}"
        with self.graph.inserting_before(self._first_call_node()):
            new = self.graph.create_node("placeholder", name, name=name)
        new.target = new.name  # as above
        new.meta["val"] = node.meta["val"]
        self.input_specs[new.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(new.name), None)
        self.nodes[new.name] = new
        node.replace_all_uses_with(new)
        return new

    def finish_subprogram(self, outputs: Any) -> ExportedProgram:
        """Return the program that :meth:`keep_only` left, with the remaining inputs. ``outputs`` is a tree of the shape
        of its outputs."""
        old, (first, *_) = self.program, self.program.module_call_graph
        own: Any = first.signature  # the program's, never None
        args, kwargs = own.in_spec.children()
        names = dict(zip([*user_inputs(old)][args.num_leaves :], kwargs.context, strict=True))
        inputs = [s.arg for s in self.input_specs.values() if s.kind == InputKind.USER_INPUT]
        positional = [a.name for a in inputs if a.name not in names]
        keywords = [names[a.name] for a in inputs if a.name in names]
        examples = old.example_inputs
        if examples is not None:
            same = positional == [*user_inputs(old)][: args.num_leaves]
            examples = (examples[0], {n: examples[1][n] for n in keywords}) if same else None
        signature = replace(
            own,
            inputs=inputs,
            in_spec=pytree.tree_structure(((0,) * len(positional), dict.fromkeys(keywords, 0))),
            out_spec=pytree.tree_structure(outputs),
            forward_arg_names=[*positional, *keywords],
        )
        return self._build_program(None, [replace(first, signature=signature)], examples)

    def signature(self) -> ExportGraphSignature:
        """Return the signature of the graph as it is now."""
        inputs = [self.input_specs[n.name] for n in self.graph.find_nodes(op="placeholder")]
        out_node = self.graph.output_node()
        values: Any = out_node.args[0]
        outputs: list[OutputSpec] = []
        for spec, value in zip(self.output_specs, values, strict=True):
            renamed = isinstance(value, fx.Node) and spec.arg.name != value.name
            outputs.append(replace(spec, arg=replace(spec.arg, name=value.name)) if renamed else spec)
        return ExportGraphSignature(inputs, outputs)

    def finish(self, root: torch.nn.Module | None = None) -> ExportedProgram:
        """Return the edited program, which its constructor validates.

        ``root`` is the module that holds the graphs of its blocks; None takes that of the opened program.
        """
        return self._build_program(root, self.module_calls, self.example_inputs)

    def _build_program(self, root: torch.nn.Module | None, module_calls: Any, examples: Any) -> ExportedProgram:
        old = self.program
        new = ExportedProgram(
            root=old.graph_module if root is None else root,
            graph=self.graph,
            graph_signature=self.signature(),
            state_dict=self.state_dict,
            range_constraints=self.ranges,
            module_call_graph=module_calls,
            example_inputs=examples,
            constants=self.constants,
            verifiers=old.verifiers,
        )
        # The shape environment of a program that was read from a file has lost these conditions.
        known = dict.fromkeys([*guards_of(old), *guards_of(new)])
        vars(new)["_guards_code"] = list(known)
        return new
