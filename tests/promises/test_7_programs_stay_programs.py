"""Promise 7: adapters are ATen nodes with tags; a file is understood from its graph alone; and after every pass,
whoever runs it, the program lints and validates."""

from __future__ import annotations

import importlib
import operator
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import ExportedProgram

import adaptc
import adaptc.passes
from adaptc import LoraConfig, PassError
from adaptc.passes.graph.pass_infra import GraphPass, Pass, PassBase
from tests.support.families import FAMILIES

X = torch.randn(3, 6)
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False),
    "dora": LoraConfig(r=3, target_modules=["0", "2"], use_dora=True),
    "oft": adaptc.OFTConfig(oft_block_size=2, target_modules=["0", "2"]),
    "fourierft": adaptc.FourierFTConfig(n_frequency=5, target_modules=["0", "2"]),
    "ia3": adaptc.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "hra": adaptc.HRAConfig(r=2, target_modules=["0", "2"]),
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 4)).eval()


def classes() -> list[type[PassBase[Any]]]:
    """Every pass there is."""
    for module in pkgutil.walk_packages(adaptc.passes.__path__, "adaptc.passes."):
        importlib.import_module(module.name)

    def below(cls: type) -> Iterator[type]:
        for c in cls.__subclasses__():
            yield c
            yield from below(c)

    found = [c for c in dict.fromkeys(below(PassBase)) if c.__module__.startswith("adaptc.passes.")]
    return [c for c in found if c not in (Pass, GraphPass)]


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_no_pass_gets_around_its_checks(cls: type[PassBase[Any]]) -> None:
    base = Pass if issubclass(cls, Pass) else GraphPass
    assert issubclass(cls, base)
    for name in ("__call__", "check", "facts_for_check"):
        assert getattr(cls, name) is getattr(base, name), name
    assert cls.name
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if "apply" in vars(cls):  # no other of its kind has its name
        assert [c for c in classes() if c.name == cls.name and issubclass(c, base) and "apply" in vars(c)] == [cls]


def test_there_are_passes_of_every_package() -> None:
    homes = {c.__module__.split(".")[2] for c in classes()}
    assert homes == {"adapt", "optimize", "lower", "train", "quantized", "stages"}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes whose results were linted, and validated where they are programs, in order."""
    names: list[str] = []
    work: list[str] = []
    lint, validate = fx.Graph.lint, ExportedProgram.validate
    monkeypatch.setattr(fx.Graph, "lint", lambda self: (work.append("lint"), lint(self))[1])
    monkeypatch.setattr(ExportedProgram, "validate", lambda self: (work.append("validate"), validate(self))[1])
    for base, wanted in ((Pass, {"lint", "validate"}), (GraphPass, {"lint"})):

        def check(self: Any, before: Any, output: Any, wanted: Any = wanted, own: Any = base.check) -> None:
            work.clear()
            own(self, before, output)
            assert wanted <= set(work), self.name
            names.append(self.name)

        monkeypatch.setattr(base, "check", check)
    return names


@pytest.mark.long
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_pipelines_of_the_product_check_every_pass(name: str, checked: list[str], tmp_path: Path) -> None:
    def fresh(expected: dict[str, Any]) -> None:
        """All passes that a program says it went through were checked."""
        went = [p for trail in expected.values() for p, _ in trail]
        assert went
        assert set(went) <= set(checked), set(went) - set(checked)

    program = adaptc.compile(net(), CONFIGS[name], example_inputs=X, training=True)
    assert checked == ["remove_max_norm_writes", "matmuls_to_linear", "settle_strides", "inject"]
    assert [p for p, _ in program.adaptation.trail] == ["inject"]
    with torch.no_grad():
        program(X)
    fresh(program.passes)
    merged = adaptc.merge(program)
    assert "merge" in checked
    fresh(merged.passes)
    unloaded = adaptc.unload(program)
    assert "unload" in checked
    fresh(unloaded.passes)
    moved = program.to("meta")
    assert "move_to_device" in checked
    assert moved.device.type == "meta"
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    if any(s.free for a in program.adaptation.attachments for s in a.method.slots(program.ops[a.id]).values()):
        sizes = {"n_frequency": 7} if name == "fourierft" else {"r": 4}
        adaptc.swap(loaded, adaptc.compile(net(), CONFIGS[name].replace(**sizes), example_inputs=X).binding)
        count = checked.count("respecialize")
        loaded.graph  # noqa: B018  # follows when it is looked at
        assert checked.count("respecialize") == count + 1
    module = program.module()
    module.train()
    assert "set_graph_mode" in checked or "set_mode" in checked
    text = str(adaptc.report(merged)) + str(adaptc.report(program))
    assert "passes, program: inject" in text


@pytest.mark.parametrize("call", ["compile", "merge", "unload"])
def test_a_pass_that_breaks_a_program_is_blamed_by_name(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = adaptc.compile(net(), CONFIGS["lora"], example_inputs=X)
    expected = program(X)
    name = {"compile": "inject", "merge": "merge", "unload": "unload"}[call]
    (cls,) = (c for c in classes() if c.name == name)
    apply = cls.apply

    def broken(self: Any, subject: Any) -> Any:
        result = apply(self, subject)
        result.output.graph_signature.input_specs.pop()
        return result

    monkeypatch.setattr(cls, "apply", broken)
    use = {
        "compile": lambda: adaptc.compile(net(), CONFIGS["lora"], example_inputs=X),
        "merge": lambda: adaptc.merge(program),
        "unload": lambda: adaptc.unload(program),
    }[call]
    with pytest.raises(PassError, match=f"pass '{name}' left an invalid program"):
        use()
    monkeypatch.undo()
    assert torch.equal(program(X), expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_regions_are_aten_and_tagged(name: str) -> None:
    base = torch.export.export(net(), (X,))
    program = adaptc.compile(base, CONFIGS[name])
    known = {n.name for n in base.graph.nodes}
    added = [n for n in program.graph.nodes if n.name not in known and n.op != "placeholder"]
    assert added
    for node in added:
        assert node.op == "call_function"
        if node.target is not operator.getitem:
            assert isinstance(node.target, torch._ops.OpOverload)
            assert node.target.namespace == "aten"
        assert node.meta["custom"]["adaptc"]["method"] == name
    assert program.run_decompositions().module()(X).shape == (3, 4)


@pytest.mark.long
def test_a_file_is_understood_from_its_graph_alone(tmp_path: Path) -> None:
    """By a process that has nothing but the file; and the file has no part that torch.export did not write."""
    family = FAMILIES["llama"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    program = adaptc.compile(family.build(), config)
    inputs = family.inputs(2, 5)
    torch.save((inputs, program(**inputs).logits), tmp_path / "expected.pt")
    path = adaptc.save(program, tmp_path / "p.pt2")
    torch.export.save(torch.export.load(path), tmp_path / "again.pt2")
    code = """
import torch, adaptc
inputs, expected = torch.load("expected.pt")
for name in ("p.pt2", "again.pt2"):
    program = adaptc.load(name)
    assert torch.equal(program(**inputs).logits, expected)
    assert (program.binding.config.r, program.binding.config.lora_alpha) == (3, 7)
    assert len(program.adaptation.attachments) == 4
    adaptc.swap(program, adaptc.save_adapter(program, "adapter"))
    back = adaptc.unmerge(adaptc.merge(program))
    torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
print("understood")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "understood\n", done.stderr
