"""The guide: every snippet runs as it stands, every link leads somewhere, every hook of the protocol has its line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import adaptc
from adaptc import methods
from adaptc.passes.protocol.method import Method
from adaptc.passes.protocol.method_hooks import Hooks
from adaptc.passes.protocol.method_names import PARTS
from tests.support.guides import DOCUMENTS, PAGES, ROOT, blocks, run

LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[\w-]+)?\)")
#: how files of the project are written in the text
PATH = re.compile(r"`((?:adaptc|passes|kernels|tests|examples)/[\w/]+(?:\.\w+)?)`")
DEPLOYING = ROOT / "examples" / "deploying.md"
WRITING = ROOT / "examples" / "writing_methods.md"


@pytest.mark.long
@pytest.mark.few(100)  # each of them
@pytest.mark.parametrize("page", [p for p in PAGES if p != WRITING], ids=lambda p: p.stem)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert blocks(page, "python")
    run(page, {})


@pytest.mark.long
def test_the_snippet_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model and an adapter that the reader is taken to have."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(97, (2, 7))
    other = adaptc.LoraConfig(r=5, target_modules=["q_proj"], init_lora_weights=False)
    adaptc.save_adapter(adaptc.compile(model, other), "another-adapter")
    ((_, text),) = blocks(ROOT / "README.md", "python")
    assert len(text.strip().splitlines()) <= 17
    space = {"model": model, "ids": ids}
    exec(compile(text, "README.md", "exec"), space)
    assert Path("model.pt2").is_file()
    torch.testing.assert_close(space["prog"](input_ids=ids).logits, space["merged"](input_ids=ids).logits)


@pytest.mark.long
def test_a_strangers_method_passes_outside_the_repository(tmp_path: Path) -> None:
    """The page alone, typed into a file elsewhere: the method it builds passes every check, and the command line knows
    it by that file."""
    text = "".join(text for _, text in blocks(WRITING, "python"))
    (tmp_path / "whole_page.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", "whole_page.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "GainedConfig keeps its promises" in done.stdout
    (tmp_path / "gained.py").write_text(blocks(WRITING, "python")[0][1], encoding="utf-8")
    command = [Path(sys.executable).parent / "adaptc", "--import", "gained.py", "show", "gained.pt2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gained_A" in done.stdout


def names_in_tables(page: Path) -> set[str]:
    """What stands in code marks in the first column of a table, without arguments."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [row.split("|")[1] for row in rows]
    return {name.partition("(")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_tags_of_regions_are_on_the_page() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 5))
    config = adaptc.LoraConfig(r=3, target_modules=["0", "1"], use_dora=True)
    graph = adaptc.compile(net, config, example_inputs=torch.randn(3, 5)).graph
    tags = [tag for n in graph.nodes if (tag := n.meta.get("custom", {}).get("adaptc"))]
    rows = [
        line.split("|")[1:3] for line in DEPLOYING.read_text(encoding="utf-8").splitlines() if line.startswith('| `"')
    ]
    where = {name.strip(' `"'): at.strip() for name, at in rows}
    everywhere = {k for k, at in where.items() if at == "every node"}
    assert everywhere == set.intersection(*(set(t) for t in tags))
    results = [t for t in tags if t["role"] == "out"]
    assert everywhere | {k for k, at in where.items() if at == "the result"} == set.intersection(*map(set, results))
    assert set(where) == set().union(*tags) - {"fused"}


def test_every_function_of_the_protocol_has_a_line_on_the_page() -> None:
    core = {n for c in (Hooks, Method) for n in vars(c) if not n.startswith("_")}
    own = {f"{part}.{n}" for part, value in PARTS.items() for n in vars(type(value)) if not n.startswith("_")}
    own |= {f"{part}.{n}" for part, value in PARTS.items() for n in vars(value) if not n.startswith("_")}
    follow = {"name", "training", "dropout", "defines", "has_weight", "has_apply_form", "call_adapted"}
    follow |= {"class_that_defines", "bank.is_defined"}
    assert follow < core | own
    of_programs = {"prompt", "virtual_token_count"}
    assert of_programs <= set(dir(adaptc.methods.VirtualTokens)) - core
    assert names_in_tables(WRITING) == ((core | own) - follow) | of_programs


