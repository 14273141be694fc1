"""Merging again is merging: the graph that is remembered, the weights that are made, and when it must be made anew."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import adaptc
from adaptc import LoraConfig
from adaptc.passes.adapt.merging.merge_pass import Merge
from tests.support.custom_models import Tied, UpDown

X = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(3))


def compiled(**options: Any) -> adaptc.AdaptedProgram:
    torch.manual_seed(1)
    training = options.pop("training", False)
    config = LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **options})
    return adaptc.compile(UpDown(), config, example_inputs=X, training=training)


def state(seed: int, *sites: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {n: s for n, s in {"up": (5, 7), "down": (3, 5)}.items() if not sites or n in sites}
    a = {f"{n}.lora_A.weight": torch.randn(seed, i, generator=g) for n, (_, i) in sizes.items()}
    return a | {f"{n}.lora_B.weight": torch.randn(o, seed, generator=g) for n, (o, _) in sizes.items()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each run of the pass on a graph."""
    runs: list[Any] = []
    real = Merge.apply

    def apply(self: Merge, program: Any) -> Any:
        runs.append(program)
        return real(self, program)

    monkeypatch.setattr(Merge, "apply", apply)
    return runs


def same(found: adaptc.AdaptedProgram, expected: adaptc.AdaptedProgram, x: Tensor = X) -> None:
    found.graph.lint()
    found.validate()
    assert list(found.state_dict) == list(expected.state_dict)
    for name, t in expected.state_dict.items():
        f = found.state_dict[name]
        assert (type(f), f.dtype, f.requires_grad) == (type(t), t.dtype, t.requires_grad)
        assert torch.equal(f, t), name
    assert torch.equal(found(x), expected(x))
    assert str(found.merge_report) == str(expected.merge_report)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
def test_the_graph_is_made_once(passes: list[Any], training: bool) -> None:
    program = compiled(training=training)
    for rank in (1, 4, 3):
        adaptc.swap(program, state(rank))
        merged = adaptc.merge(program)
        fresh = compiled(training=training)
        adaptc.swap(fresh, state(rank))
        same(merged, adaptc.merge(fresh))
        back = adaptc.unmerge(merged)
        assert torch.equal(back(X), program(X))
    assert sum(p.adaptation is program.adaptation for p in passes) == 1


@pytest.mark.long
def test_other_sites_are_another_graph(passes: list[Any]) -> None:
    program = compiled()
    for _ in range(2):
        for sites in ((), ("up",), ("down",)):
            adaptc.swap(program, state(2, *sites))
            fresh = compiled()
            adaptc.swap(fresh, state(2, *sites))
            same(adaptc.merge(program), adaptc.merge(fresh))
    assert sum(p.adaptation is program.adaptation for p in passes) == 3


def test_each_result_is_a_program_of_its_own() -> None:
    program = compiled()
    results = []
    for rank in (1, 2, 3):
        adaptc.swap(program, state(rank))
        results.append((adaptc.merge(program), adaptc.merge(program)(X).clone()))
    with torch.no_grad():
        results[1][0].state_dict["up.weight"].zero_()
    for i in (0, 2):
        assert torch.equal(results[i][0](X), results[i][1])
    adapted = adaptc.compile(results[2][0], LoraConfig(r=2, target_modules=["up"]))
    assert torch.equal(adapted(X), results[2][1])
    assert torch.equal(results[0][0](X), results[0][1])


@pytest.mark.long
def test_no_merged_weight_is_kept() -> None:
    program = compiled()
    for _ in range(2):
        merged = adaptc.merge(program)
        weight = weakref.ref(merged.state_dict["up.weight"])
        del merged
        gc.collect()
        assert weight() is None


def test_what_a_merge_finds_is_found_again() -> None:
    program = compiled()
    adaptc.merge(program)
    adaptc.swap(program, {k: torch.full_like(t, 3e38) for k, t in state(2).items()})
    with pytest.raises(adaptc.MergeError, match="not finite"):
        adaptc.merge(program)
    assert not adaptc.merge(program, safe=False).state_dict["up.weight"].isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_changed_bases(scheme: str) -> None:
    program = compiled(init_lora_weights=scheme)
    for rank in (None, 3, 1):
        fresh = compiled(init_lora_weights=scheme)
        if rank:
            adaptc.swap(program, state(rank))
            adaptc.swap(fresh, state(rank))
        same(adaptc.merge(program), adaptc.merge(fresh))


def test_biases_are_merged_every_time(passes: list[Any]) -> None:
    program = compiled(lora_bias=True)
    outs = [adaptc.merge(program)(X) for _ in range(2)]
    torch.testing.assert_close(outs[0], program(X), rtol=1e-4, atol=1e-4)
    assert torch.equal(*outs)
    assert len(passes) == 2


def test_tied_weights() -> None:
    torch.manual_seed(2)
    ids = torch.tensor([[1, 2, 28], [5, 0, 3]])
    model = Tied().double()
    config = LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=ids)
    first, second = adaptc.merge(program), adaptc.merge(program)
    same(second, first, ids)
    assert first.merge_report.untied == second.merge_report.untied == ("embed.weight",)
    assert torch.equal(second.state_dict["head.weight"], model.head.weight)


@pytest.mark.long
def test_what_is_remembered_holds_no_base_that_is_given_up() -> None:
    program = compiled()
    adaptc.swap(program, state(2, "up"))
    adaptc.merge(program)  # a graph with the base's own down.weight
    adaptc.swap(program, state(2))
    old = StorageWeakRef(program.base_tensors["down.weight"].untyped_storage())
    gc.collect()  # what is left of capturing the model
    adaptc.merge(program, keep_base=False)
    assert old.expired()


def test_giving_up_the_base_after_a_merge(passes: list[Any]) -> None:
    program = compiled()
    expected = adaptc.merge(program)(X)
    merged = adaptc.merge(program, keep_base=False)
    assert torch.equal(merged(X), expected)
    assert len(passes) == 2
    with pytest.raises(adaptc.AdaptcError, match="keep_base=False"):
        adaptc.merge(program)
