"""ONNX files whose adapter is an input, adapters for them, and sessions that choose one in each call."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from tests.exporters.runtimes import COUNTS, OPEN_WITHOUT_ADAPTC, damaged
from tests.exporters.test_slot_program import Net, compiled, inputs

SIZES = ((3, 5), (1, 1), (5, 17))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two adapters of PEFT: one of rank 3 at both layers, and one of rank 6 at one of them."""
    path = tmp_path_factory.mktemp("onnx")
    for name, options in (
        ("fr", {"r": 3, "target_modules": ["up", "down"], "lora_alpha": 5}),
        ("de", {"r": 6, "target_modules": ["down"], "use_rslora": True}),
    ):
        torch.manual_seed(len(name) + options["r"])
        model = peft.get_peft_model(Net(), peft.LoraConfig(**options, init_lora_weights=False))
        model.save_pretrained(str(path / name))
    adaptc.exporters.export_onnx(compiled(), path / "model.onnx")
    return path


def expected(folder: Path, adapter: str | None, x: Tensor) -> Tensor:
    model = Net() if adapter is None else peft.PeftModel.from_pretrained(Net(), str(folder / adapter)).eval()
    with torch.no_grad():
        return model(x)


def assert_runs(session: adaptc.exporters.OnnxSession, folder: Path, *adapters: str | None) -> None:
    for size in SIZES:
        for adapter in adapters:
            found = session.run({"x": inputs(*size).numpy()}, adapter)["output"]
            torch.testing.assert_close(torch.from_numpy(found), expected(folder, adapter, inputs(*size)))


def test_adapters_are_chosen_in_each_call(folder: Path, tmp_path: Path) -> None:
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    assert_runs(session, folder, None)
    session.load_adapter("fr", folder / "fr")
    path = adaptc.exporters.save_onnx_adapter(folder / "de", tmp_path / "de.onnx_adapter", model=session)
    session.load_adapter("de", path)
    assert session.adapters == ["fr", "de"]
    assert_runs(session, folder, "fr", None, "de", "fr")
    half = {n: v.numpy().copy() for n, v in onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters().items()}
    half["down.scaling.lora"] /= 2
    session.load_adapter("half", half)
    half["down.scaling.lora"] *= 9  # the session has its own
    x = inputs(3, 5)
    bound = compiled().bind(folder / "de", scale=0.5)
    torch.testing.assert_close(torch.from_numpy(session.run({"x": x.numpy()}, "half")["output"]), bound(x))


def test_io_binding_feeds_the_adapter(folder: Path) -> None:
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    session.load_adapter("fr", folder / "fr")
    x = inputs(3, 5)
    for adapter in ("fr", None):
        binding = session.io_binding(adapter)
        binding.bind_cpu_input("x", x.numpy())
        binding.bind_output("output")
        session.session.run_with_iobinding(binding)
        found = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
        torch.testing.assert_close(found, expected(folder, adapter, x))


WITHOUT_ADAPTC = (
    OPEN_WITHOUT_ADAPTC
    + """
x = np.load("x.npy")
np.save("base.npy", session.run(["output"], {"x": x})[0])
adapter, choice = ort.LoraAdapter(), ort.RunOptions()
adapter.Load("fr.onnx_adapter")
choice.add_active_adapter(adapter)
np.save("fr.npy", session.run(["output"], {"x": x}, choice)[0])
peft_tensors = dict(np.load("de.npz"))
np.save("de.npy", session.run(["output"], {"x": x, **peft_tensors})[0])
assert not any(m.partition(".")[0] in ("adaptc", "torch") for m in sys.modules)
"""
)


def test_onnxruntime_alone(folder: Path) -> None:
    """A fresh process without adaptc and torch: the base, a file by ONNX Runtime's own means, and PEFT's tensors."""
    from safetensors.torch import load_file

    adaptc.exporters.save_onnx_adapter(folder / "fr", folder / "fr.onnx_adapter", model=folder / "model.onnx")
    x = inputs(5, 17)
    np.save(folder / "x.npy", x.numpy())
    tensors = load_file(folder / "de" / "adapter_model.safetensors")
    scale = np.array([8 / 6**0.5], dtype=np.float32)
    plain = {k.removeprefix("base_model.model."): t.numpy() for k, t in tensors.items()}
    np.savez(folder / "de.npz", **plain, **{"down.scaling.lora": scale})
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_ADAPTC], cwd=folder, check=True)
    for name in ("base", "fr", "de"):
        found = torch.from_numpy(np.load(folder / f"{name}.npy"))
        torch.testing.assert_close(found, expected(folder, None if name == "base" else name, x))


