"""Files in which each row of a batch has adapters of its own: outputs equal to those of the bank, in two runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from tests.exporters.runtimes import OPEN_WITHOUT_ADAPTC
from tests.exporters.test_onnx_methods import NO_OPERATOR
from tests.exporters.test_slot_program import Net, compiled, inputs
from tests.support.method_table import ENTRIES
from tests.support.subject import base_model_and_program, quiet, save_random_adapter, subject

RUNTIMES = {
    ".onnx": (adaptc.exporters.export_onnx, adaptc.exporters.onnx_session, adaptc.exporters.save_onnx_adapter),
    ".xml": (adaptc.exporters.export_openvino, adaptc.exporters.openvino_model, adaptc.exporters.save_openvino_adapter),
}
ADAPTERS = {
    "fr": LoraConfig(r=3, target_modules=["up", "down"], lora_alpha=5, init_lora_weights=False),
    "de": LoraConfig(r=6, target_modules=["down"], use_rslora=True, init_lora_weights=False),
    "it": LoraConfig(r=1, target_modules=["up"], init_lora_weights=False),
}
ROWS = (
    ["fr", None, "de", {"fr": 0.5, "de": 0.25}],
    [None, None, None, None],
    ["it", "it", "it", "it"],
    ["de", "it", {"it": -1.5}, None],
)


@dataclass(frozen=True)
class Exported:
    bank: Any
    sessions: dict[str, Any]
    folder: Path

    def __iter__(self) -> Any:
        return iter(self.sessions.values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bank with three adapters of different ranks and sites, and its file in each runtime."""
    folder = tmp_path_factory.mktemp("rows")
    bank, sessions = compiled().bank(max_rank=7), {}
    for name, config in ADAPTERS.items():
        bank.add(name, adaptc.save_adapter(compiled(config), folder / name))
    for suffix, (export, open_model, _) in RUNTIMES.items():
        sessions[suffix] = open_model(export(bank, folder / f"model{suffix}", adapters="rows"))
        for name in ADAPTERS:
            sessions[suffix].load_adapter(name, folder / name)
    return Exported(bank, sessions, folder)


def run(session: Any, x: Tensor, **options: Any) -> Tensor:
    return torch.from_numpy(session.run({"x": x.numpy()}, **options)["output"])


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_the_bank(exported: Exported, rows: list[Any]) -> None:
    for length in (1, 5):
        x = inputs(4, length)
        for session in exported:
            assert session.input_names == ["x"]
            torch.testing.assert_close(run(session, x, adapters=rows), exported.bank(x, adapters=rows))


MIXES = st.dictionaries(st.sampled_from(list(ADAPTERS)), st.floats(-2, 2, width=32), max_size=3)


@given(st.lists(st.none() | st.sampled_from(list(ADAPTERS)) | MIXES, min_size=1, max_size=6), st.integers(1, 7))
def test_any_rows(exported: Exported, rows: list[Any], length: int) -> None:
    x = inputs(len(rows), length)
    wanted = exported.bank(x, adapters=rows)
    for session in exported:
        torch.testing.assert_close(run(session, x, adapters=rows), wanted, rtol=1e-5, atol=1e-5)


def test_one_adapter_for_all_rows(exported: Exported) -> None:
    x = inputs(3, 2)
    for session in exported:
        for adapter in (None, "de"):
            torch.testing.assert_close(run(session, x, adapter=adapter), exported.bank(x, adapters=[adapter] * 3))


def test_files_of_one_adapter(exported: Exported, tmp_path: Path) -> None:
    """A file of one adapter is good for a model with rows and for one without, whichever it was written for."""
    x = inputs(2, 5)
    for suffix, (export, open_model, save) in RUNTIMES.items():
        session = exported.sessions[suffix]
        plain = open_model(export(compiled(), tmp_path / f"plain{suffix}"))
        for i, model in enumerate((session, plain)):
            file = save(exported.folder / "fr", tmp_path / f"{i}{session.adapter_suffix}", model=model)
            for other in (session, plain):
                other.load_adapter(f"file {i}", file)
            found = run(session, x, adapters=[{f"file {i}": 0.3}, None])
            torch.testing.assert_close(found, exported.bank(x, adapters=[{"fr": 0.3}, None]))
            torch.testing.assert_close(run(plain, x, adapter=f"file {i}"), exported.bank(x, adapters=["fr", "fr"]))
            session.delete_adapter(f"file {i}")


