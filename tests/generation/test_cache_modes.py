"""Cache modes: code outside them asks no mode its name, and files of programs say the names that they always said."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.archives.refusal import UnsafeFile
from adaptc.generation.cache.cache_layout import CacheLayout
from adaptc.generation.description import facts_of
from adaptc.generation.modes.all_modes import MODES, candidates, mode_to_json
from adaptc.generation.modes.cache_mode import CacheMode
from tests.generation.models import case, generator
from tests.support.families import FAMILIES

SOURCE = Path(adaptc.__file__).parent
FOLDER = SOURCE / "generation" / "modes"
#: class -> its name in files, best first
NAMES = {
    "SlidingWindowMode": "window",
    "StaticMode": "room",
    "ExactLengthMode": "exact",
    "RecurrentMode": "state",
    "HybridMode": "hybrid",
    "UncachedMode": "nothing",
}
CONSTANTS = {"SLIDING_WINDOW", "STATIC", "EXACT_LENGTH", "RECURRENT", "HYBRID", "UNCACHED"}


def mentions_mode(node: ast.AST) -> bool:
    """Whether a constant, a class or the attribute of a mode is in it."""
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and (n.id in CONSTANTS or n.id in NAMES or n.id == "cache_mode"):
            return True
        if isinstance(n, ast.Attribute) and (n.attr in CONSTANTS or n.attr == "cache_mode"):
            return True
    return False


def tells_apart(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        # Another attribute of a mode may be compared: it is what the mode says of itself.
        return any(mentions_mode(s) and not is_of_a_mode(s) for s in (node.left, *node.comparators))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
        return any(map(mentions_mode, node.args))
    if isinstance(node, ast.Match):
        return mentions_mode(node.subject)
    return isinstance(node, ast.Attribute) and node.attr == "name" and mentions_mode(node.value)


def is_of_a_mode(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr != "cache_mode" and node.attr not in CONSTANTS


def comparisons(text: str) -> Iterator[int]:
    """The line of each place that tells modes apart: by a comparison, ``isinstance``, ``match``, or the name."""
    if "cache_mode" in text or any(word in text for word in (*CONSTANTS, *NAMES)):
        for node in ast.walk(ast.parse(text)):
            if tells_apart(node):
                yield node.lineno  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        "if spec.cache_mode == UNCACHED: pass",
        "if spec.cache_mode is not modes.STATIC: pass",
        "found = cache_mode in (STATIC, RECURRENT)",
        "found = isinstance(spec.cache_mode, StaticMode)",
        "found = type(self.spec.cache_mode) is RecurrentMode",
        "found = spec.cache_mode.name == 'state'",
        "match spec.cache_mode:\n    case _: pass",
    ],
)
def test_a_comparison_is_found(line: str) -> None:
    assert list(comparisons(line))


def test_what_a_mode_says_is_no_comparison() -> None:
    assert not list(comparisons("found = not spec.cache_mode.has_cache and layout.size == 3"))


def test_only_modes_tell_modes_apart() -> None:
    files = [path for path in SOURCE.rglob("*.py") if FOLDER not in path.parents]
    assert len(files) > 100
    found = [f"{path}:{line}" for path in files for line in comparisons(path.read_text(encoding="utf-8"))]
    assert found == []


def test_each_mode_is_a_file_and_has_its_name() -> None:
    assert [(type(mode).__name__, mode.name) for mode in MODES] == list(NAMES.items())
    assert all(isinstance(mode, CacheMode) for mode in MODES)
    files = {type(mode).__module__.rpartition(".")[2] for mode in MODES}
    assert len(files) == len(MODES)
    assert all((FOLDER / f"{name}.py").is_file() for name in files)


def test_a_copied_mode_is_the_mode() -> None:
    assert all(copy.deepcopy(mode) is mode for mode in MODES)


@pytest.mark.parametrize("positions", [None, 64])
@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_the_best_modes_come_first(family: str, positions: int | None) -> None:
    model = FAMILIES[family].build()
    layout = CacheLayout.from_model(model)
    expected = {"llama": ["room", "exact"], "mistral": ["window", "room", "exact"], "mamba": ["state", "state"]}[family]
    last = ["nothing"] if positions is None else ["nothing", "nothing"]
    found = candidates(model, layout, positions)
    assert [c.mode.name for c in found] == [*expected, *last]
    assert [c.has_prefill for c in found if c.mode.name == "state"] == [True, False] * (family == "mamba")
    # A step that depends on the size of its cache never sees all positions that the model has a table for.
    limits = {c.size_limit for c in found if c.mode.name in ("window", "room", "state")}
    assert limits == {None}
    assert found[-1].size_limit == (None if positions is None else 63)
    assert [c.mode.name for c in candidates(model, None, positions)] == last


KEYS = {"heads": 2, "key_dim": 4, "value_dim": 4, "sliding": None}
#: what files said of a program, before there were classes of modes: (further entries, inputs)
FILES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "room": ({"layers": [KEYS]}, {"slots", "keys_0", "values_0"}),
    "window": (
        {"layers": [KEYS | {"sliding": 6}], "keeps": "window", "why": ""},
        {"slots", "keys_0", "values_0"},
    ),
    "exact": ({"layers": [KEYS], "keeps": "exact", "why": "the first failed"}, {"slots", "keys_0", "values_0"}),
    "state": (
        {
            "layers": [],
            "keeps": "state",
            "why": "",
            "states": [{"layer": 0, "kind": "conv_states", "index": 0, "sizes": [3, 2], "dtype": "float32"}],
        },
        {"state_0"},
    ),
    "nothing": ({"layers": [], "keeps": "nothing", "why": "it has no cache"}, set()),
}


def stored(more: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "config": {"model_type": "llama"},
        "generation_config": {},
        "dtype": "float32",
        "max_batch": 3,
        "max_length": 48,
        "positions": True,
        "embeds": True,
        "vocabulary": 61,
        "width": 24,
        "embeds_dtype": "float32",
        **more,
    }


@pytest.mark.parametrize("name", FILES)
def test_files_of_before_load(name: str) -> None:
    more, inputs = FILES[name]
    spec = facts_of(stored(more), inputs)
    assert spec.cache_mode.name == name
    assert spec.mode_reason == more.get("why", "")
    written = mode_to_json(spec.cache_mode, spec)
    assert written == {key: more[key] for key in ("keeps", "why") if key in more}
    cache = spec.new_cache(torch.device("cpu"))
    assert (cache.length, cache.owner) == (0, spec)


@pytest.mark.parametrize(
    ("name", "more", "inputs", "why"),
    [
        ("room", {"keeps": "all"}, None, "what it keeps is 'all', of 1 layers"),
        ("room", {"keeps": "window"}, None, "its layers keep a window, and it has none"),
        ("room", {"keeps": "nothing"}, None, "what it keeps is 'nothing', of 1 layers"),
        ("room", {"keeps": "state"}, None, "what it keeps is 'state', of 1 layers"),
        ("nothing", {"keeps": "room"}, None, "what it keeps is 'room', of 0 layers"),
        ("room", {}, {"keys_0", "values_0"}, "its program has no such cache"),
        ("room", {}, {"slots", "keys_0"}, "its program has no such cache"),
        ("state", {}, {"slots", "state_0"}, "its program has no such cache"),
    ],
)
def test_a_mode_that_does_not_fit_the_program_is_refused(
    name: str, more: dict[str, Any], inputs: set[str] | None, why: str
) -> None:
    entries, own = FILES[name]
    with pytest.raises(UnsafeFile) as told:
        facts_of(stored(entries | more), own if inputs is None else inputs)
    assert why in str(told.value)


@pytest.mark.long
def test_what_is_saved_says_the_name(tmp_path: Path) -> None:
    """A file without an entry is of the static mode, as files were that were saved before there were others."""
    gen = generator("gpt_neo")
    assert '"keeps": "exact"' in next(iter(gen.sidecar_texts().values()))
    assert "keeps" not in next(iter(generator("llama").sidecar_texts().values()))
    adaptc.save(gen, tmp_path / "gen.pt2")
    again = adaptc.load(tmp_path / "gen.pt2")
    assert isinstance(again, adaptc.Generator)
    assert (again.spec.cache_mode.name, again.spec.mode_reason) == ("exact", gen.spec.mode_reason)
    assert case("gpt_neo").model.config.model_type == again.config.model_type
