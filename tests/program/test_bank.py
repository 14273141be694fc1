"""A bank of adapters: what its rows compute, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from tests.support.gated_net import X, adapter_tensors, compile_net, config, net

RANKS = {"a": 2, "b": 5, "c": 3}


@pytest.fixture(scope="module")
def program() -> adaptc.AdaptedProgram:
    return compile_net(2)


@pytest.fixture(scope="module")
def singles(program: adaptc.AdaptedProgram) -> dict[str | None, Tensor]:
    with torch.no_grad():
        return {None: net()(X), **{n: program.bind(adapter_tensors(r))(X) for n, r in RANKS.items()}}


def bank_of(program: adaptc.AdaptedProgram, names: str = "ab", **options: Any) -> Any:
    return program.bank({n: adapter_tensors(RANKS[n]) for n in names}, **options)


def rows(singles: dict[str | None, Tensor], *names: str | None) -> Tensor:
    return torch.stack([singles[n][i] for i, n in enumerate(names)])


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


# -- calls ------------------------------------------------------------------------------------------------------------


def test_a_batch_may_have_no_rows_and_three_ranks(program: Any, singles: dict[str | None, Tensor]) -> None:
    bank = bank_of(program, "abc")
    close(bank(X, adapters=["a", "b", "c"]), rows(singles, "a", "b", "c"))
    assert bank(X[:0], adapters=()).shape == (0, 3)


def test_mixes_of_one_layer_are_sums_of_changes() -> None:
    made = adaptc.compile(nn.Linear(5, 7), LoraConfig(r=2, target_modules="all-linear"), example_inputs=X[:2])
    keys = [k.removeprefix("base_model.model.") for k in made.module().state_dict()]
    made_up = {
        n: {k: torch.randn(*(s if "A" in k else s[::-1])) for k, s in zip(keys, ((r, 5), (r, 7)), strict=True)}
        for n, r in RANKS.items()
    }
    bank = made.bank(made_up)
    base = made.base(X)
    change = {n: made.bind(a)(X) - base for n, a in made_up.items()}
    found = bank(X, adapters=[{"a": 0.5, "c": -2}, {"b": 1e3}, {"a": 1, "b": 1, "c": 1}])
    want = [0.5 * change["a"] - 2 * change["c"], 1e3 * change["b"], change["a"] + change["b"] + change["c"]]
    torch.testing.assert_close(found, torch.stack([base[i] + w[i] for i, w in enumerate(want)]), rtol=1e-5, atol=1e-4)


@pytest.mark.long
def test_a_row_is_no_business_of_other_rows_adapters() -> None:
    """Were what an adapter makes of a row that does not want it not finite."""
    for options in ({"use_dora": True}, {}):
        made = adaptc.compile(net(), config(2, init_lora_weights=False, **options), example_inputs=X[:2])
        huge = {k: torch.full_like(t, 1e25) for k, t in adapter_tensors(2).items()}
        bank = made.bank({"a": made.binding, "huge": huge}) if not options else made.bank({"a": made.binding})
        if options:
            huge |= {
                f"{n}.lora_magnitude_vector": torch.full((o,), 1e38) for n, o in (("up", 7), ("side", 7), ("down", 3))
            }
            bank.add("huge", huge)
        found = bank(X, adapters=["a", "huge", None])
        assert not found[1].isfinite().all()
        close(found[0], made(X)[0])
        close(found[2], net()(X)[2])


def test_the_rows_of_nested_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 7)

        def forward(self, batch: Any) -> Tensor:
            return torch.tanh(self.layer(batch["x"]) * batch["more"][0])

    def inputs(count: int) -> Any:
        draw = torch.Generator().manual_seed(count)
        return {"x": torch.randn(count, 5, generator=draw), "more": [torch.randn(count, 7, generator=draw)]}

    made = adaptc.compile(
        Nested().eval(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), example_inputs=(inputs(3),)
    )
    bank = made.bank({"a": made.binding})
    found = bank(inputs(4), adapters=["a", None, "a", None])
    close(
        found, torch.stack([made(inputs(4))[0], made.base(inputs(4))[1], made(inputs(4))[2], made.base(inputs(4))[3]])
    )
    with pytest.raises(adaptc.AdaptcError, match="adapters has 3 entries, and 'batch_x' has 4 rows"):
        bank(inputs(4), adapters=["a", None, "a"])


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "options", [{"fuse": False}, {"hoist_limit": 0}, {"pack": "float32"}, {"form": "weight"}, {"kernels": True}]
)
def test_programs_with_options(options: dict[str, Any], singles: dict[str | None, Tensor]) -> None:
    kernels = options.pop("kernels", None)
    made = compile_net(2, **options)
    made.kernels = kernels
    close(bank_of(made)(X, adapters=["a", None, "b"]), rows(singles, "a", None, "b"))


@pytest.mark.long
def test_whatever_becomes_of_the_program(singles: dict[str | None, Tensor]) -> None:
    """It is swapped, merged, given up: the bank keeps what it was made of."""
    for first in (True, False):
        made = compile_net(2)
        bank = bank_of(made)
        if first:
            bank(X, adapters=["a", None, "b"])
        adaptc.swap(made, adapter_tensors(7))
        adaptc.merge(made, keep_base=False)
        for chosen in (("a", None, "b"), ("b", "b", "b"), (None, None, None)):
            close(bank(X, adapters=list(chosen)), rows(singles, *chosen))


@pytest.mark.long
def test_modes_of_torch(program: Any, singles: dict[str | None, Tensor]) -> None:
    bank = bank_of(program)
    with torch.inference_mode():
        bank(X, adapters=["a", "b", None])
    x = X.clone().requires_grad_()
    bank(x, adapters=["a", "b", None]).sum().backward()
    assert x.grad is not None
    found = torch.compile(lambda x: 2 * bank(x, adapters=["a", "b", None]))(X)
    close(found, 2 * rows(singles, "a", "b", None))
    with torch.autocast("cpu", torch.bfloat16):
        half, a, none = bank(X, adapters=["a", None, None]), program.bind(adapter_tensors(2))(X), program.base(X)
    assert half.dtype == a.dtype == torch.bfloat16
    torch.testing.assert_close(half, torch.stack([a[0], none[1], none[2]]), rtol=0.02, atol=0.02)


def test_nothing_is_made_again_for_another_assignment(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many adapters: neither the code nor, of the same ones, the stack."""
    bank = bank_of(program, "abc")
    bank(X, adapters=["a", "b", None])

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr("adaptc.bank.compile_bank.RowProgram.make_executor", fail)
    bank(X, adapters=["c", "b", "b"])
    monkeypatch.setattr("adaptc.bank.stack_placement.stack_adapters", fail)
    bank(X, adapters=[{"b": 0.5}, {"c": 2.0}, None])
    bank(X[:2], adapters=["c", None])


