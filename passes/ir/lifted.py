"""Edits of an exported program's lifted inputs: the only file that touches placeholders, signature and state together.

Open a program with ``Lifted(program)``, change its ``graph`` freely, add and remove parameters here, and ``finish()``.
The program given is never modified: its graph is copied node by node, its state dict is copied as a dict (tensors are
shared). Every placeholder always has exactly one input spec, in the same order: ``finish`` derives the signature from
the placeholders instead of keeping the two in step by hand.

Private torch use, with the public route that was tried:
- ``torch._guards.detect_fake_mode`` finds the fake mode of a graph. Public: none; a FakeTensor's ``fake_mode`` is as
  private.
- ``FakeTensor`` and ``FakeTensorMode``: a fake of a known mode, and a mode without a program. Public: none.
- ``ShapeEnv.suppress_guards``. Public: none, nor is there a public way from a fake value to its environment.
- ``ExportedProgram._guards_code``: the conditions on sizes. Public: none; ``program.module()`` has them as a function,
  which needs example inputs, and raises an AssertionError that names no sizes.
- the ``ExportedProgram`` constructor. Public: rewriting ``program.module()`` and exporting again, which costs a full
  capture and loses ``nn_module_stack`` (the site paths).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
from adaptc.passes.ir.input_tree import with_inputs
from adaptc.passes.ir.storage import storage_key
from adaptc.passes.ir.trees import pytree


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names, sharing ``meta`` values but not the ``meta`` dicts."""
    new = empty_like(graph)
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.node_copy(node, values.__getitem__)
        # fx gives a node that is called like a builtin ("input") another name; torch.export keeps such names.
        copied.name = node.name
        values[node] = copied
    return new


def empty_like(graph: fx.Graph) -> fx.Graph:
    """A graph without nodes that makes code as ``graph`` does."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    new.set_codegen(graph._codegen)
    return new


def user_inputs(program: ExportedProgram) -> dict[str, Any]:
    """Name -> what the graph has for each of the user's flat inputs, in order: a fake tensor, a size, or a constant."""
    return inputs_of(program.graph, program.graph_signature)


def inputs_of(graph: fx.Graph, signature: ExportGraphSignature) -> dict[str, Any]:
    """The same of a graph and its signature."""
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    args = [s.arg for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
    return {a.name: a.value if isinstance(a, ConstantArgument) else nodes[a.name].meta.get("val") for a in args}


def lifted_names(signature: ExportGraphSignature) -> dict[str, str]:
    """Placeholder -> the name of the parameter, buffer or constant that it stands for."""
    return {s.arg.name: s.target for s in signature.input_specs if s.target is not None}  # type: ignore[union-attr]


def guards_of(program: ExportedProgram) -> list[str]:
    """What torch assumed of input sizes when it captured the program, as conditions such as
    ``L['x'].size()[0] != 1``."""
    return list(getattr(program, "_guards_code", ()))


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode of a graph's values; None when it has none."""
    return detect_fake_mode([n.meta.get("val") for n in graph.nodes])


def fake_of(graph: fx.Graph) -> Callable[[Tensor], Tensor]:
    """A function that makes fakes of tensors, with static shape, in a graph's own mode."""
    mode = fake_mode_of(graph)
    return lambda tensor: _fake(mode, tensor)


def fake_tensors() -> FakeTensorMode:
    """A context in which tensors are made without values, apart from any program."""
    return FakeTensorMode()


@contextmanager
def sizes_stay_free(fakes: Iterable[Any]) -> Iterator[None]:
    """Keep what runs on ``fakes`` from narrowing the program's symbolic sizes, and what it creates among them.

    A fake convolution asks for the batch size to choose its kernel, and the answer would become part of the program.
    """
    mode = detect_fake_mode(list(fakes))
    env = getattr(mode, "shape_env", None)
    # In the mode, so that an arange is a fake of the same program and not a tensor.
    with nullcontext() if mode is None else mode, nullcontext() if env is None else env.suppress_guards():
        yield


def _fake(mode: Any, tensor: Tensor) -> Tensor:
    if mode is None:
        raise CaptureError("the graph has no fake values; capture it with torch.export.export")
    # Ten times cheaper than mode.from_tensor, which describes the tensor's storage first; slots are plain tensors.
    meta = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, meta, tensor.device)
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