def test_other_io(exported: Exported) -> None:
    """IO binding of ONNX Runtime, and a request of OpenVINO that the caller feeds."""
    x, rows = inputs(2, 3), ["fr", {"de": 0.5}]
    wanted = exported.bank(x, adapters=rows)
    session = exported.sessions[".onnx"]
    binding = session.io_binding(adapters=rows)
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("output")
    session.session.run_with_iobinding(binding)
    torch.testing.assert_close(torch.from_numpy(binding.copy_outputs_to_cpu()[0]), wanted)
    model = exported.sessions[".xml"]
    found = model.compiled_model({"x": x.numpy(), **model.feeds(adapters=rows)})["output"]
    torch.testing.assert_close(torch.from_numpy(found), wanted)
    for call in (session.io_binding, model.feeds):
        with pytest.raises(adaptc.ConfigError, match=r"give adapters=\[...\]"):
            call("fr")


def test_same_adapters_are_stacked_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(3, 2)
    for session in exported:
        run(session, x, adapters=["fr", "de", None])
        monkeypatch.setattr(
            session,
            "_as_value",
            lambda value, old=session._as_value: (
                pytest.fail("stacked again") if getattr(value, "ndim", 2) > 2 and value.shape[0] == 2 else old(value)
            ),
        )
        run(session, x, adapters=["fr", {"de": 0.5}, "de"])
        monkeypatch.undo()


def test_a_name_that_gets_another_adapter(exported: Exported) -> None:
    x = inputs(2, 3)
    for session in exported:
        for name in ("fr", "de"):
            session.load_adapter("a", exported.folder / name)
            torch.testing.assert_close(run(session, x, adapters=["a", None]), exported.bank(x, adapters=[name, None]))
            session.delete_adapter("a")


def test_what_is_wrong_with_rows(exported: Exported, tmp_path: Path) -> None:
    x = inputs(3, 2)
    for suffix, (export, open_model, _) in RUNTIMES.items():
        session = exported.sessions[suffix]
        with pytest.raises(adaptc.ConfigError, match="adapters has 2 entries, and 'x' has 3 rows"):
            run(session, x, adapters=["fr", None])
        with pytest.raises(adaptc.ConfigError, match="no adapter called 'frr'; nearest are 'fr'"):
            run(session, x, adapters=["frr", None, None])
        with pytest.raises(adaptc.AdaptcError, match="finite in float32"):
            run(session, x, adapters=[{"fr": float("nan")}, None, None])
        with pytest.raises(adaptc.ConfigError, match="give one of them"):
            run(session, x, adapter="fr", adapters=["fr"] * 3)
        big = adaptc.save_adapter(compiled(LoraConfig(r=8, target_modules=["up"])), tmp_path / "big")
        with pytest.raises(adaptc.SwapError, match="takes 7 at most"):
            session.load_adapter("big", big)
        assert "big" not in session.adapters
        plain = open_model(export(compiled(), tmp_path / f"plain{suffix}"))
        plain.load_adapter("fr", exported.folder / "fr")
        with pytest.raises(adaptc.ConfigError, match="takes one adapter for all rows"):
            run(plain, x, adapters=["fr"] * 3)


def test_banks_that_cannot_be_exported(tmp_path: Path) -> None:
    bank = compiled(adaptc.OFTConfig(oft_block_size=0, r=1, target_modules=["up"])).bank()
    with pytest.raises(adaptc.ConfigError, match=r"one after the other here \(oft\).*capacity=4"):
        adaptc.exporters.export_onnx(bank, tmp_path / "model.onnx", adapters="rows")
    with pytest.raises(adaptc.ConfigError, match="a bank is exported with adapters='rows'"):
        adaptc.exporters.export_onnx(bank, tmp_path / "model.onnx")
    with pytest.raises(adaptc.ConfigError, match="an ExecuTorch program takes one adapter for all rows"):
        adaptc.exporters.export_executorch(compiled(), tmp_path / "model.pte", adapters="rows")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


WITHOUT_ADAPTC = (
    OPEN_WITHOUT_ADAPTC
    + """
given = dict(np.load("given.npz"))
np.save("found.npy", session.run(["output"], given)[0])
given = {n: given[n] for n in ("x", "adapter_coefficients")}
given["adapter_coefficients"] = np.zeros((len(given["x"]), 1), np.float32)
np.save("base.npy", session.run(["output"], given)[0])
"""
)


