"""The branch of ONNX files for calls without an adapter: where there is one, and that no other call takes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import IA3Config, LoraConfig
from adaptc.exporters.prepare_export import PreparedExport
from adaptc.exporters.slot_program import SlotInput
from adaptc.exporters.to_onnx.base_branch import add_base_branch
from adaptc.exporters.to_onnx.session import quiet_options
from tests.exporters.test_slot_program import Net, compiled, inputs
from tests.support.oracle import quiet


def graph_of(path: Path) -> Any:
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path), load_external_data=False).graph


def branch_nodes(path: Path) -> tuple[Any, Any] | None:
    """The nodes of both branches, (adapted, base); None for a file without them."""
    found = [n for n in graph_of(path).node if n.op_type == "If" and n.output[0] == graph_of(path).output[0].name]
    if not found:
        return None
    branches = {a.name: a.g.node for a in found[0].attribute}
    return branches["then_branch"], branches["else_branch"]


def operators(nodes: Any) -> Counter[str]:
    return Counter(n.op_type for n in nodes)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False),
        LoraConfig(r=3, target_modules=["down"], use_rslora=True, init_lora_weights=False),
    ],
    ids=["all", "one"],
)
def test_the_base_has_no_node_of_an_adapter(config: Any, tmp_path: Path) -> None:
    program = compiled(config)
    path = adaptc.exporters.export_onnx(program, tmp_path / "adapted.onnx")
    base = adaptc.exporters.export_onnx(adaptc.unload(program), tmp_path / "base.onnx", adapters="merged")
    branches = branch_nodes(path)
    assert branches is not None
    assert operators(branches[1]) == operators(graph_of(base).node)
    assert len(branches[0]) > len(branches[1])
    initializers = {i.name for i in graph_of(path).initializer}
    assert {n for node in branches[1] for n in node.input if "lora" in n or "scaling" in n} & initializers == set()


def test_no_branch_where_it_leaves_nothing_out(tmp_path: Path) -> None:
    one_graph = adaptc.exporters.export_onnx(compiled(), tmp_path / "one.onnx", base_branch=False)
    scales = compiled(IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]))
    vectors = adaptc.exporters.export_onnx(scales, tmp_path / "ia3.onnx")
    for path in (one_graph, vectors):
        assert branch_nodes(path) is None
    x = inputs(3, 5)
    (found,) = onnxruntime.InferenceSession(str(one_graph), quiet_options()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Net()(x).detach())


@given(fed=st.sets(st.sampled_from(["up", "down"])), rank=st.integers(1, 9))
def test_any_fed_input_gives_the_adapted_branch(
    fed: set[str], rank: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = _shared_file(tmp_path_factory)
    session = onnxruntime.InferenceSession(str(path), quiet_options())
    generator, x, net = torch.Generator().manual_seed(rank), inputs(3, 5), Net()
    feeds: dict[str, Any] = {"x": x.numpy()}
    for name in fed:
        layer = net.get_submodule(name)
        a = torch.randn(rank, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, rank, generator=generator)
        feeds |= {f"{name}.lora_A.weight": a.numpy(), f"{name}.lora_B.weight": b.numpy()}
        feeds[f"{name}.scaling.lora"] = np.array([0.7], np.float32)
        layer.weight.data += 0.7 * b @ a
    (found,) = session.run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slot", ["lora_A", "lora_B"])
def test_half_of_an_adapter_is_no_base(slot: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of two factors one alone is an error of ONNX Runtime, and does not give the base."""
    session = onnxruntime.InferenceSession(str(_shared_file(tmp_path_factory)), quiet_options())
    shape = {i.name: i.shape for i in session.get_overridable_initializers()}[f"up.{slot}.weight"]
    factor = np.ones([2 if isinstance(n, str) else n for n in shape], np.float32)
    with pytest.raises(Exception, match="MatMul"):
        session.run(None, {"x": inputs(3, 5).numpy(), f"up.{slot}.weight": factor})


_FILES: list[Path] = []


def _shared_file(factory: pytest.TempPathFactory) -> Path:
    if not _FILES:
        _FILES.append(adaptc.exporters.export_onnx(compiled(), factory.mktemp("branch") / "model.onnx"))
    return _FILES[0]


