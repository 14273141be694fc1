"""Every report has its numbers as plain JSON under the keys that the guide lists, and as a table of pandas."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.api.certify import verify
from adaptc.errors import AdaptcError
from adaptc.joint_training.sweep_report import SweepReport, SweepResult
from adaptc.packages.package_report import PackageInput, PackageReport, PackageSite
from adaptc.passes.quantized.quantize_weights import WeightQuantization
from adaptc.reports.inspect_file import inspect_file
from adaptc.reports.layer_graph import LayerGraph
from adaptc.reports.results import QuantizeReport
from adaptc.tables import Report
from adaptc.training.from_data.initialize import DataFit, DataReport
from adaptc.verification.check_method import MethodCheck, MethodReport
from tests.support.guides import ROOT

#: a report's name, and its keys in code
ROW = re.compile(r"^\| `(\w+)` \| .* \| (.*) \| .* \|$", re.MULTILINE)
CONFIG = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)


class Subjects:
    """A program at two layers and what is made of it, in a folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.example = folder, torch.randn(2, 7)
        self.model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double().eval()
        self.example = self.example.double()
        self.program = adaptc.compile(self.model, CONFIG, example_inputs=self.example)
        self.adapter = adaptc.save_adapter(self.program, folder / "adapter")
        one = adaptc.compile(self.model, CONFIG.replace(target_modules=["0"]), example_inputs=self.example)
        self.one_site = adaptc.save_adapter(one, folder / "one")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("reports"))


def package_report(s: Subjects) -> PackageReport:
    site = PackageSite("0.weight", "linear", "apply", "lora", 3, 4, True)
    inputs = (PackageInput("x", torch.float32, ("batch", 7)), PackageInput("flag", None, (), True))
    return PackageReport(s.folder, "cpu", "2.11", 5, "adapter", "LORA", (site,), inputs, {"batch": (1, float("inf"))})


def trained(s: Subjects) -> Report:
    program = adaptc.compile(s.model, CONFIG, example_inputs=s.example, training=True)
    bank = program.bank({"a": CONFIG.replace(r=2)}, training=True)
    bank.forward_backward(s.example, ["a"] * len(s.example), lambda out, _: out.square().mean())
    return bank.step()


def swapped(s: Subjects) -> Report:
    program = adaptc.compile(s.model, CONFIG, example_inputs=s.example)
    return adaptc.swap(program, s.one_site)


#: class -> (how to get one, how many rows it has, a column of them and its values)
REPORTS: dict[str, tuple[Callable[[Subjects], Report], str, list[Any]]] = {
    "CoverageReport": (lambda s: adaptc.report(s.program), "fqn", ["0.weight", "2.weight"]),
    "Norms": (lambda s: adaptc.report(s.program, changes=True).norms, "site", ["0.weight", "2.weight"]),
    "SwapReport": (swapped, "rank", [3, None]),
    "MergeReport": (lambda s: adaptc.merge(s.program).merge_report, "weight", ["0.weight", "2.weight"]),
    "QuantizeReport": (lambda _: QuantizeReport([WeightQuantization("0.weight", "int8", nan, 9, 5)]), "error", [None]),
    "VerifyReport": (
        lambda s: verify(s.program, shapes=1),
        "name",
        ["base equals model", "identity equals base", "merged equals adapted", "unmerge is bitwise"],
    ),
    "Certificate": (
        lambda s: adaptc.certify(adaptc.save(s.program, s.folder / "certified.pt2"), shapes=1),
        "name",
        ["base equals model", "identity equals base", "merged equals adapted", "unmerge is bitwise"],
    ),
    "FileReport": (lambda s: inspect_file(s.adapter), "shape", [[3, 7], [11, 3], [3, 11], [5, 3]]),
    "PackageReport": (package_report, "room", [4]),
    "BankReport": (lambda s: s.program.bank({"a": s.adapter, "b": s.one_site}).report(), "adapter", ["a", "b"]),
    "StepReport": (trained, "steps", [1]),
    "SweepReport": (
        lambda _: SweepReport({"a": SweepResult("a", 3, 0.5), "b": SweepResult("b", 3, 0.25)}, 3, 9),
        "loss",
        [0.5, 0.25],
    ),
    "FitReport": (lambda s: adaptc.convert_to_lora(s.program, rank=2).report, "rank", [2, 2]),
    "IntruderReport": (
        lambda s: adaptc.methods.reduce_intruder_dimension(s.program, threshold_epsilon=1.0).report,
        "intruders",
        [7, 5],
    ),
    "EngineReport": (
        lambda s: adaptc.engines.check_adapter(
            adaptc.save_adapter(
                adaptc.compile(s.model, CONFIG.replace(use_dora=True), example_inputs=s.example), s.folder / "dora"
            ),
            "vllm",
        ),
        "what",
        ["use_dora"],
    ),
    "ExportReport": (
        lambda s: adaptc.engines.export_adapter(s.adapter, s.folder / "written", engine="vllm"),
        "weight",
        ["0", "2"],
    ),
    "DataReport": (lambda _: DataReport("eva", [DataFit("0", 2, 3, 1.0, 5, None)]), "asked", [3]),
    "MethodReport": (
        lambda _: MethodReport("X", (MethodCheck("trains", "linear", True),), {"conv1d": "why"}),
        "layer",
        ["linear"],
    ),
    "SpectrumReport": (lambda s: adaptc.debug.measure_spectra(s.program), "rank", [3, 3]),
    "SimilarityReport": (
        lambda s: adaptc.debug.compare_adapters({"a": s.adapter, "b": s.one_site}),
        "site",
        ["0", "2"],
    ),
    "LayerGraph": (
        lambda s: LayerGraph.from_program(s.program, "2"),
        "when",
        ["before"] * 5 + ["after"] * 12,
    ),
    "LayerStatuses": (lambda s: adaptc.debug.get_layer_status(s.program), "name", ["0", "2"]),
    "ModelStatus": (lambda s: adaptc.debug.get_model_status(s.program), "num_adapter_layers", [2]),
}


