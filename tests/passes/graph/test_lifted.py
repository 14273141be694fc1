"""Lifted inputs come and go: a program with inputs added and removed again is the program it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from adaptc.errors import ConfigError, PassError
from adaptc.passes.graph.lifted import LiftedProgram
from tests.support.pass_checks import Snapshot, assert_valid, export, saved_and_loaded


class Every(nn.Module):
    """One input of each kind: parameter, persistent buffer, buffer that is not saved, constant, user input."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)
        self.register_buffer("kept", torch.randn(5))
        self.register_buffer("lost", torch.randn(5), persistent=False)
        self.constant = torch.randn(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.constant + self.kept * self.lost


class NoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)
        self.start = nn.Parameter(torch.randn(3, 7))

    def forward(self) -> Tensor:
        return self.lin(self.start)


class Nothing(nn.Module):
    """Not one lifted input, and no user input."""

    def forward(self) -> Tensor:
        return torch.arange(5.0)


class Builtins(nn.Module):
    """Inputs called like builtins, of which fx keeps none."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)

    def forward(self, input: Tensor, max: Tensor, *, str: Tensor) -> Tensor:
        return self.lin(input) * max + str


class PassesThrough(nn.Module):
    """Outputs that are an input, a parameter, a buffer, a number, nothing, and one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 5)
        self.register_buffer("kept", torch.randn(5))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.lin(x)
        return y, x, self.lin.weight, self.kept, 3, None, y


class Batched(nn.Module):
    """A batch norm in train mode, which writes to its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(7, 5, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "every": (Every, lambda: ((torch.randn(3, 7),), {})),
    "no inputs": (NoInputs, lambda: ((), {})),
    "nothing": (Nothing, lambda: ((), {})),
    "builtins": (Builtins, lambda: ((torch.randn(3, 7), torch.randn(5)), {"str": torch.randn(5)})),
    "outputs": (PassesThrough, lambda: ((torch.randn(3, 7),), {})),
    "train": (lambda: Batched().train(), lambda: ((torch.randn(2, 7, 11),), {})),
    "numbers": (lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), lambda: ((torch.randn(3, 7),), {})),
}
FORMS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "fresh": lambda p: p,
    "loaded": saved_and_loaded,
    "decomposed": lambda p: p.run_decompositions(),
    "decomposed, loaded": lambda p: saved_and_loaded(p.run_decompositions()),
}


def run(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What it returns, on a copy of its state: some programs write to their buffers."""
    state = {k: v.detach().clone() for k, v in program.state_dict.items()}
    out = program.module()(*args, **kwargs)
    for k, v in program.state_dict.items():
        v.data.copy_(state[k])
    return out


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.few(6)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_there_and_back(name: str, strict: bool) -> None:
    build, inputs = PROGRAMS[name]
    torch.manual_seed(5)
    args, kwargs = inputs()
    exported = torch.export.export(build(), args, kwargs, strict=strict)
    for form in FORMS.values():
        program = form(exported)
        before = Snapshot.record(program)
        expected = run(program, args, kwargs)

        lifted = LiftedProgram(program)
        names = ["extra.0.weight", "extra.1.bias", "extra.table"]
        lifted.add_tensor(names[0], nn.Parameter(torch.randn(3, 2)))
        lifted.add_tensor(names[1], nn.Parameter(torch.randn(3), requires_grad=False))
        lifted.add_tensor(names[2], torch.arange(3))
        more = lifted.finish()
        assert_valid(more)
        before.check(program)
        same(run(more, args, kwargs), expected)
        assert set(more.state_dict) == {*program.state_dict, *names}
        kinds = {s.target: s.kind for s in more.graph_signature.input_specs if s.target in names}
        assert kinds == {names[0]: InputKind.PARAMETER, names[1]: InputKind.PARAMETER, names[2]: InputKind.BUFFER}
        assert len(more.graph.nodes) == len(program.graph.nodes) + 3

        for opened in (more, saved_and_loaded(more)):
            lifted = LiftedProgram(opened)
            for fqn in names:
                lifted.remove_tensor(fqn)
            back = lifted.finish()
            assert_valid(back)
            same(run(back, args, kwargs), expected)
            if opened is more:
                before.check(back)
            else:
                assert back.graph_module.code == saved_and_loaded(program).graph_module.code


def test_added_inputs_come_before_the_users() -> None:
    program = export(Every(), torch.randn(3, 7))
    lifted = LiftedProgram(program)
    lifted.add_tensor("a", nn.Parameter(torch.randn(3)))
    lifted.add_tensor("b", torch.randn(3))
    kinds = [s.kind for s in lifted.finish().graph_signature.input_specs]
    assert kinds.index(InputKind.USER_INPUT) == len(kinds) - 1


@pytest.mark.parametrize(
    "fqn",
    ["0.weight", "lin-weight", "a b", "lin_weight", "x", "input", "p.x", "é.weight", "3"],
)
def test_names_fx_cannot_keep(fqn: str) -> None:
    """Whatever the parameter is called, its placeholder has a legal name of its own, and the state dict its FQN."""
    args = (torch.randn(3, 7),)
    program = export(Every(), *args)
    lifted = LiftedProgram(program)
    value = nn.Parameter(torch.randn(5))
    node = lifted.add_tensor(fqn, value)
    add = torch.ops.aten.add.Tensor
    out = lifted.graph.output_node()
    (old,) = out.args[0]  # type: ignore[misc]
    with lifted.graph.inserting_before(out):
        new = lifted.graph.call_function(add, (old, node))
    new.meta["val"] = old.meta["val"]
    out.args = ((new,),)
    changed = lifted.finish()
    assert_valid(changed)
    assert changed.state_dict[fqn] is value
    assert node.name.isidentifier()
    same(changed.module()(*args), program.module()(*args) + value)
    same(saved_and_loaded(changed).module()(*args), program.module()(*args) + value)


