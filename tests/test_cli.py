"""The command line: files in, files out, errors in one line, and nothing heavy imported to print help."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import adaptc
from adaptc import LoraConfig
from adaptc.adapter_files.directory import read_adapter, write_adapter
from adaptc.cli import app
from tests.support.families import FAMILIES

WRITERS = ("compile", "merge", "swap", "unload", "lower", "package", "export-adapter")
OF_ADAPTERS = ("combine", "to-lora", "extract")  # see test_cli_adapters.py
COMMANDS = ("show", "methods", "verify", "certify", *WRITERS, *OF_ADAPTERS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Files:
    """A program, and a second adapter for it with another rank and fewer sites."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root, self.model, self.x = root, Net().eval(), torch.randn(4, 6)
        config = LoraConfig(r=3, target_modules=["layers.0", "layers.1", "layers.2"], init_lora_weights=False)
        self.own = adaptc.compile(self.model, config, example_inputs=self.x)
        self.program = adaptc.save(self.own, root / "program.pt2")
        self.base = adaptc.save(adaptc.unload(self.own), root / "base.pt2")
        config = LoraConfig(r=5, lora_alpha=20, target_modules=["layers.1"], init_lora_weights=False)
        self.other = adaptc.compile(self.model, config, example_inputs=self.x)
        self.adapter = adaptc.save_adapter(self.other, root / "adapter")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("cli"))


def call(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*args: Any, said: str) -> None:
    """An error of adaptc is one line on stderr, and nothing is written."""
    result = call(*args, code=1)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(said, lines[0]), lines[0]
    assert "Traceback" not in result.output


def output(path: Path, x: Tensor) -> Tensor:
    return torch.export.load(path).module()(x)


def test_show_a_program(files: Files) -> None:
    out = call("show", files.program).stdout
    assert re.search(r"layers\.\{0\.\.2\} x3 +linear +apply +lora +3 +lora_A\.weight 3x6", out)
    assert re.search(r"head +no entry names it +head", out)
    assert adaptc.report(files.own).parameters_line() in out


def test_show_an_adapter_directory(files: Files) -> None:
    out = call("show", files.adapter).stdout
    assert f"LORA adapter in {files.adapter}: 2 tensors, 60 parameters, 240 B" in out
    assert re.search(r"lora_alpha +20\n", out)
    assert re.search(r"target_modules +layers\.1\n", out)
    assert re.search(r"layers\.1\.lora_B\.weight +6x5 +float32", out)
    assert "rslora" not in out  # at its default


def test_merge(files: Files, tmp_path: Path) -> None:
    result = call("merge", files.program, tmp_path / "m.pt2")
    assert "merged 3 weights (float32)" in result.stdout
    assert f"wrote {tmp_path / 'm.pt2'}" in result.stdout
    merged = output(tmp_path / "m.pt2", files.x)
    assert not torch.allclose(merged, files.model(files.x), atol=1e-3)
    torch.testing.assert_close(merged, files.own(files.x), rtol=1e-5, atol=1e-6)
    assert "The program has no adapter" in call("show", tmp_path / "m.pt2").stdout


def test_merge_another_adapter(files: Files, tmp_path: Path) -> None:
    call("merge", files.program, tmp_path / "m.pt2", "--adapter", files.adapter)
    torch.testing.assert_close(output(tmp_path / "m.pt2", files.x), files.other(files.x), rtol=1e-5, atol=1e-6)


def test_merge_into_quantised_weights_with_a_correction(files: Files, tmp_path: Path) -> None:
    small = adaptc.quantize(adaptc.unload(files.own), "int8")
    path = adaptc.save(adaptc.compile(small, files.adapter), tmp_path / "small.pt2")
    refused("merge", path, tmp_path / "m.pt2", "--correction-rank", "2", said="give both")
    result = call("merge", path, tmp_path / "m.pt2", "--requantize", "--correction-rank", "2")
    assert "rank 2, from" in result.stdout
    weights = json.loads(
        call("merge", path, tmp_path / "n.pt2", "--requantize", "--correction-rank", "5", "--json").stdout
    )
    (row,) = (w for w in weights["weights"] if "correction_rank" in w)
    assert row["error"] < row["rounding_error"]