class Lifted:
    """A program opened for editing; see the module docstring. With ``edit=False`` it is opened to look only: the graph
    is the program's own and must not be changed."""

    def __init__(self, program: ExportedProgram, *, edit: bool = True) -> None:
        self.program = program
        self.graph = copy_graph(program.graph) if edit else program.graph
        self.state_dict: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.graph.nodes}
        self.specs: dict[str, InputSpec] = {s.arg.name: s for s in program.graph_signature.input_specs}
        self.outputs: list[OutputSpec] = list(program.graph_signature.output_specs)
        self.placeholders: dict[str, fx.Node] = {}
        self._first_user: fx.Node | None = None
        for node in self.graph.find_nodes(op="placeholder"):
            spec = self.specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self._first_user = self._first_user or node
            elif spec.target is not None:
                self.placeholders[spec.target] = node
        self.calls: list[Any] = list(program.module_call_graph)
        self.examples: Any = program.example_inputs
        self.fake_mode = fake_mode_of(self.graph)
        self._add_aliases()

    def _add_aliases(self) -> None:
        """FQNs of tied weights that have no placeholder of their own point to the one that carries their uses."""
        by_storage: dict[Any, fx.Node] = {}
        for fqn, node in self.placeholders.items():
            tensor = self.state_dict.get(fqn, self.constants.get(fqn))
            # Of two placeholders over one storage, the one that is read carries the uses.
            if isinstance(tensor, Tensor) and (node.users or storage_key(tensor) not in by_storage):
                by_storage[storage_key(tensor)] = node
        for fqn, tensor in self.state_dict.items():
            node = by_storage.get(storage_key(tensor)) if isinstance(tensor, Tensor) else None
            if node is not None and (fqn not in self.placeholders or not self.placeholders[fqn].users):
                self.placeholders[fqn] = node

    def tensor(self, fqn: str) -> Tensor:
        """The value behind a parameter, buffer or constant."""
        return self.state_dict[fqn] if fqn in self.state_dict else self.constants[fqn]

    def freeze(self) -> None:
        """Replace parameters by twins that share their memory and require no grad, so that flags of the model stay."""
        twins: dict[int, torch.nn.Parameter] = {}
        for fqn, tensor in self.state_dict.items():
            if isinstance(tensor, torch.nn.Parameter):
                twin = twins.setdefault(id(tensor), torch.nn.Parameter(tensor.detach(), requires_grad=False))
                self.state_dict[fqn] = twin

    def fqns(self, node: fx.Node) -> list[str]:
        """All FQNs a placeholder stands for (several when weights are tied)."""
        return [f for f, n in self.placeholders.items() if n is node]

    def fake(self, tensor: Tensor) -> Tensor:
        """``tensor`` as a fake of this graph's mode, with static shape."""
        return _fake(self.fake_mode, tensor)

    def add(self, fqn: str, tensor: Tensor) -> fx.Node:
        """A new lifted input: a parameter if ``tensor`` is an ``nn.Parameter``, else a persistent buffer."""
        if fqn in self.state_dict or fqn in self.constants:
            raise ConfigError(
                f"the program already has a tensor named {fqn!r}: another adapter's, or the model's own. Give this "
                "adapter another adapter_name, or rename the module."
            )
        return self._placeholder(fqn, tensor)

    def _placeholder(self, fqn: str, tensor: Tensor) -> fx.Node:
        is_param = isinstance(tensor, torch.nn.Parameter)
        kind = InputKind.PARAMETER if is_param else InputKind.BUFFER
        name = ("p_" if is_param else "b_") + fqn.replace(".", "_")
        # Without user inputs, the first node that is no placeholder: there is always the output.
        before = self._first_user or next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(before):
            node = self.graph.create_node("placeholder", name, name=name)
        node.target = node.name  # fx may have made the name unique or legal
        node.meta["val"] = self.fake(tensor)
        persistent = None if is_param else True
        self.specs[node.name] = InputSpec(kind, TensorArgument(node.name), fqn, persistent)
        self.state_dict[fqn] = tensor
        self.placeholders[fqn] = node
        self.nodes[node.name] = node
        return node

    def add_input(
        self, name: str, like: fx.Node, axes: Sequence[int], dtype: torch.dtype, more: Sequence[int] = ()
    ) -> fx.Node:
        """A new keyword input of the caller's, with these axes of the input ``like``, and of ``more`` sizes behind
        them; its example is zeros."""
        if name in self.specs or any(n.name == name for n in self.graph.nodes):
            raise ConfigError(
                f"the program has an input or a value called {name!r} already, and one of that name is to be added"
            )
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.create_node("placeholder", name, name=name)
        model: Tensor = like.meta["val"]
        with nullcontext() if self.fake_mode is None else self.fake_mode:
            node.meta["val"] = torch.empty([*(model.shape[i] for i in axes), *more], dtype=dtype, device=model.device)
        self.specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        self.nodes[node.name] = node
        self._retree({name: (axes, more)}, like.name)
        return node

    def remove_input(self, name: str) -> None:
        """Erase a keyword input that nothing reads any more."""
        self.graph.erase_node(self.nodes.pop(name))
        del self.specs[name]
        self._retree()

    def _retree(self, new: Mapping[str, tuple[Any, Any]] = MappingProxyType({}), like: str = "") -> None:
        names = [n.name for n in self.graph.find_nodes(op="placeholder")]
        inputs = [self.specs[n].arg for n in names if self.specs[n].kind == InputKind.USER_INPUT]
        at = list(user_inputs(self.program)).index(like) if new else 0
        examples = {n: (at, *sizes, self.nodes[n].meta["val"].dtype) for n, sizes in new.items()}
        self.calls, self.examples = with_inputs(self.calls, self.examples, inputs, examples)

    def split(self, fqn: str, users: Iterable[fx.Node], tensor: Tensor) -> fx.Node:
        """Untie ``fqn``: give it a placeholder of its own with value ``tensor``, read by ``users`` alone.

        The other users keep the old placeholder. If it went by this FQN it takes another of its own, or a new one.
        """
        old = self.placeholders[fqn]
        spec = self.specs[old.name]
        if spec.target == fqn:
            others = [f for f in self.fqns(old) if f != fqn]
            if not others:  # the same parameter, read by another module: functional heads do this
                others = [f"{fqn}_untied"]
                self.state_dict[others[0]] = self.state_dict[fqn]
                self.placeholders[others[0]] = old
            self.specs[old.name] = replace(spec, target=others[0])
        node = self._placeholder(fqn, tensor)
        for user in users:
            user.replace_input_with(old, node)
        return node

    def set(self, fqn: str, tensor: Tensor) -> None:
        """Give a lifted input another value; all its FQNs follow, so that tied weights stay tied."""
        node = self.placeholders[fqn]
        for name in self.fqns(node):
            for tensors in (self.state_dict, self.constants):
                if name in tensors:
                    tensors[name] = tensor
        old = node.meta["val"]
        if (old.shape, old.stride(), old.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            node.meta["val"] = self.fake(tensor)

    def remove(self, fqn: str) -> None:
        """Erase a lifted input that nothing reads any more, under all its names."""
        node = self.placeholders[fqn]
        if node.users:
            raise PassError(f"{fqn!r} is still read by {[u.name for u in node.users]}")
        names = self.fqns(node)
        for name in names:
            del self.placeholders[name]
            self.state_dict.pop(name, None)
            self.constants.pop(name, None)
        # A tied weight can have a placeholder per name, of which one is read.
        for spec in [s for s in self.specs.values() if s.target in names]:
            self.graph.erase_node(self.nodes.pop(spec.arg.name))
            del self.specs[spec.arg.name]

    def write_back_nothing(self, fqn: str) -> None:
        """Leave out the outputs that are there to be written to a parameter or buffer after each call."""
        out = self.graph.output_node()
        values: Any = out.args[0]
        kept = [(s, v) for s, v in zip(self.outputs, values, strict=True) if s.target != fqn]
        self.outputs = [s for s, _ in kept]
        out.args = (tuple(v for _, v in kept),)

    def user_outputs(self, indices: Iterable[int]) -> list[fx.Node]:
        """Some of the user's outputs."""
        values: Any = self.graph.output_node().args[0]
        users = [v for v, s in zip(values, self.outputs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
        return [users[i] for i in indices]

    def keep(self, nodes: Collection[fx.Node], outputs: Sequence[fx.Node]) -> None:
        """Erase all other nodes, inputs among them, and give these ``outputs`` alone."""
        out_node = self.graph.output_node()
        values: Any = out_node.args[0]
        pairs = list(zip(values, self.outputs, strict=True))
        users = {v: s for v, s in pairs if s.kind == OutputKind.USER_OUTPUT}
        others = [(v, s) for v, s in pairs if s.kind != OutputKind.USER_OUTPUT and v in nodes]
        out_node.args = ((*(v for v, _ in others), *outputs),)
        self.outputs = [*(s for _, s in others), *(users[v] for v in outputs)]
        for node in reversed(list(self.graph.nodes)):
            if node not in nodes and node is not out_node:
                self.graph.erase_node(node)
        self.specs = {n.name: self.specs[n.name] for n in self.graph.find_nodes(op="placeholder")}
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.placeholders = {f: n for f, n in self.placeholders.items() if n in nodes}

    def finish_part(self, names: Sequence[str]) -> ExportedProgram:
        """The program after :meth:`keep`, whose outputs have these names; it takes the keywords that are left."""
        old, (first, *_) = self.program, self.program.module_call_graph
        kwargs = old.call_spec.in_spec.children()[1]  # type: ignore[union-attr]
        left = [n for n, s in zip(kwargs.context, user_inputs(old), strict=True) if s in self.specs]
        values = {} if old.example_inputs is None else old.example_inputs[1]
        examples = {n: values[n] for n in left if n in values}
        signature = replace(
            first.signature,  # type: ignore[type-var]
            inputs=[arg for arg in first.signature.inputs if arg.name in self.specs],  # type: ignore[union-attr]
            in_spec=pytree.tree_structure(((), dict.fromkeys(left, 0))),
            out_spec=pytree.tree_structure(dict.fromkeys(names, 0)),
            forward_arg_names=left,
        )
        return self._program(None, [replace(first, signature=signature)], ((), examples) if examples else None)

    def signature(self) -> ExportGraphSignature:
        """The signature of the graph as it is now."""
        inputs = [self.specs[n.name] for n in self.graph.find_nodes(op="placeholder")]
        out_node = self.graph.output_node()
        values = out_node.args[0]
        outputs: list[OutputSpec] = []
        for spec, value in zip(self.outputs, values, strict=True):  # type: ignore[arg-type]
            renamed = isinstance(value, fx.Node) and spec.arg.name != value.name
            outputs.append(replace(spec, arg=replace(spec.arg, name=value.name)) if renamed else spec)
        return ExportGraphSignature(inputs, outputs)

    def finish(self, root: fx.GraphModule | None = None) -> ExportedProgram:
        """The edited program, which its constructor validates. ``root``: what has the graphs of its blocks, if not the
        program that was opened."""
        return self._program(root, self.calls, self.examples)

    def _program(self, root: fx.GraphModule | None, calls: Any, examples: Any) -> ExportedProgram:
        old = self.program
        new = ExportedProgram(
            root=old.graph_module if root is None else root,
            graph=self.graph,
            graph_signature=self.signature(),
            state_dict=self.state_dict,
            range_constraints=old.range_constraints,
            module_call_graph=calls,
            example_inputs=examples,
            constants=self.constants,
            verifiers=old.verifiers,
        )
        # Of a program that was read from a file the graph's own sizes do not know them.
        known = dict.fromkeys([*guards_of(old), *guards_of(new)])
        vars(new)["_guards_code"] = list(known)
        return new