# -- adapters that come and go ----------------------------------------------------------------------------------------


def test_who_is_used_least_goes_and_comes_again_from_the_loader(program: Any, singles: Any) -> None:
    asked: list[str] = []

    def loader(name: str) -> Any:
        asked.append(name)
        return adapter_tensors(RANKS[name]) if name in RANKS else None

    bank = program.bank(capacity=2, evict=True, loader=loader)
    close(bank(X, adapters=["a", "b", None]), rows(singles, "a", "b", None))
    bank(X, adapters=["a", "a", "a"])
    assert list(bank) == ["b", "a"]
    # The one to go is not one of this call, though it was used least.
    close(bank(X, adapters=["b", "c", None]), rows(singles, "b", "c", None))
    assert list(bank) == ["b", "c"]
    assert asked == ["a", "b", "c"]
    with pytest.raises(adaptc.ConfigError, match=r"names 3 adapters .*the bank holds 2 at once"):
        bank(X, adapters=["a", "b", "c"])
    with pytest.raises(adaptc.AdaptcError, match="no adapter 'd', and its loader gave none"):
        bank(X, adapters=["d", None, None])
    assert list(bank) == ["b", "c"]


def test_the_memory_of_a_bank(program: Any) -> None:
    """Its adapters, and the stacks of those in use, which go with them."""
    one = sum(t.nbytes for t in program.bind(adapter_tensors(3)).binding.values.values())
    bank = program.bank({f"n{i}": adapter_tensors(3) for i in range(6)})
    assert bank.nbytes == 6 * one
    assert bank.held == 0
    bank(X, adapters=["n0", "n1", None])
    assert bank.held == 2 * one
    for i in range(1, 5):
        bank(X, adapters=[f"n{i}", f"n{i + 1}", None])
    assert bank.held == 2 * 2 * one  # those used last
    assert bank.report().stacks == (("n3", "n4"), ("n4", "n5"))
    bank.remove("n3")
    assert bank.held == 2 * one
    bank.replace("n5", adapter_tensors(3))
    assert bank.held == 2 * one  # that of the new adapter, made before a call asks for it
    bank.remove("n5")
    assert bank.held == 0
    with pytest.raises(adaptc.ConfigError, match="no room for 'more'"):
        program.bank({"n": adapter_tensors(3)}, max_bytes=2 * one - 1).add("more", adapter_tensors(3))


def test_the_report(program: Any) -> None:
    bank = bank_of(program, capacity=4, max_bytes=10**6)
    bank(X, adapters=["a", "b", None])
    report = bank.report()
    text = str(report)
    assert text.startswith("bank of 2 of 4 adapters, ")
    assert "in 1 stack of those in use" in text
    data = report.to_dict()
    own = sum(t.nbytes for t in bank["b"].values.values())
    assert data["adapters"]["b"] == {"sites": 3, "ranks": [5], "bytes": own, "source": "state dict"}
    assert (data["capacity"], data["stacks"]) == (4, [["a", "b"]])
    assert str(adaptc.report(bank)) == text
    assert repr(bank).startswith("<Bank: 2 of 4 adapters, ")
    assert repr(program.bank()) == "<Bank: 0 adapters, 0 B>"


