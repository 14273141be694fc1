"""Files whose quantised weights were damaged or forged: each is refused by the name of the weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc import LoraConfig
from adaptc.errors import CheckpointError
from adaptc.passes.quantized.expand_quantized import QUANTIZED_META, ExpandQuantized
from adaptc.passes.quantized.integer_scheme import IntegerScheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

X = torch.linspace(-2, 2, 3 * 16).reshape(3, 16)


class Net(nn.Module):
    def __init__(self, scheme: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(16, 11), nn.Linear(11, 7)
        adaptc.quantize(self, scheme, exclude=["down"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@cache
def program(scheme: str) -> adaptc.AdaptedProgram:
    torch.manual_seed(5)
    config = LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False)
    return adaptc.compile(Net(scheme), config, example_inputs=X)


def stored(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def damage(plain: Any) -> None:
        plain.state_dict[f"up.weight.{role}"] = change(plain.state_dict[f"up.weight.{role}"])

    return damage


def record(**fields: Any) -> Callable[[Any], None]:
    def damage(plain: Any) -> None:
        (found,) = [c for n in plain.graph.nodes if (c := n.meta.get("custom", {}).get(QUANTIZED_META))]
        found.update(fields)
        for name in [n for n, value in fields.items() if value is None]:
            del found[name]

    return damage


def nan_at_one(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t[:1] * float("nan"), t[1:]])


INT4 = {"scheme": "integer", "bits": 4, "group_size": 16, "scale_dtype": "bfloat16", "zero_dtype": "uint8"}
CASES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "scales that are NaN": ("int8", stored("scales", nan_at_one), "'scales' of integer .* not finite"),
    "table that is NaN": ("nf4", stored("table", nan_at_one), "'table' of table .* not finite"),
    "codes that are cut": ("int8", stored("codes", lambda t: t[:, :-1].clone()), r"is stored as a CHAR of \[11, 15\]"),
    "codes of another dtype": ("nf4", stored("codes", lambda t: t.view(torch.int8)), "is stored as a CHAR of"),
    "a scheme that nobody knows": ("int8", record(scheme='{"scheme": "ternary"}'), "ternary.* names no scheme"),
    "a scheme that is no JSON": ("int8", record(scheme="int8"), "names no scheme"),
    "a scheme of other bits": ("int8", record(scheme=json.dumps(INT4)), "'up.weight.zeros'"),
    "an option that nobody knows": ("int4", record(scheme=json.dumps({**INT4, "bit": 4})), "no option bit"),
    "an option of another type": ("int4", record(scheme=json.dumps({**INT4, "bits": "4"})), "no option bits='4'"),
    "groups that do not divide": ("int4", record(scheme=json.dumps({**INT4, "group_size": 5})), "group_size=5"),
    "another shape": ("int8", record(shape=[16, 11]), r"says \(16, 11\), .* computes \(11, 16\)"),
    "a shape with less axes": ("int8", record(shape=[]), r"says \(\)"),
    "rows of no axis": ("int8", record(row_axes=0), r"row_axes=0: at least one axis, .* \(11, 16\)"),
    "rows counted from the end": ("int8", record(row_axes=-1), "row_axes=-1: at least one axis"),
    "rows of all axes": ("nf4", record(row_axes=2), "row_axes=2: at least one axis, and not all"),
    "rows that are no number": ("int8", record(row_axes="two"), "its record is"),
    "another name": ("int8", record(names=["up.other"]), "'up.other.codes'"),
    "no names": ("int8", record(names=None), "its record is"),
    "no scheme": ("int8", record(scheme=None), "its record is"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_refused_by_the_name_of_the_weight(case: str, tmp_path: Path) -> None:
    scheme, damage, said = CASES[case]
    prog = program(scheme)
    before, weight = prog(X), prog.state_dict["up.weight"]
    plain = ExpandQuantized()(prog).output
    damage(plain)
    torch.export.save(plain, tmp_path / "damaged.pt2")
    name = {"another name": "'up.other'", "no names": "'[a-z_0-9]+'"}.get(case, "'up.weight[a-z.]*'")
    with pytest.raises(CheckpointError, match=f"{name}.*{said}"):
        adaptc.load(tmp_path / "damaged.pt2")
    assert torch.equal(prog(X), before)
    assert prog.state_dict["up.weight"] is weight
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.pt2"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "int8_dynamic"])
def test_a_file_that_was_not_damaged_is_read_to_the_bit(scheme: str, tmp_path: Path) -> None:
    """The same way to a file, without damage: what is refused above is refused for the damage."""
    prog = program(scheme)
    torch.export.save(ExpandQuantized()(prog).output, tmp_path / "whole.pt2")
    assert torch.equal(adaptc.load(tmp_path / "whole.pt2")(X), prog(X))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = adaptc.save(program("nf4"), tmp_path / "cut.pt2")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(CheckpointError, match=r"cut\.pt2"):
        adaptc.load(path)


def test_groups_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """They would be read past the end of the scales."""
    scheme = IntegerScheme(bits=4, group_size=8, has_group_index=True)
    tensors = {"codes": torch.ones(11, 8, dtype=torch.uint8), "scales": torch.ones(11, 2)}
    tensors["group_index"] = torch.arange(16, dtype=torch.int32) % 2
    model = Net("int8")
    model.up.weight = nn.Parameter(QuantizedTensor(scheme, tensors, (11, 16), torch.float32), requires_grad=False)
    plain = ExpandQuantized()(adaptc.compile(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=X)).output
    stored("group_index", lambda t: t + 1)(plain)
    torch.export.save(plain, tmp_path / "damaged.pt2")
    with pytest.raises(CheckpointError, match=r"'up\.weight'.*'group_index'.* groups 0 to 1, and is from 1 to 2"):
        adaptc.load(tmp_path / "damaged.pt2")
