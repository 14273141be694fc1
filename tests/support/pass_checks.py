"""What tests of the passes share: small exports, attachments made by hand, and comparisons of whole programs.

A pass is judged on the program alone, without the API above it: sites are looked up, slot values are random, and two
programs are compared node by node.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.analysis.sites import Site, find_sites
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.attachment import Attachment
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.regions import node_tag, site_op


def export(model: nn.Module, *args: Any, strict: bool = False, **options: Any) -> ExportedProgram:
    return torch.export.export(model, args, strict=strict, **options)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    """The program after a trip to a file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def assert_valid(program: ExportedProgram) -> None:
    program.graph.lint()
    program.validate()


def site(program: ExportedProgram, fqn: str) -> Site:
    return next(s for s in find_sites(program) if s.fqn == fqn)


def attach(program: ExportedProgram, fqn: str, method: Method | None = None, **changes: Any) -> Attachment:
    """``method`` (LoRA of rank 3) at the site of a parameter."""
    s = site(program, fqn)
    key = s.module if s.param == "weight" else s.fqn
    a = Attachment(key, s.module, s.param, s.kind, method or Lora(r=3, alpha=5), consumers=s.consumers)
    return dataclasses.replace(a, **changes)


def random_values(program: ExportedProgram, attachments: Iterable[Attachment], seed: int = 0) -> dict[str, Tensor]:
    """A random tensor for every trainable slot, in float32 above half precision, and the scale."""
    generator = torch.Generator().manual_seed(seed)
    lifted = LiftedProgram(program)
    out: dict[str, Tensor] = {}
    for a in attachments:
        op, base = site_op(lifted, a), lifted.tensor(a.fqn).dtype
        dtype = torch.float32 if base in (torch.float16, torch.bfloat16) else base
        identity = a.method.identity(op, op.canonical(lifted.tensor(a.fqn).detach()), dtype)
        for name, slot in a.method.slots(op).items():
            value = torch.randn(slot.shape, generator=generator, dtype=torch.float64).to(slot.dtype or dtype)
            value = value if slot.trainable else identity[name]
            out[a.method.files.fqn(a.slot_path, name, a.adapter)] = value
        scale = a.method.scale(op)
        if scale is not None:
            out[a.scale_fqn] = torch.tensor(scale, dtype=dtype)
    return out


def inject(
    program: ExportedProgram, *fqns: str, method: Method | None = None, seed: int = 0
) -> tuple[ExportedProgram, list[Attachment], dict[str, Tensor]]:
    """(program with ``method`` at these parameters, the attachments as injected, their random values)."""
    attachments = [attach(program, f, method) for f in fqns]
    return inject_all(program, attachments, seed)


def inject_all(
    program: ExportedProgram, attachments: Sequence[Attachment], seed: int = 0
) -> tuple[ExportedProgram, list[Attachment], dict[str, Tensor]]:
    values = random_values(program, attachments, seed)
    result = Inject(attachments, values)(program)
    return result.program, list(result.data), values


def factors(a: Attachment, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of a LoRA, A and B as matrices."""
    A, B = (values[f] for n, f in a.slots.items() if not n.endswith("bias"))
    assert a.scale_slot is not None
    return A.flatten(1), B.flatten(1), float(values[a.scale_slot])


def describe(node: fx.Node) -> tuple[Any, ...]:
    """All of a node but its custom meta, as text: two nodes that describe alike compute alike."""
    val = node.meta.get("val")
    shown = (tuple(map(str, val.shape)), str(val.dtype), tuple(map(str, val.stride()))) if torch.is_tensor(val) else val
    stack = {k: (p, str(c)) for k, (p, c) in (node.meta.get("nn_module_stack") or {}).items()}
    return (node.name, node.op, str(node.target), repr(node.args), repr(node.kwargs), repr(shown), repr(stack))


@dataclasses.dataclass(eq=False)
class Snapshot:
    """Everything a program consists of, to be compared with the same program later, or with another one."""

    nodes: list[tuple[Any, ...]]
    code: str
    signature: str
    state: dict[str, Any]
    constants: dict[str, Any]
    flags: dict[str, bool]

    @classmethod
    def record(cls, program: ExportedProgram) -> Snapshot:
        state, constants = dict(program.state_dict), dict(program.constants)
        flags = {k: t.requires_grad for k, t in state.items()}
        nodes = [describe(n) for n in program.graph.nodes]
        return cls(nodes, program.graph_module.code, str(program.graph_signature), state, constants, flags)

    def check(self, program: ExportedProgram) -> None:
        """``program`` is node by node, and tensor object by tensor object, what was recorded."""
        now = Snapshot.record(program)
        assert now.nodes == self.nodes
        assert now.code == self.code
        assert now.signature == self.signature
        assert now.flags == self.flags
        for old, new in ((self.state, now.state), (self.constants, now.constants)):
            assert list(old) == list(new)
            assert all(new[k] is v for k, v in old.items())


def base_node_facts(program: ExportedProgram, added_inputs: Iterable[str] = ()) -> list[tuple[Any, ...]]:
    """Descriptions of the nodes that are in no region and read no lifted input of ``added_inputs``, as if there were
    none."""
    copy = LiftedProgram(program)
    names = {copy.placeholders[f].name for f in added_inputs}
    for node in copy.graph.nodes:
        tag = node_tag(node)
        if tag is not None and tag["role"] == "out":
            node.replace_all_uses_with(copy.nodes[tag["base"]])
    return [describe(n) for n in copy.graph.nodes if node_tag(n) is None and n.name not in names]
