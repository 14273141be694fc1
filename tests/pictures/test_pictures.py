"""Pictures show what they say: texts, shapes and colours are those of the numbers, and nothing overlaps."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.pictures.canvas import Canvas
from adaptc.pictures.heat_map import draw_heat_map
from adaptc.pictures.layered_layout import lay_out
from adaptc.pictures.site_grid import Grid, site_grid
from adaptc.pictures.themes import DARK, LIGHT, THEMES, Colour, Theme
from adaptc.reports.layer_graph import LayerGraph
from tests.pictures.readme_picture import PICTURE, draw_picture
from tests.test_cli import call, refused

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: pixels of an inch
RESOLUTION = 144


def net(config: Any, *layers: nn.Module) -> adaptc.AdaptedProgram:
    torch.manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)))).eval()
    return adaptc.compile(model, config, example_inputs=torch.randn(2, 7))


@pytest.fixture(scope="module")
def program() -> adaptc.AdaptedProgram:
    return net(LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))


def texts(svg: bytes) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def fills(svg: bytes) -> Counter[str]:
    """How many shapes have each fill."""
    return Counter(re.findall(r'<path [^>]*style="fill: (#\w+)', svg.decode()))


def hexadecimal(colour: Colour) -> str:
    return "#" + "".join(f"{round(c * 255):02x}" for c in colour)


def overlaps(page: Canvas) -> list[tuple[str, str]]:
    """The pairs of texts that overlap, and texts that leave the page, beside the page's edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(page.figure).get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in page.axes.texts]
    found = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    width, height = page.figure.get_size_inches() * page.figure.dpi
    outside = [t for t, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    return [*found, *((t, "the edge") for t in outside)]


# -- layers ------------------------------------------------------------------------------------------------------------


def test_a_layer_has_the_nodes_of_the_graph(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    report = adaptc.draw(program, tmp_path / "x.svg", site="2")
    assert isinstance(report, LayerGraph)
    nodes = {n.name: n for n in report.after}
    graph = {n.name: n for n in program.graph.nodes}
    assert {n.name for n in report.after if n.role in ("adapter", "sum")} == {
        n.name for n in graph.values() if n.meta.get("custom", {}).get("adaptc", {}).get("site", "").startswith("2.")
    }
    for name, node in nodes.items():
        if node.inputs and name != "output":
            assert node.inputs == tuple(i.name for i in graph[name].all_input_nodes)
    assert [(n.label, n.sizes) for n in report.before] == [
        ("input", "a x 11"),
        ("weight", "5 x 11"),
        ("bias", "5"),
        ("linear", "a x 5"),
        ("output", "a x 5"),
    ]
    written = (tmp_path / "x.svg").read_bytes()
    shown = Counter(texts(written))
    expected = Counter(t for n in (*report.before, *report.after) for t in (n.label, n.sizes))
    assert not expected - shown
    assert shown["2.weight: lora, adapter 'default'"] == shown["before"] == shown["after"] == 1
    roles = Counter(n.role for n in (*report.before, *report.after))
    for role in ("base", "tensor", "adapter", "sum"):  # and once in the legend
        assert fills(written)[hexadecimal(LIGHT.fills[role])] == roles[role] + 1
    lines = sum(len(n.inputs) for n in (*report.before, *report.after))
    assert written.count(b"fill: none; stroke: ") == lines


@pytest.mark.parametrize(
    ("config", "replaced"),
    [
        (LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, use_dora=True), "linear"),
        (adaptc.LoHaConfig(r=3, target_modules=["0"], init_weights=False), "p_0_weight"),
        (adaptc.IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False), "input"),
    ],
    ids=["around", "on the weight", "on the input"],
)
def test_before_and_after_of_any_form(config: Any, replaced: str, tmp_path: Path) -> None:
    adapted = net(config)
    report = adaptc.draw(adapted, tmp_path / "x.svg")
    assert isinstance(report, LayerGraph)
    assert [n.label for n in report.before] == ["input", "weight", "bias", "linear", "output"]
    (total,) = (n for n in report.after if n.role == "sum")
    readers = [n.name for n in report.after if total.name in n.inputs]
    assert readers == (["output"] if replaced == "linear" else ["linear"])
    for theme in THEMES.values():
        from adaptc.pictures.layer_picture import draw_layer

        assert overlaps(draw_layer(report, theme)) == []


