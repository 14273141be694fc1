"""Numbers that name no row of a table: an error before compiled code, which would end the process, meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import AdaptcError
from adaptc.packages.manifest import read
from adaptc.passes.analysis.index_bounds import find_index_bounds
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.runtime.calls.check_indices import check_index_bounds

ROWS = 11


class Tables(nn.Module):
    """Tokens are looked up by an embedding, places by ``index_select``, kinds from the end, too; the last token twice,
    and ``free`` only after it was put right."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, 5), nn.Parameter(torch.randn(7, 5))
        self.kinds, self.few = nn.Parameter(torch.randn(3, 5)), nn.Embedding(2, 5)
        self.up = nn.Linear(5, 3)

    def forward(self, ids: Tensor, places: Tensor, kinds: Tensor, free: Tensor) -> Tensor:
        x = self.words(ids.long()) + self.places.index_select(0, places.view(-1)).view(*places.shape, 5)
        x = x + self.kinds[kinds] + self.words(free.clamp(0, ROWS - 1)) + self.few(free[:, :1] * 0)
        return self.up(x)


def inputs(rows: int = 3, length: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows)
    most = {"ids": ROWS, "places": 7, "kinds": 3, "free": 99}
    return {n: torch.randint(m, (rows, length), generator=g) for n, m in most.items()}


def copies(ids: Tensor, other: Tensor, words: Tensor) -> Tensor:
    """``ids`` is seen through one copy of several; of ``other`` a row is chosen, and the rest may be anything."""
    x = words[ids.unsqueeze(0).expand(3, -1, -1).select(0, 1).long()] + words[ids.unsqueeze(0).expand(2, -1, -1)[1]]
    return x + words[other.unsqueeze(0).expand(2, -1, -1).select(1, 0)].sum(0)


def program(**options: Any) -> adaptc.AdaptedProgram:
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    return adaptc.compile(Tables().eval(), config, example_inputs=inputs(), **options)


WRONG = [("ids", ROWS), ("ids", -1), ("places", 7), ("kinds", 3), ("kinds", -4)]


def test_one_of_several_copies_is_looked_up() -> None:
    class Copies(nn.Module):
        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            return copies(ids, other, self.words)

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.randn(ROWS, 5))

    given = {n: t for n, t in inputs().items() if n in ("ids",)} | {"other": inputs()["ids"]}
    exported = torch.export.export(Copies(), (), given, strict=False)
    assert find_index_bounds(LiftedProgram(exported)) == {"ids": (-ROWS, ROWS - 1)}


def test_what_a_program_looks_up() -> None:
    made = program()
    assert find_index_bounds(LiftedProgram(made)) == {"ids": (0, ROWS - 1), "places": (0, 6), "kinds": (-3, 2)}
    # Plain PyTorch says it itself.
    with pytest.raises(IndexError):
        made(**inputs() | {"ids": torch.full((3, 4), ROWS)})


@pytest.mark.long
@pytest.mark.parametrize("how", ["inductor", pytest.param("package", marks=pytest.mark.long)])
def test_it_is_an_error_and_not_the_end(how: str, tmp_path: Path) -> None:
    """A process that ended would take the tests with it."""
    made: Any = program(backend="inductor" if how == "inductor" else "eager")
    if how == "package":
        made = adaptc.load_package(adaptc.package(made, tmp_path / "p.pt2", max_rank=3))
    good = inputs(5, 7)
    expected = made(**good)
    for name, value in WRONG:
        wrong = good[name].clone()
        wrong[-1, 2] = value
        with pytest.raises(AdaptcError, match=rf"input '{name}' has {value}, and the model looks up a row"):
            made(**good | {name: wrong})
    edges = {"ids": ROWS - 1, "places": 6, "kinds": -3}
    made(**good | {n: torch.full((5, 7), v) for n, v in edges.items()})
    assert torch.equal(made(**good), expected)


@pytest.mark.long
def test_the_manifest_says_it(tmp_path: Path) -> None:
    path = adaptc.package(program(), tmp_path / "p.pt2")
    found = {i.name: i.bounds for i in read(path).manifest.inputs}
    assert found == {"ids": (0, ROWS - 1), "places": (0, 6), "kinds": (-3, 2), "free": None}


def test_of_nothing_and_of_other_devices() -> None:
    check_index_bounds("ids", torch.zeros(0, 3, dtype=torch.int64), (0, 1))
    check_index_bounds("ids", torch.zeros(2, dtype=torch.int64, device="meta"), (0, 1))
