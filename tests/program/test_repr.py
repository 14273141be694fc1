"""What programs, bindings and modules say of themselves: few words, no graph; and the graph, when one asks for it."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.passes.graph.graph_lock import GRAPH_LOCK
from adaptc.passes.protocol.regions import node_tag
from tests.support.families import FAMILIES

CONFIG = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.tied = nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 7, bias=False)
        self.tied.weight = self.up.weight

    def forward(self, x: Tensor, *, flag: bool, shift: Tensor) -> Tensor:
        return self.tied(self.down(torch.tanh(self.up(x)))) + shift if flag else x


def program(**options: Any) -> Any:
    example = {"x": torch.randn(3, 5), "flag": True, "shift": torch.randn(3, 7)}
    return adaptc.compile(Net(), CONFIG, example_inputs=example, **options)


@pytest.fixture(scope="module")
def prog() -> Any:
    return program()


BASE = 5 * 7 + 7 + 7 * 5 + 5
ADAPTER = 2 * 3 * (5 + 7)


def test_a_program_is_three_lines(prog):
    first, second, third = repr(prog).splitlines()
    assert first == "AdaptedProgram: LORA adapter 'default' from 'first values', rank 3, at 2 sites"
    assert second == "  takes x float32[a, 5], flag=True, shift float32[a, 7]"
    assert third == f"  {ADAPTER} parameters over {BASE} of the base in float32 on cpu; eager"
    assert str(prog) == repr(prog) == f"{prog}"


def test_it_is_of_the_current_adapter(prog):
    own = copy.deepcopy(prog)
    adaptc.swap(own, {"up.lora_A.weight": torch.ones(11, 5), "up.lora_B.weight": torch.ones(7, 11)})
    assert "from 'state dict', rank 11, at 1 of 2 sites" in repr(own)
    assert "rank 3" in repr(prog)


def test_it_says_what_became_of_it(prog):
    own = copy.deepcopy(prog)
    merged = adaptc.merge(own)
    assert repr(merged).startswith("AdaptedProgram: no adapter, merged from 'first values'\n")
    assert f"\n  {BASE + 35} parameters" in repr(merged)  # the tied weight is one of its own now
    assert repr(adaptc.unload(own)).startswith("AdaptedProgram: no adapter\n")
    adaptc.merge(own, keep_base=False)
    assert "its base was given up to a merge" in repr(own)
    trained = program(training=True, backend="inductor")
    assert repr(trained).endswith("; inductor, captured for training")


def test_adapters_that_act_together_are_named():
    configs = {"one": LoraConfig(r=2, target_modules=["0"]), "two": LoraConfig(r=3, target_modules=["0"])}
    both = adaptc.compile(nn.Sequential(nn.Linear(5, 7)), configs, example_inputs=torch.randn(3, 5))
    assert "LORA adapter 'one', 'two'" in repr(both)


def test_nothing_is_waited_for(prog):
    """A debugger shows a program while another thread works on its graph."""
    said: list[str] = []
    with GRAPH_LOCK, prog.swap_lock():
        thread = threading.Thread(target=lambda: said.append(repr(prog)))
        thread.start()
        thread.join(10)
    assert said == [repr(prog)]


@pytest.mark.long
def test_sizes_that_are_equal_have_one_letter():
    model = FAMILIES["llama"].build()
    text = repr(adaptc.compile(model, LoraConfig(target_modules=["q_proj"])))
    assert "takes input_ids int64[a, b], attention_mask int64[a, b]" in text


def test_bindings_modules_and_bound_callables_are_short(prog):
    assert repr(prog.binding) == "<Binding: LORA adapter 'default' from 'first values', rank 3, at 2 sites>"
    assert repr(prog.bind(prog.binding)).startswith("Runner(")
    assert "2 sites" in repr(prog.spec())
    trained = program(training=True).module()
    first, second, third = repr(trained).splitlines()
    assert first == f"ProgramModule of a program: {repr(prog).splitlines()[0].partition(': ')[2]}"
    assert second == repr(prog).splitlines()[1]
    assert third == f"  {ADAPTER} of {ADAPTER + BASE} parameters train, in float32 on cpu; training mode"
    assert repr(trained.eval()).endswith("eval mode")
    assert "up.lora_A.default" in dict(trained.named_modules())  # what is not printed is there


@pytest.mark.long
def test_the_module_of_a_transformers_model_has_its_name():
    model = FAMILIES["llama"].build()
    trained = adaptc.compile(model, LoraConfig(target_modules=["q_proj"])).module()
    assert repr(trained).startswith("LlamaForCausalLM of a program: LORA adapter")
    assert len(repr(trained).splitlines()) == 3


def test_a_notebook_shows_tables(prog):
    html = prog._repr_html_()
    assert html.startswith("<table>")
    assert "float32[a, 5]" in html
    assert '<td style="text-align: left">up<br>down</td>' in html
    for report in (adaptc.report(prog), adaptc.merge(prog).merge_report, adaptc.swap(prog, prog.binding)):
        html = report._repr_html_()
        assert html.count("<table>") == html.count("</table>")
        assert len(repr(report).splitlines()) == 1


def test_names_are_no_markup():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>&", nn.Linear(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("<b>&")(x)

    odd = adaptc.compile(Odd(), LoraConfig(target_modules=["<b>&"]), example_inputs=torch.randn(3, 5))
    for html in (odd._repr_html_(), adaptc.report(odd)._repr_html_()):
        assert "<b>" not in html
        assert "&lt;b&gt;&amp;" in html


# -- the graph ---------------------------------------------------------------------------------------------------------


def test_the_view_has_every_node_and_frames_those_of_adapters(prog):
    lines = prog.graph_view().splitlines()
    bare = [line.removeprefix("| ") for line in lines if not line.startswith("+")]
    nodes = list(prog.graph.nodes)
    assert len(bare) == len(nodes)
    for node, line in zip(nodes, bare, strict=True):
        assert line.startswith("return " if node.op == "output" else node.name)
    framed = [line[2:].partition(":")[0].partition(" ")[0] for line in lines if line.startswith("| ")]
    assert framed == [n.name for n in nodes if node_tag(n)]
    assert lines.count("+") == 2
    assert [line for line in lines if line.startswith("+ ")] == [
        "+ up.weight: lora, adapter 'default'",
        "+ down.weight: lora, adapter 'default'",
    ]
    assert "p_up_lora_A_default_weight: float32[3, 5]  # up.lora_A.default.weight" in lines
    assert any(re.fullmatch(r"x: float32\[s\d+, 5\]  # input", line) for line in lines)


def test_the_view_of_one_site(prog):
    for site in ("down", "down.weight"):
        view = prog.graph_view(site).splitlines()
        assert view[0] == "+ down.weight: lora, adapter 'default'"
        assert view[-1] == "+"
        assert all(line.startswith("| ") for line in view[1:-1])
        assert re.search(r"aten\.add\.Tensor\(linear_1, \w+\)  # stands for linear_1$", view[-2])
    with pytest.raises(ConfigError, match="no adapter at 'dwn'; nearest are 'down'"):
        prog.graph_view("dwn")


def test_the_view_of_a_plain_program_has_no_frame(prog):
    view = adaptc.unload(prog).graph_view()
    assert "+" not in {line[:1] for line in view.splitlines()}


def test_blocks_follow_under_their_names():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = torch.relu(self.up(x))
            return self.down(y)

    blocks = adaptc.compile(Frozen(), LoraConfig(target_modules=["down"]), example_inputs=torch.randn(3, 5))
    nested = [m for m in blocks.graph_module.modules() if m is not blocks.graph_module]
    view = blocks.graph_view()
    assert ("block submod_" in view) == bool(nested)
    assert "aten.relu.default" in view


def test_the_view_changes_nothing(prog, tmp_path: Path):
    before = ExportedProgram.__str__(prog)
    prog.graph_view()
    repr(prog)
    assert ExportedProgram.__str__(prog) == before
    assert adaptc.load(adaptc.save(prog, tmp_path / "p.pt2")).graph_view() == prog.graph_view()
