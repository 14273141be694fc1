"""examples/cpp: a program without Python that runs packages with PEFT's adapters, and refuses the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc
from tests.support.packaged_nets import NET_CONFIG, Packaged, adapter, net_inputs

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
SUFFIX = "adapter_config.json"
ALL = NET_CONFIG.replace(r=3, lora_alpha=7)
SOME = NET_CONFIG.replace(r=5, lora_alpha=4, use_rslora=True)


def compiler() -> str:
    found = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    assert found is not None, "the tests of packages need g++ or clang++, and neither is here"
    return found


pytestmark = pytest.mark.slow  # torch's headers take a compiler most of a minute


def built(folder: Path) -> Path:
    """By cmake with the project's file, or where that is not installed by the compiler alone."""
    if shutil.which("cmake") and (shutil.which("make") or shutil.which("ninja")):
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        done(["cmake", "-S", str(SOURCE), "-B", str(folder), prefix])
        done(["cmake", "--build", str(folder)])
        return folder / "run_package"
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    where = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    program = folder / "run_package"
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    done([compiler(), "-std=c++20", abi, *include, str(SOURCE / "main.cpp"), "-o", str(program), *where])
    return program


def done(command: list[str], code: int = 0) -> Any:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def folders(net: Packaged, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of all sites and of some, and with one thing each that the example does not take."""
    root = tmp_path_factory.mktemp("adapters")
    out = {}
    for name, config, only in (
        ("all", ALL, None),
        ("some", SOME, ("head.weight", "head.bias", "emb.weight", "lin.weight")),
    ):
        chosen = only or [a.fqn for a in net.program.adaptation.attachments]
        tensors = adapter(net.program, config, lambda fqn, chosen=chosen: fqn in chosen)
        adaptc.swap(net.program, tensors, config=config)
        out[name] = adaptc.save_adapter(net.program, root / name)
    return out


def changed(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / SUFFIX).read_text())
    (target / SUFFIX).write_text(json.dumps({**config, **fields}))
    return target


def inputs(folder: Path, size: tuple[int, int], **others: Tensor) -> Path:
    (x,), kwargs = net_inputs(*size)
    save_file({"x": x, **kwargs, **others}, folder / "inputs.safetensors")
    return folder / "inputs.safetensors"


def parsed(text: str) -> dict[str, list[Tensor]]:
    """Adapter -> its outputs."""
    lines, out = text.splitlines(), {}
    for head, values in zip(lines[::2], lines[1::2], strict=True):
        name, _, *shape = head.split()
        numbers = torch.tensor([float(v) for v in values.split()])
        out.setdefault(name, []).append(numbers.view([int(n) for n in shape]))
    return out


@pytest.mark.parametrize("size", [(2, 5), (3, 7)])
def test_it_computes_what_python_does(
    net: Packaged, program: Path, folders: dict[str, Path], tmp_path: Path, size: tuple[int, int]
) -> None:
    """Also with one adapter after another: nothing of the one before is left."""
    order = [folders[n] for n in ("all", "some", "all")]
    package = adaptc.load_package(net.path)
    args, kwargs = net_inputs(*size)
    wanted = {"packaged": package(*args, **kwargs)} | {str(d): package.bind(d)(*args, **kwargs) for d in order}
    for given in ([order[0], order[1]], [order[1], order[0]]):
        command = [str(program), str(net.path), str(inputs(tmp_path, size)), *map(str, given)]
        found = parsed(done(command).stdout)
        assert found.keys() == wanted.keys()
        for name, outputs in found.items():
            tensors = [v for v in wanted[name].values() if v is not None]
            for got, want in zip(outputs, tensors, strict=True):
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_it_runs_packages_on_quantised_bases(program: Path, tmp_path: Path, scheme: str) -> None:
    """Also where few rows and many are computed in two ways, and with another adapter."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 47), nn.Tanh(), nn.Linear(47, 7))
    adaptc.quantize(net, scheme, exclude=["2"])
    config = adaptc.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    prog = adaptc.compile(net, config, example_inputs=torch.randn(3, 64))
    path = adaptc.package(prog, tmp_path / "net.pt2")
    adapted = prog.bind(prog.binding)
    other = adaptc.save_adapter(adaptc.compile(net, config, example_inputs=torch.randn(3, 64)), tmp_path / "other")
    for rows in (3, 11):
        x = torch.randn(rows, 64)
        save_file({"input": x}, tmp_path / "inputs.safetensors")
        found = parsed(done([str(program), str(path), str(tmp_path / "inputs.safetensors"), str(other)]).stdout)
        expected = {"packaged": adapted(x), str(other): prog.bind(str(other))(x)}
        assert found.keys() == expected.keys()
        for name, (got,) in found.items():
            torch.testing.assert_close(got, expected[name], rtol=2e-5, atol=2e-5)


def test_what_it_does_not_understand_is_refused(
    net: Packaged, program: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    good, x = folders["all"], inputs(tmp_path, (3, 7))
    large = NET_CONFIG.replace(r=9)
    adaptc.swap(net.program, adapter(net.program, large), config=large)
    refused = {
        "use_dora": (changed(good, tmp_path / "dora", use_dora=True), "the option 'use_dora' is not understood"),
        "pattern": (changed(good, tmp_path / "pattern", alpha_pattern={"lin": 3}), "'alpha_pattern' is not"),
        "pissa": (changed(good, tmp_path / "pissa", init_lora_weights="pissa"), "'init_lora_weights' is not"),
        "kind": (changed(good, tmp_path / "kind", peft_type="IA3"), "only LORA is understood"),
        "rank": (adaptc.save_adapter(net.program, tmp_path / "large"), "has shape .* room for"),
        "none": (tmp_path / "nothing", "cannot read"),
    }
    half = changed(good, tmp_path / "half")
    data = (half / "adapter_model.safetensors").read_bytes()
    (half / "adapter_model.safetensors").write_bytes(data[:-7])
    refused["cut"] = (half, "lies outside the file")
    for directory, said in refused.values():
        result = done([str(program), str(net.path), str(x), str(directory)], code=1)
        assert len(result.stderr.splitlines()) == 1
        assert list(parsed(result.stdout)) == ["packaged"]
        assert re.search(said, result.stderr), result.stderr
    for name, others in {"gain": {"gain": torch.ones(4)}, "ids": {"ids": torch.ones(3, 7)}}.items():
        result = done([str(program), str(net.path), str(inputs(tmp_path, (3, 7), **others))], code=1)
        assert f"the input '{name}' has another dtype or shape" in result.stderr
