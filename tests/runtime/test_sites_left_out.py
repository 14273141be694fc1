"""Adapters that leave sites of a program out: calls run a graph without these sites."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.passes.optimize import sibling_cost
from adaptc.runtime.variants.graph_variants import MAX_FEWER_SITES
from tests.support.method_table import BY_NAME
from tests.support.sibling_nets import LAYERS, adapter, assert_close, compile_block, random_rows
from tests.support.subject import adapter_parameters

METHODS = ["lora", "dora", "vera", "loha", "lokr", "oft", "boft", "ia3", "fourierft", "shira", "hira", "randlora"]


def names_of_variants(program: Any) -> set[str]:
    return set(program.executor().variants.trails)


def layers_read(executor: Any, variant_name: str) -> set[str]:
    """Return the layers whose slots a variant reads."""
    names = dict(zip(executor.placeholder_names, executor.lifted_names, strict=True))
    places = executor.variants.get(variant_name).split.module.graph.find_nodes(op="placeholder")
    return {str(names[n.name]).partition(".")[0] for n in places if n.users and "lora" in str(names.get(n.name))}


def called(program: Any, times: int = 2) -> list[Tensor]:
    with torch.no_grad():
        return [program(random_rows(2)) for _ in range(times)]


def test_calls_run_a_graph_without_the_sites() -> None:
    program, alone = compile_block(), compile_block(targets=("q", "out"))
    for target in (program, alone):
        adaptc.swap(target, adapter(2, 5, ("q", "out")))
    first, second = called(program)
    assert names_of_variants(program) == {"stacked/1"}
    assert layers_read(program.executor(), "stacked") == set(LAYERS)
    assert layers_read(program.executor(), "stacked/1") == {"q", "out"}
    assert_close(first, alone(random_rows(2)))
    assert torch.equal(first, second)


def two_layers(name: str, directory: Path) -> tuple[Any, Any, Path, Tensor]:
    """Return a program with sites at two layers, one with the second alone, the directory with the latter's random
    adapter, and an input."""
    entry = BY_NAME[name]
    torch.manual_seed(0)
    n, m = entry.widths
    net = nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, n)).double().eval()
    x = torch.randn(3, n, dtype=torch.float64)

    def compiled(*layers: str) -> Any:
        config = getattr(adaptc, entry.cls)(**{**entry.config, "target_modules": list(layers), "inference_mode": True})
        return adaptc.compile(net, config, example_inputs=x)

    alone = compiled("2")
    with torch.no_grad():
        for key, t in adapter_parameters(alone).items():
            if t.is_floating_point():
                t.copy_(entry.random_tensor(key, t))
    return compiled("0", "2"), alone, adaptc.save_adapter(alone, directory), x


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str, tmp_path: Path) -> None:
    """Calls compute what a program without these sites does."""
    program, alone, adapter_path, x = two_layers(name, tmp_path)
    adaptc.swap(program, adapter_path)
    wanted, tolerance = alone(x), BY_NAME[name].tolerance
    assert not torch.allclose(wanted, program.base(x))
    for _ in range(2):
        torch.testing.assert_close(program(x), wanted, rtol=tolerance, atol=tolerance)
    assert any("/" in n for n in names_of_variants(program))


def test_swaps_between_sets_of_sites() -> None:
    program = compile_block()
    whole = program.binding
    adapters: dict[tuple[str, ...], Any] = {
        layers: adapter(2 + i, i, layers) for i, layers in enumerate([("q",), ("k", "v"), ("q", "out"), ("v",)])
    }
    wanted: dict[tuple[str, ...], Tensor] = {}
    for layers, tensors in adapters.items():
        alone = compile_block(targets=layers)
        adaptc.swap(alone, tensors)
        wanted[layers] = alone(random_rows(2))
    expected = program(random_rows(2))
    for _ in range(2):
        for layers, tensors in adapters.items():
            adaptc.swap(program, tensors)
            for one in called(program):
                assert_close(one, wanted[layers])
            adaptc.swap(program, whole)
            assert_close(program(random_rows(2)), expected)
    assert len({n.partition("/")[2] for n in names_of_variants(program)} - {""}) == MAX_FEWER_SITES
    adaptc.swap(program, adapter(3, 9, ("k",)))  # one more set of sites than there are graphs for
    alone = compile_block(targets=("k",))
    adaptc.swap(alone, adapter(3, 9, ("k",)))
    assert_close(called(program)[-1], alone(random_rows(2)))


def test_calls_of_few_and_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sibling_cost, "DISPATCH", 600)
    program = compile_block()
    adaptc.swap(program, adapter(2, 5, ("q", "k")))
    called(program)
    for n in (1, 90):
        assert_close(program(random_rows(n)), program.module()(random_rows(n)))
    assert {"stacked/1", "apart/1"} <= names_of_variants(program)


def test_what_trains_keeps_all_sites() -> None:
    """Slots of sites that an adapter left out get gradients."""
    program = compile_block(training=True)
    adaptc.swap(program, adapter(2, 5, ("q",)))
    for _ in range(2):
        program(random_rows(2))
    assert names_of_variants(program) == {"plain"}


def test_compiled_code_and_kernels_keep_all_sites() -> None:
    compiled = compile_block(backend="inductor")
    adaptc.swap(compiled, adapter(2, 5, ("q",)))
    called(compiled)
    assert names_of_variants(compiled) == {"plain"}


def test_a_bank_leaves_out_what_none_of_its_rows_has() -> None:
    program: Any = compile_block()
    adapters = {"a": adapter(2, 5, ("q", "out")), "b": adapter(3, 6, ("q",))}
    bank = program.bank(adapters)
    wanted = [program.bind(adapters[n])(random_rows(2))[i] for i, n in enumerate("ab")]
    for _ in range(2):
        with torch.no_grad():
            found = bank(random_rows(2), adapters=["a", "b"])
        assert_close(found, torch.stack(wanted))
    (code,) = bank.placement.code_cache.executors
    (name,) = code.variants.trails
    assert layers_read(code, name) == {"q", "out"}
    bank.replace("b", adapter(3, 6, ("k", "v")))
    wanted[1] = program.bind(adapter(3, 6, ("k", "v")))(random_rows(2))[1]
    for _ in range(2):
        with torch.no_grad():
            found = bank(random_rows(2), adapters=["a", "b"])
        assert_close(found, torch.stack(wanted))
    (other,) = code.variants.trails.keys() - {name}
    assert layers_read(code, other) == {"q", "k", "v", "out"}
    assert_close(bank(random_rows(2), adapters=[None, "a"])[0], program.base(random_rows(2))[0])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_row(name: str, tmp_path: Path) -> None:
    """Methods of every form that rows have: at inputs, at outputs, and as repeated calls."""
    program, alone, adapter_path, x = two_layers(name, tmp_path)
    bank = program.bank({"a": adapter_path, "b": adapter_path})
    with torch.no_grad():
        found = bank(x, adapters=["a", None, "b"])
    tolerance = BY_NAME[name].tolerance
    wanted = torch.stack([alone(x)[0], program.base(x)[1], alone(x)[2]])
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    (code,) = bank.placement.code_cache.executors
    names = dict(zip(code.lifted_names, code.placeholder_names, strict=True))
    without, only = ({names[f] for f in a.slots.values()} for a in sorted(code.attachments, key=lambda a: a.module))
    assert code.variants.trails
    for variant in code.variants.trails:
        graph = code.variants.get(variant).split.module.graph
        read = {n.name for n in graph.find_nodes(op="placeholder") if n.users}
        assert not read & (without - only)  # VeRA's layers share tensors
        assert read & only


def test_threads_call_while_the_graph_is_made() -> None:
    program, alone = compile_block(), compile_block(targets=("v",))
    for target in (program, alone):
        adaptc.swap(target, adapter(2, 5, ("v",)))
    wanted, found = alone(random_rows(2)), list[Tensor]()
    threads = [threading.Thread(target=lambda: found.extend(called(program, 9))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 54
    for one in found:
        assert_close(one, wanted)
    assert "stacked/1" in names_of_variants(program)
    assert "stacked/2" not in names_of_variants(program)
