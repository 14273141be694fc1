"""Requests of OpenVINO: one adapter after another feeds nothing anew, and as many adapters as one likes take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptc
from adaptc.exporters.to_openvino import openvino_model
from tests.exporters.runtimes import RUNTIMES, run
from tests.exporters.test_slot_program import compiled, inputs
from tests.support.cover import examples


class Counted:
    """A compiled model that counts the requests it makes, and the tensors that these are given."""

    def __init__(self, model: Any) -> None:
        self.model, self.requests, self.fed = model, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def create_infer_request(self) -> Any:
        self.requests += 1
        return _CountedRequest(self, self.model.create_infer_request())


class _CountedRequest:
    def __init__(self, owner: Counted, request: Any) -> None:
        self.owner, self.request = owner, request

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)

    def set_input_tensor(self, number: int, value: Any) -> None:
        self.owner.fed += 1
        self.request.set_input_tensor(number, value)


@pytest.fixture(scope="module")
def program() -> adaptc.AdaptedProgram:
    return compiled()


@pytest.fixture(scope="module")
def path(program: adaptc.AdaptedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RUNTIMES["openvino"].exported(program, tmp_path_factory.mktemp("openvino"))


def opened(program: adaptc.AdaptedProgram, path: Path, count: int) -> tuple[Any, dict[str | None, Any]]:
    """A model with so many adapters, and what calls with each of them compute."""
    model = RUNTIMES["openvino"].open_model(path)
    model.compiled_model = Counted(model.compiled_model)
    wanted: dict[str | None, Any] = {None: program.base(inputs(3, 5)).detach()}
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        tensors = {n: torch.randn(t.shape, generator=generator) for n, t in adapter_tensors(program).items()}
        bound = program.bind(tensors)
        model.load_adapter(str(i), bound)
        wanted[str(i)] = bound(inputs(3, 5)).detach()
    return model, wanted


def adapter_tensors(program: adaptc.AdaptedProgram) -> dict[str, torch.Tensor]:
    return dict(program.module().state_dict())


def test_a_change_of_adapters_feeds_nothing_anew(program: adaptc.AdaptedProgram, path: Path) -> None:
    model, wanted = opened(program, path, 2)
    for _ in range(2):
        for name in ("0", "1", None):
            run(model, {"x": inputs(3, 5)}, name)
        fed = model.compiled_model.fed
    assert (model.compiled_model.requests, fed) == (3, 3 * len(model._base))
    for name in ("1", "0", None, "0", "1"):
        torch.testing.assert_close(run(model, {"x": inputs(3, 5)}, name), wanted[name], rtol=1e-4, atol=1e-5)
    assert model.compiled_model.fed == fed
    model.delete_adapter("0")
    assert sorted(values is model._values("1") for _, values in model._idle) == [False, True]
    model.load_adapter("0", program.bind({n: t * 0.5 for n, t in adapter_tensors(program).items()}))
    changed = run(model, {"x": inputs(3, 5)}, "0")
    assert not torch.allclose(changed, wanted["0"], rtol=1e-2)


@settings(max_examples=examples(5), deadline=None)
@given(st.lists(st.sampled_from([None, *map(str, range(7))]), min_size=1, max_size=30))
def test_any_order_of_adapters(program: adaptc.AdaptedProgram, path: Path, names: list[str | None]) -> None:
    model, wanted = opened(program, path, 7)
    for name in names:
        torch.testing.assert_close(run(model, {"x": inputs(3, 5)}, name), wanted[name], rtol=1e-4, atol=1e-5)
    assert model.compiled_model.requests == len(model._idle) <= openvino_model.MAX_IDLE
