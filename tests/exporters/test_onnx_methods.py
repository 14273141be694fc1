"""Every method as inputs of an ONNX file: the adapter it was compiled with, another one, and the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from tests.support.method_table import ENTRIES
from tests.support.subject import base_model_and_program, quiet, save_random_adapter, subject

#: variants whose operators ONNX lacks -> the operator
NO_OPERATOR = {
    **dict.fromkeys(("oft_cayley", "boft", "boft_butterfly", "hra_gs", "psoft"), "linalg_solve"),
    "hra": "linalg_solve_triangular",
    "deft_qr": "sort",
}
CASES = [(e.name, "linear") for e in ENTRIES if "linear" in e.layers()]
CASES += [(n, layer) for n in ("lora", "dora", "vera") for layer in ("embedding", "conv2d_odd", "experts")]


@pytest.mark.long
@pytest.mark.few(9)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_every_method(entry: str, layer: str, tmp_path: Path) -> None:
    s = subject(entry, layer)
    base = base_model_and_program(layer, s.entry.widths, torch.float32)[1]
    with quiet():
        program = adaptc.compile(base, save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9))
        other = program.bind(s.directory)
    args = tuple(a.float() if a.is_floating_point() else a for a in s.args(5))
    path = tmp_path / "model.onnx"
    if entry in NO_OPERATOR:
        with pytest.raises(adaptc.BackendError, match=f"could not convert the program to ONNX.*{NO_OPERATOR[entry]}"):
            adaptc.exporters.export_onnx(program, path)
        return
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, path))
    session.load_adapter("own", program)
    session.load_adapter("other", other)
    given = {n: a.numpy() for n, a in zip(session.input_names, args, strict=True)}
    for adapter, expected in ((None, adaptc.unload(program)), ("own", program), ("other", other)):
        wanted = expected(*args)
        found = torch.from_numpy(session.run(given, adapter)["output"])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-5)
