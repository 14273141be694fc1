"""Injection: which nodes come into a program, and that nothing else in it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers.pytorch_utils import Conv1D

from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.protocol.regions import node_tag, region_tag, site_op
from tests.support.custom_models import Bilinear, Recurrent, SharedLayers, Strides, Tied
from tests.support.pass_checks import (
    Snapshot,
    assert_valid,
    attach,
    base_node_facts,
    export,
    inject_all,
    random_values,
    saved_and_loaded,
)

Build = Callable[[], nn.Module]
IDS = torch.tensor([[1, 2, 28], [5, 0, 3]])
#: model, inputs, and the form in which LoRA is injected at each parameter
NETS: dict[str, tuple[Build, tuple[Tensor, ...], dict[str, str]]] = {
    "linear": (lambda: nn.Linear(7, 5), (torch.randn(3, 7),), {"weight": "apply"}),
    "addmm": (lambda: Conv1D(5, 7), (torch.randn(3, 7),), {"weight": "apply"}),
    "conv": (lambda: nn.Conv2d(3, 7, (3, 1), padding=1), (torch.randn(2, 3, 5, 7),), {"weight": "apply"}),
    "groups": (lambda: nn.Conv1d(6, 9, 3, groups=3), (torch.randn(2, 6, 7),), {"weight": "apply"}),
    "embedding": (lambda: nn.Embedding(29, 5), (IDS,), {"weight": "apply"}),
    "transposed": (lambda: nn.ConvTranspose1d(3, 5, 3), (torch.randn(2, 3, 7),), {"weight": "weight"}),
    "bilinear": (Bilinear, (torch.randn(2, 5), torch.randn(2, 7)), {"layer.weight": "weight"}),
    "twice": (SharedLayers, (torch.randn(3, 7),), {"up.weight": "apply", "down.weight": "apply"}),
    "tied": (Tied, (IDS,), {"embed.weight": "apply", "head.weight": "apply", "mid.weight": "apply"}),
    "strides": (lambda: Strides(3, 5, 5), (torch.randn(2, 3, 13),), {"weight": "apply"}),
    "gru": (
        lambda: Recurrent(nn.GRU(7, 5, batch_first=True)),
        (torch.randn(2, 3, 7),),
        {"rnn.weight_ih_l0": "weight", "rnn.weight_hh_l0": "weight"},
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")


def net(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...], ExportedProgram]:
    torch.manual_seed(3)
    build, args, _ = NETS[name]
    model = build().to(dtype)
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    return model, args, export(model, *args)


@pytest.mark.parametrize("name", list(NETS))
def test_regions(name: str) -> None:
    """One tagged region of ATen ops per consumer or per weight, in the promised form, and nothing else changed."""
    model, args, program = net(name)
    before = Snapshot.record(program)
    forms = NETS[name][2]
    attachments = [attach(program, f) for f in forms]
    result = Inject(attachments, random_values(program, attachments))(program)
    before.check(program)
    assert result.count == len(attachments)
    assert [a.form for a in result.data] == list(forms.values())
    added = [f for a in result.data for f in [*a.slots.values(), a.scale_slot]]
    assert set(result.program.state_dict) == {*program.state_dict, *added}
    assert base_node_facts(result.program, added) == before.nodes

    regions: dict[str, list[Any]] = {}
    for node in result.program.graph.nodes:
        tag = node_tag(node)
        if tag is not None:
            assert isinstance(node.target, torch._ops.OpOverload)
            assert node.target.namespace == "aten"
            assert tag["method"] == "lora"
            assert tag["adapter"] == "default"
            assert {"val", "nn_module_stack", "torch_fn"} <= set(node.meta)
            regions.setdefault(tag["site"], []).append(tag["role"])
    for a in result.data:
        count = len(a.consumers) if a.form == "apply" else 1
        roles = regions.pop(a.id)
        assert roles.count("out") == count
        assert len(set(roles)) == len(roles) // count
    assert not regions
    changed = result.program.module()(*args)
    assert not torch.allclose(changed, model(*args), rtol=1e-2, atol=1e-2)
    again = saved_and_loaded(result.program)
    assert torch.equal(again.module()(*args), changed)
    assert [node_tag(n) for n in again.graph.nodes] == [node_tag(n) for n in result.program.graph.nodes]


@pytest.mark.parametrize("name", list(NETS))
def test_lifted_slots(name: str) -> None:
    """Trainable slots are parameters with a gradient, the scale is a buffer, the base has none, the model keeps its."""
    model, _, program = net(name)
    attachments = [attach(program, f) for f in NETS[name][2]]
    adapted, done, values = inject_all(program, attachments)
    specs = {s.target: s for s in adapted.graph_signature.input_specs}
    for a in done:
        for fqn in a.slots.values():
            assert specs[fqn].kind == InputKind.PARAMETER
            assert adapted.state_dict[fqn].requires_grad
            assert torch.equal(adapted.state_dict[fqn], values[fqn])
        assert a.scale_slot is not None
        assert (specs[a.scale_slot].kind, specs[a.scale_slot].persistent) == (InputKind.BUFFER, True)
    for fqn, value in program.state_dict.items():
        assert adapted.state_dict[fqn].data_ptr() == value.data_ptr()
        assert not adapted.state_dict[fqn].requires_grad
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(NETS))
def test_identity_slots_compute_the_base(name: str, dtype: torch.dtype) -> None:
    _, args, program = net(name, dtype)
    attachments = [attach(program, f) for f in NETS[name][2]]
    lifted = LiftedProgram(program)
    values = random_values(program, attachments)
    for a in attachments:
        op = site_op(lifted, a)
        identity = a.method.identity(op, op.canonical(lifted.tensor(a.fqn).detach()), torch.float32)
        values |= {
            a.method.files.fqn(a.slot_path, n, a.adapter): t.to(
                values[a.method.files.fqn(a.slot_path, n, a.adapter)].dtype
            )
            for n, t in identity.items()
        }
    adapted = Inject(attachments, values)(program).program
    assert_valid(adapted)
    assert torch.equal(adapted.module()(*args), program.module()(*args))


def test_the_output_is_adapted() -> None:
    """Where the adapted layer's output is the program's, also twice, the signature names the region's result."""

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.lin(x)
            return {"y": y, "x": x, "again": [y, self.lin.bias], "z": y + 1}

    torch.manual_seed(1)
    x = torch.randn(3, 7)
    program = export(Outputs(), x)
    adapted, (a,), values = inject_all(program, [attach(program, "lin.weight")])
    (out,) = [n for n in adapted.graph.nodes if region_tag(n)]
    names = [s.arg.name for s in adapted.graph_signature.output_specs]
    (values_out,) = adapted.graph.output_node().args
    assert names == [n.name for n in values_out]  # type: ignore[union-attr]
    assert [i for i, n in enumerate(names) if n == out.name] == [0, 2]
    got, base = adapted.module()(x), program.module()(x)
    A, B = (values[f] for f in a.slots.values())
    change = x @ (B @ A).T * 5 / 3
    torch.testing.assert_close(got["y"], base["y"] + change)
    assert torch.equal(got["again"][0], got["y"])
    assert torch.equal(got["z"], got["y"] + 1)
    assert torch.equal(got["x"], x)
    back = Unload()(adapted).program
    assert [s.arg.name for s in back.graph_signature.output_specs] == [
        s.arg.name for s in program.graph_signature.output_specs
    ]


