"""Every method as inputs of OpenVINO and ExecuTorch files: the adapter compiled with, another one, and the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from tests.exporters.runtimes import RUNTIMES, run
from tests.support.method_table import ENTRIES
from tests.support.subject import base_model_and_program, quiet, save_random_adapter, subject

#: (runtime, variant) whose operators the runtime lacks -> what the error says
NO_OPERATOR: dict[tuple[str, str], str] = {
    **{(r, e): "linalg_solve" for r in RUNTIMES for e in ("oft_cayley", "boft", "boft_butterfly", "hra_gs", "psoft")},
    **{(r, "hra"): "linalg_solve_triangular" for r in RUNTIMES},
    **{(r, "fourierft"): "_fft_c2c" for r in RUNTIMES},
    ("openvino", "c3a"): "_fft_c2r",
    ("executorch", "c3a"): "kernel",
    ("openvino", "deft_qr"): "linalg_qr",
    ("executorch", "deft_qr"): "sort",
    **{("openvino", e): "convolution whose weight is an input" for e in ("waveft", "waveft_sym4")},
    **{("openvino", f"{e} conv2d_odd"): "convolution whose weight is an input" for e in ("lora", "dora", "vera")},
}
#: models that OpenVINO writes and fails to compile for CPUs
NOT_COMPILED = (("openvino", "shira"),)
#: options of methods whose free sizes are numbers of entries
OPTIONS = {("executorch", e): {"max_rank": 1000} for e in ("shira", "supertuning", "supertuning_hybrid")}
CASES = [(e.name, "linear") for e in ENTRIES if "linear" in e.layers()]
CASES += [(n, layer) for n in ("lora", "dora", "vera") for layer in ("embedding", "conv2d_odd", "experts")]


@pytest.mark.long
@pytest.mark.few(9)
@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_every_method(entry: str, layer: str, name: str, tmp_path: Path) -> None:
    runtime = RUNTIMES[name]
    s = subject(entry, layer)
    base = base_model_and_program(layer, s.entry.widths, torch.float32)[1]
    with quiet():
        program = adaptc.compile(base, save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9))
        other = program.bind(s.directory)
    args = tuple(a.float() if a.is_floating_point() else a for a in s.args(5))
    why = NO_OPERATOR.get((name, entry), NO_OPERATOR.get((name, f"{entry} {layer}")))
    if why is not None:
        with pytest.raises(adaptc.BackendError, match=f"could not convert the program: .*{why}"):
            runtime.exported(program, tmp_path)
        return
    path = runtime.exported(program, tmp_path, **OPTIONS.get((name, entry), {}))
    if (name, entry) in NOT_COMPILED:
        with pytest.raises(adaptc.BackendError, match=r"OpenVINO cannot open .*model.xml"):
            runtime.open_model(path)
        return
    model = runtime.open_model(path)
    model.load_adapter("own", program)
    model.load_adapter("other", other)
    given = dict(zip(model.input_names, args, strict=True))
    for adapter, expected in ((None, adaptc.unload(program)), ("own", program), ("other", other)):
        wanted = expected(*args)
        found = run(model, given, adapter)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-5)
