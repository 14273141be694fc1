"""How much code a bank makes: none for another assignment, few for other numbers of adapters, all of it at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import LoraConfig
from adaptc.methods.lora_family.lora import LoraBank
from tests.support.builds import record_builds

NAMES = [f"n{i}" for i in range(11)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.side, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.side(x))


def inputs(length: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, length, 5, generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def program_and_adapters(config: Any, **options: Any) -> tuple[adaptc.AdaptedProgram, dict[str, Any]]:
    made = adaptc.compile(Net().eval(), config, example_inputs=inputs(4, 2), **options)
    out = {}
    for seed, name in enumerate(NAMES):
        draw = torch.Generator().manual_seed(seed)
        values = {
            n: t + 0.3 * torch.randn(t.shape, generator=draw) if t.ndim and t.is_floating_point() else t
            for n, t in made.binding.values.items()
        }
        out[name] = replace(made.binding, values=values)
    return made, out


def chosen(count: int, rows: int = 12) -> list[str | None]:
    return [NAMES[i % count] for i in range(rows - 1)] + [None] if count else [None] * rows


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_builds(monkeypatch)


def check(bank: Any, made: adaptc.AdaptedProgram, adapters: dict[str, Any], count: int, length: int) -> None:
    x, names = inputs(length), chosen(count)
    with torch.no_grad():
        found = bank(x, adapters=names)
        alone = {n: made.bind(adapters[n])(x) if n else made.base(x) for n in set(names)}
    torch.testing.assert_close(found, torch.stack([alone[n][i] for i, n in enumerate(names)]), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}])
def test_of_adapters_side_by_side_there_is_one_code_for_all_numbers(options: dict[str, Any], built: list[str]) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)
    made, adapters = program_and_adapters(config)
    bank = made.bank(adapters)
    for length in (1, 30):
        check(bank, made, adapters, 3, length)
    codes = len(bank.placement.code_cache.executors)
    assert codes <= 2
    for length in (1, 30):
        for count in (2, 5, 11, 7, 4):
            bank(inputs(length), adapters=chosen(count))
        check(bank, made, adapters, 11, length)
        check(bank, made, adapters, 2, length)
    assert len(bank.placement.code_cache.executors) <= 2
    before = len(built)
    for count in range(1, 12):
        bank(inputs(2), adapters=chosen(count))
    assert len(built) == before


@pytest.mark.long
@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}], ids=["dora", "biases"])
def test_of_adapters_one_after_the_other_there_is_one_for_each_power_of_two(options: dict[str, Any]) -> None:
    made, adapters = program_and_adapters(LoraConfig(r=2, target_modules=["up"], **options))
    bank = made.bank(adapters)
    for count in (3, 5, 4, 7, 2):
        check(bank, made, adapters, count, 2)
    assert {s.capacity for s in bank.placement.table.contents.placed.stacks} <= {2, 4, 8}
    assert len(bank.placement.code_cache.executors) == 3
    small = made.bank({n: adapters[n] for n in NAMES[:5]}, capacity=5)
    check(small, made, adapters, 5, 2)
    assert [s.capacity for s in small.placement.table.contents.placed.stacks] == [5]


def test_a_form_that_writes_the_number_down_has_code_for_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(
        self: Any, op: Any, x: Tensor, y: Tensor, W: Tensor, b: Any, slots: Any, scale: Any, mix: Tensor
    ) -> Tensor:
        A, B = slots.values()
        h = torch.einsum("...i,kri->...kr", x, A) * (mix.squeeze(-2) * scale).unsqueeze(-1)
        return y + h.reshape(*x.shape[:-1], A.shape[0] * A.shape[1]) @ B.transpose(0, 1).flatten(1).mT

    monkeypatch.setattr(LoraBank, "apply", apply)
    monkeypatch.setattr(LoraBank, "apply_fused", lambda *args: None)
    made, adapters = program_and_adapters(LoraConfig(r=2, target_modules=["up"]))
    bank = made.bank(adapters)
    assert not bank.placement.code_cache.serves_any_count
    for count in (2, 3):
        check(bank, made, adapters, count, 2)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"hoist_limit": 0}], ids=["lora", "dora", "no_memory"])
def test_a_warm_bank_makes_nothing_in_calls(options: dict[str, Any], built: list[str]) -> None:
    limit = {"hoist_limit": options.pop("hoist_limit")} if "hoist_limit" in options else {}
    config = LoraConfig(r=2, target_modules=["up", "side"], **options)
    made, adapters = program_and_adapters(config, **limit)
    bank = made.bank({n: adapters[n] for n in NAMES[:8]})
    bank.warm()
    assert bank.held == 0
    assert len(built) > 3
    before = len(built)
    for length in (1, 64):
        for count in (0, 1, 2, 3, 8):
            bank(inputs(length), adapters=chosen(count))
        bank(inputs(length), adapters=["n3"] * 12)
    assert len(built) == before, built[before:]
    bank.warm()
    bank.add("n8", adapters["n8"])
    assert len(built) == before
    check(bank, made, adapters, 8, 2)


def only(made: adaptc.AdaptedProgram, adapter: Any, *beginnings: str) -> Any:
    """Return the adapter at the sites whose ids begin so; others have the values of the program."""
    methods = {i: m for i, m in adapter.methods.items() if i.startswith(beginnings)}
    fqns = {f for a in made.adaptation.attachments if a.id in methods for f in a.tensor_names}
    kept = {f: t if f in fqns else made.binding.values[f].detach() for f, t in adapter.values.items()}
    return replace(adapter, values=kept, methods=methods)


def test_a_warm_bank_makes_no_graph_for_sites_that_it_has_not_seen(built: list[str]) -> None:
    made, adapters = program_and_adapters(LoraConfig(r=2, target_modules=["up", "side"]))
    adapters |= {n: only(made, adapters[n], module) for n, module in (("n0", "up"), ("n1", "side"))}
    bank = made.bank({"n0": adapters["n0"]})
    bank.warm(4)
    before = len(built)
    bank.add("n1", adapters["n1"])
    for rows in (["n1"], ["n1", None], ["n0", "n1"]):
        bank(inputs(2, len(rows)), adapters=rows)
    assert len(built) == before, built[before:]
    check(bank, made, adapters, 2, 2)
    bank.warm(4)
    assert len(built) > before
    check(bank, made, adapters, 2, 2)


def test_a_region_of_two_sites_stays_where_a_row_has_one_of_them() -> None:
    """The weight and the bias of a layer change in one call for each adapter."""
    config = adaptc.BOFTConfig(boft_block_size=1, target_modules=["up", "side"], bias="all")
    made, adapters = program_and_adapters(config)
    sites = sorted(a.id for a in made.adaptation.attachments if a.module == "up")
    assert len(sites) == 2
    adapters |= {f"n{i}": only(made, adapters[f"n{i}"], site) for i, site in enumerate(sites)}
    for names in (NAMES[:1], NAMES[1:2], NAMES[:2]):
        bank = made.bank({n: adapters[n] for n in names})
        rows = [*names, None, names[-1]]
        found = bank(inputs(3, len(rows)), adapters=rows)
        for i, name in enumerate(rows):
            alone = made.bind(adapters[name]) if name else made.base
            torch.testing.assert_close(found[i], alone(inputs(3, len(rows)))[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_warm_bank_has_the_graphs_of_adapters_that_leave_sites_out(options: dict[str, Any], built: list[str]) -> None:
    """Adapters that come later run the graph with all sites, until the bank is warmed again."""
    made, adapters = program_and_adapters(LoraConfig(r=2, target_modules=["up", "side"], **options))
    for name, module in {"n0": "up", "n1": "side", "n2": "side", "n3": "up"}.items():
        adapters[name] = only(made, adapters[name], module)
    bank = made.bank({n: adapters[n] for n in ("n0", "n1", "n2")})
    bank.warm(8)
    before = len(built)
    for length in (1, 64):
        for rows in (["n0"], ["n0", None], ["n1", None], ["n1", "n2"], ["n0", "n1", "n2"], [None]):
            bank(inputs(length, len(rows)), adapters=rows)
    bank.add("n4", adapters["n4"])
    bank.add("n3", adapters["n3"])
    bank(inputs(2), adapters=chosen(5))
    bank(inputs(2), adapters=["n3"] * 12)
    assert len(built) == before, built[before:]
    check(bank, made, adapters, 5, 2)
    for code in (bank.program.executor(), *bank.placement.code_cache.executors):
        assert {n.partition("/")[2] for n in code.variants.trails} == {"", "1", "2"}


@pytest.mark.long
def test_a_bank_that_is_empty_is_warmed_for_as_many_as_it_may_hold(built: list[str]) -> None:
    made, adapters = program_and_adapters(LoraConfig(r=2, target_modules=["up"], use_dora=True))
    bank = made.bank(capacity=4, evict=True, loader=adapters.__getitem__)
    bank.warm()
    before = len(built)
    for count in range(5):
        bank(inputs(2), adapters=chosen(count))
    assert len(built) == before
