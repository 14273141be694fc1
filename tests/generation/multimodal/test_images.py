"""Prompts with images, of vision towers that compute from grids: tokens are PEFT's, in every way to give a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.archives.refusal import UnsafeFile
from adaptc.generation.description import facts_of, spec_to_json
from adaptc.generation.modes import chunked_prefill
from adaptc.generation.multimodal_generator import MultimodalGenerator
from adaptc.passes.graph.subprogram import output_names
from adaptc.state.runner import ProgramPart
from tests.support.image_models import FAMILIES, IMAGE, adapted_by_peft, answers, build, call_with_images

# What is refused at a call names the line of the model that refuses it.
pytestmark = pytest.mark.usefixtures("stack_traces")

#: the grids of the prompts that a model is captured with, and of those that it is given
EXAMPLE = [[(1, 4, 6)], [(1, 2, 4), (1, 6, 4)]]
PROMPTS = [[(1, 2, 6), (1, 4, 4)], [], [(1, 8, 4)]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
LIMITS: dict[str, Any] = {"max_length": 100}


@cache
def generator(family: str) -> Any:
    return adaptc.compile_for_generation(
        build(family), adapted_by_peft(family)[1], example_inputs=call_with_images(EXAMPLE, pads_left=True), **LIMITS
    )


def prompts() -> dict[str, Tensor]:
    return call_with_images(PROMPTS, pads_left=True)


@torch.no_grad()
def expected(family: str, call: dict[str, Tensor], **options: Any) -> Tensor:
    return adapted_by_peft(family)[0].generate(**call, **OPTIONS, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.long
@pytest.mark.few(2)
def test_tokens_are_those_of_peft(family: str) -> None:
    call, gen = prompts(), generator(family)
    assert torch.equal(gen.generate(**call, **OPTIONS), expected(family, call))
    # GLM-4V itself takes no image of two frames.
    one = call_with_images([[(1 if family == "glm4v" else 2, 4, 2)]])
    assert torch.equal(gen.generate(**one, **OPTIONS), expected(family, one))


@pytest.mark.long
@pytest.mark.few(1)
def test_beams_and_caches(family: str) -> None:
    call, gen = prompts(), generator(family)
    # transformers mixes up the images of GLM-4V's beams where a text has two: its sequence is the less likely one.
    beamed = call_with_images([[(1, 2, 6)], [], [(1, 8, 4)]], pads_left=True) if family == "glm4v" else call
    assert torch.equal(gen.generate(**beamed, **OPTIONS, num_beams=2), expected(family, beamed, num_beams=2))
    others = {n: v for n, v in call.items() if n != "input_ids"}
    past = gen.prefill(call["input_ids"], **others)
    again = gen.generate(call["input_ids"], attention_mask=call["attention_mask"], cache=past.copy(), **OPTIONS)
    assert torch.equal(again, expected(family, call))


@pytest.mark.long
def test_features_of_images_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 5)
    call = prompts()
    assert torch.equal(generator("qwen3_vl").generate(**call, **OPTIONS), expected("qwen3_vl", call))


class TestQwen2VL:
    family = "qwen2_vl"

    @pytest.mark.long
    def test_prompts_of_text_alone_do_not_run_the_tower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids, gen = answers(2, 7), generator(self.family)
        monkeypatch.setattr(MultimodalGenerator, "embed_prompt", None)
        assert torch.equal(gen.generate(ids, **OPTIONS), expected(self.family, {"input_ids": ids}))
        call = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
        assert torch.equal(gen.generate(**call, **OPTIONS), expected(self.family, {"input_ids": ids}))

    @pytest.mark.long
    def test_a_conversation_goes_on_after_the_images(self) -> None:
        call, gen = prompts(), generator(self.family)
        first = gen.generate(**call, **OPTIONS, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, answers(len(PROMPTS), 4)], 1)
        added = ids.shape[1] - call["input_ids"].shape[1]
        mask = torch.nn.functional.pad(call["attention_mask"], (0, added), value=1)
        kinds = torch.nn.functional.pad(call["mm_token_type_ids"], (0, added))
        whole = {**call, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        found = gen.generate(ids, attention_mask=mask, cache=first.past_key_values, **OPTIONS)
        assert torch.equal(found, expected(self.family, whole))

    @pytest.mark.long
    def test_one_step_at_a_time(self) -> None:
        call, gen = prompts(), generator(self.family)
        with torch.no_grad():
            want = adapted_by_peft(self.family)[0](**call).logits
        seen = call["attention_mask"].bool()
        torch.testing.assert_close(gen(**call).logits[seen], want[seen], atol=1e-4, rtol=1e-4)
        last = gen(**call, logits_to_keep=1)
        token = last.logits[:, -1:].argmax(-1)
        step = gen(token, cache=last.cache if "cache" in last else last.past_key_values)
        mask = torch.nn.functional.pad(call["attention_mask"], (0, 1), value=1)
        kinds = torch.nn.functional.pad(call["mm_token_type_ids"], (0, 1))
        ids = torch.cat([call["input_ids"], token], 1)
        whole = {**call, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        with torch.no_grad():
            want = adapted_by_peft(self.family)[0](**whole).logits[:, -1]
        torch.testing.assert_close(step.logits[:, -1], want, atol=1e-4, rtol=1e-4)

    def test_long_prompts_are_read_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chunked_prefill, "CHUNK_SIZE", 5)
        call, gen = prompts(), generator(self.family)
        assert torch.equal(gen.generate(**call, **OPTIONS), expected(self.family, call))

    def test_images_are_read_once(self) -> None:
        call, pinned = prompts(), generator(self.family).snapshot_call()
        calls: list[str] = []

        def counted(name: str) -> ProgramPart:
            part = pinned.parts[name]

            def run(**inputs: Any) -> dict[str, Tensor]:
                calls.append(name)
                return part.run(**inputs)

            return replace(part, run=run)

        pinned.parts = {name: counted(name) for name in pinned.parts}
        assert torch.equal(pinned.generate(**call, **OPTIONS), expected(self.family, call))
        assert calls == ["prompt", *["step"] * OPTIONS["max_new_tokens"]]

    def test_swaps_reach_the_tower(self) -> None:
        gen, call = generator(self.family), prompts()
        own = gen.bind(adapted_by_peft(self.family)[1])
        values = own.runner.binding.values
        assert any("visual" in name for name in values)
        assert any("language_model" in name for name in values)
        assert not torch.equal(gen.base(**call).logits, own(**call).logits)
        with torch.no_grad():
            assert torch.equal(own.generate(**call, **OPTIONS), expected(self.family, call))

    @pytest.mark.long
    def test_merges_and_files(self, tmp_path: Path) -> None:
        gen, call = generator(self.family), prompts()
        want = expected(self.family, call)
        assert torch.equal(adaptc.merge(gen).generate(**call, **OPTIONS), want)
        adaptc.save(gen, tmp_path / "gen.pt2")
        loaded = adaptc.load(tmp_path / "gen.pt2")
        assert torch.equal(loaded.generate(**call, **OPTIONS), want)
        assert "pixel_values, image_grid_thw beside text" in str(adaptc.report(loaded))
        with pytest.raises(adaptc.AdaptcError, match="must fit their prompt, so they are not drawn: give inputs="):
            adaptc.verify(loaded)

    @pytest.mark.parametrize(
        "damage",
        [
            {"inputs": ["input_ids", "pixel_values", "image_grid_thw", "nowhere"]},
            {"tokens": ["nowhere"]},
            {"tokens": []},
            {"axes": "3"},
            {"axes": None},
            {"deepstack": 1},
            {"ahead": True},
        ],
        ids=str,
    )
    def test_damaged_files_are_refused(self, damage: dict[str, Any]) -> None:
        """Each key of what is stored of prompts is checked against the program."""
        gen = generator(self.family)
        (text,) = spec_to_json(gen.spec).values()
        inputs, outputs = gen.program.adaptation.inputs(gen.program).names, output_names(gen.program)
        stored = json.loads(text)
        assert facts_of(stored, inputs, outputs=outputs).part_outputs == gen.spec.part_outputs
        stored["prompts"] |= damage
        with pytest.raises(UnsafeFile):
            facts_of(stored, inputs, outputs=outputs)

    @pytest.mark.long
    def test_it_is_verified_with_its_example(self) -> None:
        report = adaptc.verify(generator(self.family), build(self.family), shapes=1)
        assert report.ok, str(report)

    @pytest.mark.long
    def test_a_package(self, tmp_path: Path) -> None:
        gen, call = generator(self.family), prompts()
        adaptc.package(gen, tmp_path / "gen.pt2")
        package = adaptc.load_package(tmp_path / "gen.pt2")
        assert torch.equal(package.generate(**call, **OPTIONS), expected(self.family, call))
        with pytest.raises(adaptc.AdaptcError, match="must fit their prompt, so they are not drawn: give inputs="):
            adaptc.verify(package)

    def test_crops_keep_the_images(self) -> None:
        call, gen = prompts(), generator(self.family)
        others = {n: v for n, v in call.items() if n != "input_ids"}
        past = gen.prefill(call["input_ids"], **others)
        length = past.length
        past.crop(-1)
        assert past.length == length - 1
        with pytest.raises(adaptc.AdaptcError, match="are read as a whole"):
            past.crop(-6)
        assert past.length == length - 1
        past.crop(-length)
        assert past.length == 0
        assert past.position_offset is None

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"image_grid_thw": None}, "has mm_token_type_ids, pixel_values and lacks image_grid_thw"),
            ({"pixel_values": None, "image_grid_thw": None}, "mm_token_type_ids marks tokens of images or audio"),
            (dict.fromkeys(("pixel_values", "image_grid_thw", "mm_token_type_ids")), f"image_token_id={IMAGE}"),
            ({"pixel_values": [[0.0]]}, "pixel_values must be a tensor, not a list"),
            ({"inputs_embeds": torch.zeros(3, 16, 24)}, "inputs_embeds is not taken beside images or audio"),
            ({"input_ids": None}, "input_ids must be a tensor"),
            ({"attention_mask": torch.ones(3, 4)}, "attention_mask must be a tensor"),
            ({"video_grid_thw": torch.ones(1, 3)}, "video_grid_thw"),
            ({"num_beams": 4}, "12 rows"),
            ({"prefill_chunk_size": 4}, "prefill_chunk_size is not taken for a prompt with images"),
        ],
        ids=lambda value: "" if isinstance(value, str) else " ".join(value),
    )  # fmt: skip
    def test_refused(self, change: dict[str, Any], words: str) -> None:
        call = {n: v for n, v in {**prompts(), **change}.items() if v is not None}
        with pytest.raises(adaptc.AdaptcError, match=words):
            generator(self.family).generate(**call, **OPTIONS)

    def test_images_that_do_not_fit_their_placeholders_are_refused(self) -> None:
        call, gen = prompts(), generator(self.family)
        with pytest.raises(adaptc.AdaptcError, match="_check_that_grids_have_all_patches"):
            gen.generate(**call | {"pixel_values": call["pixel_values"][:-4]}, **OPTIONS)
        grid = call["image_grid_thw"].clone()
        grid[0, 1] += 2
        with pytest.raises(adaptc.AdaptcError, match="_check_that_grids_have_all_patches"):
            gen.generate(**call | {"image_grid_thw": grid}, **OPTIONS)
        ids = call["input_ids"].clone()
        ids[ids == IMAGE] = 9
        ids[0, -1] = IMAGE
        with pytest.raises(adaptc.AdaptcError, match="get_placeholder_mask"):
            gen.generate(**call | {"input_ids": ids}, **OPTIONS)

    def test_images_are_read_into_a_new_cache(self) -> None:
        call, gen = prompts(), generator(self.family)
        past = gen.prefill(answers(3, 4))
        with pytest.raises(adaptc.AdaptcError, match="read into a new cache, and this one holds a text"):
            gen.generate(**call, **OPTIONS, cache=past)
        assert past.length == 4

    def test_a_bank_is_refused(self) -> None:
        with pytest.raises(adaptc.ConfigError, match="the images of all prompts lie in one tensor"):
            generator(self.family).bank({"one": adapted_by_peft(self.family)[1]})


@pytest.mark.long
def test_an_example_of_one_prompt_is_enough() -> None:
    config = adaptc.LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)
    gen = adaptc.compile_for_generation(
        build("qwen2_vl"), config, example_inputs=call_with_images([[(1, 4, 2)]]), **LIMITS
    )
    call = prompts()
    model = build("qwen2_vl")
    with torch.no_grad():
        assert torch.equal(gen.base.generate(**call, **OPTIONS), model.generate(**call, **OPTIONS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None}, "example_inputs needs input_ids"),
        ({"image_grid_thw": [[1, 4, 6]]}, "example_inputs has 'image_grid_thw', a list"),
    ],
    ids=["no ids", "lists"],
)
def test_examples_that_are_refused(change: dict[str, Any], words: str) -> None:
    call = {n: v for n, v in {**call_with_images(EXAMPLE), **change}.items() if v is not None}
    with pytest.raises(adaptc.CaptureError, match=words):
        adaptc.compile_for_generation(
            build("qwen2_vl"), adaptc.LoraConfig(target_modules=["q_proj"]), example_inputs=call, **LIMITS
        )


@pytest.mark.long
def test_numbers_of_a_processor_fit_a_model_in_half_precision() -> None:
    def half(call: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in call.items()}

    model = build("qwen2_vl").to(torch.bfloat16)
    config, call = adaptc.LoraConfig(r=2, target_modules=["qkv"]), prompts()
    gen = adaptc.compile_for_generation(
        model, config, example_inputs=half(call_with_images(EXAMPLE, pads_left=True)), **LIMITS
    )
    with torch.no_grad():
        want = model.generate(**half(call), **OPTIONS)
    wide = {**call, "mm_token_type_ids": call["mm_token_type_ids"].long()}
    assert torch.equal(gen.base.generate(**wide, **OPTIONS), want)


@pytest.mark.long
def test_compiled_code_generates_the_same_and_is_compiled_once() -> None:
    config = adaptc.LoraConfig(r=2, target_modules=["qkv", "q_proj"], init_lora_weights=False)
    example = call_with_images(EXAMPLE, pads_left=True)
    gens = [
        adaptc.compile_for_generation(
            build("qwen3_vl"),
            config,
            example_inputs=example,
            backend=backend,
            generator=torch.Generator().manual_seed(1),
            **LIMITS,
        )
        for backend in ("inductor", "eager")
    ]
    call, one = prompts(), call_with_images([[(1, 4, 2)]])
    for inputs in (call, one):
        assert torch.equal(gens[0].generate(**inputs, **OPTIONS), gens[1].generate(**inputs, **OPTIONS))
    with adaptc.debug.assert_no_recompiles():
        gens[0].generate(**call_with_images([[(1, 8, 2), (1, 2, 2)]]), **OPTIONS)
        gens[0].generate(answers(1, 5), **OPTIONS)


@pytest.mark.long
def test_an_example_fits_the_cache() -> None:
    with pytest.raises(adaptc.ConfigError, match="more than max_length=9"):
        adaptc.compile_for_generation(
            build("qwen2_vl"),
            adaptc.LoraConfig(target_modules=["q_proj"]),
            example_inputs=call_with_images(EXAMPLE),
            max_length=9,
        )


@pytest.mark.long
def test_virtual_tokens_in_front_are_refused() -> None:
    config = adaptc.PrefixTuningConfig(num_virtual_tokens=3)
    gen = adaptc.compile_for_generation(
        build("qwen2_vl"), config, example_inputs=call_with_images(EXAMPLE, pads_left=True), **LIMITS
    )
    with pytest.raises(adaptc.AdaptcError, match="puts its own in front"):
        gen.generate(**prompts(), **OPTIONS)
    assert gen.generate(answers(2, 5), **OPTIONS).shape == (2, 11)
