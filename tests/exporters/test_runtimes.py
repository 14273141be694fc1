"""Files of OpenVINO and ExecuTorch whose adapter is an input, adapters for them, and calls that choose one."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from adaptc.passes.graph.lifted import fake_mode_of
from tests.exporters.runtimes import COUNTS, RUNTIMES, RuntimeUnderTest, damaged, run
from tests.exporters.test_onnx import Counter, Named
from tests.exporters.test_slot_program import Net, compiled, inputs

SIZES = ((3, 5), (1, 1), (5, 17))


#: each export to ExecuTorch takes seconds: what it has alone is tested in short all the same
_MARKS = {"executorch": [pytest.mark.long]}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=_MARKS.get(n, [])) for n in RUNTIMES])
def runtime(request: pytest.FixtureRequest) -> RuntimeUnderTest:
    return RUNTIMES[request.param]


@pytest.fixture(scope="module")
def folder(runtime: RuntimeUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two adapters of PEFT: one of rank 3 at both layers, and one of rank 6 at one of them."""
    path = tmp_path_factory.mktemp(runtime.name)
    for name, options in (
        ("fr", {"r": 3, "target_modules": ["up", "down"], "lora_alpha": 5}),
        ("de", {"r": 6, "target_modules": ["down"], "use_rslora": True}),
    ):
        torch.manual_seed(len(name) + options["r"])
        model = peft.get_peft_model(Net(), peft.LoraConfig(**options, init_lora_weights=False))
        model.save_pretrained(str(path / name))
    runtime.exported(compiled(), path)
    return path


@pytest.fixture
def model(runtime: RuntimeUnderTest, folder: Path) -> Any:
    return runtime.open_model(folder / f"model{runtime.suffix}")


def expected(folder: Path, adapter: str | None, x: Tensor) -> Tensor:
    model = Net() if adapter is None else peft.PeftModel.from_pretrained(Net(), str(folder / adapter)).eval()
    with torch.no_grad():
        return model(x)


def assert_runs(model: Any, folder: Path, *adapters: str | None) -> None:
    for size in SIZES:
        for adapter in adapters:
            x = inputs(*size)
            torch.testing.assert_close(run(model, {"x": x}, adapter), expected(folder, adapter, x))


def test_adapters_are_chosen_in_each_call(runtime: RuntimeUnderTest, folder: Path, model: Any, tmp_path: Path) -> None:
    assert_runs(model, folder, None)
    model.load_adapter("fr", folder / "fr")
    path = runtime.save_adapter(folder / "de", tmp_path / f"de{runtime.adapter_suffix}", model=model)
    model.load_adapter("de", str(path))
    assert model.adapters == ["fr", "de"]
    assert (model.input_names, model.output_names) == (["x"], ["output"])
    assert_runs(model, folder, "fr", None, "de", "fr")
    scale = np.array([8 / 6**0.5 / 2], dtype=np.float32)
    half = {n: np.array(v.data) if runtime.name == "openvino" else v.numpy() for n, v in model._adapters["de"].items()}
    assert half.keys() == {"down.lora_A.weight", "down.lora_B.weight", "down.scaling.lora"}
    half["down.scaling.lora"] = scale
    model.load_adapter("half", half)
    half["down.lora_A.weight"] *= 9  # the model has its own
    scale *= 9
    x = inputs(3, 5)
    bound = compiled().bind(folder / "de", scale=0.5)
    torch.testing.assert_close(run(model, {"x": x}, "half"), bound(x))
    first = run(model, {"x": x}, "fr")
    before = first.clone()
    run(model, {"x": x}, "de")
    assert torch.equal(before, first)  # outputs are the caller's


def test_adapters_keep_their_values_while_their_program_trains(model: Any) -> None:
    program = compiled()
    model.load_adapter("own", program)
    x = inputs(3, 5)
    wanted = program(x)
    with torch.no_grad():
        for tensor in program.current.values.values():
            tensor.mul_(3)
    torch.testing.assert_close(run(model, {"x": x}, "own"), wanted)
    assert not torch.allclose(program(x), wanted)


def test_options_of_swap(runtime: RuntimeUnderTest, folder: Path, model: Any, tmp_path: Path) -> None:
    path = runtime.save_adapter(folder / "fr", tmp_path / f"fr{runtime.adapter_suffix}", model=model.path, scale=0.25)
    model.load_adapter("fr", path)
    bound = compiled().bind(folder / "fr", scale=0.25)
    torch.testing.assert_close(run(model, {"x": inputs(2, 3)}, "fr"), bound(inputs(2, 3)))


