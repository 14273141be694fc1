"""Banks of what generates behind prompts and prefixes: each row has tokens of its own in front, as many as its adapter
has, and gives what it gives alone and what PEFT gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import adaptc
from adaptc.errors import AdaptcError, CheckpointError, ConfigError
from adaptc.generation.spec import cache_argument_name
from tests.generation.models import generated
from tests.generation.test_bank import Mixed, row
from tests.generation.test_prefixes import continued
from tests.generation.test_virtual_tokens import TASKS, peft_said, said
from tests.support.archives import read_records, with_right_hashes, write_records
from tests.support.families import FAMILIES
from tests.support.oracle import Oracle
from tests.support.prompts import prompt_oracle, text

PROMPT, PREFIX = "PromptTuningConfig", "PrefixTuningConfig"
ROWS: list[Any] = ["seven", None, "two", "seven"]
COUNTS = {"two": 2, "seven": 7}
#: grouped queries, absolute positions, rings in some layers, states
CASES = [("llama", PROMPT), ("gpt2", PROMPT), ("gemma3_text", PROMPT), ("llama", PREFIX), ("gpt2", PREFIX)]


@cache
def oracle(family: str, cls: str, count: int) -> Oracle:
    more = {"num_attention_heads": 1} if family == "mamba" else {}
    return prompt_oracle(family, Path(mkdtemp()), cls, num_virtual_tokens=count, seed=count, **more)


@cache
def generator(family: str, cls: str) -> Any:
    config = getattr(adaptc, cls)(num_virtual_tokens=3)
    return adaptc.compile_for_generation(FAMILIES[family].build(), config, max_batch=12, max_length=60)


def bank(family: str = "llama", cls: str = PROMPT) -> Any:
    return generator(family, cls).bank({n: oracle(family, cls, count).path for n, count in COUNTS.items()})


def alone(family: str, cls: str, name: str | None) -> Any:
    gen = generator(family, cls)
    return gen.base if name is None else gen.bind(oracle(family, cls, COUNTS[name]).path)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize(("family", "cls"), CASES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_a_prompt_gets_what_it_gets_alone(family: str, cls: str, how: dict[str, Any]) -> None:
    made = bank(family, cls)
    for inputs in (text(4, 7, "left"), text(4, 1, None), text(4, 12, None)):
        out = said(Mixed(made, ROWS), inputs, **how)
        each = len(out) // 4
        for i, name in enumerate(ROWS):
            assert torch.equal(out[i * each : (i + 1) * each], said(alone(family, cls, name), row(inputs, i), **how)), (
                i,
                inputs,
            )
    assert torch.equal(said(Mixed(made, ["two"] * 4), inputs), said(alone(family, cls, "two"), inputs))
    assert torch.equal(said(Mixed(made, [None] * 4), inputs), said(alone(family, cls, None), inputs))


@pytest.mark.long
@pytest.mark.parametrize("cls", [PROMPT, PREFIX])
def test_peft_says_the_same(cls: str) -> None:
    inputs = text(4, 7, "left" if cls == PROMPT else None)
    out = said(Mixed(bank(cls=cls), ROWS), inputs)
    for i, name in enumerate(ROWS):
        if name is not None:
            theirs, own = oracle("llama", cls, COUNTS[name]).model, row(inputs, i)
            expected = peft_said(theirs, own) if cls == PROMPT else continued(theirs, own["input_ids"], 7)
            assert torch.equal(out[i : i + 1], expected)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("family", "cls"), [("llama", PROMPT), ("gpt2", PROMPT), ("llama", PREFIX), ("gemma3_text", PROMPT)]
)
def test_caches_are_continued(family: str, cls: str) -> None:
    """From prefill, from an earlier generation, from copies and chosen rows; with masks of all positions, too."""
    made, inputs = bank(family, cls), text(4, 8, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mixed, expected = Mixed(made, ROWS), said(Mixed(made, ROWS), inputs)
    past = made.prefill(ids[:, :5], mask[:, :5], adapters=ROWS)
    assert (past.length, past.prefix_length, past.left_padding.tolist()) == (12, 7, [0, 7, 5, 0])
    for one in (past.copy(), made.select(ROWS).new_cache(), made.prefill(ids, mask, adapters=ROWS)):
        assert torch.equal(said(mixed, inputs, past_key_values=one), expected)
    whole = torch.cat([torch.ones(4, 7, dtype=torch.int64), mask], 1)
    more = {"input_ids": ids[:, 5:], "attention_mask": whole}
    assert torch.equal(said(mixed, more, past_key_values=past.copy()), expected[:, 5:])
    past.batch_select_indices(torch.tensor([2, 0]))
    turned = {"input_ids": ids[[2, 0]], "attention_mask": mask[[2, 0]]}
    assert torch.equal(said(Mixed(made, ["two", "seven"]), turned, past_key_values=past), expected[[2, 0]])
    out = said(mixed, inputs, new=3, return_dict_in_generate=True)
    longer = {"input_ids": out.sequences, "attention_mask": torch.cat([mask, torch.ones_like(ids[:, :3])], 1)}
    assert torch.equal(said(mixed, longer, new=4, past_key_values=out[cache_argument_name()]), expected)
    logits = made.select(ROWS)(ids, attention_mask=mask).logits
    for i, name in enumerate(ROWS):
        own = alone(family, cls, name)(ids[i : i + 1], attention_mask=mask[i : i + 1]).logits
        torch.testing.assert_close(logits[i][mask[i].bool()], own[0][mask[i].bool()])


@pytest.mark.long
def test_tasks(tmp_path: Path) -> None:
    """Where a row's tokens follow from its task, each row has its own."""
    config = adaptc.MultitaskPromptTuningConfig(num_virtual_tokens=2, **TASKS)
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), config, max_batch=12, max_length=60)
    theirs = {
        name: prompt_oracle("llama", tmp_path / name, "MultitaskPromptTuningConfig", num_virtual_tokens=n, **TASKS)
        for name, n in (("two", 2), ("five", 5))
    }
    made, names = gen.bank({n: o.path for n, o in theirs.items()}), ["five", None, "two", "five"]
    inputs, tasks = text(4, 7, "left"), torch.tensor([2, 0, 1, 0])
    out = said(Mixed(made, names), {**inputs, "task_ids": tasks})
    for i, name in enumerate(names):
        if name is not None:
            own = {**row(inputs, i), "task_ids": tasks[i : i + 1]}
            assert torch.equal(out[i : i + 1], peft_said(theirs[name].model, own))
    assert torch.equal(out[1:2], said(gen.base, row(inputs, 1)))
    for bad, message in (
        ({}, "needs task_ids"),
        ({"task_ids": tasks[:3]}, "task_ids has 3 entries, and adapters has 4"),
        ({"task_ids": tasks + 2}, "task_ids has 4, and the adapter has tasks from 0 to 2"),
    ):
        with pytest.raises(AdaptcError, match=message):
            said(Mixed(made, names), {**inputs, **bad})