def test_merged(folder: Path, tmp_path: Path) -> None:
    program = compiled(folder / "fr")
    path = adaptc.exporters.export_onnx(program, tmp_path / "merged.onnx", adapters="merged")
    again = adaptc.exporters.export_onnx(adaptc.merge(program), tmp_path / "again.onnx", adapters="merged")
    for file in (path, again):
        session = onnxruntime.InferenceSession(str(file))
        assert not session.get_overridable_initializers()
        for size in SIZES:
            (found,) = session.run(["output"], {"x": inputs(*size).numpy()})
            torch.testing.assert_close(torch.from_numpy(found), expected(folder, "fr", inputs(*size)))
    opened = adaptc.exporters.onnx_session(path)
    assert opened.is_merged
    with pytest.raises(adaptc.ConfigError, match=r"merged.onnx has no inputs for adapters"):
        opened.load_adapter("fr", folder / "fr")
    with pytest.raises(adaptc.CheckpointError, match=r"merged.onnx has no inputs for adapters"):
        adaptc.exporters.save_onnx_adapter(folder / "fr", tmp_path / "fr.onnx_adapter", model=path)


def test_weights_are_written_once(folder: Path) -> None:
    """One file of weights, in which defaults of a rank of zero take nothing; all files pass ONNX's checker."""
    onnx.checker.check_model(str(folder / "model.onnx"))
    sizes = sum(p.numel() * 4 for p in Net().parameters())
    in_graph = (folder / "model.onnx").stat().st_size
    data = (folder / "model.onnx.data").stat().st_size
    assert data <= sizes
    assert in_graph < 40_000


def test_adapters_whose_values_follow_from_the_base(tmp_path: Path) -> None:
    """A file cannot tell them; what is bound to the program does."""
    config = LoraConfig(r=3, target_modules=["up"], kasa_config={}, init_lora_weights=False)
    program = compiled(config)
    adapter = adaptc.save_adapter(program, tmp_path / "kasa")
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    with pytest.raises(adaptc.SwapError, match=r"follow from the base weight 'up.weight'.* prog.bind\(adapter\)"):
        session.load_adapter("a", adapter)
    bound = program.bind(adapter, scale=0.5)
    session.load_adapter("a", bound)
    found = session.run({"x": inputs(2, 3).numpy()}, "a")["output"]
    torch.testing.assert_close(torch.from_numpy(found), bound(inputs(2, 3)))


def test_an_adapter_that_replaces_the_base(tmp_path: Path) -> None:
    program = compiled(LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"))
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    session.load_adapter("a", program)
    found = session.run({"x": inputs(2, 3).numpy()}, "a")["output"]
    torch.testing.assert_close(torch.from_numpy(found), program(inputs(2, 3)))
    plain = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(compiled(), tmp_path / "plain.onnx"))
    with pytest.raises(adaptc.SwapError):
        plain.load_adapter("a", program)


@COUNTS
def test_hundreds_of_damaged_files(folder: Path, tmp_path: Path, count: int) -> None:
    """Damage is refused as such, or lies where nothing reads it; no other error comes, and the process goes on."""
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    file = adaptc.exporters.save_onnx_adapter(folder / "fr", tmp_path / "fr.onnx_adapter", model=session)
    shutil.copy(folder / "model.onnx.data", tmp_path)
    graph, data, refused = (folder / "model.onnx").read_bytes(), file.read_bytes(), 0
    for seed in range(count):
        file.write_bytes(damaged(data, seed))
        (tmp_path / "model.onnx").write_bytes(damaged(graph, seed))
        for read in (
            lambda: session.load_adapter("a", file),
            lambda: adaptc.exporters.onnx_session(tmp_path / "model.onnx"),
        ):
            try:
                read()
            except (adaptc.CheckpointError, adaptc.SwapError):
                refused += 1
        if "a" in session.adapters:
            session.delete_adapter("a")
    assert refused > count