@pytest.mark.long
def test_ranks_up_to_a_limit(tmp_path: Path) -> None:
    """ExecuTorch plans memory for a largest rank, and computes nothing on empty tensors."""
    runtime = RUNTIMES["executorch"]
    model = runtime.open_model(runtime.exported(compiled(), tmp_path, max_rank=7))
    assert model.max_rank == 7
    x = inputs(2, 3)
    for rank in (1, 2, 7):
        config = LoraConfig(r=rank, target_modules=["up"], init_lora_weights=False)
        other = adaptc.save_adapter(compiled(config), tmp_path / f"rank{rank}")
        model.load_adapter(f"rank{rank}", other)
        torch.testing.assert_close(run(model, {"x": x}, f"rank{rank}"), compiled(config)(x))
    wide = compiled(LoraConfig(r=8, target_modules=["up"], init_lora_weights=False))
    message = "rank_0 is 8 in 'up.lora_A.weight', and the file takes 7 at most: .* larger max_rank"
    with pytest.raises(adaptc.SwapError, match=message):
        model.load_adapter("wide", adaptc.save_adapter(wide, tmp_path / "wide"))
    with pytest.raises(adaptc.SwapError, match=message):
        runtime.save_adapter(tmp_path / "wide", tmp_path / "wide.ptd", model=model)
    with pytest.raises(adaptc.SwapError, match=message):
        runtime.exported(wide, tmp_path, "wide", max_rank=7)
    empty = {"up.lora_A.weight": array(0, 7), "up.lora_B.weight": array(11, 0)}
    with pytest.raises(adaptc.SwapError, match=r"rank_0 is 0 in 'up.lora_A.weight', and the file takes 1 at least"):
        model.load_adapter("empty", empty)
    assert not (tmp_path / "wide.ptd").exists()
    assert not (tmp_path / "wide.pte").exists()


def test_sizes_up_to_a_limit(tmp_path: Path) -> None:
    """ExecuTorch's own check is of the number of elements alone."""
    runtime = RUNTIMES["executorch"]
    path = tmp_path / "model.pte"
    with pytest.raises(adaptc.ConfigError, match=r"axis 0 of the input 'x' has no largest size.* give max_size"):
        runtime.export(compiled(), path)
    with pytest.raises(adaptc.ConfigError, match="axis 0 of the input 'x' has no largest size"):
        runtime.export(compiled(), path, adapters="merged")
    for options, message in (
        ({"max_size": 1}, "max_size=1 is no number from 2 on"),
        ({"max_rank": True}, "max_rank=True is no number"),
        ({"backend": "vulkan"}, "backend='vulkan' is not one of xnnpack, portable"),
    ):
        with pytest.raises(adaptc.ConfigError, match=message):
            runtime.export(compiled(), path, **options)
    sequence = torch.nn.Sequential(torch.nn.Linear(7, 5))
    named = adaptc.compile(sequence, LoraConfig(r=2, target_modules=["0"]), example_inputs=(torch.ones(3, 7),))
    with pytest.raises(adaptc.ConfigError, match="no program with an input called 'input'"):
        runtime.export(named, path, max_size=5)
    assert not path.exists()
    free = ({0: torch.export.Dim("batch", max=3), 1: torch.export.Dim("length")},)
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    program = adaptc.compile(Net(), config, example_inputs=(inputs(2, 3),), dynamic_shapes=free)
    model = runtime.open_model(runtime.export(program, path, max_size=5, backend="portable"))
    model.load_adapter("own", program)
    torch.testing.assert_close(run(model, {"x": inputs(3, 5)}, "own"), program(inputs(3, 5)))
    for size in ((4, 1), (1, 6)):
        with pytest.raises(adaptc.BackendError, match=r"'x' has shape .* expected \(\d to 3, \d to 5, 7\)"):
            model.run({"x": inputs(*size)})
    with pytest.raises(adaptc.BackendError, match="'x' is float64, expected float32"):
        model.run({"x": inputs(2, 3).double()})


def test_xnnpack_computes_the_base(tmp_path: Path) -> None:
    """The file names the backend that its layers need; without a partitioner it names none."""
    for backend in ("xnnpack", "portable"):
        path = RUNTIMES["executorch"].exported(compiled(), tmp_path, backend, backend=backend)
        assert (b"XnnpackBackend" in path.read_bytes()) == (backend == "xnnpack")