def test_merge_is_safe_unless_told_otherwise(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "inf.pt2"
    program = adaptc.compile(files.model, files.own.binding.config, example_inputs=files.x)
    with torch.no_grad():
        program.state_dict["layers.1.lora_B.default.weight"].mul_(torch.inf)
    adaptc.save(program, path)
    refused("merge", path, tmp_path / "m.pt2", said="not finite")
    assert not (tmp_path / "m.pt2").exists()
    call("merge", path, tmp_path / "m.pt2", "--no-safe")
    assert not torch.isfinite(output(tmp_path / "m.pt2", files.x)).all()


def test_swap(files: Files, tmp_path: Path) -> None:
    before = files.program.read_bytes()
    out = call("swap", files.program, files.adapter, tmp_path / "s.pt2").stdout
    assert f"{files.adapter}: 1 of 3 sites, rank 5" in out
    assert "left at the base: layers.{0,2}.weight" in out
    swapped = adaptc.load(tmp_path / "s.pt2")
    torch.testing.assert_close(swapped(files.x), files.other(files.x))  # fused, and trained: to rounding
    assert files.program.read_bytes() == before


def test_unload(files: Files, tmp_path: Path) -> None:
    call("unload", files.program, tmp_path / "u.pt2")
    assert torch.equal(output(tmp_path / "u.pt2", files.x), files.model(files.x))


def test_unload_onto_itself(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(files.program.read_bytes())
    refused("unload", path, path, said="is there already; --force")
    call("unload", path, "-o", path, "--force")
    assert torch.equal(output(path, files.x), files.model(files.x))


def test_export_adapter(files: Files, tmp_path: Path) -> None:
    call("export-adapter", files.program, tmp_path / "a", "--base-model", "some/model")
    program = adaptc.compile(files.model, str(tmp_path / "a"), example_inputs=files.x)
    torch.testing.assert_close(program(files.x), files.own(files.x))
    assert "some/model" in call("show", tmp_path / "a").stdout


def test_verify(files: Files) -> None:
    out = call("verify", files.program, "--runs", 4, "--seed", 11).stdout
    assert out.startswith("verified (seed 11)")
    assert "run 4: " in out
    assert re.search(r"merged equals adapted +pass", out)
    out = call("verify", files.program, "--atol", "1e-30", code=1).stdout
    assert "NOT verified: merged equals adapted" in out


def test_errors_are_one_line(files: Files, tmp_path: Path) -> None:
    refused("show", tmp_path / "none.pt2", said="there is no file")
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    refused("show", tmp_path / "bad.pt2", said="cannot be read as an exported program")
    refused("show", tmp_path, said="holds no adapter")
    refused("swap", files.program, tmp_path / "none", tmp_path / "o.pt2", said="none")
    refused("unload", files.program, tmp_path / "no" / "o.pt2", said="does not exist")
    call("unload", files.program, tmp_path / "u.pt2")
    refused("merge", tmp_path / "u.pt2", tmp_path / "o.pt2", said="no adapter")
    refused("export-adapter", tmp_path / "u.pt2", tmp_path / "o", said="no adapter")
    assert not (tmp_path / "o.pt2").exists()


def test_warnings_are_one_line_too(files: Files, tmp_path: Path) -> None:
    directory = tmp_path / "newer"
    directory.mkdir()
    for file in files.adapter.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "quantum": True}))
    result = call("swap", files.program, directory, tmp_path / "s.pt2")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("warning: ")
    assert "quantum" in line


def test_version() -> None:
    assert call("--version").stdout == f"adaptc {adaptc.__version__}\n"


def test_unknown_options_are_usage_errors(files: Files) -> None:
    assert "No such option" in call("merge", files.program, "o.pt2", "--fast", code=2).stderr