def test_names_and_inputs_that_do_not_exist(folder: Path) -> None:
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    session.load_adapter("fr", folder / "fr")
    x = inputs(2, 3).numpy()
    with pytest.raises(adaptc.ConfigError, match="an adapter called 'fr' already"):
        session.load_adapter("fr", folder / "de")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'frr'; nearest are 'fr'"):
        session.run({"x": x}, "frr")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'de'"):
        session.io_binding("de")
    with pytest.raises(adaptc.ConfigError, match=r"no input 'y'; its inputs are \['x'\]"):
        session.run({"x": x, "y": x})
    with pytest.raises(adaptc.ConfigError, match="input 'x' is missing"):
        session.run({})
    with pytest.raises(adaptc.ConfigError, match="no output 'z'"):
        session.run({"x": x}, outputs=["z"])
    with pytest.raises(adaptc.BackendError, match="ONNX Runtime refused the call"):
        session.run({"x": x[..., :3]})
    with pytest.raises(adaptc.ConfigError, match="the name of an adapter is a text"):
        session.load_adapter("", folder / "de")
    session.delete_adapter("fr")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'fr'"):
        session.run({"x": x}, "fr")


A, B, SCALE = "down.lora_A.weight", "down.lora_B.weight", "down.scaling.lora"


def array(*shape: int) -> Any:
    return np.ones(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"down.lora_C.weight": array(3, 11)}, "no input 'down.lora_C.weight' for an adapter; nearest are"),
        ({A: array(3, 10), B: array(5, 3)}, r"'down.lora_A.weight' has shape \(3, 10\), expected \('rank_1', 11\)"),
        ({A: array(3, 11, 1), B: array(5, 3)}, r"has shape \(3, 11, 1\)"),
        ({A: array(3, 11), B: array(5, 2)}, "rank_1 is 2 in 'down.lora_B.weight', and 3 in 'down.lora_A.weight'"),
        ({A: array(3, 11)}, "it has 'down.lora_A.weight', and lacks 'down.lora_B.weight'"),
        ({SCALE: array(1).astype(np.float64)}, "is float64, expected float32"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, tensors: dict[str, Any], message: str) -> None:
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    with pytest.raises(adaptc.SwapError, match=message):
        session.load_adapter("wrong", tensors)
    assert session.adapters == []


def test_adapters_that_do_not_fit_write_nothing(folder: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "a.onnx_adapter", folder / "model.onnx"
    torch.manual_seed(1)
    wide = peft.get_peft_model(nn.Sequential(nn.Linear(4, 9)), peft.LoraConfig(target_modules=["0"]))
    wide.save_pretrained(str(tmp_path / "other"))
    ia3 = adaptc.save_adapter(
        compiled(adaptc.IA3Config(target_modules=["up"], feedforward_modules=[])), tmp_path / "ia3"
    )
    for adapter, message in (
        (tmp_path / "other", "0.lora_A|binds to nothing|site"),
        (ia3, "ia3|IA3"),
        (tmp_path / "nothing", "nothing"),
        (compiled(adaptc.IA3Config(target_modules=["up"], feedforward_modules=[])), "other sites"),
    ):
        with pytest.raises(adaptc.AdaptcError, match=message):
            adaptc.exporters.save_onnx_adapter(adapter, path, model=model)
    state = {k: torch.full_like(t, torch.nan) for k, t in _state(folder).items()}
    with pytest.raises(adaptc.CheckpointError, match="finite"):
        adaptc.exporters.save_onnx_adapter(state, path, model=model)
    with pytest.raises(adaptc.CheckpointError, match=r"must end in \.onnx_adapter"):
        adaptc.exporters.save_onnx_adapter(folder / "fr", tmp_path / "a.bin", model=model)
    with pytest.raises(adaptc.ConfigError, match=r"model is the path of an \.onnx file"):
        adaptc.exporters.save_onnx_adapter(folder / "fr", path, model=7)  # type: ignore[arg-type]
    assert not path.exists()


def _state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "fr" / "adapter_model.safetensors")


