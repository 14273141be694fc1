"""Rows stay apart to the end: in what a program gives, and in what it writes to, or a bank of it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
OF_OTHERS = "what one row of the batch is changes what others are there"


class Net(nn.Module):
    """What is made of the output of the last adapted layer; a second layer may have weights of zero."""

    def __init__(self, end: Callable[[Net, Tensor, Tensor], Any], buffer: Tensor | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.gate, self.end = nn.Linear(5, 7), nn.Linear(5, 7), end
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        if buffer is not None:
            self.register_buffer("kept", buffer.clone())

    def forward(self, x: Tensor) -> Any:
        return self.end(self, x, self.layer(x))


def writing(write: Callable[[Net, Tensor, Tensor], Any]) -> Callable[[Net, Tensor, Tensor], Tensor]:
    def end(net: Net, x: Tensor, z: Tensor) -> Tensor:
        write(net, x, z)
        return z

    return end


def compiled(end: Any, buffer: Tensor | None, fixed: bool, folds: bool = False) -> adaptc.AdaptedProgram:
    size = 2 * torch.export.Dim("half", max=4) if folds else torch.export.Dim("b", max=9)
    shapes = None if fixed else ({0: size},)
    exported = torch.export.export(Net(end, buffer).eval(), (X.clone(),), dynamic_shapes=shapes)
    config = adaptc.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return adaptc.compile(exported, config)


MIXED: dict[str, tuple[Any, Tensor | None, str]] = {
    "products of rows": (lambda n, x, z: z @ z.T, None, f"the output: {OF_OTHERS}"),
    "softmax": (lambda n, x, z: z.softmax(0), None, f"the output: {OF_OTHERS}"),
    "mean": (lambda n, x, z: z - z.mean(0), None, f"the output: {OF_OTHERS}"),
    "one mean": (lambda n, x, z: z.mean(0), None, r"the output: \(7,\) has no axis for the .* rows"),
    "roll": (lambda n, x, z: z.roll(1, 0), None, f"the output: {OF_OTHERS}"),
    "sorted": (lambda n, x, z: z.sort(0).values, None, f"the output: {OF_OTHERS}"),
    "numbers of rows": (lambda n, x, z: z.argmax(0), None, r"the output: \(7,\) has no axis"),
    "one of several": (lambda n, x, z: {"a": z, "b": (z, z.flip(0))}, None, rf"the output \['b'\]\[1\]: {OF_OTHERS}"),
    "as many as there are": (lambda n, x, z: (z, z[z > 0]), None, r"the output \[1\]: the number of values there"),
    "statistics": (
        writing(lambda n, x, z: n.kept.copy_(z.mean(0))),
        torch.zeros(7),
        f"what is written to 'kept': {OF_OTHERS}",
    ),
    "a sum": (
        writing(lambda n, x, z: n.kept.add_(z.sum())),
        torch.zeros(()),
        r"what is written to 'kept': \(\) has no axis for",
    ),
    "a cache of others": (
        writing(lambda n, x, z: n.kept[: x.shape[0]].copy_(z.flip(0))),
        torch.zeros(9, 7),
        f"what is written to 'kept': {OF_OTHERS}",
    ),
    "an input": (lambda n, x, z: (x.copy_(x.flip(0)), z)[1], None, f"what is written to 'x': {OF_OTHERS}"),
    "behind zeros": (lambda n, x, z: z + n.gate(x - x.mean(0)), None, rf"'gate\.weight' .*: {OF_OTHERS}"),
}


@pytest.mark.long
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", list(MIXED))
def test_rows_that_mix_behind_the_last_layer_are_refused_by_name(case: str, fixed: bool) -> None:
    end, buffer, message = MIXED[case]
    program = compiled(end, buffer, fixed)
    before = {n: t.clone() for n, t in program.state_dict.items()}
    with pytest.raises(adaptc.TargetError, match=message):
        program.bank()
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict.items())


FOLDED: dict[str, Any] = {
    "output": lambda n, x, z: z.view(z.shape[0] // 2, 14),
    "input": lambda n, x, z: n.layer(x.view(x.shape[0] // 2, 10)[:, :5]),
    "pairs": lambda n, x, z: n.layer(x.view(x.shape[0] // 2, 2, 5)).view(-1, 7),
}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", list(FOLDED))
def test_rows_that_are_folded_are_refused_by_name(case: str, fixed: bool) -> None:
    with pytest.raises(adaptc.TargetError, match=r"(the output|'layer\.weight').*has no axis for the .* rows"):
        compiled(FOLDED[case], None, fixed, folds=True).bank()


APART: dict[str, tuple[Any, Tensor | None]] = {
    "plain": (lambda n, x, z: z.tanh(), None),
    "a loss beside it": (lambda n, x, z: {"z": z, "loss": z.square().mean()}, None),
    "turned": (lambda n, x, z: z.T, None),
    "of several places": (lambda n, x, z: torch.stack([z, x @ x.new_ones(5, 7)], 1).flatten(0, 1), None),
    "infinite": (lambda n, x, z: z.masked_fill(z < 0, float("-inf")), None),
    "not a number": (lambda n, x, z: z.log(), None),
    "a constant and a size": (lambda n, x, z: (z, torch.arange(4), z.shape[0]), None),
    "a counter": (writing(lambda n, x, z: n.kept.add_(1)), torch.zeros(())),
    "a cache with room": (writing(lambda n, x, z: n.kept[: x.shape[0]].copy_(z)), torch.zeros(9, 7)),
    "an input": (lambda n, x, z: (x.mul_(2), z)[1], None),
    "behind zeros": (lambda n, x, z: z + n.gate(x), None),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", list(APART))
def test_rows_that_are_apart_have_a_bank(case: str, fixed: bool) -> None:
    program = compiled(*APART[case], fixed)
    found = program.bank({"a": program.binding})(X.clone(), adapters=["a", None, None, "a"])
    first = next(t for t in (found.values() if isinstance(found, dict) else [found, found[0]]) if isinstance(t, Tensor))
    with torch.no_grad():
        one, other = program(X.clone()), program.base(X.clone())
    if case == "plain":
        torch.testing.assert_close(first, torch.stack([one[0], other[1], other[2], one[3]]))
    assert first.numel() >= 28


def test_a_loss_is_of_all_rows_with_the_adapters_they_have() -> None:
    program = compiled(lambda n, x, z: {"z": z, "loss": z.square().mean()}, None, False)
    found = program.bank({"a": program.binding})(X, adapters=["a", None, None, "a"])
    torch.testing.assert_close(found["loss"], found["z"].square().mean())


class Dropping(nn.Module):
    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.up, self.down, self.drop, self.behind = nn.Linear(5, 7), nn.Linear(7, 3), nn.Dropout(0.5), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.up(x))) if self.behind else self.down(self.drop(self.up(x)))


@pytest.mark.long
@pytest.mark.parametrize("behind", [False, True])
def test_dropout_of_programs_that_train_does_not_mix_rows(behind: bool) -> None:
    """It draws the same numbers in every run, and none of the caller's."""
    config = adaptc.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    program = adaptc.compile(Dropping(behind), config, example_inputs=X[:2], training=True)
    before = torch.get_rng_state()
    bank = program.bank({"a": program.binding})
    assert torch.equal(torch.get_rng_state(), before)
    found, one = bank(X, adapters=["a", None, "a", "a"]), program.bind(program.binding)(X)
    torch.testing.assert_close(found[0], one[0])


def test_random_numbers_of_a_program_do_not_mix_its_rows() -> None:
    program = compiled(lambda n, x, z: z + torch.randn_like(z), None, False)
    before = torch.get_rng_state()
    program.bank({"a": program.binding})
    assert torch.equal(torch.get_rng_state(), before)
