"""Modules that train with chosen products: PEFT's losses and gradients, what is told, and where nothing is chosen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol import matmul_op as op
from adaptc.passes.protocol.matmul_op import ALL_ROW_CLASSES, LINEAR, ONEDNN
from adaptc.passes.train.base_products import frozen_linear
from adaptc.program import module_factory
from tests.program.test_training import KW, batch, peft_twin, randomised, steps
from tests.support.families import FAMILIES

FORWARD, GRADIENTS = "matmuls in training", "gradients of inputs"


def _choose(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    return MatmulChoice(ONEDNN, ALL_ROW_CLASSES, "measured: faster here", (0.5, 0.75))


def _choose_for_gradient(out: int, width: int, dtype: torch.dtype) -> MatmulChoice:
    return (
        _choose(out, width, dtype) if dtype == torch.float32 else MatmulChoice(LINEAR, (), "measured: the fastest here")
    )


@pytest.fixture(autouse=True)
def fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(module_factory, "choose_matmul", _choose)
    monkeypatch.setattr(module_factory, "choose_for_gradient", _choose_for_gradient)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return FAMILIES["llama"].build()


def compiled(model: nn.Module, **options: object) -> adaptc.AdaptedProgram:
    config = LoraConfig(**KW, task_type="CAUSAL_LM")
    return randomised(adaptc.compile(model, config, training=True, **options), 1)


def told(module: nn.Module) -> int:
    """How many steps of a module's graph are told what computes their products."""
    nodes = module.graph.nodes  # type: ignore[union-attr]
    return sum(bool(n.kwargs.get("kinds")) or n.target is frozen_linear for n in nodes)


@pytest.mark.long
def test_fifty_steps_are_pefts(llama: nn.Module) -> None:
    program = compiled(llama)
    module, theirs = program.module(), peft_twin(llama, program)
    assert told(module) > 5
    found = [
        steps(lambda b, m=m: m(**b).loss, [p for p in m.parameters() if p.requires_grad], 50) for m in (module, theirs)
    ]
    assert found[0][-1] < found[0][0]
    # Adam divides by what a gradient was so far, so roundings of small ones grow from step to step.
    torch.testing.assert_close(found[0][:20], found[1][:20], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=2e-3, atol=1e-5)


@pytest.mark.long
def test_the_module_and_the_report_say_what_was_chosen(llama: nn.Module) -> None:
    program = compiled(llama)
    assert adaptc.report(program).training == ()
    module = program.module()
    layers = len(module.products[0].choices)
    rows = "1, 2 to 4, 5 to 16, 17 to 256, more than 256 rows"
    lines = [
        f"{FORWARD}, float32: {layers} by onednn at {rows} (measured: faster here, 0.50 to 0.75 of linear's time)",
        f"{GRADIENTS}, bfloat16: {layers} by linear (measured: the fastest here)",
    ]
    report = adaptc.report(program)
    for line in lines:
        assert line in "\n".join(map(str, module.products))
        assert line in str(report)
    assert report.to_dict()["training"][f"{GRADIENTS}, bfloat16"][0]["count"] == layers
    assert not any("adaptc" in str(n.target) for n in program.graph.nodes)


@pytest.mark.long
@pytest.mark.parametrize("how", ["switch", "fuse", "compilers", "frozen"])
def test_where_nothing_is_chosen(how: str, llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(llama)
    if how == "switch":
        monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    program.fuse = how != "fuse"
    if how == "frozen":
        config = LoraConfig(**KW, inference_mode=True)
        program = adaptc.compile(llama, config, training=True)
    module = program.module(check_guards=how != "compilers")
    assert told(module) == 0
    assert how == "compilers" or module.products == ()


@pytest.mark.long
@pytest.mark.parametrize("how", ["copied", "pickled", "checkpointed"])
def test_other_forms_of_the_module_are_equal_to_the_bit(how: str, llama: nn.Module) -> None:
    program = compiled(llama)
    module = program.module()
    if how == "copied":
        other = copy.deepcopy(module)
    elif how == "pickled":
        other = pickle.loads(pickle.dumps(module))
    else:
        other = program.module(gradient_checkpointing=True)
    found = []
    for m in (module, other):
        m.zero_grad()
        m(**batch(2)).loss.backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        assert m.products
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.long
def test_heads_that_train_are_left_alone(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(**KW, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    program = randomised(adaptc.compile(llama, config, training=True), 1)
    module = program.module()
    monkeypatch.setenv("ADAPTC_PRODUCTS", "plain")
    plain = program.module()
    heads = [n for n in module.graph.nodes if getattr(n.target, "__name__", "") == "linear_cross_entropy"]
    assert heads
    assert not any(n.kwargs.get("kinds") for n in heads)
    found = []
    for m in (module, plain):
        m.zero_grad()
        m(**batch(2)).loss.backward()
        found.append({n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    assert any("lm_head" in n for n in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_machine_without_the_op_trains_the_same(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled(llama).module()
    expected = module(**batch(2)).loss
    monkeypatch.setattr(op, "_pointwise", None)
    torch.testing.assert_close(module(**batch(2)).loss, expected, rtol=1e-5, atol=1e-6)