def test_onnxruntime_alone(exported: Exported) -> None:
    """A fresh process without adaptc and torch, which stacks two adapters of one rank by hand."""
    folder, x, rng = exported.folder, inputs(3, 5), np.random.default_rng(0)
    stacks = {i.name: i for i in exported.sessions[".onnx"].session.get_overridable_initializers()}
    sizes = {"adapters": 2, "rank_0": 4, "rank_1": 5}
    values = {n: rng.standard_normal([sizes.get(s, s) for s in i.shape], np.float32) for n, i in stacks.items()}
    c = np.array([[1, 0], [0.5, 2], [0, 0]], np.float32)
    np.savez(folder / "given.npz", x=x.numpy(), adapter_coefficients=c, **values)
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_ADAPTC], cwd=folder, check=True)
    wanted = by_hand(x, {n: torch.from_numpy(v) for n, v in values.items()}, torch.from_numpy(c))
    torch.testing.assert_close(torch.from_numpy(np.load(folder / "found.npy")), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.load(folder / "base.npy")), Net()(x))


def by_hand(x: Tensor, values: dict[str, Tensor], c: Tensor) -> Tensor:
    """What Net computes with these stacked adapters, row by row, from the formula of LoRA."""
    net, rows = Net(), []
    with torch.no_grad():
        for row, weights in zip(x, c, strict=True):

            def layer(name: str, h: Tensor, weights: Tensor = weights) -> Tensor:
                y = getattr(net, name)(h)
                for k, weight in enumerate(weights):
                    A, B, scale = (values[f"{name}.{n}"][k] for n in ("lora_A.weight", "lora_B.weight", "scaling.lora"))
                    y = y + weight * scale * (h @ A.T @ B.T)
                return y

            rows.append(layer("down", torch.tanh(layer("up", row))))
    return torch.stack(rows)


#: variants that no bank takes -> why
NOT_IN_BANKS = {"lily": "depends on the whole batch"}
CASES = [(e.name, "linear") for e in ENTRIES if "linear" in e.layers()]
CASES += [(n, layer) for n in ("lora", "dora") for layer in ("embedding", "conv2d_odd", "experts")]


@pytest.mark.long
@pytest.mark.few(7)
@pytest.mark.parametrize(("entry", "layer"), CASES)
def test_every_method(entry: str, layer: str, tmp_path: Path) -> None:
    """Each method that banks take: two adapters of different sizes, a mix, and the base."""
    s = subject(entry, layer)
    base = base_model_and_program(layer, s.entry.widths, torch.float32)[1]
    with quiet():
        program = adaptc.compile(base, save_random_adapter(s, s.config(**s.entry.other_config), tmp_path, seed=9))
        other = program.bind(s.directory)
        if entry in NOT_IN_BANKS:
            with pytest.raises(adaptc.AdaptcError, match=NOT_IN_BANKS[entry]):
                program.bank({"own": program.binding, "other": other}, capacity=3)
            return
        bank = program.bank({"own": program.binding, "other": other}, capacity=3)
    args = tuple(a.float() if a.is_floating_point() else a for a in s.args(5))
    path = tmp_path / "model.onnx"
    if entry in NO_OPERATOR:
        with pytest.raises(adaptc.BackendError, match=f"could not convert the program to ONNX.*{NO_OPERATOR[entry]}"):
            adaptc.exporters.export_onnx(bank, path, adapters="rows")
        return
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(bank, path, adapters="rows"))
    for name in bank:
        session.load_adapter(name, bank[name])
    named = {n: a.numpy() for n, a in zip(session.input_names, args, strict=True)}
    count = len(args[0])
    for cycle in ([None], ["own"], ["own", None, "other"], [{"own": 0.5}]):
        rows = (cycle * count)[:count]
        wanted = bank(*args, adapters=rows)
        found = torch.from_numpy(session.run(named, adapters=rows)["output"])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-5)


def test_the_description_says_how_rows_are_stacked(exported: Exported) -> None:
    for session in exported:
        rows = json.loads(session.text)["rows"]
        assert rows["batch"] == {"input": "x", "axis": 0}
        assert (rows["capacity"], rows["max_rank"]) == (None, 7)
        assert rows["scalars"] == ["up.scaling.lora", "down.scaling.lora"]
    session = exported.sessions[".onnx"].session
    shapes = {i.name: i.shape for i in session.get_overridable_initializers()}
    assert shapes["up.lora_A.weight"] == ["adapters", "rank_0", 7]
    assert isinstance(session, onnxruntime.InferenceSession)