class Sequenced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding="same")
        self.head = nn.Linear(9, 5)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).mT).mT
        return self.head(torch.tanh(h)) * scale[:, None]


def symbols(program: ExportedProgram) -> set[str]:
    found: set[str] = set()
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            found |= {
                str(s)
                for size in (*val.shape, *val.stride())
                if isinstance(size, torch.SymInt)
                for s in size.node.expr.free_symbols
            }
    return found


@pytest.mark.parametrize("rank", [1, 3])
def test_sizes_stay_free(rank: int) -> None:
    """No symbol comes or goes, no range or guard changes, and any batch and length runs."""
    torch.manual_seed(4)
    batch, length = Dim("batch", min=1, max=61), Dim("length", min=3, max=59)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    args = (torch.randint(29, (4, 8)), torch.randn(4, 8, 1)[..., 0])
    model = Sequenced()
    model.forward = lambda ids, scale: Sequenced.forward(model, ids, scale[:, :1])  # type: ignore[method-assign]
    program = export(model, *args, dynamic_shapes=shapes)
    env = next(n.meta["val"].shape[0].node.shape_env for n in program.graph.nodes if n.name == "ids")
    known, guards = dict(env.var_to_range), len(env.guards)
    method = Lora(r=rank, alpha=5)
    attachments = [attach(program, f, method) for f in ("embed.weight", "conv.weight", "head.weight")]
    adapted, done, values = inject_all(program, attachments)
    assert adapted.range_constraints == program.range_constraints
    assert symbols(adapted) == symbols(program)
    assert dict(env.var_to_range) == known
    assert len(env.guards) == guards
    merged = Merge(done, values)(adapted).program
    for b, n in ((1, 3), (7, 13), (61, 5)):
        ids, scale = torch.randint(29, (b, n)), torch.randn(b, n)
        torch.testing.assert_close(adapted.module()(ids, scale), merged.module()(ids, scale), rtol=1e-4, atol=1e-4)