# -- refusals ---------------------------------------------------------------------------------------------------------

OTHERS = {"nope.lora_A.weight": torch.randn(2, 5), "nope.lora_B.weight": torch.randn(5, 2)}
BROKEN = {k: t.where(t != t.max(), float("nan")) for k, t in adapter_tensors(2).items()}


def broken(binding: Any) -> Any:
    values = {n: t * float("nan") if t.ndim else t for n, t in binding.values.items()}
    return dataclasses.replace(binding, values=values)


REFUSED: dict[str, tuple[Any, str]] = {
    "coefficients": (
        lambda b: b(X, adapters=["a"] * 3, adapter_coefficients=torch.ones(3, 2)),
        "'adapter_coefficients' is made of adapters=",
    ),
    "input": (lambda b: b(X, adapters=["a", "b", None], y=3), "'y' is not an input of the program"),
    "no input": (lambda b: b(adapters=["a", "b", None]), "missing input 'x'"),
    "other model": (lambda b: b.add("c", OTHERS), "compiled without the sites"),
    "other shapes": (lambda b: b.add("c", {k: t[..., :-1] for k, t in adapter_tensors(3).items()}), "has shape"),
    "not finite": (lambda b: b.add("c", BROKEN), "NaN or infinite"),
    "a binding that is not finite": (lambda b: b.replace("b", broken(b["b"])), "'b' is not finite"),
    "rank": (lambda b: b.add("c", adapter_tensors(6)), "'c' has rank 6, and the bank takes ranks up to 5"),
    "no room": (lambda b: b.add("c", adapter_tensors(3)), "no room for 'c': it holds no more than 2.*evict=True"),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", list(REFUSED))
def test_a_refusal_changes_nothing(case: str, program: Any, singles: dict[str | None, Tensor]) -> None:
    act, message = REFUSED[case]
    bank = bank_of(program, capacity=2, max_rank=5)
    before = [bank[n] for n in bank]
    with pytest.raises(adaptc.AdaptcError, match=message):
        act(bank)
    assert [bank[n] for n in bank] == before
    close(bank(X, adapters=["a", None, "b"]), rows(singles, "a", None, "b"))


def test_options_that_there_are_not(program: Any) -> None:
    with pytest.raises(adaptc.ConfigError, match=r"scale is of one adapter: bank\.add"):
        program.bank({"a": adapter_tensors(2)}, scale=0.5)
    for option in ("capacty", "form"):
        with pytest.raises(adaptc.ConfigError, match=f"a bank has no option '{option}'"):
            program.bank(**{option: 3})
    with pytest.raises(adaptc.ConfigError, match="loader=3 must be a function of a name"):
        program.bank(loader=3)
    with pytest.raises(adaptc.ConfigError, match="must be a dict of adapters by name"):
        program.bank(["a"])


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor, adapters: Tensor | None = None, adapter_coefficients: Any = None) -> Tensor:
        return self.layer(x) * sum(t for t in (adapters, adapter_coefficients) if t is not None)


@pytest.mark.parametrize("name", ["adapters", "adapter_coefficients"])
def test_programs_with_an_input_of_that_name_are_refused(name: str) -> None:
    inputs = {"x": X, name: torch.randn(3, 7)}
    made = adaptc.compile(Named().eval(), LoraConfig(r=2, target_modules=["layer"]), example_inputs=inputs)
    with pytest.raises(adaptc.ConfigError, match=f"the program has an input called '{name}'"):
        made.bank()


def test_programs_without_sites_and_with_adapters_that_act_together_are_refused(program: Any) -> None:
    with pytest.raises(adaptc.ConfigError, match="no adapter sites"):
        adaptc.merge(program).bank()
    both = adaptc.compile(net(), {"x": config(2), "y": config(3)}, example_inputs=X[:2])
    with pytest.raises(adaptc.ConfigError, match=r"adapters that act together .'x', 'y'.*give rows a mix"):
        both.bank()


@pytest.mark.long
def test_a_base_of_its_own_is_refused_and_others_of_that_program_are_not() -> None:
    options = {"init_lora_weights": "pissa"}
    made = adaptc.compile(net(), config(2, **options), example_inputs=X[:2])
    with pytest.raises(adaptc.CheckpointError, match="'a' brings a base of its own"):
        made.bank({"a": made.binding})
    bank = made.bank({"a": adapter_tensors(3)}, config=config(3))
    want = compile_net(2).bind(adapter_tensors(3), config=config(3))(X)
    close(bank(X, adapters=["a", None, "a"]), torch.stack([want[0], net()(X)[1], want[2]]))


class Blocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(self.layer(x))


def test_layers_inside_of_blocks_are_refused() -> None:
    made = adaptc.compile(Blocked().eval(), LoraConfig(r=2, target_modules=["layer"]), example_inputs=X[:2])
    with pytest.raises(adaptc.TargetError, match=r"'layer\.weight' cannot have another adapter.*inside a block"):
        made.bank()
