"""How methods become known: registered again and again, reloaded, by files of the command line, by entry points."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import adaptc
from adaptc import ConfigError
from adaptc.cli import app
from adaptc.methods._shared import registry as _registry
from adaptc.methods._shared.registry import METHODS, _load_class
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.program_method import ProgramMethod

SOURCE = textwrap.dedent(
    '''
    """A method that adds a learned multiple of the weight's signs."""

    from dataclasses import dataclass
    from typing import ClassVar

    import adaptc

    FACTOR = 1.0


    @dataclass(frozen=True)
    class Signed(adaptc.methods.Method):
        name: ClassVar[str] = "signed"

        def slots(self, op):
            return {"signed_amount": adaptc.methods.Slot((1,))}

        def weight(self, op, W, slots, scale):
            return (W + FACTOR * slots["signed_amount"] * W.sign()).to(W.dtype)


    @dataclass
    class SignedConfig(adaptc.methods.TargetedConfig):
        peft_type: ClassVar[str] = "SIGNED"

        def method(self, name, kind):
            return Signed()


    adaptc.methods.register_method(SignedConfig, Signed)
    '''
)


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered here is forgotten again."""
    for name in ("CONFIGS", "METHODS", "_registered_classes"):
        monkeypatch.setattr(_registry, name, dict(getattr(_registry, name)))
    monkeypatch.setattr(_registry, "_entry_points_loaded", list(_registry._entry_points_loaded))
    yield
    sys.modules.pop("signed_method", None)


def compiled(config: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(2)
    return adaptc.compile(nn.Sequential(nn.Linear(6, 5)).eval(), config(target_modules=["0"]), example_inputs=X)


X = torch.linspace(-1, 2, 18).reshape(3, 6)


def run_cell(factor: float) -> Any:
    """The source as a cell of a notebook, whose classes are those of ``__main__``."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(SOURCE.replace("FACTOR = 1.0", f"FACTOR = {factor}"), space)
    return space["SignedConfig"]


def output(program: adaptc.AdaptedProgram) -> torch.Tensor:
    with torch.no_grad():
        for t in program.binding.values.values():
            t.fill_(0.5)
    return program(X)


def test_a_cell_that_runs_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    first = compiled(run_cell(1.0))
    path = adaptc.save(first, tmp_path / "signed.pt2")
    second = compiled(run_cell(-3.0))
    assert not torch.allclose(output(first), output(second))
    module = nn.Linear(6, 5)
    module.load_state_dict({k[2:]: v for k, v in second.state_dict.items() if k in ("0.weight", "0.bias")})
    weight = module.weight - 3.0 * 0.5 * module.weight.sign()
    torch.testing.assert_close(output(second), nn.functional.linear(X, weight, module.bias))
    # What is made again from a file is made by the method that is registered now.
    assert type(adaptc.load(path).adaptation.attachments[0].method) is _registry._registered_classes["__main__:Signed"]


def test_a_reloaded_module_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "signed_method.py"
    file.write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("signed_method")
    old = module.SignedConfig
    compiled(old)
    file.write_text(SOURCE.replace("FACTOR = 1.0", "FACTOR = 2.5  # changed"), encoding="utf-8")
    module = importlib.reload(module)
    assert module.FACTOR == 2.5
    assert module.SignedConfig is not old
    (a,) = compiled(module.SignedConfig).adaptation.attachments
    assert type(a.method) is module.Signed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("SIGNED", "LORA"), "'LORA' is the name of 'adaptc.methods.lora_family.lora_config:LoraConfig' already"),
        (('"signed"', '"lora"'), "'lora' is the name of 'adaptc.methods.lora_family.lora:Lora' already"),
        (('"signed"', '""'), "name must not be empty"),
        (("SIGNED", "Signed"), "must be a name in capitals"),
        (
            ("    def slots", "    absent: int = 2\n\n    def slots"),
            "Signed.absent is a function or an object of the protocol",
        ),
    ],
)
def test_names_that_are_taken_or_missing(change: tuple[str, str], message: str) -> None:
    before = dict(_registry.METHODS), dict(_registry.CONFIGS)
    with pytest.raises(ConfigError, match=message):
        exec(SOURCE.replace(*change), {"__name__": "__main__"})
    assert before == (_registry.METHODS, _registry.CONFIGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a program, an adapter, and the file of their method."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "signed_method.py").write_text(SOURCE, encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import torch, adaptc, signed_method
config = signed_method.SignedConfig(target_modules=["0"])
program = adaptc.compile(torch.nn.Sequential(torch.nn.Linear(6, 5)), config, example_inputs=torch.zeros(3, 6))
adaptc.save(program, {str(folder / "signed.pt2")!r})
adaptc.save_adapter(program, {str(folder / "adapter")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    return folder


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.long
def test_the_command_line_needs_the_file_and_says_so(saved: Path, tmp_path: Path) -> None:
    done = command("show", saved / "signed.pt2")
    assert done.exit_code == 1
    assert "'signed', which is not known here" in done.stderr
    assert "on the command line: --import FILE" in done.stderr
    given = ("--import", saved / "signed_method.py")
    done = command(*given, "show", saved / "signed.pt2")
    assert done.exit_code == 0, done.output
    assert "signed_amount" in done.stdout
    done = command(*given, "verify", saved / "signed.pt2")
    assert done.exit_code == 0, done.output
    out = tmp_path / "swapped.pt2"
    done = command(*given, "swap", saved / "signed.pt2", saved / "adapter", out)
    assert done.exit_code == 0, done.output
    assert out.is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "there is no such Python file"), ("1 +", "SyntaxError"), ("import nowhere_to_be_found", "ModuleNotFound")],
)
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "wrong.py"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    done = command("--import", file, "methods")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: --import {file}: ")
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.long
def test_an_imported_file_hides_no_library(tmp_path: Path) -> None:
    """It may be called like a module that adaptc needs, and finds the files beside it."""
    (tmp_path / "json.py").write_text("import beside\nprint('imported', beside.VALUE)\n", encoding="utf-8")
    (tmp_path / "beside.py").write_text("VALUE = 17\n", encoding="utf-8")
    program = [Path(sys.executable).parent / "adaptc", "--import", tmp_path / "json.py", "methods"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported 17" in done.stdout
    assert "LoraConfig" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("point", ["signed_method", "signed_entry:register"])
def test_an_installed_package_is_found_by_its_entry_point(
    saved: Path, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module, or a function that registers; it is looked for where a name is not known."""
    monkeypatch.setattr(_registry, "_entry_points_loaded", [])
    (tmp_path / "signed_method.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "signed_entry.py").write_text("def register():\n    import signed_method\n", encoding="utf-8")
    info = tmp_path / "signed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signed\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[adaptc.methods]\nsigned = {point}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "signed_method" not in sys.modules
    if point == "signed_method":
        program = adaptc.load(saved / "signed.pt2")
    else:
        net = nn.Sequential(nn.Linear(6, 5))
        program = adaptc.compile(net, saved / "adapter", example_inputs=torch.zeros(3, 6))
    assert program.binding.config.peft_type == "SIGNED"
    assert "signed_method" in sys.modules
    sys.modules.pop("signed_entry", None)


def test_methods_of_peft_that_are_refused_say_why(tmp_path: Path) -> None:
    """As a config of PEFT's, and as an adapter that it wrote."""
    config = peft.ShadowConfig(r=3)
    config.save_pretrained(str(tmp_path))
    torch.save({"base_model.model.shadow_down.weight": torch.ones(3, 4)}, tmp_path / "adapter_model.bin")
    for given in (config, tmp_path, {"peft_type": "SHADOW"}):
        with pytest.raises(ConfigError, match="'SHADOW' is not supported: its adapter is a second decoder"):
            adaptc.compile(nn.Linear(3, 4), given, example_inputs=torch.randn(2, 3))


@pytest.mark.parametrize("name", METHODS)
def test_no_option_hides_a_hook(name: str) -> None:
    """An option of the name of a hook would answer in its place, as WaveFT's ``family`` of wavelets did once."""
    method = _load_class(METHODS[name])
    base = ProgramMethod if issubclass(method, ProgramMethod) else Method
    own = {f.name for f in dataclasses.fields(method)} - {f.name for f in dataclasses.fields(base)}
    # Both are switches that the protocol has for methods without such an option, too.
    assert {n for n in own if hasattr(base, n)} <= {"dropout", "training"}
