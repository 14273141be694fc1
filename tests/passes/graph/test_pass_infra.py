"""Passes and their manager: what is checked after each pass, what is reported, and who is blamed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from adaptc.errors import MergeError, PassError
from adaptc.passes.adapt.inject import Inject
from adaptc.passes.adapt.merging.merge_pass import Merge
from adaptc.passes.adapt.unload import Unload
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.graph.pass_infra import Pass, PassManager, PassResult
from adaptc.passes.train.set_mode import SetMode
from tests.support.pass_checks import Snapshot, attach, export, inject, random_values

X = torch.randn(3, 7)


@pytest.fixture
def program() -> ExportedProgram:
    torch.manual_seed(2)
    return export(nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5), nn.Linear(5, 3)).train(), X)


@dataclass(frozen=True)
class AddInput(Pass):
    """A good pass."""

    name: ClassVar[str] = "add_input"

    fqn: str = "extra"
    size: int = 3
    secret: Any = field(default=None, repr=False)

    def apply(self, program: ExportedProgram) -> PassResult:
        lifted = LiftedProgram(program)
        lifted.add_tensor(self.fqn, torch.zeros(self.size))
        return PassResult(lifted.finish(), 1, (f"added {self.fqn}",))


@dataclass(frozen=True)
class Breaks(Pass):
    """A pass that leaves a program which is not valid, by ``how``."""

    name: ClassVar[str] = "breaks"

    how: str

    def apply(self, program: ExportedProgram) -> PassResult:
        new = LiftedProgram(program).finish()
        graph = new.graph_module.graph
        linear = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if self.how == "order":
            linear[0].append(linear[0].args[0])
        elif self.how == "value":
            del linear[0].meta["val"]
        elif self.how == "signature":
            new.graph_signature.input_specs.pop(0)
        elif self.how == "state":
            new.state_dict.clear()
        elif self.how == "type":
            new.state_dict["0.weight"] = torch.zeros(5, 7)
        return PassResult(new, 1)


@dataclass(frozen=True)
class Fails(Pass):
    name: ClassVar[str] = "fails"

    error: Exception

    def apply(self, program: ExportedProgram) -> PassResult:
        raise self.error


def test_results_add_up(program: ExportedProgram) -> None:
    seen: list[tuple[str, int]] = []
    manager = PassManager(
        [AddInput("one"), SetMode(training=False), AddInput("two", 5)],
        observe=lambda p, result: seen.append((str(p), len(result.program.state_dict))),
    )
    before = Snapshot.record(program)
    result = manager(program)
    before.check(program)
    assert result.count == 3
    assert result.notes == ("added one", "added two")
    assert list(result.program.state_dict)[-2:] == ["one", "two"]
    assert [r.count for r in manager.results] == [1, 1, 1]
    assert manager.results[-1].program is result.program
    size = len(program.state_dict)
    assert seen == [
        ("add_input(fqn='one', size=3)", size + 1),
        ("set_mode(training=False)", size + 1),
        ("add_input(fqn='two', size=5)", size + 2),
    ]
    manager(program)
    assert len(manager.results) == 3


def test_no_pass_is_the_program_itself(program: ExportedProgram) -> None:
    assert PassManager([])(program) == PassResult(program, 0, data=())


def test_passes_show_their_options() -> None:
    assert str(Inject([], {})) == "inject(training=False)"
    assert str(Merge([], {})) == "merge(safe=True)"
    assert str(Unload()) == "unload()"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Unload().name = "x"  # type: ignore[misc]


@pytest.mark.parametrize("how", ["order", "value", "signature", "state", "type"])
def test_a_broken_program_is_blamed_on_its_pass(program: ExportedProgram, how: str) -> None:
    with pytest.raises(PassError, match="pass 'breaks' left an invalid program"):
        Breaks(how)(program)
    seen: list[str] = []
    manager = PassManager([AddInput(), SetMode(), Breaks(how), AddInput("b")], observe=lambda p, _: seen.append(p.name))
    before = Snapshot.record(program)
    with pytest.raises(PassError, match=r"(?s)'breaks' left .* after add_input, set_mode\)") as caught:
        manager(program)
    assert caught.value.__cause__ is not None
    assert seen == ["add_input", "set_mode"]
    assert len(manager.results) == 2
    before.check(program)


@pytest.mark.parametrize("error", [MergeError("not finite"), PassError("not finite")])
def test_errors_keep_their_type(program: ExportedProgram, error: Exception) -> None:
    with pytest.raises(type(error), match=r"not finite \(in pass 'fails', after no other pass\)") as caught:
        PassManager([Fails(error)])(program)
    assert caught.value.__cause__ is error
    with pytest.raises(type(error), match=r"not finite \(in pass 'fails', after add_input, add_input\)"):
        PassManager([AddInput("a"), AddInput("b"), Fails(error)])(program)


@pytest.mark.parametrize("error", [KeyError("weight"), ValueError(), AssertionError()])
def test_a_bug_in_a_pass_is_blamed_on_it(program: ExportedProgram, error: Exception) -> None:
    with pytest.raises(PassError, match=rf"({type(error).__name__}|weight).*in pass 'fails'") as caught:
        PassManager([Fails(error)])(program)
    assert caught.value.__cause__ is error


def test_the_passes_of_a_program_in_a_row(program: ExportedProgram) -> None:
    """Inject, merge and mode in one manager; and inject, unload, which is where it began."""
    a = attach(program, "0.weight")
    values = random_values(program, [a])
    injected, (done,), _ = inject(program, "0.weight")
    merged = PassManager([SetMode(training=False), Inject([a], values), Merge([done], values)])(program)
    assert merged.count == 3
    module = injected.module()
    expected = SetMode(training=False)(injected).program.module()(X)
    torch.testing.assert_close(merged.program.module()(X), expected)
    assert not torch.equal(module(X), expected)  # with dropout
    back = PassManager([Inject([a], values), Unload()])(program).program
    assert [n.name for n in back.graph.nodes] == [n.name for n in program.graph.nodes]


def test_a_pass_without_apply(program: ExportedProgram) -> None:
    with pytest.raises(AssertionError, match=r"must define apply"):
        Pass()(program)