def test_files_of_another_model_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    program = compiled()
    with torch.no_grad():
        program.base_tensors["down.weight"].add_(1)
    other = adaptc.exporters.export_onnx(program, tmp_path / "other.onnx")
    path = adaptc.exporters.save_onnx_adapter(folder / "fr", tmp_path / "fr.onnx_adapter", model=other)
    session = adaptc.exporters.onnx_session(folder / "model.onnx")
    with pytest.raises(adaptc.CheckpointError, match=r"fr.onnx_adapter was written for another model"):
        session.load_adapter("fr", path)
    adaptc.exporters.onnx_session(other).load_adapter("fr", path)
    data = path.read_bytes()
    for other_bytes in (b"", data[:40], bytes(64) + data[64:]):
        (tmp_path / "damaged.onnx_adapter").write_bytes(other_bytes)
        with pytest.raises(adaptc.CheckpointError, match="is no adapter file, or is damaged"):
            session.load_adapter("damaged", tmp_path / "damaged.onnx_adapter")
    with pytest.raises(adaptc.CheckpointError, match="there is no file"):
        session.load_adapter("none", tmp_path / "none.onnx_adapter")
    graph = (folder / "model.onnx").read_bytes()
    for other_bytes in (b"", graph[: len(graph) // 2], b"x" * 100):
        (tmp_path / "damaged.onnx").write_bytes(other_bytes)
        with pytest.raises(adaptc.CheckpointError):
            adaptc.exporters.onnx_session(tmp_path / "damaged.onnx")
        with pytest.raises(adaptc.CheckpointError):
            adaptc.exporters.save_onnx_adapter(
                folder / "fr", tmp_path / "x.onnx_adapter", model=tmp_path / "damaged.onnx"
            )
    with pytest.raises(adaptc.CheckpointError, match="there is no file"):
        adaptc.exporters.onnx_session(tmp_path / "none.onnx")
    assert session.adapters == []


def test_descriptions_that_were_changed(folder: Path, tmp_path: Path) -> None:
    for change in (lambda t: "{", lambda t: t.replace('"fingerprint": "', '"fingerprint": "z'), lambda t: "[]"):
        model = onnx.load(folder / "model.onnx")
        (entry,) = (p for p in model.metadata_props if p.key == "adaptc")
        entry.value = change(entry.value)
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(adaptc.CheckpointError, match=r"changed.onnx: the description .* is damaged"):
            adaptc.exporters.onnx_session(tmp_path / "changed.onnx")


class Counter(nn.Module):
    """A model with a buffer that each call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.up(x) + self.count[0]


def test_programs_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    program = compiled()
    with pytest.raises(adaptc.ConfigError, match=r"takes what adaptc\.compile"):
        adaptc.exporters.export_onnx(Net(), path)  # type: ignore[arg-type]
    with pytest.raises(adaptc.ConfigError, match="adapters=7 is not one of inputs, merged, rows"):
        adaptc.exporters.export_onnx(program, path, adapters=7)  # type: ignore[arg-type]
    with pytest.raises(adaptc.CheckpointError, match=r"must end in \.onnx"):
        adaptc.exporters.export_onnx(program, tmp_path / "model.pt2")
    with pytest.raises(adaptc.ConfigError, match="no adapter that could be an input"):
        adaptc.exporters.export_onnx(adaptc.merge(program), path)
    counter = adaptc.compile(Counter(), LoraConfig(r=2, target_modules=["up"]), example_inputs=(inputs(2, 3),))
    with pytest.raises(adaptc.ConfigError, match="writes to 'count' in each call"):
        adaptc.exporters.export_onnx(counter, path)
    with pytest.raises(adaptc.BackendError, match=r"could not convert .*linalg_solve"):
        adaptc.exporters.export_onnx(compiled(adaptc.BOFTConfig(boft_block_size=7, target_modules=["up"])), path)
    assert not list(tmp_path.iterdir())


class Named(nn.Module):
    """A model with an input that has the name of an adapter's input, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)

    def forward(self, x: Tensor, flag: Any = None) -> dict[str, Any]:
        y = self.up(x)
        return {"y": y, "pair": (y * 2, None)}


def test_outputs_have_names(tmp_path: Path) -> None:
    free = {"x": {0: Dim("batch")}, "flag": None}
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    x = inputs(2, 3)
    program = adaptc.compile(Named(), config, example_inputs={"x": x, "flag": None}, dynamic_shapes=free)
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    assert session.output_names == ["y", "pair_0"]
    assert session.session.get_inputs()[0].shape == ["x_0", 3, 7]
    session.load_adapter("a", program)
    found = session.run({"x": x.numpy()}, "a", outputs=["pair_0"])
    torch.testing.assert_close(torch.from_numpy(found["pair_0"]), program(x=x, flag=None)["pair"][0])


def test_a_quantised_base(tmp_path: Path) -> None:
    program = adaptc.quantize(compiled(), "int8")
    session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    session.load_adapter("a", program)
    found = session.run({"x": inputs(3, 5).numpy()}, "a")["output"]
    torch.testing.assert_close(torch.from_numpy(found), program(inputs(3, 5)), rtol=1e-4, atol=1e-5)
