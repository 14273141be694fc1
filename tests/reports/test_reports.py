"""Reports: numbers equal to PEFT's, and text that says what matters and stays readable for hundreds of sites."""

from __future__ import annotations

import json
import re
from html import escape
from math import nan
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adaptc
from adaptc import LoraConfig
from adaptc.passes.adapt.merging.site_merge import SiteMerge
from adaptc.program.swap_report import SwapReport
from adaptc.reports.coverage import CoverageReport, SiteCoverage
from adaptc.reports.inspect_file import inspect_file
from adaptc.reports.results import MergeReport
from tests.support.families import FAMILIES

# -- parameters ------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 3}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "r": 5}),
    (
        "llama",
        {
            "target_modules": ["o_proj"],
            "rank_pattern": {"layers.1.self_attn.o_proj": 7},
            "trainable_token_indices": [3, 8],
        },
    ),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),  # tied head
    ("gpt2", {"target_modules": ["c_attn", "lm_head"], "bias": "lora_only", "fan_in_fan_out": True, "r": 2}),
    ("t5", {"target_modules": "all-linear", "r": 3}),  # three names for one embedding
    ("opt", {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}),
    ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS", "r": 3}),  # saves the classifier
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 3}),
    ("llama", {"target_modules": ["q_proj"], "inference_mode": True}),
]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_parameter_counts_are_pefts(family: str, options: dict[str, Any]) -> None:
    model = FAMILIES[family].build()
    report = adaptc.report(adaptc.compile(model, LoraConfig(**options)))
    oracle = peft.get_peft_model(FAMILIES[family].build(), peft.LoraConfig(**options))
    assert (report.trainable, report.total) == oracle.get_nb_trainable_parameters()


@pytest.mark.long
def test_parameter_line_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    oracle = peft.get_peft_model(FAMILIES["llama"].build(), peft.LoraConfig(target_modules=["q_proj"]))
    oracle.print_trainable_parameters()
    program = adaptc.compile(FAMILIES["llama"].build(), LoraConfig(target_modules=["q_proj"]))
    assert adaptc.report(program).parameters_line() == capsys.readouterr().out.strip()


# -- coverage ----------------------------------------------------------------------------------------------------------


def _partial() -> adaptc.AdaptedProgram:
    """Two entries, one of which misses a layer."""
    config = LoraConfig(r=5, target_modules=["layers.1.self_attn.q_proj", "v_proj"], init_lora_weights=False)
    return adaptc.compile(FAMILIES["llama"].build(), config)


@pytest.fixture(scope="module")
def partial() -> adaptc.AdaptedProgram:
    """Some of the tests call it, after which its report tells of its code, too; tests run in any order."""
    return _partial()


@pytest.mark.long
def test_coverage_tells_which_layers_an_entry_missed(partial: adaptc.AdaptedProgram) -> None:
    report = adaptc.report(partial)
    assert {k: len(v) for k, v in report.matches.items()} == {"layers.1.self_attn.q_proj": 1, "v_proj": 2}
    text = str(report)
    assert re.search(
        r"layers\.1\.self_attn\.q_proj +1 of 2 +model\.layers\.1\S+ +model\.layers\.0\.self_attn\.q_proj", text
    )
    assert re.search(r"v_proj +2 of 2 +model\.layers\.\{0,1\}\.self_attn\.v_proj +-", text)
    assert re.search(r"k_proj x2 +no entry names it +model\.layers\.\{0,1\}\.self_attn\.k_proj", text)


@pytest.mark.long
def test_coverage_names_sites_with_their_tensors(partial: adaptc.AdaptedProgram) -> None:
    report = adaptc.report(partial)
    site = next(s for s in report.sites if s.fqn == "model.layers.1.self_attn.q_proj.weight")
    assert (site.kind, site.form, site.method, site.rank) == ("linear", "apply", "lora", 5)
    assert site.slots == {"lora_A.weight": ((5, 24), torch.float32), "lora_B.weight": ((32, 5), torch.float32)}
    assert site.params == 5 * 24 + 32 * 5
    assert sum(s.params for s in report.sites) == report.trainable
    assert "lora_B.weight 32x5" in str(report)