class Unusual(nn.Module):
    """A model with control flow, and outputs that no node or two names give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 5, bias=False)
        self.table = nn.Embedding(13, 7)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        y = self.up(x + self.table(tokens))
        z = torch.cond(x.sum() > 0, lambda t: self.down(torch.tanh(t)), lambda t: self.down(t) - 1, (y,))
        return z, y, x, y + 0, torch.arange(3)


@pytest.mark.parametrize("sign", [1, -1])
def test_control_flow_and_outputs_that_no_node_gives(sign: int, tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = LoraConfig(r=2, target_modules=["up", "table"], init_lora_weights=False)
    given = (inputs(2, 3).abs() * sign, torch.tensor([[1, 5, 12], [0, 2, 2]]))
    with quiet(".*grad attribute.*"):  # which torch.cond reads of weights, to copy them
        program = adaptc.compile(Unusual().eval(), config, example_inputs=given)
    path = adaptc.exporters.export_onnx(program, tmp_path / "model.onnx")
    assert branch_nodes(path) is not None
    session = adaptc.exporters.onnx_session(path)
    session.load_adapter("a", program)
    feeds = {"x": given[0].numpy(), "tokens": given[1].numpy()}
    for adapter, expected in (("a", program(*given)), (None, adaptc.unload(program)(*given))):
        found = list(session.run(feeds, adapter).values())
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(np.asarray(left)), right, rtol=1e-4, atol=1e-5)


def test_methods_whose_base_needs_values_compute_it_in_both_branches(tmp_path: Path) -> None:
    program = compiled(LoraConfig(use_dora=True, r=3, target_modules=["up", "down"], init_lora_weights=False))
    path = adaptc.exporters.export_onnx(program, tmp_path / "model.onnx")
    session = adaptc.exporters.onnx_session(path)
    session.load_adapter("a", program)
    x = inputs(3, 5)
    for adapter, expected in (("a", program(x)), (None, Net()(x).detach())):
        found = session.run({"x": x.numpy()}, adapter)["output"]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 7] x, float[7, rank] a, float[rank, 5] b, float[4, rank] c)
    => (float[n, 5] y, float[4, 5] v, float[n, 5] u, float[n, 5] w) {
    h = MatMul(x, a)
    d = MatMul(h, b)
    y = Add(bias, d)
    delta = MatMul(c, b)
    v = Add(weight, delta)
    u = MatMul(x, wide)
    w = Add(u, d)
}
"""


def test_sums_that_broadcast_stay_and_outputs_may_be_weights(tmp_path: Path) -> None:
    """In ``y`` the other term has another shape than the sum. In ``v`` it is a weight, and in ``w`` another output."""
    text = onnx.parser.parse_model(GRAPH)
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(text))
    by_name = {v.name: v for v in model.graph.inputs}
    generator = np.random.default_rng(2)
    sizes = {"bias": (5,), "weight": (4, 5), "wide": (7, 5)}
    weights = {n: generator.standard_normal(s).astype(np.float32) for n, s in sizes.items()}
    values = {v.name: v for node in model.graph for v in node.inputs if v is not None and v.name in weights}
    for name, array in weights.items():
        values[name].const_value = onnx_ir.tensor(array, name=name)
        values[name].shape, values[name].dtype = onnx_ir.Shape(array.shape), onnx_ir.DataType.FLOAT
        model.graph.initializers[name] = values[name]
    base = {"a": torch.zeros(7, 0), "b": torch.zeros(0, 5), "c": torch.zeros(4, 0)}
    for name, value in base.items():
        by_name[name].const_value = onnx_ir.tensor(value, name=name)
        model.graph.initializers[name] = by_name[name]
    assert add_base_branch(model, PreparedExport(cast(Any, None), ["x"], list("yvuw"), **_inputs_of(base)))
    onnx_ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), quiet_options())
    x = generator.standard_normal((3, 7)).astype(np.float32)
    y, v, u, w = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, np.broadcast_to(weights["bias"], (3, 5)))
    np.testing.assert_array_equal(v, weights["weight"])
    np.testing.assert_array_equal(w, u)
    fed = {
        name: generator.standard_normal([size or 2 for size in value.shape]).astype(np.float32)
        for name, value in base.items()
    }
    y, v, u, w = session.run(None, {"x": x, **fed})
    np.testing.assert_allclose(y, x @ fed["a"] @ fed["b"] + weights["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(w, x @ fed["a"] @ fed["b"] + u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v, fed["c"] @ fed["b"] + weights["weight"], rtol=1e-4, atol=1e-5)


def _inputs_of(base: dict[str, Tensor]) -> dict[str, Any]:
    shape = {n: ("rank", *t.shape[1:]) if n == "b" else (*t.shape[:1], "rank") for n, t in base.items()}
    return {"inputs": [SlotInput(n, n, n, "", n, shape[n], str(t.dtype), None, t) for n, t in base.items()]}