@pytest.mark.long
def test_console_script_and_lazy_imports(tmp_path: Path) -> None:
    """A process of its own: help loads no torch, and an error comes back as the exit code."""
    code = (
        "import sys; from adaptc.cli import main; sys.argv[1:] = ['--help']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout)
    assert done.stdout.strip().endswith("False")
    done = subprocess.run(
        [sys.executable, "-m", "adaptc.cli", "show", str(tmp_path / "none.pt2")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")
    assert len(done.stderr.strip().splitlines()) == 1


def test_faults_of_users_are_no_tracebacks(files: Files, tmp_path: Path) -> None:
    for option, bad in (("--seed", 2**64), ("--seed", -(10**30)), ("--runs", 10**30), ("--runs", 0), ("--atol", "x")):
        call("verify", files.program, option, bad, code=2)
    # A name that is no text, and a config with one: shown with escapes.
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert r"\udcff" in call("export-adapter", files.program, odd).stdout
    copy = tmp_path / "a"
    shutil.copytree(files.adapter, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "\udc80"}))
    assert "LORA" in call("show", copy).stdout
    refused("swap", files.program, copy, tmp_path / "o.pt2", said="can be written as UTF-8")


@pytest.mark.parametrize("change", [{"r": "3"}, {"r": 10**15}, {"lora_alpha": math.inf}, {"rank_pattern": {"x": None}}])
def test_faults_of_configs_are_one_line(files: Files, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(files.adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused("swap", files.program, tmp_path / "a", tmp_path / "o.pt2", said=next(iter(change)))


# -- what commands that write have in common ---------------------------------------------------------------------------


def words(command: str, files: Files) -> list[Any]:
    """The arguments of a command that writes, without where to."""
    more = {"swap": [files.adapter], "compile": [files.adapter]}.get(command, [])
    return [command, files.base if command == "compile" else files.program, *more]


@pytest.mark.parametrize("command", WRITERS)
def test_what_is_there_is_not_replaced(files: Files, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    (out.mkdir() if command == "export-adapter" else out.touch())
    if command == "export-adapter":
        (out / "adapter_config.json").touch()
    before = out.stat()
    for place in ([out], ["-o", out], ["--output", out]):
        refused(*words(command, files), *place, said="is there already; --force replaces it")
    after = out.stat()  # but for the time of the last access
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("command", WRITERS)
def test_the_output_is_given_once(files: Files, tmp_path: Path, command: str) -> None:
    for place in ([], [tmp_path / "a", "-o", tmp_path / "b"]):
        assert "give the output once" in call(*words(command, files), *place, code=2).stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("command", ["compile", "merge", "swap", "unload", "export-adapter"])
def test_json_is_all_there_is_on_stdout(files: Files, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    for force in ([], ["--force"]):
        found = json.loads(call(*words(command, files), "-o", out, "--json", *force).stdout)
        assert found["wrote"] == str(out)
    expected = {
        "merge": ("source", lambda v: v),
        "swap": ("sites", lambda v: v == 1),
        "compile": ("trainable", lambda v: v == 0 or v == 60),
    }
    if command in expected:
        key, good = expected[command]
        assert good(found[key]), found


def test_json_of_what_is_looked_at(files: Files) -> None:
    found = json.loads(call("show", files.program, "--json").stdout)
    assert [s["fqn"] for s in found["sites"]] == [f"layers.{i}.weight" for i in range(3)]
    assert json.loads(call("show", files.adapter, "--json").stdout)["config"]["lora_alpha"] == 20
    assert json.loads(call("verify", files.program, "--json").stdout)["ok"] is True
    assert json.loads(call("verify", files.program, "--json", "--atol", "1e-30", code=1).stdout)["ok"] is False
    assert "LoraConfig" in [m["config"] for m in json.loads(call("methods", "--json").stdout)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    click = typer.main.get_command(app)
    found = click.commands[command]  # type: ignore[attr-defined]
    assert found.help
    for parameter in found.params:
        assert parameter.help, parameter.name
    options = {opt for p in found.params for opt in p.opts}
    assert "--json" in options
    assert (command in (*WRITERS, *OF_ADAPTERS)) == ({"--output", "-o", "--force"} <= options)


# -- compile, package, lower -------------------------------------------------------------------------------------------


def test_compile_a_program(files: Files, tmp_path: Path) -> None:
    out = call("compile", files.base, files.adapter, "-o", tmp_path / "a.pt2").stdout
    assert re.search(r"layers\.1 +linear +apply +lora +5", out)
    torch.testing.assert_close(adaptc.load(tmp_path / "a.pt2")(files.x), files.other(files.x))


def test_compile_a_file_of_another_format(files: Files, tmp_path: Path) -> None:
    file = adaptc.save_adapter(files.other, tmp_path / "k.safetensors", format="kohya", component="unet")
    call("compile", files.base, file, "-o", tmp_path / "a.pt2", "--component", "unet")
    torch.testing.assert_close(adaptc.load(tmp_path / "a.pt2")(files.x), files.other(files.x))
    refused("compile", files.base, file, "-o", tmp_path / "b.pt2", "--component", "vae", said="no component 'vae'")
    assert call("merge", files.program, "-o", tmp_path / "b.pt2", "--component", "unet", code=2)


def test_compile_a_config(files: Files, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 7, "target_modules": ["head"]}))
    call("compile", files.base, config, "-o", tmp_path / "a.pt2")
    program = adaptc.load(tmp_path / "a.pt2")
    assert adaptc.report(program).sites[0].rank == 7
    torch.testing.assert_close(program(files.x), files.model(files.x))
    for text, said in (("{", "JSON"), ("[]", "peft_type"), ('{"peft_type": "NONE"}', "NONE")):
        config.write_text(text)
        refused("compile", files.base, config, "-o", tmp_path / "b.pt2", said=said)
    refused("compile", files.base, tmp_path / "none", "-o", tmp_path / "b.pt2", said="there is no file")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = FAMILIES["llama"].build()
    folder = tmp_path_factory.mktemp("llama") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.long
def test_compile_a_model_directory(llama: tuple[Any, Path], files: Files, tmp_path: Path) -> None:
    model, folder = llama
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    own = adaptc.compile(model, config)
    adapter = adaptc.save_adapter(own, tmp_path / "adapter")
    call("compile", folder, adapter, "-o", tmp_path / "a.pt2")
    ids = torch.arange(15).reshape(3, 5)
    out = adaptc.load(tmp_path / "a.pt2")(input_ids=ids)
    torch.testing.assert_close(out.logits, own(input_ids=ids).logits)
    call("compile", folder, adapter, "-o", tmp_path / "t.pt2", "--training")
    assert adaptc.load(tmp_path / "t.pt2").module().train().training


def test_a_directory_without_a_model_says_so(llama: tuple[Any, Path], files: Files, tmp_path: Path) -> None:
    def compiled(said: str) -> None:
        refused("compile", tmp_path / "m", files.adapter, "-o", tmp_path / "a.pt2", said=said)

    compiled("there is no model in .*transformers model directory")
    shutil.copytree(llama[1], tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    good = json.loads(file.read_text())
    for names in (None, [], ["Nothing"], ["LlamaModel", "LlamaForCausalLM"], ["AutoTokenizer"], "LlamaForCausalLM"):
        file.write_text(json.dumps({**good, "architectures": names}))
        compiled("architectures")
    file.write_text("{")
    compiled("cannot be read")
    file.write_text(json.dumps(good))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    compiled("cannot load LlamaForCausalLM")


@pytest.mark.long
def test_keys_are_renamed(files: Files, tmp_path: Path) -> None:
    tensors = {f"net.{k}": t for k, t in read_adapter(files.adapter).tensors.items()}
    inner = write_adapter(tmp_path / "inner", files.other.binding.config.to_dict(), tensors)
    out, mapping = tmp_path / "o.pt2", json.dumps({r"^net\.": ""})
    refused("swap", files.program, inner, "-o", out, said=r"key_mapping=\{r\"\^net")
    for text in ("{", "[]"):
        assert "JSON" in call("swap", files.program, inner, "-o", out, "--key-mapping", text, code=2).stderr
    assert "--adapter" in call("merge", files.program, "-o", out, "--key-mapping", mapping, code=2).stderr
    refused("swap", files.program, inner, "-o", out, "--key-mapping", '{"(": ""}', said="key_mapping")
    refused("swap", files.program, inner, "-o", out, "--key-mapping", '{"a": 1}', said="key_mapping")
    call("swap", files.program, inner, "-o", out, "--key-mapping", mapping)
    torch.testing.assert_close(adaptc.load(out)(files.x), files.other(files.x))
    call("merge", files.program, "-f", "-o", out, "--adapter", inner, "--key-mapping", mapping)
    torch.testing.assert_close(output(out, files.x), files.other(files.x), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_package(files: Files, tmp_path: Path) -> None:
    call("package", files.program, "-o", tmp_path / "p.pt2", "--max-rank", 5)
    runner = adaptc.load_package(tmp_path / "p.pt2")
    torch.testing.assert_close(runner(files.x), files.own(files.x))
    runner.swap(files.adapter)
    torch.testing.assert_close(runner(files.x), files.other(files.x))


def test_lower_needs_a_gpu(files: Files, tmp_path: Path) -> None:
    refused("lower", files.program, "-o", tmp_path / "l.pt2", said="GPU")
    refused("lower", files.program, "-o", tmp_path / "l.pt2", "--device", "nowhere", said="nowhere")


@pytest.mark.long
def test_a_process_of_its_own(files: Files, tmp_path: Path) -> None:
    """Tables and JSON on stdout, errors on stderr, and the exit codes."""

    def run(*args: Any) -> Any:
        command = [sys.executable, "-m", "adaptc.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("swap", files.program, files.adapter, "-o", tmp_path / "s.pt2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrote"] == str(tmp_path / "s.pt2")
    assert done.stderr == ""
    done = run("swap", files.program, files.adapter, "-o", tmp_path / "s.pt2")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 's.pt2'} is there already; --force replaces it\n"
    assert run("swap", files.program).returncode == 2
