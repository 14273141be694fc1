"""Poly in what generates: PEFT's answers token by token, with a task for each prompt."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptc
from adaptc.errors import AdaptcError, MergeError
from tests.generation.models import generated, prompt
from tests.support.cover import examples
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"], "mamba": ["in_proj"]}


@cache
def oracle(family: str, seed: int = 0, **sizes: int) -> Oracle:
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    sizes = {"r": 3, "n_tasks": 5, "n_skills": 4, "n_splits": 2, **sizes}
    config = peft.PolyConfig(target_modules=TARGETS[family], task_type=task, **sizes)  # type: ignore[arg-type]
    made = Oracle.wrap_and_save(family, config, Path(mkdtemp()), seed=seed)
    with torch.no_grad():  # tasks that answer otherwise
        for n, p in made.model.named_parameters():
            if "poly_" in n:
                p.mul_(3)
    made.model.save_pretrained(str(made.path))
    return made


@cache
def generator(family: str) -> Any:
    return adaptc.compile_for_generation(FAMILIES[family].build(), oracle(family).path, max_batch=12, max_length=48)


def text(rows: int, length: int, tasks: list[int], padding: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {**prompt(rows, length, padding), "task_ids": torch.tensor(tasks)}


def said(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    return generated(model, inputs, **{"decoder_start_token_id": 1, **how})


@pytest.mark.long
@given(st.data(), st.sampled_from(["llama", "t5"]), st.integers(1, 4), st.integers(2, 9))
@settings(max_examples=examples(8))
def test_what_peft_generates(data: Any, family: str, rows: int, length: int) -> None:
    tasks = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    inputs = text(rows, length, tasks, (length // 3,))
    for how in ({}, {"do_sample": True}):
        assert torch.equal(said(generator(family), inputs, **how), said(oracle(family).model, inputs, **how))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tasks_change_the_answer(family: str) -> None:
    gen, inputs = generator(family), text(5, 7, [0, 1, 2, 3, 4])
    inputs["input_ids"] = inputs["input_ids"][:1].expand(5, -1).contiguous()
    assert len({tuple(row) for row in said(gen, inputs, new=20).tolist()}) > 2
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    assert torch.equal(said(gen.base, plain), said(FAMILIES[family].build(), plain))
    assert torch.equal(said(gen.bind(oracle(family).path), inputs), said(gen, inputs))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_have_the_task_of_their_prompt(family: str, how: dict[str, Any]) -> None:
    """(PEFT has no beams: its hooks know of the prompts alone.)"""
    gen, inputs = generator(family), text(3, 7, [4, 0, 2])
    together, n = said(gen, inputs, **how), how.get("num_return_sequences", 1)
    for row in range(3):
        alone = said(gen, {k: t[row : row + 1] for k, t in inputs.items()}, **how)
        assert torch.equal(alone, together[n * row : n * row + n])


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_swaps_caches_and_files(family: str, tmp_path: Path) -> None:
    gen, inputs = generator(family), text(3, 7, [4, 0, 2], (2,))
    given = {"inputs" if family == "t5" else "input_ids": inputs["input_ids"]}
    rest = {n: t for n, t in inputs.items() if n != "input_ids"}
    past = gen.prefill(**given, **rest)
    more = {"task_ids": inputs["task_ids"]} if family == "t5" else inputs
    assert torch.equal(said(gen, more, past_key_values=past), said(gen, inputs))
    other = oracle(family, seed=1, r=5, n_tasks=2, n_skills=7)
    loaded = adaptc.load(adaptc.save(gen, tmp_path / "gen.pt2"))
    assert torch.equal(said(loaded, inputs), said(gen, inputs))
    adaptc.swap(loaded, other.path)
    inputs["task_ids"] = torch.tensor([1, 0, 1])
    assert torch.equal(said(loaded, inputs), said(other.model, inputs))
    assert adaptc.verify(loaded).ok


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_refused(family: str, tmp_path: Path) -> None:
    gen, inputs = generator(family), text(3, 7, [4, 0, 2])
    plain = {n: t for n, t in inputs.items() if n != "task_ids"}
    for tasks, message in (
        (None, "task_ids is missing: give a tensor of 3 whole numbers"),
        (torch.tensor([1, 2]), "must be a tensor of 3 whole numbers"),
        (torch.tensor([1.0, 2.0, 0.0]), "must be a tensor of 3 whole numbers"),
        (torch.tensor([0, 5, 1]), "task_ids has 5, and the adapter has tasks from 0 to 4"),
    ):
        with pytest.raises(AdaptcError, match=message):
            said(gen, plain if tasks is None else {**plain, "task_ids": tasks})
    with pytest.raises(MergeError, match="cannot be merged"):
        adaptc.merge(gen)


@pytest.mark.long
def test_a_model_with_a_state() -> None:
    gen, inputs = generator("mamba"), text(2, 5, [3, 1])
    assert torch.equal(said(gen, inputs), said(oracle("mamba").model, inputs))
