"""The rooms ``tuning`` and ``safe_pt2`` may be removed: all else imports, and computes the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.house.layout import ROOT, SOURCE

#: what every script begins with. Removed rooms must not be found in the checkout, where an editable install looks.
HEAD = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch
import adaptc
folder, room = sys.argv[1:]
assert adaptc.__file__.startswith(folder), adaptc.__file__
given = torch.load(f"{folder}/given.pt", weights_only=False)
model, x, adapters = given["model"], given["x"], given["adapters"]
config = adaptc.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
"""

IMPORT_ALL = """
import importlib, pkgutil
names = [m.name for m in pkgutil.walk_packages(adaptc.__path__, "adaptc.", onerror=print)]
for name in names:
    if not name.startswith("adaptc.kernels") and not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 400
assert f"adaptc.{room}" not in sys.modules
"""

USE = """
prog = adaptc.compile(model, adapters[0], config=config, example_inputs=x, pack="float32")
found = {"compiled": prog(x), "module": prog.module()(x)}
adaptc.swap(prog, adapters[1], config=config)
found["swapped"] = prog(x)
loaded = adaptc.load(adaptc.save(prog, f"{folder}/program.pt2"))
found["loaded"] = loaded(x)
print(adaptc.report(prog), prog.products, prog.packed)
torch.save({n: y.detach() for n, y in found.items()}, f"{folder}/found.pt")
"""

FOREIGN = """
foreign = torch.export.export(model, (x,))
torch.export.save(foreign, f"{folder}/foreign.pt2")
data = bytearray(open(f"{folder}/program.pt2", "rb").read())
data[len(data) // 2] ^= 1
open(f"{folder}/damaged.pt2", "wb").write(data)
for name, why in [("foreign", "checks of foreign files are not installed"), ("damaged", "damaged")]:
    try:
        adaptc.load(f"{folder}/{name}.pt2")
    except adaptc.CheckpointError as error:
        assert f"{name}.pt2" in str(error) and why in str(error), error
    else:
        raise AssertionError(f"{name}.pt2 was read")
"""

COMPILED = """
prog = adaptc.compile(model, adapters[0], config=config, example_inputs=x, backend="inductor")
found = {"compiled": prog(x)}
package = adaptc.load_package(adaptc.package(prog, f"{folder}/package.pt2"))
found["packaged"] = package(x)
adaptc.swap(package, adapters[1], config=config)
found["swapped"] = package(x)
torch.save({n: y.detach() for n, y in found.items()}, f"{folder}/found.pt")
"""


def values(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes = {"0": (131, 163), "2": (163, 135)}
    return {
        f"base_model.model.{name}.lora_{slot}.weight": torch.randn(shape) / 9
        for name, (width, out) in sizes.items()
        for slot, shape in (("A", (2, width)), ("B", (out, 2)))
    }


def outputs_of(model: nn.Module, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        down, up = (tensors[f"base_model.model.{name}.lora_{slot}.weight"] for slot in "AB")
        return model.get_submodule(name)(x) + 3 * F.linear(F.linear(x, down), up)

    with torch.no_grad():
        return layer("2", torch.tanh(layer("0", x)))


def run_without(room: str, folder: Path, *scripts: str) -> None:
    """Run the scripts in a fresh process on a copy of the source that lacks ``room``, and compare what they found."""
    assert (ROOT / "adaptc" / room).is_dir()
    for source, package in SOURCE.items():
        shutil.copytree(
            ROOT / source,
            folder / package.replace(".", "/"),
            ignore=shutil.ignore_patterns("__pycache__", room),
            dirs_exist_ok=True,
        )
    assert not (folder / "adaptc" / room).exists()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(131, 163), nn.Tanh(), nn.Linear(163, 135)).eval()
    x, adapters = torch.randn(7, 131), [values(1), values(2)]
    torch.save({"model": model, "x": x, "adapters": adapters}, folder / "given.pt")
    environment = {k: v for k, v in os.environ.items() if k != "ADAPTC_PRODUCTS"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([HEAD, *scripts]), str(folder), room],
        env=environment | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (outputs_of(model, x, tensors) for tensors in adapters)
    assert float((first - second).abs().max()) > 0.1  # the two adapters are told apart by their outputs
    wanted = {"compiled": first, "module": first, "packaged": first, "swapped": second, "loaded": second}
    for name, y in torch.load(folder / "found.pt").items():
        torch.testing.assert_close(y, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.long
def test_without_the_choice_of_matmuls(tmp_path: Path) -> None:
    run_without("tuning", tmp_path, USE, IMPORT_ALL)


@pytest.mark.long
def test_without_the_checks_of_foreign_files(tmp_path: Path) -> None:
    run_without("safe_pt2", tmp_path, USE, FOREIGN, IMPORT_ALL)


@pytest.mark.long
@pytest.mark.parametrize("room", ["tuning", "safe_pt2"])
def test_compiled_code_without_a_room(room: str, tmp_path: Path) -> None:
    run_without(room, tmp_path, COMPILED)
