"""Models of OpenVINO that compute calls without an adapter by a compiled model of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch

import adaptc
from adaptc import LoraConfig
from adaptc.exporters import export_openvino, openvino_model
from adaptc.exporters.to_openvino.adapter_tensors import read_tensors
from adaptc.exporters.to_openvino.base_model import remove_adapter
from adaptc.exporters.to_openvino.openvino_model import base_path
from tests.exporters.test_slot_program import Net, compiled, inputs


def operators(model: Any) -> list[str]:
    return sorted(n.get_type_name() for n in model.get_ops() if n.get_type_name() not in {"Constant", "Convert"})


def test_the_base_has_no_node_of_an_adapter(tmp_path: Path) -> None:
    program = compiled()
    path = export_openvino(program, tmp_path / "model.xml")
    plain = export_openvino(adaptc.unload(program), tmp_path / "base.xml", adapters="merged")
    model = openvino.Core().read_model(str(path))
    before = operators(model)
    assert remove_adapter(openvino, model, {n: v.shape for n, v in read_tensors(base_path(path)).items()}) == []
    assert operators(model) == operators(openvino.Core().read_model(str(plain)))
    assert operators(model) != before


def test_calls_with_and_without_an_adapter_take_turns(tmp_path: Path) -> None:
    program = compiled()
    model = openvino_model(export_openvino(program, tmp_path / "model.xml"), separate_base=True)
    model.load_adapter("fr", program)
    for size in ((3, 5), (1, 1), (5, 17)):
        x = inputs(*size)
        for adapter, expected in (("fr", program(x)), (None, Net()(x).detach()), ("fr", program(x))):
            found = model.run({"x": x.numpy()}, adapter)["output"]
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_threads_with_and_without_an_adapter(tmp_path: Path) -> None:
    program = compiled()
    model = openvino_model(export_openvino(program, tmp_path / "model.xml"), separate_base=True)
    model.load_adapter("fr", program)
    net = Net()  # which seeds torch's global generator, so no thread makes one

    def call(i: int) -> None:
        x = inputs(1 + i % 3, 1 + i % 7)
        found = model.run({"x": x.numpy()}, "fr" if i % 2 else None)["output"]
        expected = program(x) if i % 2 else net(x).detach()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(call, range(90)))) == 90


def test_a_call_that_fails_leaves_the_base(tmp_path: Path) -> None:
    model = openvino_model(export_openvino(compiled(), tmp_path / "model.xml"), separate_base=True)
    with pytest.raises(adaptc.AdaptcError):
        model.run({"x": inputs(3, 5).numpy()[..., :4]})
    found = model.run({"x": inputs(3, 5).numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), Net()(inputs(3, 5)).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", ["dora", "rows", "merged"])
def test_files_without_such_a_base_are_refused(adapters: str, tmp_path: Path) -> None:
    dora = LoraConfig(r=3, target_modules=["up"], use_dora=True, init_lora_weights=False)
    program = compiled(dora) if adapters == "dora" else compiled()
    options: dict[str, Any] = {} if adapters == "dora" else {"adapters": adapters}
    path = export_openvino(program, tmp_path / "model.xml", **options)
    with pytest.raises(adaptc.ConfigError, match=r"separate_base=True .*open it without separate_base"):
        openvino_model(path, separate_base=True)