def test_adapters_that_act_together_are_drawn_together() -> None:
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11)).eval()
    joint = adaptc.compile(model, {"one": config, "two": config.replace(r=2)}, example_inputs=torch.randn(2, 7))
    report = LayerGraph.from_program(joint, None)
    assert report.heading == "lora, adapters 'one', 'two'"
    assert [n.sizes for n in report.after if n.label == "lora_A.weight"] == ["3 x 7", "2 x 7"]
    assert len([n for n in report.after if n.role == "sum"]) == 2
    assert report.after[-1].inputs == ([n.name for n in report.after if n.role == "sum"][-1],)


def test_a_layer_inside_a_block_is_drawn() -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = self.layer(x)
            return y * 2

    adapted = adaptc.compile(
        Quiet().eval(),
        LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False),
        example_inputs=torch.ones(2, 7),
    )
    report = LayerGraph.from_program(adapted, "layer")
    assert [n.label for n in report.before][-3:] == ["alias", "wrap_with_set_grad_enabled", "output"]
    assert next(n.label for n in report.before if n.role == "input") == "input"
    assert [n.role for n in report.after].count("sum") == 1


@given(st.data())
def test_boxes_and_lines_of_any_graph_are_apart(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    names = [f"n{i}" for i in range(count)]
    inputs = {
        n: data.draw(st.lists(st.sampled_from(names[:i]), unique=True, max_size=3)) if i else []
        for i, n in enumerate(names)
    }
    widths = {n: data.draw(st.sampled_from([0.3, 1.1, 2.3])) for n in names}
    found = lay_out(inputs, widths, 0.2)
    boxes = [(found.layers[n], found.middles[n] - widths[n] / 2, found.middles[n] + widths[n] / 2) for n in names]
    for (layer, left, right), (other, start, end) in combinations(boxes, 2):
        assert layer != other or right + 0.19 < start or end + 0.19 < left
    for (start, end), points in found.lines.items():
        assert [layer for layer, _ in points] == [*range(found.layers[start], found.layers[end] + 1)]
        for layer, x in points[1:-1]:
            assert all(other != layer or x < left or x > right for other, left, right in boxes)
    assert min(left for _, left, _ in boxes) >= -1e-9
    assert max(right for *_, right in boxes) <= found.width + 1e-9
    assert set(found.lines) == {(i, n) for n, read in inputs.items() for i in read}


# -- heat maps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> adaptc.AdaptedProgram:
    """Thirty blocks, seven layers in each, of which one has no adapter and one another rank."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 13, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 30}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=3)).eval()
    ranks = {"layers.4.mlp.up_proj": 2}
    config = LoraConfig(r=5, target_modules=LINEAR, rank_pattern=ranks, init_lora_weights=False)
    return adaptc.compile(model, config.replace(exclude_modules=r".*layers\.17\.self_attn\.k_proj"))


@pytest.mark.long
@pytest.mark.few(100)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", ["norm", "rank", "effective_rank"])
def test_thirty_blocks_of_seven_layers(deep: adaptc.AdaptedProgram, kind: Any, theme: Any, tmp_path: Path) -> None:
    report = adaptc.draw(deep, tmp_path / "x.svg", kind=kind, theme=theme)
    written = (tmp_path / "x.svg").read_bytes()
    shown = texts(written)
    assert [t for t in shown if t in LINEAR] == LINEAR
    assert {str(i) for i in range(30)} <= {*shown}
    assert "no adapter" in shown
    sites = report.to_pandas()
    assert len(sites) == 209
    if kind == "rank":
        assert Counter(t for t in shown if t in ("5", "2")) == {
            "5": 208 + 2,
            "2": 1 + 1,
        }  # rows 5 and 2, the scale's end
    if kind == "norm":
        share = sites["change"] / sites["weight"]
        name = "model.layers.4.mlp.up_proj.weight"
        values = deep.binding.values
        a, b = (values[f"model.layers.4.mlp.up_proj.lora_{x}.default.weight"].detach() for x in "AB")
        weight = deep.state_dict[name].detach()
        expected = float((b @ a * 4).norm() / weight.norm())  # alpha 8, rank 2
        assert float(share[sites["site"] == name].iloc[0]) == pytest.approx(expected, rel=1e-5)
        number = f"{expected:.{0 if expected >= 9.95 else 1}f}"
        assert shown.count(number) > [*map(str, range(30))].count(number)  # more often than the blocks' own numbers
    page = THEMES[theme]
    assert fills(written)[hexadecimal(page.empty)] == 2  # the layer without an adapter, and the legend


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(30, LINEAR), (3, ["a name that is wider than a column", *"bcd"]), (70, ["q"]), (2, [f"e{i}" for i in range(64)])],
    ids=["llama", "long names", "many blocks", "many columns"],
)  # fmt: skip
def test_no_text_overlaps(rows: int, columns: list[str], theme: Theme) -> None:
    values: dict[tuple[str, str], float | None] = {
        (str(i), c): 0.001 * 3.7**i % 1 for i in range(rows) for c in columns if (i, c) != (1, "k_proj")
    }
    page = draw_heat_map(Grid("a title", [*map(str, range(rows))], columns, values, "{:.3f}".format), theme)
    assert overlaps(page) == []
    assert len(page.axes.texts) >= rows + len(columns) + 3


def test_the_pixels_of_a_cell_have_the_colour_of_its_value(program: adaptc.AdaptedProgram) -> None:
    grid = Grid(
        "t", ["0", "1"], ["one", "two"], {("0", "one"): 1.0, ("0", "two"): 4.0, ("1", "one"): 0.0}, "{:.0f}".format
    )
    for theme in (LIGHT, DARK):
        page = draw_heat_map(grid, theme)
        pixels = np.asarray(Image.open(BytesIO(page.to_bytes(".png"))).convert("RGB"))
        assert pixels.shape[:2] == tuple(int(n * RESOLUTION) for n in page.figure.get_size_inches()[::-1])
        assert tuple(pixels[0, 0]) == tuple(round(c * 255) for c in theme.page)
        boxes = [p.get_bbox() for p in page.axes.patches[:4]]
        expected = [theme.colour_of(1 / 4), theme.colour_of(1), theme.colour_of(0), theme.empty]
        for box, colour in zip(boxes, expected, strict=True):  # beside the text
            x, y = (box.x0 + 0.05) * RESOLUTION, (box.y0 + 0.05) * RESOLUTION
            assert tuple(pixels[int(y), int(x)]) == tuple(round(c * 255) for c in colour)
    assert DARK.colour_of(1) == DARK.scale[-1]
    assert DARK.colour_of(-1) == DARK.negative[-1]
    assert LIGHT.colour_of(-1 / 3) == LIGHT.negative[1]


def test_texts_can_be_read_on_every_fill() -> None:
    """WCAG asks for a contrast of 4.5 in small text."""

    def luminance(colour: Colour) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(one: Colour, other: Colour) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for theme in THEMES.values():
        for fill in [theme.colour_of(i / 50) for i in range(-50, 51)] + [*theme.fills.values()]:
            assert contrast(theme.text_on(fill), fill) >= 4.2
        assert contrast(theme.text, theme.page) >= 4.5
        assert contrast(theme.faint, theme.page) >= 4.5


def test_columns_have_the_shortest_names_that_differ() -> None:
    names = [
        "encoder.block.0.attn.q.weight",
        "encoder.block.10.attn.q.weight",
        "decoder.block.0.attn.q.weight",
        "decoder.block.0.attn.k.weight",
        "lm_head.weight",
    ]
    grid = site_grid("t", [(n, 1.0) for n in names], str)
    assert grid.rows == ["0", "10", "-"]
    assert grid.columns == ["encoder.block.attn.q", "decoder.block.attn.q", "k", "lm_head"]
    assert ("-", "lm_head") in grid.values


# -- similarities ------------------------------------------------------------------------------------------------------


def test_similarities_are_in_the_cells(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0"])
    shapes = {"0.lora_A.weight": (3, 7), "0.lora_B.weight": (11, 3)}
    one = adaptc.Adapter(config, {k: torch.randn(s, generator=generator) for k, s in shapes.items()}, "one")
    report: Any = adaptc.draw({"one": one, "minus one": -1 * one}, tmp_path / "x.svg")
    assert report.matrix()[0][1] == pytest.approx(-1)
    shown = texts((tmp_path / "x.svg").read_bytes())
    assert Counter(shown)["-1.00"] == 3
    assert Counter(shown)["1.00"] == 3
    assert shown.count("minus one") == 2


# -- files and errors --------------------------------------------------------------------------------------------------


def test_the_same_picture_is_the_same_file(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.PNG"):
        adaptc.draw(program, tmp_path / name, kind="effective_rank")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.PNG").read_bytes().startswith(b"\x89PNG")
    import matplotlib

    assert matplotlib.rcParams["svg.fonttype"] == "path"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "x.jpg"}, r"'x\.jpg' must end in \.svg or \.png"),
        ({"kind": "norms"}, "kind"),
        ({"theme": "blue"}, "theme"),
        ({"kind": "rank", "site": "0"}, "site= is for kind='layer'"),
        ({"site": "1"}, "the program has no adapter at '1'"),
        ({"kind": "similarity"}, "give two adapters at least"),
    ],
)
def test_refusals_write_nothing(
    program: adaptc.AdaptedProgram, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        adaptc.draw(program, **{"path": "x.svg", **options})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda p, d: adaptc.save_adapter(p, d / "a"), "norm", "kind='norm' is of a program"),
        (lambda p, d: adaptc.unload(p), "layer", "the program has no adapter at a layer"),
        (lambda p, d: adaptc.unload(p), "norm", "no adapter"),
        (
            lambda p, d: adaptc.Adapter(adaptc.LoHaConfig(r=2), {"0.hada_w1_a": torch.ones(3, 2)}, "odd"),
            "rank",
            "odd: what an adapter of LOHA changes does not follow from its tensors alone",
        ),
    ],
    ids=["norm of an adapter", "layer of a plain program", "norm of a plain program", "another method"],
)
def test_what_has_no_such_picture_says_so(
    program: adaptc.AdaptedProgram, make: Callable[[Any, Path], Any], kind: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(adaptc.AdaptcError, match=said):
        adaptc.draw(make(program, tmp_path), tmp_path / "x.svg", kind=kind)
    assert not (tmp_path / "x.svg").exists()


def test_without_matplotlib_the_error_says_how_to_get_it(
    program: adaptc.AdaptedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'adaptc\[pictures\]'"):
        adaptc.draw(program, tmp_path / "x.svg")


def test_a_file_that_cannot_be_written(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    with pytest.raises(adaptc.CheckpointError, match="does not exist"):
        adaptc.draw(program, tmp_path / "missing" / "x.svg")


def test_the_command_draws(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    path = adaptc.save(program, tmp_path / "p.pt2")
    adapter = adaptc.save_adapter(program, tmp_path / "one")
    other = adaptc.save_adapter(program, tmp_path / "two")
    assert "0.weight: lora, adapter 'default'" in call("draw", path, "-o", tmp_path / "a.svg").stdout
    call("draw", path, "-o", tmp_path / "b.png", "--kind", "norm", "--theme", "dark")
    pixels = np.asarray(Image.open(tmp_path / "b.png").convert("RGB"))
    assert tuple(pixels[0, 0]) == tuple(round(c * 255) for c in DARK.page)
    call("draw", adapter, other, "-o", tmp_path / "c.svg")
    assert texts((tmp_path / "c.svg").read_bytes()).count("1.00") == 5
    call("draw", adapter, "-o", tmp_path / "d.svg", "--kind", "rank")
    refused("draw", adapter, "-o", tmp_path / "d.svg", said="is there already")
    refused("draw", adapter, "-o", tmp_path / "e.svg", "--kind", "norm", said="is of a program")


def test_the_picture_of_the_readme_is_drawn_by_this_code(tmp_path: Path) -> None:
    """By texts, shapes and fills: another matplotlib may place a line a little elsewhere."""
    draw_picture(tmp_path / "x.svg")
    old, new = PICTURE.read_bytes(), (tmp_path / "x.svg").read_bytes()
    assert texts(old) == texts(new)
    assert fills(old) == fills(new)
    assert "(examples/layer.svg)" in (PICTURE.parents[1] / "README.md").read_text(encoding="utf-8")
