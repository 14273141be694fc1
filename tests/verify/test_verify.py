"""Verification: passes where adaptc is right, and fails, in the right row, wherever something was broken on purpose."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, LoraConfig
from adaptc.verification.compare import digests
from tests.support.families import FAMILIES
from tests.support.verify_nets import BASE, IDENTITY, MERGED, UNMERGE, compile_net, failed, net

# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_transformers_models_verify(family: str) -> None:
    model = FAMILIES[family].build()
    program = adaptc.compile(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    report = adaptc.verify(program, model)
    assert report.ok, report
    assert [c.passed for c in report.checks] == [True] * 4
    assert report[BASE].error == report[UNMERGE].error == 0
    # Layers that read one tensor are one product in the adapted program.
    assert report[IDENTITY].error <= (report[IDENTITY].limit / 4 if program.fusion.groups else 0)
    assert 0 < report[MERGED].error <= report[MERGED].limit
    assert ", run " in report[MERGED].where
    assert len(set(report.runs)) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_verifies_within_its_own_rounding(dtype: torch.dtype) -> None:
    model = net(dtype)
    report = adaptc.verify(compile_net(model), model)
    assert report.ok, report
    assert report[MERGED].relative < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_initialisations_that_change_the_base_verify(init: Any) -> None:
    model = net()
    report = adaptc.verify(compile_net(model, init), model)
    assert report.ok, report
    assert [c.passed for c in report.checks] == [True] * 4


def test_training_programs_verify_in_eval_mode() -> None:
    model = net().train()
    example = {"ids": torch.randint(0, 23, (3, 9)), "mask": torch.ones(3, 9, dtype=torch.int64)}
    config = LoraConfig(target_modules=["up"], lora_dropout=0.5, init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=example, training=True)
    assert adaptc.verify(program, model).ok
    assert model.training


def test_programs_without_adapter_and_without_model() -> None:
    model = net()
    program = compile_net(model)
    report = adaptc.verify(adaptc.unload(program), model)
    assert report.ok
    assert [c.passed for c in report.checks] == [True, None, None, None]
    report = adaptc.verify(adaptc.unload(program))
    assert not report.ok  # nothing was checked
    assert "nothing could be checked" in str(report)
    report = adaptc.verify(program)
    assert report.ok
    assert report[BASE].passed is None


def test_a_merged_program_is_not_its_base() -> None:
    model = net()
    assert failed(adaptc.verify(adaptc.merge(compile_net(model)), model)) == [BASE]


def test_loaded_programs_verify(tmp_path: Any) -> None:
    model = net()
    adaptc.save(compile_net(model), tmp_path / "p.pt2")
    assert adaptc.verify(adaptc.load(tmp_path / "p.pt2"), model).ok
    adaptc.save(compile_net(model, "pissa"), tmp_path / "p.pt2")
    report = adaptc.verify(adaptc.load(tmp_path / "p.pt2"), model)
    assert [c.passed for c in report.checks] == [None, None, True, True]


def test_models_may_be_programs_or_functions() -> None:
    model = net()
    program = compile_net(model)
    assert adaptc.verify(program, adaptc.unload(program)).ok
    assert adaptc.verify(program, lambda ids, mask: model(ids, mask)).ok


# -- nothing is changed ------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Counts its calls in a buffer that the output depends on."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(self.lin(x)) * self.calls


def test_buffers_are_put_back() -> None:
    model = Stateful().train()
    x = torch.randn(4, 5)
    config = LoraConfig(target_modules=["lin"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    before, own = {k: v.clone() for k, v in model.state_dict().items()}, digests(program.state_dict)
    report = adaptc.verify(program, model)
    assert report.ok, report
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert digests(program.state_dict) == own
    assert model.training
    assert model.norm.training


@pytest.mark.parametrize("form", ["apply", "weight"])
def test_buffers_of_what_is_bound_are_put_back(form: str) -> None:
    """They are its own, and neither the program's nor the model's."""
    model, x = Stateful().eval(), torch.randn(4, 5)
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x)
    bound = program.bind(program.binding, form=form)
    bound(x)
    before = {k: t.clone() for k, t in bound.state.items()}
    assert before["calls"] == 1
    adaptc.verify(program, bound)
    assert {k: t.item() for k, t in bound.state.items() if k == "calls"} == {"calls": 1}
    assert all(torch.equal(t, before[k]) for k, t in bound.state.items())


def test_runs_do_not_see_what_the_ones_before_them_wrote() -> None:
    model = Stateful().eval()
    config = LoraConfig(target_modules=["lin"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=torch.randn(4, 5))
    model.calls.fill_(2.0)  # so that a run's place among the others shows
    with torch.no_grad():
        model.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    report = adaptc.verify(program, model)
    assert report.ok, report
    assert model.calls == 2


def test_neither_program_nor_model_nor_random_state_change() -> None:
    model = net().train()
    model.drop.eval()
    program = compile_net(model)
    binding, held, weights = program.binding, digests(program.state_dict), digests(model.state_dict())
    nodes, torch_state = [n.name for n in program.graph.nodes], torch.get_rng_state()
    assert adaptc.verify(program, model).ok
    assert program.binding is binding
    assert digests(program.state_dict) == held
    assert digests(model.state_dict()) == weights
    assert [n.name for n in program.graph.nodes] == nodes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]


# -- inputs as the caller wants them -----------------------------------------------------------------------------------


def test_own_inputs_and_shapes_are_used() -> None:
    model, seen = net(), []

    def spy(ids: Tensor, mask: Tensor) -> Any:
        seen.append((ids.clone(), mask.shape))
        return model(ids, mask)

    program = compile_net(model)
    ids = torch.randint(0, 23, (2, 5))
    one = {"ids": ids, "mask": torch.ones_like(ids)}
    assert adaptc.verify(program, spy, inputs=one).runs == ("ids/mask 2x5",)
    assert torch.equal(seen[0][0], ids)
    seen.clear()
    report = adaptc.verify(program, spy, shapes=[{"ids": (4, 11)}, {"mask": (1, 2)}])
    assert [tuple(shape) for _, shape in seen] == [(4, 11), (1, 2)]
    assert report.runs == ("ids/mask 4x11", "ids/mask 1x2")
    seen.clear()
    assert len(adaptc.verify(program, spy, shapes=5).runs) == 5
    for bad in ([], 3, ["x"]):
        with pytest.raises(AdaptcError, match="inputs"):
            adaptc.verify(program, spy, inputs=bad)


def test_equal_seeds_give_equal_reports() -> None:
    model, seen = net(), []

    def spy(ids: Tensor, mask: Tensor) -> Any:
        seen.append(ids.clone())
        return model(ids, mask)

    program = compile_net(model)
    a, b, _ = (adaptc.verify(program, spy, seed=s, shapes=1) for s in (7, 7, 8))
    assert str(a) == str(b)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_reports_answer_by_name_only() -> None:
    report = adaptc.verify(compile_net(net()))
    assert isnan(report[BASE].error)
    with pytest.raises(KeyError):
        report["no such check"]
