"""The size of a method: the value nearest to the budget, counted on small models."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import adaptc
from adaptc.methods._shared.registry import CONFIGS, config_class
from tests.comparison.budget import extrapolated, nearest_value
from tests.comparison.compared import COMPARED, LEFT_OUT, Compared, slug
from tests.comparison.run_method import count_trained, make_config, sized_value
from tests.comparison.task import Scores, Task


def test_the_nearest_is_by_ratio() -> None:
    """100 is 90 from 190 and 60 from 40, but 190 is 1.9 times of it, and 40 is 2.5 times less."""
    assert nearest_value([1, 2, 3], {1: 40, 2: 190, 3: 1000}.__getitem__, 100) == (2, 190)
    assert nearest_value([3, 1], {1: 40, 3: 250}.__getitem__, 100) == (3, 250)
    assert nearest_value([1, 3], {1: 0, 3: 10**9}.__getitem__, 100) == (3, 10**9)


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_values_beyond_the_nearest_are_not_counted(sign: int) -> None:
    seen = []

    def count(value: int) -> int:
        seen.append(value)
        return 10 ** (value * sign + 5)

    assert nearest_value(range(1, 9), count, 10 ** (3 * sign + 5)) == (3, 10 ** (3 * sign + 5))
    assert seen == [1, 2, 3, 4, 5]


def test_one_value_out_of_order_does_not_end_the_search() -> None:
    assert nearest_value([1, 2, 3], {1: 40, 2: 30, 3: 90}.__getitem__, 100) == (3, 90)


def test_what_a_method_refuses_is_no_candidate() -> None:
    def count(value: int) -> int:
        if value != 7:
            raise adaptc.ConfigError(f"{value} does not divide 21")
        return 5

    assert nearest_value([2, 7, 11], count, 1000) == (7, 5)
    with pytest.raises(adaptc.ConfigError, match=r"near 1000: 2: 2 does not divide 21; 11: 11 does not"):
        nearest_value([2, 11], count, 1000)


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        nearest_value([0, 1], lambda value: 1 // value, 10)


@functools.cache
def llama(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=44, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def task(layers: int) -> Task:
    """A task with a small model, of which only the model is used."""
    return Task(
        name="text",
        model=llama(layers),
        layers=layers,
        small_model=llama,
        targets={"layers": ["q_proj", "v_proj"], "norms": ["input_layernorm"]},
        options={"task_type": "CAUSAL_LM"},
        train_rows=[],
        collate=lambda rows: {},
        score=lambda logits, part: Scores(0.0, 0.0, 0.0),
    )


@pytest.mark.long
@pytest.mark.few(100)  # each of them
@pytest.mark.parametrize(
    "compared",
    [
        Compared("LoraConfig", {}, "r", (2, 3, 7)),
        Compared("VBLoRAConfig", {"r": 2, "vector_length": 4, "topk": 2}, "num_vectors", (5, 11)),
        replace(COMPARED["Adaption prompt"], values=(3, 7)),
    ],
    ids=["own factors", "a shared bank", "the program"],
)
def test_the_count_of_a_deep_model_follows_from_shallow_ones(compared: Compared) -> None:
    layers, value = 3, compared.values[1]
    real = count_trained(adaptc.compile(llama(3), make_config(compared, task(3), 40, value, layers), training=True))
    assert sized_value(compared, task(layers), 40, real) == value
    one, two = (
        count_trained(adaptc.compile(llama(n), make_config(compared, task(n), 40, value, n), training=True))
        for n in (1, 2)
    )
    assert extrapolated(one, two, layers) == real


def test_every_method_is_compared_or_left_out_with_a_reason() -> None:
    compared = {getattr(adaptc, c.config).peft_type for c in COMPARED.values()}
    assert compared | {*LEFT_OUT} == {*CONFIGS}
    assert not compared & {*LEFT_OUT}
    assert all(len(why) > 20 or config_class(kind).peft_type != kind for kind, why in LEFT_OUT.items())


def test_every_config_can_be_made() -> None:
    for method, compared in COMPARED.items():
        for value in compared.values or (None,):
            config = make_config(compared, task(2), 40, value, 2)
            if compared.sized_by:
                assert getattr(config, compared.sized_by) == value, method
            if compared.places != "program":
                assert {*config.target_modules} == {*task(2).targets[compared.places]}, method
            assert config.task_type == "CAUSAL_LM"


def test_options_that_follow_the_steps_do() -> None:
    config = make_config(COMPARED["AdaLoRA"], task(2), 70, 6, 2)
    assert (config.tinit, config.tfinal, config.total_step) == (7, 21, 70)


def test_no_two_methods_share_a_file() -> None:
    assert len({slug(method) for method in COMPARED}) == len(COMPARED)
