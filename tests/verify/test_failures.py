"""Verification fails, in the right row, wherever something was broken on purpose."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError
from adaptc.methods.lora_family.lora import Lora
from adaptc.verification import verify
from tests.support.verify_nets import BASE, IDENTITY, MERGED, UNMERGE, compile_net, failed, net


def test_a_changed_model_is_seen() -> None:
    model = net()
    program = compile_net(model)
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
    program = compile_net(model, init)
    right = Lora.weight
    monkeypatch.setattr(Lora, "weight", lambda self, op, W, slots, scale: right(self, op, W, slots, scale * 1.01))
    assert failed(adaptc.verify(program, model)) == [MERGED]


def test_a_wrong_identity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    program = compile_net(model)
    right = Lora.identity

    def wrong(self: Lora, op: Any, W: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: v + 0.1 for k, v in right(self, op, W, dtype).items()}

    monkeypatch.setattr(Lora, "identity", wrong)
    assert failed(adaptc.verify(program, model)) == [IDENTITY]


def test_a_merge_that_writes_to_the_base_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    program = compile_net(model)
    right = verify.merge_program

    def wrong(program: adaptc.AdaptedProgram, **options: Any) -> Any:
        result = right(program, **options)
        with torch.no_grad():
            program.state_dict["embed.weight"][22, 5] = torch.nextafter(
                program.state_dict["embed.weight"][22, 5], torch.tensor(inf)
            )
        return result

    monkeypatch.setattr(verify, "merge_program", wrong)
    report = adaptc.verify(program)
    assert failed(report) == [UNMERGE]
    assert "embed.weight" in report[UNMERGE].note


def test_an_unmerge_that_loses_a_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "unmerge_program", verify.unload_program)
    program = compile_net(net())
    report = adaptc.verify(program)
    assert failed(report) == [UNMERGE]
    assert "lora_A" in report[UNMERGE].note


def test_errors_inside_are_failures_with_a_note() -> None:
    def broken(ids: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("no such thing\nand more")

    report = adaptc.verify(compile_net(net()), broken)
    assert failed(report) == [BASE]
    assert report[BASE].note == "RuntimeError: no such thing"
    report = adaptc.verify(compile_net(net()), lambda ids, mask: {"other": ids})
    assert "structure" in report[BASE].note


def test_failures_raise_on_request() -> None:
    model, other = net(), net()
    nn.init.zeros_(other.head.weight)
    adaptc.verify(compile_net(model), model, raise_on_failure=True)
    with pytest.raises(AdaptcError, match="NOT verified: base equals model"):
        adaptc.verify(compile_net(model), other, raise_on_failure=True)


def test_the_tolerance_is_what_was_asked_for() -> None:
    model = net()
    program = compile_net(model)
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