#: parts that fx turns into one legal name, and others
PARTS = st.text(st.sampled_from("ab01_-: é"), min_size=1, max_size=4)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True))
def test_any_names_together(fqns: list[str]) -> None:
    """Names that look alike once sanitised still get a placeholder each, and all go away again."""
    program = PROGRAM
    before = Snapshot.record(program)
    lifted = LiftedProgram(program)
    values = {f: nn.Parameter(torch.randn(i + 1)) for i, f in enumerate(fqns)}
    nodes = [lifted.add_tensor(f, v) for f, v in values.items()]
    assert len({n.name for n in nodes}) == len(fqns)
    more = lifted.finish()
    assert_valid(more)
    for fqn, value in values.items():
        assert more.state_dict[fqn] is value
    lifted = LiftedProgram(more)
    for fqn in reversed(fqns):
        lifted.remove_tensor(fqn)
    before.check(lifted.finish())


PROGRAM = torch.export.export(Every(), (torch.randn(3, 7),))


@pytest.mark.parametrize("fqn", ["lin.weight", "kept", "lost", "constant"])
def test_a_name_is_given_once(fqn: str) -> None:
    lifted = LiftedProgram(PROGRAM)
    with pytest.raises(ConfigError, match=fqn):
        lifted.add_tensor(fqn, nn.Parameter(torch.randn(5)))
    Snapshot.record(PROGRAM).check(lifted.finish())


def test_a_new_name_is_given_once() -> None:
    lifted = LiftedProgram(PROGRAM)
    lifted.add_tensor("extra", torch.randn(3))
    with pytest.raises(ConfigError, match="extra"):
        lifted.add_tensor("extra", torch.randn(3))
    assert len(lifted.finish().graph.nodes) == len(PROGRAM.graph.nodes) + 1


@pytest.mark.parametrize("fqn", ["lin.weight", "kept", "lost", "constant"])
def test_inputs_that_are_read_stay(fqn: str) -> None:
    lifted = LiftedProgram(PROGRAM)
    with pytest.raises(PassError, match=fqn):
        lifted.remove_tensor(fqn)
    Snapshot.record(PROGRAM).check(lifted.finish())


class Unread(Every):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class UnreadTied(Unread):
    """A weight with two names, read under neither."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(7, 5)
        self.other.weight = self.lin.weight


def test_tied_inputs_go_under_all_names() -> None:
    x = torch.randn(3, 7)
    lifted = LiftedProgram(export(UnreadTied(), x))
    lifted.remove_tensor("other.weight")
    less = lifted.finish()
    assert_valid(less)
    assert not {"lin.weight", "other.weight"} & set(less.state_dict)
    assert {"lin.bias", "other.bias"} <= set(less.state_dict)
    same(less.module()(x), x + 1)


def test_the_last_input_makes_room_for_another() -> None:
    program = export(Nothing())
    lifted = LiftedProgram(program)
    lifted.add_tensor("one", torch.randn(3))
    lifted.remove_tensor("one")
    lifted.add_tensor("two", torch.randn(3))
    lifted.add_tensor("three", torch.randn(3))
    more = lifted.finish()
    assert_valid(more)
    assert [s.target for s in more.graph_signature.input_specs] == ["two", "three"]


@pytest.mark.parametrize("fqn", ["lin.weight", "kept"])
def test_inputs_that_nothing_reads_can_go(fqn: str) -> None:
    x = torch.randn(3, 7)
    program = export(Unread(), x)
    lifted = LiftedProgram(program)
    lifted.remove_tensor(fqn)
    less = lifted.finish()
    assert_valid(less)
    assert fqn not in less.state_dict
    assert fqn not in less.constants
    assert len(less.graph.nodes) == len(program.graph.nodes) - 1
    same(less.module()(x), x + 1)


@pytest.mark.parametrize("fqn", ["lin.bias", "kept", "lost", "constant"])
def test_a_new_value(fqn: str) -> None:
    """Any lifted input takes another value, in the program returned and nowhere else."""
    x = torch.randn(3, 7)
    before = Snapshot.record(PROGRAM)
    lifted = LiftedProgram(PROGRAM)
    value = lifted.tensor(fqn).detach() * 3 + 1
    value = nn.Parameter(value) if fqn == "lin.bias" else value
    lifted.set_tensor(fqn, value)
    changed = lifted.finish()
    assert_valid(changed)
    before.check(PROGRAM)
    tensors = {**PROGRAM.state_dict, **PROGRAM.constants, fqn: value}
    lin = nn.functional.linear(x, tensors["lin.weight"], tensors["lin.bias"])
    same(changed.module()(x), lin * tensors["constant"] + tensors["kept"] * tensors["lost"])


def test_fakes_follow_shape_and_layout() -> None:
    lifted = LiftedProgram(PROGRAM)
    lifted.set_tensor("lin.weight", nn.Parameter(torch.randn(7, 5).t()))
    fake = lifted.placeholders["lin.weight"].meta["val"]
    assert tuple(fake.shape) == (5, 7)
    assert fake.stride() == (1, 5)
    lifted.set_tensor("kept", torch.randn(1, 5).double())
    fake = lifted.placeholders["kept"].meta["val"]
    assert (tuple(fake.shape), fake.dtype) == ((1, 5), torch.float64)