def report_classes() -> dict[str, type[Report]]:
    """The classes of reports in the sources, found by their names and bases."""
    found: dict[str, type[Report]] = {}
    for top, package in (("adaptc", "adaptc"), ("passes", "adaptc.passes")):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                bases = [ast.unparse(b) for b in node.bases] if isinstance(node, ast.ClassDef) else []
                if isinstance(node, ast.ClassDef) and any(t.endswith("Report") for t in [node.name, *bases]):
                    parts = file.relative_to(ROOT / top).with_suffix("").parts
                    module = importlib.import_module(".".join((package, *parts)))
                    found[node.name] = getattr(module, node.name)
    del found["Report"]
    return found


def documented_keys() -> dict[str, str]:
    return dict(ROW.findall((ROOT / "examples" / "reports.md").read_text(encoding="utf-8")))


def test_all_reports_are_of_one_base_and_listed() -> None:
    classes = report_classes()
    assert all(issubclass(c, Report) for c in classes.values())
    assert classes.keys() == REPORTS.keys() == documented_keys().keys()
    assert not [n for n, c in classes.items() if {"to_dict", "to_pandas", "data"} & vars(c).keys()]


@pytest.mark.few(100)
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_as_data(subjects: Subjects, name: str) -> None:
    make, column, expected = REPORTS[name]
    report = make(subjects)
    assert type(report) is report_classes()[name]
    found = report.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    keys = re.findall(r"`(\w+)`", documented_keys()[name])
    if name == "Norms":
        assert all([*entry] == keys for entry in found.values())
    else:
        assert [*found] == keys
    table = report.to_pandas()
    cells = [None if isinstance(c, float) and pandas.isna(c) else c for c in table[column].tolist()]
    assert cells == expected


def test_columns_of_nested_dicts_have_dotted_names(subjects: Subjects) -> None:
    table = adaptc.report(subjects.program).to_pandas()
    assert table["slots.lora_A.weight.shape"].tolist() == [[3, 7], [3, 11]]
    norms = adaptc.report(subjects.program).norms.to_pandas()
    values = subjects.program.binding.values
    expected = [float(t.detach().norm()) for k, t in values.items() if "lora_A" in k]
    assert norms["slots.lora_A.weight"].tolist() == pytest.approx(expected)


def test_a_swap_tells_which_sites_the_adapter_has(subjects: Subjects) -> None:
    entries = swapped(subjects).to_dict()["weights"]
    assert [(e["weight"], e["adapted"], e["method"]) for e in entries] == [
        ("0.weight", True, "lora"),
        ("2.weight", False, "lora"),
    ]


def test_a_report_without_entries_is_an_empty_table(subjects: Subjects) -> None:
    report = adaptc.engines.check_adapter(subjects.adapter, "vllm")
    assert report.to_pandas().empty
    assert adaptc.engines.export_adapter(subjects.adapter, subjects.folder / "same", engine="peft").to_pandas().empty


def test_without_pandas_the_error_says_how_to_get_it(subjects: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AdaptcError, match=r"pip install 'adaptc\[pandas\]'"):
        adaptc.report(subjects.program).to_pandas()


def test_the_old_name_warns(subjects: Subjects) -> None:
    report = adaptc.report(subjects.program)
    with pytest.warns(DeprecationWarning, match=r"report\.data\(\) is called report\.to_dict\(\) now"):
        assert report.data() == report.to_dict()
