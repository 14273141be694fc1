"""The checks that run over the table of sites, on programs with a planted fault: each check finds one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.support.site_cases import BIASES, CASES
from tests.support.site_checks import CHECKS, Subject, changed_by, subject

NAME = BIASES[0].name


def wrong_oracle(s: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program computes something else than PEFT, by a hundredth of one tensor."""
    tensor = next(p for name, p in s.oracle.model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        tensor.mul_(1.01)


def wrong_values(s: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own adapter is not that of the file."""
    with torch.no_grad():
        next(t for name, t in s.program.binding.values.items() if "lora_B" in name).mul_(1.01)


def wrong_reading(s: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from a program's file has other values than were saved."""
    read = adaptc.load

    def load(path: Path) -> Any:
        program: Any = read(path)
        with torch.no_grad():
            next(t for name, t in program.binding.values.items() if "lora_B" in name).mul_(1.01)
        return program

    monkeypatch.setattr(adaptc, "load", load)


FAULTS = {
    "check_outputs": wrong_oracle,
    "check_gradients": wrong_oracle,
    "check_swap": wrong_oracle,
    "check_merge": wrong_oracle,
    "check_files": wrong_values,
    "check_reload": wrong_reading,
    "check_weight_form": wrong_values,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_a_fault_is_found(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir()
    wrong.mkdir()
    with contextlib.closing(Subject(CASES[NAME])) as s:
        check(s, right)
        FAULTS[check.__name__](s, monkeypatch)
        with pytest.raises(AssertionError):
            check(s, wrong)


def test_a_change_of_the_model_itself_is_found(tmp_path: Path) -> None:
    name, weight = next(iter(subject(NAME).base.named_parameters()))
    before = weight.detach().clone()

    def spoil(s: Subject, tmp_path: Path) -> None:
        with torch.no_grad():
            weight.add_(1)

    try:
        assert changed_by(spoil, NAME, tmp_path) == [name]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert changed_by(lambda s, path: None, NAME, tmp_path) == []