def low_rank_rows() -> list[list[str]]:
    """The cells of the table of a low-rank product's shapes: kind, A, B, whether there is a down_up."""
    text = WRITING.read_text(encoding="utf-8")
    table = text.partition("| kind of `op` | A | B |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [[kind.strip(), *rest] for first, *rest in rows for kind in first.partition(";")[0].split(",")]


ATEN = torch.ops.aten
PLAIN = ((1,), (0,), (1,), 1)
GROUPED = ((2, 1), (1, 0), (1, 1), 2)
#: kind -> the op of a layer, and an input for it where it can be called
LOW_RANK = {
    "linear": (methods.Op("linear", (5, 7), ATEN.linear.default), torch.randn(3, 7)),
    "addmm": (methods.Op("addmm", (5, 7), ATEN.addmm.default), torch.randn(3, 7)),
    "embedding": (
        methods.Op("embedding", (5, 7), ATEN.embedding.default, (-1, False, False)),
        torch.tensor([1, 6]),
    ),
    "conv1d": (methods.Op("conv1d", (5, 7, 3), ATEN.conv1d.default, PLAIN), torch.randn(2, 7, 9)),
    "conv2d": (methods.Op("conv2d", (6, 7, 3, 2), ATEN.conv2d.default, GROUPED), torch.randn(2, 14, 9, 8)),
    "conv3d": (methods.Op("conv3d", (5, 7, 3, 2, 1), ATEN.conv3d.default, PLAIN), torch.randn(2, 7, 5, 4, 3)),
    "conv_transpose": (methods.Op("conv_transpose", (5, 7, 3)), None),
    "weight": (methods.Op("weight", (5, 7)), None),
    "experts": (methods.Op("experts", (3, 5, 7)), None),
    "experts_t": (methods.Op("experts_t", (3, 5, 7)), None),
}


def test_the_table_of_low_rank_shapes_has_every_kind() -> None:
    assert [row[0] for row in low_rank_rows()] == list(LOW_RANK)


@pytest.mark.parametrize("row", low_rank_rows(), ids=lambda row: row[0])
def test_low_rank_products_take_the_shapes_of_the_page(row: list[str]) -> None:
    kind, down, up, around = row
    op, x = LOW_RANK[kind]
    sizes = {"r": 4, "inputs": op.in_features, "outputs": op.out_features, "groups": op.groups, "experts": op.experts}
    sizes |= {"kernel": op.kernel, "ones": (1,) * len(op.kernel)}
    A, B = (torch.randn(eval(shape, sizes)) for shape in (down, up))
    product = op.product(A, B)
    assert product.shape == (op.shape if op.groups == 1 else (op.out_features, op.in_features, *op.kernel))
    assert op.callable == (around == "yes") == (x is not None)
    if x is not None:
        torch.testing.assert_close(op.down_up(x, A, B), op(x, product), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [m for m in LINK.findall(text) if not m[0].startswith(("http", "mailto"))]
    for target, anchor in links:
        there = (document.parent / target).resolve()
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}, anchor
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"(examples/{page.name})" in text, page.name


def test_the_private_names_of_torch_are_in_the_files_that_contributing_lists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(
        re.findall(
            r"`((?:passes|adaptc)/\S+\.py)`", text.partition("Private names of torch")[2].partition("- Tests")[0]
        )
    )
    private = re.compile(
        r"^\s*(?:from|import) torch(?:\.\w+)*\._\w+|^\s*from torch(?:\.\w+)* import _\w+"
        r'|torch\.ops\.mkldnn(?:\.|, ")_\w+'
        r"|aten\._(?:int_mm|weight_int|convert_weight)|_make_wrapper_subclass",
        re.MULTILINE,
    )
    files = [f for folder in ("adaptc", "passes", "kernels") for f in (ROOT / folder).rglob("*.py")]
    texts = {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in files}
    # Attributes such as those of tensors are private in ways that no pattern tells; then the file itself says so.
    commented = {name for name, source in texts.items() if "Private torch use" in source}
    assert {name for name, source in texts.items() if private.search(source)} <= commented
    assert commented == listed