def test_threads(folder: Path, model: Any) -> None:
    """Each of many calls at once has its own adapter."""
    model.load_adapter("fr", folder / "fr")
    model.load_adapter("de", folder / "de")
    x = inputs(5, 17)
    wanted = {a: expected(folder, a, x) for a in ("fr", "de", None)}
    wrong: list[Any] = []

    def call(adapter: str | None) -> None:
        for _ in range(30):
            found = run(model, {"x": x}, adapter)
            if not torch.allclose(found, wanted[adapter], rtol=1e-4, atol=1e-5):
                wrong.append((adapter, found))

    threads = [threading.Thread(target=call, args=(a,)) for a in ("fr", "de", None, "fr")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_merged(runtime: RuntimeUnderTest, folder: Path, tmp_path: Path) -> None:
    program = compiled(folder / "fr")
    path = runtime.exported(program, tmp_path, "merged", adapters="merged")
    again = runtime.exported(adaptc.merge(program), tmp_path, "again", adapters="merged")
    for file in (path, again):
        for size in SIZES:
            x = inputs(*size)
            torch.testing.assert_close(_run_plain(file, x), expected(folder, "fr", x))
    model = runtime.open_model(path)
    torch.testing.assert_close(run(model, {"x": inputs(2, 3)}), expected(folder, "fr", inputs(2, 3)))
    with pytest.raises(adaptc.ConfigError, match=rf"merged\{runtime.suffix} has no inputs for adapters"):
        model.load_adapter("fr", folder / "fr")
    with pytest.raises(adaptc.CheckpointError, match="has no inputs for adapters"):
        runtime.save_adapter(folder / "fr", tmp_path / f"fr{runtime.adapter_suffix}", model=path)


def _run_plain(file: Path, x: Tensor) -> Tensor:
    if file.suffix == ".pte":
        from executorch.runtime import Runtime

        return Runtime.get().load_program(file).load_method("forward").execute([x])[0].clone()
    import openvino

    compiled_model = openvino.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert len(compiled_model.inputs) == 1
    return torch.from_numpy(compiled_model({"x": x.numpy()})["output"])


def test_a_merged_file_takes_the_place_of_one_with_inputs(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    path = runtime.exported(compiled(), tmp_path)
    runtime.exported(compiled(), tmp_path, adapters="merged")
    names = {".xml": {"model.xml", "model.bin"}, ".pte": {"model.pte"}}[runtime.suffix]
    assert {p.name for p in runtime.files(path)} == names == {p.name for p in tmp_path.iterdir()}


def test_the_program_stays_as_it_is(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    program = compiled()
    before = {n: t.clone() for n, t in program.state_dict.items()}
    ranges = dict(program.range_constraints)
    shape_env = fake_mode_of(program.graph).shape_env
    limits = dict(shape_env.var_to_range)
    runtime.exported(program, tmp_path)
    assert {s: shape_env.var_to_range[s] for s in limits} == limits
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict.items())
    assert dict(program.range_constraints) == ranges
    x = inputs(30, 40)  # larger than ExecuTorch's file may take
    torch.testing.assert_close(program(x), adaptc.merge(program)(x))


def test_adapters_whose_values_follow_from_the_base(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["up"], kasa_config={}, init_lora_weights=False)
    program = compiled(config)
    adapter = adaptc.save_adapter(program, tmp_path / "kasa")
    model = runtime.open_model(runtime.exported(program, tmp_path))
    with pytest.raises(adaptc.SwapError, match=r"follow from the base weight 'up.weight'.* prog.bind\(adapter\)"):
        model.load_adapter("a", adapter)
    bound = program.bind(adapter, scale=0.5)
    model.load_adapter("a", bound)
    torch.testing.assert_close(run(model, {"x": inputs(2, 3)}, "a"), bound(inputs(2, 3)))


def test_an_adapter_that_replaces_the_base(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    """The base weight is an input with a value of its own, which is not one number."""
    program = compiled(LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"))
    model = runtime.open_model(runtime.exported(program, tmp_path))
    model.load_adapter("a", program)
    for _ in range(2):
        torch.testing.assert_close(run(model, {"x": inputs(2, 3)}, "a"), program(inputs(2, 3)))
        torch.testing.assert_close(run(model, {"x": inputs(2, 3)}), Net()(inputs(2, 3)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_quantised_base(runtime: RuntimeUnderTest, scheme: str, tmp_path: Path) -> None:
    program = adaptc.quantize(compiled(), scheme)
    if (runtime.name, scheme) == ("openvino", "int4"):
        with pytest.raises(adaptc.BackendError, match=r"it has no operator for aten.*shift"):
            runtime.exported(program, tmp_path)
        return
    path = runtime.exported(program, tmp_path)
    if runtime.name == "openvino":
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        model = runtime.open_model(path, config=exact)
    else:
        model = runtime.open_model(path)
    model.load_adapter("a", program)
    x = inputs(3, 5)
    torch.testing.assert_close(run(model, {"x": x}, "a"), program(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, {"x": x}), adaptc.unload(program)(x), rtol=1e-4, atol=1e-5)


def test_bfloat16(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    free = ({0: torch.export.Dim("batch", max=9)},)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    x = inputs(4, 3).bfloat16()
    torch.manual_seed(5)
    program = adaptc.compile(
        Net().bfloat16(), config, example_inputs=(x,), dynamic_shapes=free, autocast_adapter_dtype=False
    )
    model = runtime.open_model(runtime.exported(program, tmp_path))
    model.load_adapter("a", program)
    if runtime.name == "openvino":
        import openvino

        given = openvino.Tensor(openvino.Type.bf16, openvino.Shape([4, 3, 7]))
        given.data.view(np.uint16)[...] = x.view(torch.uint16).numpy()
    else:
        given = x
    for adapter, base in (("a", program), (None, adaptc.unload(program))):
        found = torch.as_tensor(model.run({"x": given}, adapter)["output"]).float()
        torch.testing.assert_close(found, base(x).float(), rtol=2e-2, atol=2e-2)
    path = runtime.save_adapter(program, tmp_path / f"a{runtime.adapter_suffix}", model=model)
    model.load_adapter("again", path)
    found, again = (torch.as_tensor(model.run({"x": given}, n)["output"]) for n in ("a", "again"))
    assert torch.equal(found, again)


def test_outputs_have_names(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    free = {"x": {0: torch.export.Dim("batch")}, "flag": None}
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    x = inputs(2, 3)
    program = adaptc.compile(Named(), config, example_inputs={"x": x, "flag": None}, dynamic_shapes=free)
    model = runtime.open_model(runtime.exported(program, tmp_path))
    assert (model.input_names, model.output_names) == (["x"], ["y", "pair_0"])
    model.load_adapter("a", program)
    wanted = program(x=x, flag=None)
    torch.testing.assert_close(run(model, {"x": x}, "a", "pair_0"), wanted["pair"][0])
    torch.testing.assert_close(run(model, {"x": x}, "a", "y"), wanted["y"])


def test_names_and_inputs_that_do_not_exist(runtime: RuntimeUnderTest, folder: Path, model: Any) -> None:
    model.load_adapter("fr", folder / "fr")
    x = inputs(2, 3).numpy()
    with pytest.raises(adaptc.ConfigError, match="an adapter called 'fr' already"):
        model.load_adapter("fr", folder / "de")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'frr'; nearest are 'fr'"):
        model.run({"x": x}, "frr")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'de'"):
        model.feeds("de")
    with pytest.raises(adaptc.ConfigError, match=r"no input 'y'; its inputs are \['x'\]"):
        model.run({"x": x, "y": x})
    with pytest.raises(adaptc.ConfigError, match="input 'x' is missing"):
        model.run({})
    with pytest.raises(adaptc.ConfigError, match="no output 'z'"):
        model.run({"x": x}, outputs=["z"])
    with pytest.raises(adaptc.BackendError, match=r"refused the call: .*shape"):
        model.run({"x": x[..., :3]})
    torch.testing.assert_close(run(model, {"x": inputs(2, 3)}, "fr"), expected(folder, "fr", inputs(2, 3)))
    with pytest.raises(adaptc.ConfigError, match="the name of an adapter is a text"):
        model.load_adapter("", folder / "de")
    model.delete_adapter("fr")
    with pytest.raises(adaptc.ConfigError, match="no adapter called 'fr'"):
        model.run({"x": x}, "fr")


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
def test_tensors_that_do_not_fit(model: Any, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(adaptc.SwapError, match=message):
        model.load_adapter("wrong", tensors)
    assert model.adapters == []


def test_adapters_that_do_not_fit_write_nothing(
    runtime: RuntimeUnderTest, folder: Path, model: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"a{runtime.adapter_suffix}"
    torch.manual_seed(1)
    wide = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 9)), peft.LoraConfig(target_modules=["0"]))
    wide.save_pretrained(str(tmp_path / "other"))
    ia3 = compiled(adaptc.IA3Config(target_modules=["up"], feedforward_modules=[]))
    for adapter, message in ((tmp_path / "other", "0.lora_A|site"), (tmp_path / "nothing", "nothing"), (ia3, "sites")):
        with pytest.raises(adaptc.AdaptcError, match=message):
            runtime.save_adapter(adapter, path, model=model)
        with pytest.raises(adaptc.AdaptcError, match=message):
            model.load_adapter("a", adapter)
    with pytest.raises(adaptc.CheckpointError, match=rf"must end in \{runtime.adapter_suffix}"):
        runtime.save_adapter(folder / "fr", tmp_path / "a.bin", model=model)
    with pytest.raises(adaptc.ConfigError, match="model is the path of a"):
        runtime.save_adapter(folder / "fr", path, model=7)
    assert not path.exists()
    assert model.adapters == []


def test_adapter_files_of_another_model(runtime: RuntimeUnderTest, folder: Path, model: Any, tmp_path: Path) -> None:
    program = compiled()
    with torch.no_grad():
        program.base_tensors["down.weight"].add_(1)
    other = runtime.exported(program, tmp_path, "other")
    path = runtime.save_adapter(folder / "fr", tmp_path / f"fr{runtime.adapter_suffix}", model=other)
    with pytest.raises(adaptc.CheckpointError, match=rf"fr\{runtime.adapter_suffix} was written for another model"):
        model.load_adapter("fr", path)
    runtime.open_model(other).load_adapter("fr", path)
    with pytest.raises(adaptc.CheckpointError, match="there is no file"):
        model.load_adapter("none", tmp_path / f"none{runtime.adapter_suffix}")
    assert model.adapters == []


@COUNTS
def test_damaged_models(runtime: RuntimeUnderTest, folder: Path, tmp_path: Path, count: int) -> None:
    """Hundreds of files, each damaged elsewhere, are refused before the runtime is given any."""
    model = folder / f"model{runtime.suffix}"
    files = runtime.files(model)
    assert len(files) == {".xml": 3, ".pte": 1}[runtime.suffix]
    for file in files:
        shutil.copy(file, tmp_path / file.name)
    target = tmp_path / model.name
    for file in files:
        data = file.read_bytes()
        for seed in range(count // len(files)):
            (tmp_path / file.name).write_bytes(damaged(data, seed))
            with pytest.raises(adaptc.CheckpointError, match=rf"model\{runtime.suffix} (is damaged|was not written)"):
                runtime.open_model(target)
        (tmp_path / file.name).unlink()
        with pytest.raises(adaptc.CheckpointError, match=f"there is no file .*{file.name}"):
            runtime.open_model(target)
        (tmp_path / file.name).write_bytes(data)
    runtime.open_model(target)


@COUNTS
def test_damaged_adapters(runtime: RuntimeUnderTest, folder: Path, model: Any, tmp_path: Path, count: int) -> None:
    path = runtime.save_adapter(folder / "fr", tmp_path / f"fr{runtime.adapter_suffix}", model=model)
    data = path.read_bytes()
    for seed in range(count):
        path.write_bytes(damaged(data, seed))
        with pytest.raises((adaptc.CheckpointError, adaptc.SwapError), match=rf"fr\{runtime.adapter_suffix}"):
            model.load_adapter("fr", path)
    assert model.adapters == []
    path.write_bytes(data)
    model.load_adapter("fr", path)
    assert_runs(model, folder, "fr")


def test_programs_that_cannot_be_exported(runtime: RuntimeUnderTest, tmp_path: Path) -> None:
    path = tmp_path / f"model{runtime.suffix}"
    program = compiled()
    with pytest.raises(adaptc.ConfigError, match=r"takes what adaptc\.compile"):
        runtime.export(Net(), path)
    with pytest.raises(adaptc.ConfigError, match="adapters=7 is not one of inputs, merged, rows"):
        runtime.export(program, path, adapters=7)
    with pytest.raises(adaptc.CheckpointError, match=rf"must end in \{runtime.suffix}"):
        runtime.export(program, tmp_path / "model.pt2")
    with pytest.raises(adaptc.ConfigError, match="no adapter that could be an input"):
        runtime.export(adaptc.merge(program), path)
    counter = adaptc.compile(Counter(), LoraConfig(r=2, target_modules=["up"]), example_inputs=(inputs(2, 3),))
    with pytest.raises(adaptc.ConfigError, match="writes to 'count' in each call"):
        runtime.export(counter, path)
    boft = compiled(adaptc.BOFTConfig(boft_block_size=7, target_modules=["up"]))
    with pytest.raises(adaptc.BackendError, match=r"could not convert .*linalg_solve"):
        runtime.exported(boft, tmp_path)
    assert not list(tmp_path.iterdir())