@pytest.mark.long
def test_coverage_after_a_swap_is_of_the_current_adapter(partial: adaptc.AdaptedProgram) -> None:
    model = FAMILIES["llama"].build()
    program = adaptc.compile(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    config = LoraConfig(r=11, target_modules=["v_proj"], init_lora_weights=False)
    other = adaptc.compile(model, config)
    tensors = {k.replace(".default", ""): v for k, v in other.binding.values.items() if "lora_" in k}
    swapped = adaptc.swap(program, tensors, config=config)
    assert (swapped.sites, swapped.ranks) == (2, (11,))
    assert swapped.identity == tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    assert 0 < swapped.seconds < 60
    assert "2 of 4 sites, rank 11" in str(swapped)
    assert "model.layers.{0,1}.self_attn.q_proj.weight" in str(swapped)
    report = adaptc.report(program)
    assert {s.rank for s in report.sites if s.present} == {11}
    assert "2 of them left at the base" in str(report)
    assert report.total == adaptc.report(other).total
    assert report.trainable == 0  # an adapter swapped into an inference program is not trained


@pytest.mark.long
def test_coverage_survives_a_file(tmp_path: Any) -> None:
    program = _partial()
    adaptc.save(program, tmp_path / "p.pt2")
    before, after = adaptc.report(program), adaptc.report(adaptc.load(tmp_path / "p.pt2"))
    assert after.sites == before.sites
    assert (after.trainable, after.total) == (before.trainable, before.total)
    assert str(after).splitlines()[1:] == str(before).splitlines()[1:]


@pytest.mark.long
def test_sites_come_in_one_order_after_a_file_too(tmp_path: Any) -> None:
    """Adapter by adapter, and whole modules last, which the regions in a graph are not."""
    style = LoraConfig(r=3, target_modules=["v_proj", "layers.0.self_attn.q_proj"], init_lora_weights=False)
    whole = LoraConfig(r=2, target_modules=["lm_head", "v_proj"], modules_to_save=["embed_tokens", "q_proj"])
    for config in ({"b": style, "a": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}, whole):
        program = adaptc.compile(FAMILIES["llama"].build(), config)
        loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
        assert [a.id for a in loaded.adaptation.attachments] == [a.id for a in program.adaptation.attachments]
        before, after = adaptc.report(program), adaptc.report(loaded)
        assert after.sites == before.sites
        assert str(after).splitlines()[1:] == str(before).splitlines()[1:]


@pytest.mark.long
def test_what_another_adapter_acts_on_is_not_left_at_the_base() -> None:
    both = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    program = adaptc.compile(FAMILIES["llama"].build(), {"a": both, "b": both})
    half = adaptc.compile(FAMILIES["llama"].build(), LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = {k.replace(".default", ""): v for k, v in half.binding.values.items() if "lora_" in k}
    report = adaptc.swap(program, {"b": tensors})
    assert (report.sites, report.identity) == (6, ())
    assert str(report).endswith("ms")
    assert "6 of 8 sites" in str(report)
    text = str(adaptc.report(program))
    assert "left at the base" not in text
    assert "(left to the others)" in text
    report = adaptc.swap(program, {"a": tensors})
    assert (report.sites, report.identity) == (4, tuple(f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)))
    assert "4 of them left at the base" in str(adaptc.report(program))


def test_plain_programs_have_no_adapter(partial: adaptc.AdaptedProgram) -> None:
    total = adaptc.report(partial).total - adaptc.report(partial).trainable
    for plain in (adaptc.merge(partial), adaptc.unload(partial)):
        report = adaptc.report(plain)
        assert (report.sites, report.trainable, report.total) == ((), 0, total)
        assert "no adapter" in str(report)
        assert "trainable params: 0" in str(report)
    assert "merged from first values" in str(adaptc.report(adaptc.merge(partial)))


@pytest.mark.long
def test_modules_to_save_are_not_left_out() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = adaptc.report(adaptc.compile(FAMILIES["llama"].build(), config))
    assert "lm_head" not in {name for name, _ in report.left_out}
    assert "model.embed_tokens" in {name for name, _ in report.left_out}


def _large(layers: int = 30) -> CoverageReport:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    slots = {"lora_A.weight": ((16, 576), torch.float32), "lora_B.weight": ((1536, 16), torch.bfloat16)}
    sites = tuple(
        SiteCoverage(f"model.layers.{i}.{n}.weight", "linear", "apply", "lora", 16, slots, 33792)
        for i in range(layers)
        for n in names
        if (i, n) != (7, "mlp.up_proj")
    )
    matches = {
        n.rpartition(".")[2]: [f"model.layers.{i}.{n}" for i in range(layers) if (i, n) != (7, names[5])] for n in names
    }
    left_out = [("model.layers.7.mlp.up_proj", "excluded by 'layers.7.mlp.up_proj'"), ("lm_head", "the output head")]
    return CoverageReport(sites, matches, left_out, 209 * 33792, 10**9, "default", "LORA", "first values")


def test_hundreds_of_sites_stay_readable() -> None:
    text = str(_large())
    assert len(text.splitlines()) < 45
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(
        r"model\.layers\.\{0\.\.29\}\.mlp\.down_proj x30 +linear +apply +lora +16 +lora_A\.weight 16x576", text
    )
    assert "model.layers.{0..6,8..29}.mlp.up_proj" in text
    assert re.search(r"up_proj +29 of 30 +\S+ +model\.layers\.7\.mlp\.up_proj", text)
    assert f"{30 * 33792:,d}" in text
    assert "lora_B.weight 1536x16 bfloat16" in text
    assert text.isascii()


def test_narrow_reports_lose_nothing() -> None:
    wide, narrow = (re.sub(r"[\s-]", "", _large().render(w)) for w in (140, 80))
    assert sorted(wide) == sorted(narrow)


@pytest.mark.parametrize("what", ["coverage", "plain", "swap", "merge", "verify", "adapter"])
def test_the_data_of_every_report_is_json(partial: adaptc.AdaptedProgram, what: str, tmp_path: Path) -> None:
    merged = adaptc.merge(partial)
    report: Any = {
        "coverage": lambda: adaptc.report(partial),
        "plain": lambda: adaptc.report(merged),
        "swap": lambda: adaptc.swap(partial, partial.binding),
        "merge": lambda: merged.merge_report,
        "verify": lambda: adaptc.verify(partial, shapes=1),
        "adapter": lambda: inspect_file(adaptc.save_adapter(partial, tmp_path)),
    }[what]()
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    expected = {
        "coverage": ("trainable", report.trainable if what == "coverage" else 0),
        "plain": ("merged", "first values"),
        "swap": ("sites", 3),
        "merge": ("largest_error", merged.merge_report.max_error),
        "verify": ("ok", True),
        "adapter": ("parameters", adaptc.report(partial).trainable),
    }[what]
    assert data[expected[0]] == expected[1]
    assert repr(report).startswith(f"<{type(report).__name__}: ")
    first = str(report).splitlines()[0]
    assert repr(report) == f"<{type(report).__name__}: {first}>"
    assert escape(first) in report._repr_html_()


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_merge_report_is_of_the_merge() -> None:
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    program = adaptc.compile(model, config)
    report = adaptc.merge(program).merge_report
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn.q_proj"
        a, b = (program.state_dict[f"{prefix}.lora_{x}.default.weight"].detach() for x in "AB")
        weight = program.state_dict[f"{prefix}.weight"].float()
        exact = weight + b @ a * (8 / 3)
        site = next(s for s in report.sites if s.fqn == f"{prefix}.weight")
        assert site.delta == pytest.approx(float((exact - weight).abs().max()), rel=1e-5)
        assert site.error == pytest.approx(float((exact.bfloat16().float() - exact).abs().max()), rel=1e-3)
    assert report.max_error == max(s.error for s in report.sites) > 0
    assert report.max_delta == max(s.delta for s in report.sites)
    assert "2 weights (bfloat16)" in str(report)


@pytest.mark.long
def test_merge_report_tells_untied_weights() -> None:
    program = adaptc.compile(FAMILIES["gpt2"].build(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    report = adaptc.merge(program).merge_report
    assert report.untied == ("lm_head.weight",)
    assert ", 1 untied" in str(report)


def site_merge(n: int, delta: float, error: float) -> SiteMerge:
    return SiteMerge(f"s{n}|lora", f"layers.{n}.weight", torch.float16, lambda: (delta, error))


def test_merge_report_puts_the_worst_first_and_counts_the_rest() -> None:
    sites = [site_merge(i, 0.5, (i * 37 % 101) / 1000) for i in range(97)]
    report = MergeReport([*sites, site_merge(97, nan, 0.5)], "x")
    worst = report.sites_by_error()
    assert worst[0].fqn == "layers.97.weight"
    assert [s.error for s in worst] == sorted((s.error for s in report.sites), reverse=True)
    text = str(report)
    rows = [line for line in text.splitlines() if ".weight" in line]
    assert len(rows) == 20
    assert "layers.97.weight" in rows[0]
    assert f"and 78 more, each with a rounding error of at most {worst[20].error:.2e}" in text
    assert (report.max_delta, report.max_error) == (0.5, 0.5)


def test_merge_report_of_nothing_prints() -> None:
    assert "0 weights" in str(MergeReport([], "x"))


def test_swap_report_without_ranks_or_time() -> None:
    assert str(SwapReport("dir", (), {})) == "dir: 0 of 0 sites"