def test_refused_by_name() -> None:
    made, inputs = bank(), text(4, 6, None)
    for mix in ({"two": 0.5}, {"two": 1.0, "seven": 1.0}):
        with pytest.raises(ConfigError, match="puts tokens in front, which are there or are not"):
            said(Mixed(made, [mix, None, None, None]), inputs)
    with pytest.raises(AdaptcError, match="task_ids"):
        said(Mixed(made, ROWS), {**inputs, "task_ids": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(AdaptcError, match=r"6\d positions, 7 of them of tokens that the adapter has in front"):
        said(Mixed(made, ROWS), inputs, new=50)
    with pytest.raises(AdaptcError, match="in front of each of 4 rows, and the cache is for 3"):
        said(made.select(ROWS), text(3, 6, None))


@pytest.mark.slow
def test_a_model_with_a_state() -> None:
    made, inputs = bank("mamba", PROMPT), text(4, 5, None)
    out = generated(Mixed(made, ROWS), inputs, new=6)
    for i, name in enumerate(ROWS):
        assert torch.equal(out[i : i + 1], generated(alone("mamba", PROMPT, name), row(inputs, i), new=6))


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_beside_lora(backend: str) -> None:
    """In one bank: each adapter has its sites, and what it lacks is the base's."""
    lora = adaptc.LoraConfig(r=3, target_modules=["k_proj", "embed_tokens"], init_lora_weights=False)
    gen = adaptc.compile_for_generation(
        FAMILIES["llama"].build(),
        [adaptc.PromptTuningConfig(num_virtual_tokens=3), lora],
        max_batch=12,
        max_length=60,
        backend=backend,
    )
    style = Path(mkdtemp())
    plain = adaptc.compile_for_generation(FAMILIES["llama"].build(), lora, max_batch=12, max_length=60)
    adaptc.save_adapter(plain, style)
    made = gen.bank({"seven": oracle("llama", PROMPT, 7).path, "style": style})
    names: list[Any] = ["seven", "style", None, {"style": 0.5}]
    inputs = text(4, 7, "left")
    out = said(Mixed(made, names), inputs)
    assert torch.equal(out[:1], peft_said(oracle("llama", PROMPT, 7).model, row(inputs, 0)))
    assert torch.equal(out[1:2], said(plain, row(inputs, 1)))
    assert torch.equal(out[2:3], said(plain.base, row(inputs, 2)))
    assert torch.equal(out[3:], said(Mixed(made, names[3:]), row(inputs, 3)))


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("cls", [PROMPT, PREFIX])
def test_packages(cls: str, tmp_path: Path) -> None:
    """Of the bank in compiled code, and of adapters that are put in and replaced; a forged one is refused."""
    made, inputs = bank(cls=cls), text(4, 7, "left")
    path = adaptc.package(made, tmp_path / "package.pt2", capacity=3)
    package = adaptc.load_package(path)
    for how in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert torch.equal(said(Mixed(package, ROWS), inputs, **how), said(Mixed(made, ROWS), inputs, **how))
    past = package.prefill(inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4], adapters=ROWS)
    expected = said(Mixed(made, ROWS), inputs)
    assert torch.equal(said(Mixed(package, ROWS), inputs, past_key_values=past), expected)
    for one in (made, package):
        one.add("nine", oracle("llama", cls, 9).path)
        one.replace("two", oracle("llama", cls, 5).path)
    names: list[Any] = ["nine", None, "two", "seven"]
    assert torch.equal(said(Mixed(package, names), inputs), said(Mixed(made, names), inputs))
    records = read_records(path)
    name = next(n for n in records if n.endswith(".safetensors"))
    tensors = load(records[name])
    key = next(n for n in tensors if n.startswith("member.1."))
    records[name] = save({**tensors, key: tensors[key][0].contiguous()})
    with pytest.raises(CheckpointError, match=r"'member.1.* of another shape or dtype"):
        adaptc.load_package(write_records(tmp_path / "forged.pt2", with_right_hashes(records)))
