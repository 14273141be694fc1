"""Stages of programs: they compute what the whole does, for any model and method, or the cut is refused by name."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, ConfigError, LoraConfig, SwapError
from adaptc.passes.stages.plan_stages import _even_cuts
from tests.distributed.models import (
    CONFIG,
    SEQ2SEQ_CUTS,
    batch,
    llama,
    own_program,
    program,
    seq2seq_batch,
    seq2seq_program,
)


def gradients(modules: list[Any], loss: Tensor) -> dict[str, Tensor]:
    for m in modules:
        m.zero_grad()
    loss.backward()
    return {n: p.grad for m in modules for n, p in m.named_parameters() if p.requires_grad}


def check_training(whole: adaptc.AdaptedProgram, split: Any, **inputs: Tensor) -> None:
    """Outputs and gradients of the stages are those of the whole, to the bit."""
    module, stages = whole.module().train(), [p.module().train() for p in split.programs.values()]
    out = module(**inputs)
    expected = gradients([module], out.loss)
    values: Any = ()
    for stage in stages:
        values = stage(*values, **inputs)
    found = split.outputs.with_tensors(values)
    assert type(found) is type(out)
    assert torch.equal(found.loss, out.loss)
    assert torch.equal(found.logits, out.logits)
    own = gradients(stages, found.loss)
    assert own.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        assert torch.equal(own[name], grad), name


def test_stages_compute_and_learn_what_the_program_does() -> None:
    for cuts, crossing in {
        ("model.layers.1",): [1],
        ("model.layers.0.mlp", "model.layers.1.self_attn.o_proj", "lm_head"): [2, 2, 1],
        ("model.layers.0.self_attn.v_proj",): None,
    }.items():
        split = adaptc.split(program(), boundaries=cuts)
        if crossing is not None:
            inputs = [p.call_spec.in_spec.children()[0].num_leaves for p in split.programs.values()]  # type: ignore[union-attr]
            assert inputs == [0, *crossing]
        check_training(program(), split, **batch())
        check_training(program(), split, **batch(rows=3, tokens=5))
    whole = program()
    rows = {k: t for k, t in batch().items() if k != "labels"}
    assert torch.equal(split(**rows).logits, whole(**rows).logits)
    # The base is not copied, and each stage has its own part of it.
    for stage in split.programs.values():
        base = {n: t for n, t in stage.state_dict.items() if n in whole.base_tensors}
        assert all(t.data_ptr() == whole.state_dict[n].data_ptr() for n, t in base.items())
        assert set(stage.state_dict) < set(whole.state_dict)


@given(st.integers(2, 4), st.data())
def test_stages_are_of_about_equal_work(count: int, data: Any) -> None:
    costs = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=7))
    cuts = _even_cuts(costs, count)
    assert len(cuts) == count - 1
    assert [0, *cuts, len(costs)] == sorted({0, *cuts, len(costs)})

    def most(at: list[int]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *at, len(costs)]))

    assert most(cuts) == min(most(list(c)) for c in itertools.combinations(range(1, len(costs)), count - 1))


def test_blocks_are_found_where_only_their_number_is_said() -> None:
    assert adaptc.split(program(), 2).boundaries == ("model.layers.1",)
    with pytest.raises(ConfigError, match=r"stages=3: the program has 2 repeated blocks, 'model.layers.0'"):
        adaptc.split(program(), 3)
    for stage, block in enumerate(("model.layers.0", "model.layers.1")):
        with pytest.raises(ConfigError, match=rf"stages=2: the program has 1 repeated blocks, '{block}'"):
            adaptc.split(adaptc.split(program(), 2).programs[stage], 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either stages="),
        ({"stages": 2, "boundaries": ["lm_head"]}, "give either stages="),
        ({"stages": 1}, "stages=1 must be a number from 2"),
        ({"stages": True}, "stages=True must be"),
        ({"boundaries": "lm_head"}, "boundaries='lm_head' must be a list"),
        ({"boundaries": []}, "must be a list of module paths"),
        ({"boundaries": [3]}, "boundaries has 3, which is no module path"),
        ({"boundaries": ["model.layers.7"]}, "'model.layers.7' is no module that the program runs; nearest"),
        (
            {"boundaries": ["lm_head", "model.layers.1"]},
            r"in the order \['model.layers.1', 'lm_head'\]; given were \['lm_head', 'model.layers.1'\]",
        ),
        ({"boundaries": ["lm_head", "lm_head"]}, "each stage begins after the one before"),
    ],
)
def test_cuts_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adaptc.split(program(), **options)


@pytest.mark.long
def test_one_directory_holds_the_adapter_of_all_stages(tmp_path: Path) -> None:
    whole = own_program()
    split = adaptc.split(whole, 2)
    for folder, write in {"split": split.save_adapter, "whole": lambda p: adaptc.save_adapter(whole, p)}.items():
        write(tmp_path / folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    config = LoraConfig(**CONFIG | {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]})
    other = adaptc.compile(llama(), config)
    adaptc.save_adapter(other, tmp_path / "other")
    whole.swap(tmp_path / "other")
    rows = batch()
    for adapter in (tmp_path / "other", adaptc.load_adapter(tmp_path / "other"), whole, whole.binding):
        split.swap(tmp_path / "split")
        assert not torch.equal(split(**rows).logits, whole(**rows).logits)
        split.swap(adapter)
        assert torch.equal(split(**rows).logits, whole(**rows).logits)
    merged = split.merge()
    torch.testing.assert_close(merged(**rows).logits, whole(**rows).logits, rtol=1e-10, atol=1e-10)
    again = adaptc.split(adaptc.merge(whole), 2)
    assert torch.equal(merged(**rows).logits, again(**rows).logits)
    with pytest.raises(AdaptcError, match="no adapter to write"):
        again.save_adapter(tmp_path / "none")
    part = split.keep(1)
    part.swap(tmp_path / "split")
    with pytest.raises(AdaptcError, match=r"a call needs all 2 stages, and this process keeps \[1\]"):
        part(**rows)
    with pytest.raises(ConfigError, match="no stage 0 here"):
        part.keep(0)


def test_a_swap_that_fails_changes_no_stage(tmp_path: Path) -> None:
    split = adaptc.split(own_program(), 2)
    tensors = dict(adaptc.load_adapter(split.save_adapter(tmp_path)).tensors)
    before = [p.binding for p in split.programs.values()]
    for key, said in {
        "model.layers.1.self_attn.o_proj.lora_A.weight": "no slot in the program",
        "model.layers.9.self_attn.q_proj.lora_A.weight": "no slot in the program",
    }.items():
        with pytest.raises(SwapError, match=said):
            split.swap(adaptc.Adapter(LoraConfig(**CONFIG), tensors | {key: torch.ones(5, 40)}))
    assert [p.binding for p in split.programs.values()] == before


@pytest.mark.long
def test_stages_are_programs_that_files_hold(tmp_path: Path) -> None:
    split = adaptc.split(own_program(), 2)
    values: Any = ()
    for i, stage in split.programs.items():
        adaptc.save(stage, tmp_path / f"{i}.pt2")
        values = adaptc.load(tmp_path / f"{i}.pt2")(*values, **batch())
    assert torch.equal(split.outputs.with_tensors(values).logits, split(**batch()).logits)


METHODS: dict[str, Any] = {
    "dora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "pissa": LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights="pissa"),
    "weight": adaptc.LoHaConfig(r=3, target_modules=["up_proj"], init_weights=False),
    "oft": adaptc.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"], init_weights=False),
    "ia3": adaptc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": adaptc.VeraConfig(r=3, target_modules=["q_proj"], init_weights=False),
    "saved": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "norms": adaptc.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_goes_through_a_cut(name: str, tmp_path: Path) -> None:
    whole = adaptc.compile(llama(), METHODS[name], training=True)
    split = adaptc.split(whole, boundaries=["model.layers.1"])
    module, stages = whole.module().train(), [p.module().train() for p in split.programs.values()]
    loss = module(**batch()).loss
    values: Any = ()
    for stage in stages:
        values = stage(*values, **batch())
    found = split.outputs.with_tensors(values)
    assert torch.equal(found.loss, loss)
    expected, own = gradients([module], loss), gradients(stages, found.loss)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[n], g) for n, g in expected.items() if g is not None)
    adaptc.save_adapter(whole, tmp_path / "whole")
    split.save_adapter(tmp_path / "split")
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "split")]
    assert files[0] == files[1]
    split.swap(tmp_path / "whole")
    assert torch.equal(split(**batch()).loss, loss)


class Strange(nn.Module):
    """Blocks between which there is what no schedule sends."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "data":
            y = y[y.sum(1) > 0]
        if self.how == "buffer":
            y = y + self.seen
        if self.how == "in place":
            z = self.second(y)
            y.mul_(2)
            return z + y.sum()
        z = self.second(y)
        if self.how == "buffer":
            self.seen.add_(z.detach().sum())
        return z


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("data", r"the cut before 'second' would have to pass on '\w+'.*depend on data"),
        ("buffer", r"'add_\w*' in stage 1 writes to 'b_seen', which the stages \[0\] read"),
        ("in place", r"'mul_\w*' in stage 1 writes to 'add_1', which the stages \[0\] read"),
    ],
)
def test_what_no_schedule_sends_is_refused(how: str, said: str) -> None:
    config = LoraConfig(r=2, target_modules=["first", "second"])
    made = adaptc.compile(Strange(how), config, example_inputs=torch.randn(4, 5))
    with pytest.raises(ConfigError, match=said):
        adaptc.split(made, boundaries=["second"])


