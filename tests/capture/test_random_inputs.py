"""Random inputs are always inputs the program takes: sizes in range, ids below the tables, masks that pad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from adaptc import AdaptcError
from adaptc.capture.inputs.random_inputs import draw_inputs
from tests.support.families import FAMILIES


def exported(module: nn.Module, args: tuple[Any, ...], shapes: Any, **kwargs: Any) -> ExportedProgram:
    return export(module, args, kwargs or None, dynamic_shapes=shapes, strict=False)


class Lookups(nn.Module):
    """Three integer inputs that three different tables bound, one of them only after moves."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(37, 4), nn.Embedding(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, word_ids: Tensor, kind_ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        h = self.words(word_ids.view(-1, 2)[:, :1].reshape(-1)) + self.kinds(kind_ids.clone())
        return F.cross_entropy(self.head(h), F.pad(labels, (0, 1), value=-100)[1:]) * mask.sum()


def lookups() -> ExportedProgram:
    n = Dim("n", min=2, max=40)
    ids = torch.zeros(7, dtype=torch.int64)
    args = (torch.zeros(14, dtype=torch.int64), ids, ids, torch.ones(7, 9, dtype=torch.int32))
    return exported(Lookups(), args, ({0: 2 * n}, {0: n}, {0: n}, {0: n}))


LOOKUPS = lookups()


@given(seed=st.integers(0, 10**6))
def test_integers_stay_below_what_they_are_looked_up_in(seed: int) -> None:
    runs = list(draw_inputs(LOOKUPS, seed=seed))
    assert runs
    for run in runs:
        words, kinds, labels, mask = run.args
        assert words.shape[0] == 2 * kinds.shape[0] == 2 * labels.shape[0] == 2 * mask.shape[0]
        assert 2 <= kinds.shape[0] <= 40
        for ids, bound in ((words, 37), (kinds, 3), (labels, 5)):
            assert ids.dtype == torch.int64
            assert int(ids.min()) >= 0
            assert int(ids.max()) < bound
        assert mask.dtype == torch.int32
        assert torch.isfinite(LOOKUPS.module()(*run.args))


def test_integers_reach_the_whole_table() -> None:
    words = torch.cat([r.args[0] for r in draw_inputs(LOOKUPS, shapes=40)])
    assert set(words.tolist()) == set(range(37))


@given(seed=st.integers(0, 10**6))
def test_masks_pad_the_left_or_the_right(seed: int) -> None:
    mask = draw_inputs(LOOKUPS, shapes=[{"mask": (40, 9)}], seed=seed)[0].args[3]
    assert set(mask.unique().tolist()) == {0, 1}
    for row in mask.tolist():
        kept = "".join(map(str, row)).strip("0")
        assert set(kept) == {"1"}
        assert len(kept) >= 6
        assert row[0] or row[-1]
    assert any(not row[0] for row in mask.tolist())
    assert any(not row[-1] for row in mask.tolist())


class Shapes(nn.Module):
    def forward(self, x: Tensor, y: Tensor, flag: Tensor, n: int, extra: dict[str, Any]) -> Tensor:
        return x.sum() + y.sum() + flag.sum() + extra["z"].abs().sum() + n


def test_every_kind_of_input_is_made() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    args = (x, torch.randn(6, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bool), 3)
    extra = {"z": torch.randn(2, dtype=torch.complex64), "none": None}
    b = Dim("b", min=3, max=8)
    program = exported(Shapes(), (*args, extra), ({0: b}, {0: b}, None, None, {"z": None, "none": None}))
    runs = draw_inputs(program, shapes=30)
    assert tuple(runs[0].args[0].shape) == (6, 5)  # as captured
    assert {r.args[0].shape[0] for r in runs} == {3, 4, 5, 6}  # within the range, and not above the capture
    for run in runs:
        x, y, flag, n, extra = run.args
        assert x.dtype == torch.float64
        assert (y.dtype, y.shape[0]) == (torch.bfloat16, x.shape[0])
        assert (flag.dtype, tuple(flag.shape)) == (torch.bool, (4,))
        assert n == 3
        assert (extra["z"].dtype, extra["none"]) == (torch.complex64, None)
        program.module()(*run.args)
    assert "4" in runs[0].shapes_text


def test_shapes_the_program_cannot_take_are_refused() -> None:
    for bad, said in (
        ({"masks": (3, 9)}, "did you mean one of .*'mask'"),
        ({"mask": (3,)}, "has 2 axes"),
        ({"mask": (3, 8)}, "cannot have shape"),
        ({"mask": (3, 9), "labels": (4,)}, "cannot have shape"),
        ({"mask": (41, 9)}, "no sizes found"),
    ):
        with pytest.raises(AdaptcError, match=said):
            draw_inputs(LOOKUPS, shapes=[bad])
    with pytest.raises(AdaptcError, match="at least one"):
        draw_inputs(LOOKUPS, shapes=[])
    with pytest.raises(AdaptcError, match="at least one"):
        draw_inputs(LOOKUPS, shapes=0)


def test_equal_seeds_give_equal_inputs_and_leave_torch_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (draw_inputs(LOOKUPS, seed=s)[2].args for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.long
@pytest.mark.parametrize("family", ["roberta", "bart", "whisper"])
def test_families_take_what_is_drawn(family: str) -> None:
    from adaptc.capture.capture import capture

    model = FAMILIES[family].build()
    program = capture(model).program
    for run in draw_inputs(program, vocab_size=model.config.vocab_size):
        with torch.no_grad():
            model(**run.kwargs)
        for name, value in run.kwargs.items():
            if name.endswith("ids"):
                assert int(value.max()) < model.config.vocab_size


def test_ids_without_a_table_use_the_vocabulary() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, flags: Tensor, position_ids: Tensor) -> Tensor:
            return input_ids * 2 + flags + position_ids

    ids = torch.zeros(50, 40, dtype=torch.int64)
    run = draw_inputs(exported(Plain(), (ids, ids, ids), None), shapes=1, vocab_size=91)[0]
    ids, flags, positions = run.args
    assert set(ids.unique().tolist()) == set(range(91))
    assert set(flags.unique().tolist()) == {0, 1}
    assert torch.equal(positions[7], torch.arange(40))
