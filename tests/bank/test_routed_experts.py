"""Adapters of their own for rows and tokens at stacked experts, which get their tokens in the order of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from tests.support.banks import check_rows, outputs_by_adapter, save_random_adapters
from tests.support.custom_models import Mixture
from tests.support.families import FAMILIES
from tests.support.method_table import ENTRIES

EXPERTS = 3
WIDTHS = (12, 20)
PARAMETERS = ["experts.up", "experts.down"]
ROWS: list[Any] = ["0", None, "1", "0"]
#: methods that experts can have; LoRA acts by factors, others one adapter after the other. BD-LoRA names its layers.
METHODS = [
    e.name for e in ENTRIES if e.rows and "experts" in e.layers() and not e.follows_from_base and "bdlora" not in e.name
]


class RoutedExperts(nn.Module):
    """Stacked experts, each of which computes the tokens that are sorted to it, as transformers' do."""

    def __init__(self, widths: tuple[int, int], keeps_order: bool) -> None:
        super().__init__()
        width, inner = widths
        self.up = nn.Parameter(torch.randn(EXPERTS, inner, width) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, width, inner) / 3)
        self.keeps_order = keeps_order

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        from transformers.integrations import moe

        assert moe  # defines the op
        in_half = x.dtype == torch.bfloat16
        multiply = torch.ops.aten._grouped_mm if in_half else torch.ops.transformers.grouped_mm_fallback
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        tokens = x[order // chosen.shape[-1]]
        made = multiply(torch.tanh(multiply(tokens, self.up.transpose(-2, -1), ends)), self.down.mT, ends)
        made = made * weights.flatten()[order][:, None]
        if self.keeps_order:
            made = made[order.argsort()]
        return made.view(*chosen.shape, -1).sum(1)


class RoutedNet(nn.Module):
    """A router, with each token's two of three experts."""

    def __init__(self, widths: tuple[int, int], keeps_order: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(widths[0], EXPERTS)
        self.experts = RoutedExperts(widths, keeps_order)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        return self.experts(flat, weights, chosen).view_as(x)


def rows(count: int = len(ROWS), tokens: int = 5, width: int = WIDTHS[0]) -> Tensor:
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(count * tokens))


def compile_net(
    config: Any = None, widths: tuple[int, int] = WIDTHS, keeps_order: bool = True, **options: Any
) -> adaptc.AdaptedProgram:
    config = config or adaptc.LoraConfig(r=3, target_modules=["gate"], target_parameters=PARAMETERS)
    torch.manual_seed(0)
    model, inputs = RoutedNet(widths, keeps_order).eval(), rows(3, width=widths[0])
    return adaptc.compile(model, config, example_inputs=inputs, **options)


def compile_method(name: str, parameters: list[str]) -> adaptc.AdaptedProgram:
    (entry,) = (e for e in ENTRIES if e.name == name)
    options = {**entry.config, "target_parameters": parameters, "target_modules": []}
    return compile_net(getattr(adaptc, entry.cls)(**options), entry.widths)


@pytest.mark.parametrize("method", ["lora", pytest.param("loha", marks=pytest.mark.long)])
def test_rows_at_routed_experts(method: str, tmp_path: Path) -> None:
    """Other numbers of rows and tokens than those of the capture, one token among them."""
    check_bank(compile_method(method, PARAMETERS), tmp_path)


@pytest.mark.long
@pytest.mark.few(8)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_routed_experts(method: str, tmp_path: Path) -> None:
    """At the first of the two matmuls, whose outputs are as many as the methods' options want."""
    check_bank(compile_method(method, ["experts.up"]), tmp_path)


def check_bank(program: adaptc.AdaptedProgram, folder: Path) -> None:
    adapters = dict(zip(("0", "1"), save_random_adapters(program, folder), strict=True))
    bank = program.bank(adapters)
    for tokens in (5, 1, 40):
        x = rows(tokens=tokens, width=program.base_tensors["experts.up"].shape[-1])
        alone = outputs_by_adapter(program, adapters, lambda call, x=x: call(x))
        check_rows(bank(x, adapters=ROWS), alone, ROWS)


def test_a_mix_of_adapters_is_the_sum_of_what_they_change(tmp_path: Path) -> None:
    """At the second of the two matmuls, whose output is a sum over experts."""
    program = compile_net(adaptc.LoraConfig(r=3, target_modules=[], target_parameters=["experts.down"]))
    adapters = dict(zip(("a", "b"), save_random_adapters(program, tmp_path), strict=True))
    x, bank = rows(2), program.bank(adapters)
    base, a, b = program.base(x), program.bind(adapters["a"])(x), program.bind(adapters["b"])(x)
    found = bank(x, adapters=[{"a": 0.5, "b": -2.0}, "b"])
    want = torch.stack([(base + 0.5 * (a - base) - 2 * (b - base))[0], b[1]])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_rows_of_a_fixed_number(tmp_path: Path) -> None:
    """No size of the graph is free then, and the rows are found all the same."""
    torch.manual_seed(0)
    config = adaptc.LoraConfig(r=3, target_modules=["gate"], target_parameters=PARAMETERS)
    model, x = RoutedNet(WIDTHS, True).eval(), rows()
    program = adaptc.compile(model, config, example_inputs=x, dynamic_shapes=None)
    adapters = dict(zip(("0", "1"), save_random_adapters(program, tmp_path), strict=True))
    alone = outputs_by_adapter(program, adapters, lambda call: call(x))
    check_rows(program.bank(adapters)(x, adapters=ROWS), alone, ROWS)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_tokens_at_all_experts(transposed: bool, tmp_path: Path) -> None:
    """By batched matmuls with weights of both layouts, in which tokens keep their order."""
    torch.manual_seed(1)
    config = adaptc.LoraConfig(r=3, target_modules=["gate"], target_parameters=PARAMETERS)
    program = adaptc.compile(Mixture(transposed).eval(), config, example_inputs=torch.randn(5, 7))
    adapters = dict(zip(("0", "1"), save_random_adapters(program, tmp_path), strict=True))
    x = torch.randn(len(ROWS), 7)
    assert "bmm" in str(program.graph)
    check_rows(program.bank(adapters)(x, adapters=ROWS), outputs_by_adapter(program, adapters, lambda c: c(x)), ROWS)


def test_factors_are_computed_by_the_experts_own_matmul() -> None:
    """No weight of an expert is made anew: two matmuls of each layer more, for any number of adapters."""
    program = compile_net(adaptc.LoraConfig(r=3, target_modules=[], target_parameters=PARAMETERS))
    bank = program.bank({str(i): program.binding for i in range(3)})
    graph = bank.exported(["0", "1", "2"]).graph
    assert sum("grouped_mm" in str(n.target) for n in graph.nodes) == 2 + 2 * 2
    sums = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(sums) >= 2
    assert not any(n.meta["val"].shape[:1] == (EXPERTS,) for n in sums)


def test_tokens_that_are_left_in_the_order_of_experts_are_refused() -> None:
    """What leaves such a model mixes the rows of a batch."""
    program = compile_net(keeps_order=False)
    with pytest.raises(adaptc.TargetError, match="what one row of the batch is changes what others are there"):
        program.bank()


@pytest.mark.long
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_families_of_experts(family: str, tmp_path: Path) -> None:
    """With the targets of "all-linear": attention, routers and experts."""
    program = adaptc.compile(FAMILIES[family].build(), adaptc.LoraConfig(r=3, target_modules="all-linear"))
    assert any(a.kind == "experts" for a in program.adaptation.attachments)
    adapters = dict(zip(("0", "1"), save_random_adapters(program, tmp_path), strict=True))
    kwargs = {"input_ids": torch.randint(1, 40, (len(ROWS), 6), generator=torch.Generator().manual_seed(3))}
    alone = outputs_by_adapter(program, adapters, lambda call: call(**kwargs))
    check_rows(program.bank(adapters)(**kwargs, adapters=ROWS), alone, ROWS)


@pytest.mark.long
def test_matmuls_in_half_precision_want_whole_rows(tmp_path: Path) -> None:
    """Ranks whose rows are of no whole 16 bytes: the factors get zeros, of which nothing is left in the sum."""
    torch.manual_seed(0)
    config = adaptc.LoraConfig(r=3, target_modules=[], target_parameters=PARAMETERS)
    model, inputs = RoutedNet((16, 24), True).eval().bfloat16(), rows(3, width=16).bfloat16()
    program = adaptc.compile(model, config, example_inputs=inputs)
    adapters = dict(zip(("0", "1"), save_random_adapters(program, tmp_path), strict=True))
    bank, x = program.bank(adapters), rows(width=16).bfloat16()
    assert "_grouped_mm" in str(program.graph)
    # The program adds the change to the weight and rounds that; here the change is rounded by itself.
    check_rows(bank(x, adapters=ROWS), outputs_by_adapter(program, adapters, lambda call: call(x)), ROWS, tol=0.03)


@pytest.mark.long
def test_compiled_code_and_packages(tmp_path: Path) -> None:
    """For adapters of other ranks than those that were there when the code was compiled."""
    options = {"target_modules": ["gate"], "target_parameters": PARAMETERS}
    program = compile_net(adaptc.LoraConfig(r=3, **options))
    (small,) = save_random_adapters(program, tmp_path / "small", count=1)
    (large,) = save_random_adapters(compile_net(adaptc.LoraConfig(r=7, **options)), tmp_path / "large", count=1)
    adapters, x = {"0": small, "1": large}, rows()
    alone = outputs_by_adapter(program, adapters, lambda call: call(x))
    compiled = compile_net(adaptc.LoraConfig(r=3, **options), backend="inductor")
    bank = compiled.bank({"0": small, "1": small})
    bank(x, adapters=ROWS)
    bank.replace("1", large)
    check_rows(bank(x, adapters=ROWS), alone, ROWS)
    path = adaptc.package(program.bank({"0": small, "1": small}), tmp_path / "bank.pt2", max_rank=7)
    packaged = adaptc.load_package(path)
    packaged.replace("1", large)
    check_rows(packaged(x, adapters=ROWS), alone, ROWS)