class WithoutGradients(nn.Module):
    """A block under ``no_grad``, which is a graph of its own in the program, whose values both layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("scale", torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = self.scale.exp()
        with torch.no_grad():
            mean = x.mean(1, keepdim=True).tanh()
        return self.second(self.first(x) * factor + mean) + factor.sum() * mean


def test_blocks_without_gradients_are_on_the_side_that_reads_them() -> None:
    x = torch.randn(4, 5)
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    whole = adaptc.compile(WithoutGradients(), config, example_inputs=x)
    split = adaptc.split(whole, boundaries=["second"])
    for rows in (x, torch.randn(3, 5)):
        assert torch.equal(split(rows), whole(rows))
    # The product and the mean are sent; the factor follows from a buffer, and each stage computes it.
    assert split.programs[1].call_spec.in_spec.children()[0].num_leaves == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        # All stages read the number of virtual tokens.
        adaptc.PromptTuningConfig(num_virtual_tokens=3),
    ],
    ids=["tied", "prompt"],
)
def test_a_trained_tensor_of_two_stages_is_refused(config: Any) -> None:
    made = adaptc.compile(copy.deepcopy(llama()), config, training=True)
    with pytest.raises(ConfigError, match=re.escape("is trained and read by the stages [0, 1]")):
        adaptc.split(made, boundaries=["model.layers.1"])


@pytest.mark.long
def test_an_encoder_passes_its_states_to_all_stages_of_the_decoder() -> None:
    whole, rows = seq2seq_program(), seq2seq_batch()
    split = adaptc.split(whole, boundaries=SEQ2SEQ_CUTS)
    module, stages = whole.module().eval(), [p.module().eval() for p in split.programs.values()]
    out, values = module(**rows), ()
    for stage in stages:
        values = stage(*values, **rows)
    found = split.outputs.with_tensors(values)
    # A value that is sent has other strides, in which sums have another order.
    torch.testing.assert_close(found.logits, out.logits, rtol=1e-12, atol=1e-12)
    expected, own = gradients([module], out.loss), gradients(stages, found.loss)
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
