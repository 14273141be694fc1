"""Verification: passes where adaptc is right, and fails, in the right row, wherever something was broken on purpose."""

from __future__ import annotations

from math import inf, isnan, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, LoraConfig, api
from adaptc.comparing import compare, difference, digests, leaves
from adaptc.methods.lora import Lora
from tests.families import FAMILIES

BASE, IDENTITY, MERGED, UNMERGE = (
    "base equals model",
    "identity equals base",
    "merged equals adapted",
    "unmerge is bitwise",
)


class Net(nn.Module):
    """Token ids in, a dict of tuples out, with a dropout that eval mode must turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 6)
        self.up = nn.Linear(6, 10)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        h = self.up(self.embed(ids)) * mask.unsqueeze(-1)
        return {"pair": (h, self.head(self.drop(torch.tanh(h)))), "argmax": h.argmax(-1)}


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def compiled(model: Net, init: Any = False, **options: Any) -> adaptc.AdaptedProgram:
    example = {"ids": torch.randint(0, 23, (3, 9)), "mask": torch.ones(3, 9, dtype=torch.int64)}
    config = LoraConfig(r=3, target_modules=["up", "head"], init_lora_weights=init, **options)
    return adaptc.compile(model, config, example_inputs=example)


def failed(report: Any) -> list[str]:
    return [c.name for c in report.checks if c.passed is False]


# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_transformers_models_verify(family: str) -> None:
    model = FAMILIES[family].build()
    program = adaptc.compile(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    report = adaptc.verify(program, model)
    assert report.ok, report
    assert [c.passed for c in report.checks] == [True] * 4
    assert report[BASE].error == report[IDENTITY].error == report[UNMERGE].error == 0
    assert 0 < report[MERGED].error <= report[MERGED].limit
    assert report[MERGED].where.startswith("logits, run")
    assert len(set(report.runs)) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_verifies_within_its_own_rounding(dtype: torch.dtype) -> None:
    model = net(dtype)
    report = adaptc.verify(compiled(model), model)
    assert report.ok, report
    assert report[MERGED].relative < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
def test_initialisations_that_change_the_base_verify(init: Any) -> None:
    model = net()
    report = adaptc.verify(compiled(model, init), model)
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
    program = compiled(model)
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
    assert failed(adaptc.verify(adaptc.merge(compiled(model)), model)) == [BASE]


def test_loaded_programs_verify(tmp_path: Any) -> None:
    model = net()
    adaptc.save(compiled(model), tmp_path / "p.pt2")
    assert adaptc.verify(adaptc.load(tmp_path / "p.pt2"), model).ok
    adaptc.save(compiled(model, "pissa"), tmp_path / "p.pt2")
    report = adaptc.verify(adaptc.load(tmp_path / "p.pt2"), model)
    assert [c.passed for c in report.checks] == [None, None, True, True]


def test_models_may_be_programs_or_functions() -> None:
    model = net()
    program = compiled(model)
    assert adaptc.verify(program, adaptc.unload(program)).ok
    assert adaptc.verify(program, lambda ids, mask: model(ids, mask)).ok


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_changed_model_is_seen() -> None:
    model = net()
    program = compiled(model)
    with torch.no_grad():
        model.head.weight = nn.Parameter(model.head.weight.clone())  # no longer the program's own
        model.head.weight[4, 7] += 0.01
    report = adaptc.verify(program, model)
    assert failed(report) == [BASE]
    assert report[BASE].where.startswith("pair[1]")
    assert 0 < report[BASE].error <= 0.011
    assert str(report).startswith("NOT verified: base equals model")
    assert "FAIL" in str(report)


@pytest.mark.parametrize("init", [False, True])
def test_a_wrong_merge_is_seen(monkeypatch: pytest.MonkeyPatch, init: bool) -> None:
    """Also when the current adapter is at its first values, which change nothing."""
    model = net()
    program = compiled(model, init)
    right = Lora.weight
    monkeypatch.setattr(Lora, "weight", lambda self, op, W, slots, scale: right(self, op, W, slots, scale * 1.01))
    assert failed(adaptc.verify(program, model)) == [MERGED]


def test_a_wrong_identity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    program = compiled(model)
    right = Lora.identity

    def wrong(self: Lora, op: Any, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: v + 0.1 for k, v in right(self, op, W, dtype).items()}

    monkeypatch.setattr(Lora, "identity", wrong)
    assert failed(adaptc.verify(program, model)) == [IDENTITY]


def test_a_merge_that_writes_to_the_base_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    program = compiled(model)
    right = api.merge

    def wrong(program: adaptc.AdaptedProgram, **options: Any) -> adaptc.AdaptedProgram:
        merged = right(program, **options)
        with torch.no_grad():
            program.state_dict["embed.weight"][22, 5] = torch.nextafter(
                program.state_dict["embed.weight"][22, 5], torch.tensor(inf)
            )
        return merged

    monkeypatch.setattr(api, "merge", wrong)
    report = adaptc.verify(program)
    assert failed(report) == [UNMERGE]
    assert "embed.weight" in report[UNMERGE].note


def test_an_unmerge_that_loses_a_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "unmerge", api.unload)
    program = compiled(net())
    report = adaptc.verify(program)
    assert failed(report) == [UNMERGE]
    assert "lora_A" in report[UNMERGE].note


def test_errors_inside_are_failures_with_a_note() -> None:
    def broken(ids: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("no such thing\nand more")

    report = adaptc.verify(compiled(net()), broken)
    assert failed(report) == [BASE]
    assert report[BASE].note == "RuntimeError: no such thing"
    report = adaptc.verify(compiled(net()), lambda ids, mask: {"other": ids})
    assert "structure" in report[BASE].note


def test_failures_raise_on_request() -> None:
    model, other = net(), net()
    nn.init.zeros_(other.head.weight)
    adaptc.verify(compiled(model), model, raise_on_failure=True)
    with pytest.raises(AdaptcError, match="NOT verified: base equals model"):
        adaptc.verify(compiled(model), other, raise_on_failure=True)


def test_the_tolerance_is_what_was_asked_for() -> None:
    model = net()
    program = compiled(model)
    default = adaptc.verify(program, model)
    error = default[MERGED].error
    assert error > 0
    assert failed(adaptc.verify(program, model, atol=error / 2)) == [MERGED]
    report = adaptc.verify(program, model, atol=1e-3)
    assert report.ok
    assert report[MERGED].limit == 1e-3


def test_only_programs_of_adaptc() -> None:
    with pytest.raises(AdaptcError, match="not a Net"):
        adaptc.verify(net())  # type: ignore[arg-type]


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


def test_neither_program_nor_model_nor_random_state_change() -> None:
    model = net().train()
    model.drop.eval()
    program = compiled(model)
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

    program = compiled(model)
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

    program = compiled(model)
    a, b, _ = (adaptc.verify(program, spy, seed=s, shapes=1) for s in (7, 7, 8))
    assert str(a) == str(b)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_differences() -> None:
    a = torch.tensor([1.0, nan, inf, -3.0])
    assert difference(a, a.clone()) == (0.0, 3.0)
    assert difference(a, torch.tensor([1.5, nan, inf, -3.0])) == (0.5, 3.0)
    assert difference(a, torch.tensor([1.0, 0.0, inf, -3.0]))[0] == inf
    assert difference(a, torch.tensor([1.0, nan, -inf, -3.0]))[0] == inf
    assert difference(a, a[:3])[0] == inf
    assert difference(torch.tensor([3]), torch.tensor([5])) == (2.0, 3.0)
    assert difference(torch.tensor([3]), torch.tensor([3.0]))[0] == inf
    assert difference(torch.empty(0), torch.empty(0)) == (0.0, 0.0)
    assert difference(torch.tensor([3 + 4j]), torch.tensor([3 + 1j])) == (3.0, 5.0)
    assert difference(2, 2)[0] == 0
    assert difference(2, 3)[0] == inf


def test_the_worst_output_is_reported() -> None:
    runs = [leaves((torch.tensor([1.0]), {"k": torch.tensor([100.0])})) for _ in range(2)]
    found = [
        leaves((torch.tensor([1.0]), {"k": torch.tensor([100.0])})),
        leaves((torch.tensor([1.1]), {"k": torch.tensor([101.0])})),
    ]
    check = compare("x", runs, found, 0.5)
    assert check.passed
    assert check.where == "output[0], run 2"  # by the share of what is allowed, not by size
    assert check.error == pytest.approx(0.1)
    assert not compare("x", runs, found, 0.05).passed
    assert compare("x", runs, runs, 0.0).passed
    assert compare("x", [{}], [{}], 1.0).passed is False


def test_digests_see_one_bit_and_one_storage() -> None:
    t = torch.randn(5, 3, dtype=torch.bfloat16)
    state = {"a": t, "tied": t, "b": t.clone(), "n": 3}
    out = digests(state)
    assert out["a"] == out["tied"] == out["b"]
    assert "n" not in out
    t.view(torch.int16)[4, 2] ^= 1
    assert digests(state)["a"] != out["b"]


def test_reports_answer_by_name_only() -> None:
    report = adaptc.verify(compiled(net()))
    assert isnan(report[BASE].error)
    with pytest.raises(KeyError):
        report["no such check"]
