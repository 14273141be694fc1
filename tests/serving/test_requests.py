"""Each request gets the tokens that it gets by itself, whatever else is in its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.bank import bank_code
from tests.generation.models import case, generated
from tests.generation.test_families import CAUSAL
from tests.serving.models import SIZES, expected_tokens, free_blocks, greedy, prompts, results, running, served, serving
from tests.support.banks import save_random_adapters
from tests.support.families import FAMILIES

#: models that transformers' paged cache or one axis of tokens does not fit, and what their error says
REFUSED = {
    "bloom": "BloomForCausalLM takes no position_ids",
    "falcon": r"1 key heads of \d+, and transformers' paged cache reserves 4 of \d+",
    "gpt_neo": "GPTNeoForCausalLM cannot be captured as a paged step",
    "mamba": "keeps states|paged cache",
    "stablelm": "keys and values of different sizes",
}
MIXED: list[Any] = ["first", "second", None, {"first": 0.5, "second": -0.3}, "second", "first", None]


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in REFUSED])
def test_tokens_are_those_of_each_request_alone(family: str) -> None:
    """Prompts that are longer than a batch and than the windows of layers, two of them equal: blocks are shared."""
    texts = prompts(5, 23, 1, 9, 14, 23, 2)
    texts[5], texts[6] = texts[1], texts[1]
    found = served(serving(family), texts, MIXED)
    assert [one.error for one in found] == [None] * 7
    expected = [expected_tokens(family, text, adapter) for text, adapter in zip(texts, MIXED, strict=True)]
    assert [one.generated_tokens for one in found] == expected
    assert expected != [expected_tokens(family, text, None) for text in texts]


def test_a_step_by_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU by their references: each token of a step has the adapter of its request."""
    monkeypatch.setattr(bank_code, "runs_on_gpu", lambda tensors: True)
    found = case("llama")
    made = adaptc.compile_for_serving(found.model, found.adapters["first"], adapters=found.adapters, **SIZES)
    assert len(made.bank.placement.kernel_sites) == len(made.program.adaptation.attachments) > 0
    texts = prompts(5, 23, 9)
    adapters = ["first", None, "second"]
    expected = [expected_tokens("llama", text, adapter) for text, adapter in zip(texts, adapters, strict=True)]
    assert [one.generated_tokens for one in served(made, texts, adapters)] == expected


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_tokens_of_all_kinds_of_layers(family: str) -> None:
    """Full attention, windows beside it, and latents; with and without shared blocks."""
    texts = prompts(23, 3, 23, 8)
    texts[2] = texts[0]
    adapters: list[Any] = ["second", "first", None, {"first": 1.5}]
    expected = [expected_tokens(family, text, adapter) for text, adapter in zip(texts, adapters, strict=True)]
    for shares in (True, False):
        found = served(serving(family), texts, adapters, allow_block_sharing=shares)
        assert [one.generated_tokens for one in found] == expected


def test_layers_that_compute_with_the_latents_of_all_that_is_read() -> None:
    """They make keys and values of other requests' positions too, each by the adapter of its own request."""
    model, texts = serving("deepseek_v3"), prompts(19, 3, 7)
    assert sum("kv_b_proj" in a.id for a in model.program.adaptation.attachments) == 2
    expected = [expected_tokens("deepseek_v3", t, a) for t, a in zip(texts, ["first", "second", None], strict=True)]
    assert [one.generated_tokens for one in served(model, texts, ["first", "second", None])] == expected
    assert expected[0] != expected_tokens("deepseek_v3", texts[0], None)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_models_without_a_paged_step_are_refused(family: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(adaptc.CaptureError, match=REFUSED[family]):
        adaptc.compile_for_serving(model, adaptc.LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.long
def test_evicted_requests_go_on_with_their_adapters() -> None:
    """In a pool for a third of them, so that requests lose their blocks and are computed again."""
    texts = prompts(9, 10, 11, 12, 9, 10, seed=3)
    adapters = ["first", "second", None, "second", "first", {"first": 0.5, "second": 0.5}]
    found = served(serving(), texts, adapters, new=14, num_blocks=14)
    assert [one.error for one in found] == [None] * 6
    expected = [expected_tokens("llama", text, adapter, 14) for text, adapter in zip(texts, adapters, strict=True)]
    assert [one.generated_tokens for one in found] == expected


@pytest.mark.long
def test_several_answers_of_one_request() -> None:
    text, model = prompts(9)[0], serving()
    options = greedy(model, 5)
    options.update(do_sample=True, top_k=1, num_return_sequences=3)  # as good as greedy, which takes no such number
    out = model.generate_batch([text], adapters=["second"], generation_config=options)
    assert [one.generated_tokens for one in out.values()] == [expected_tokens("llama", text, "second", 5)] * 3


@pytest.mark.long
def test_requests_that_name_no_adapter_have_the_program_s() -> None:
    found, text = case("llama"), prompts(6)[0]
    model = adaptc.compile_for_serving(found.model, found.adapters["first"], page_size=4, num_blocks=16)
    for name in ("first", "second"):
        adaptc.swap(model, found.adapters[name])
        (out,) = model.generate_batch([text], max_new_tokens=5).values()
        assert out.generated_tokens == expected_tokens("llama", text, name, 5)
    bank = model.bank
    assert len(bank) == 0
    bank.add("other", found.adapters["first"])
    (out,) = model.generate_batch([text], adapters=["other"], max_new_tokens=5).values()
    assert out.generated_tokens == expected_tokens("llama", text, "first", 5)


@pytest.mark.long
def test_requests_are_cancelled_and_streamed() -> None:
    """A cancelled one leaves no block behind, the others get their tokens."""
    texts = prompts(9, 12, 5)
    with running(serving(), new=30) as manager:
        first = manager.add_request(texts[0], adapter="first", max_new_tokens=30)
        others = [manager.add_request(t, adapter="second", max_new_tokens=6, streaming=True) for t in texts[1:]]
        manager.cancel_request(first)
        found = results(manager, others)
        assert free_blocks(manager)
    for text, request in zip(texts[1:], others, strict=True):
        assert found[request].generated_tokens == expected_tokens("llama", text, "second", 6)


@pytest.mark.long
def test_log_probabilities_are_those_of_the_adapter() -> None:
    text = prompts(7)[0]
    (found,) = served(serving(), [text], ["second"], new=3, return_logprobs=True)
    tokens = torch.tensor([text + found.generated_tokens])
    oracle = case("llama").oracle
    oracle.set_adapter("second")
    with torch.no_grad():
        logits = oracle(input_ids=tokens).logits[0, len(text) - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, tokens[0, len(text) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_compiled_steps_give_the_same_tokens() -> None:
    """One compilation for all sizes, adapters and mixes."""
    texts = prompts(5, 23, 1, 9)
    model = serving("llama", "inductor")
    adapters: list[Any] = ["first", "second", None, {"first": 0.5, "second": -0.3}]
    found = served(model, texts, adapters)
    assert [one.error for one in found] == [None] * 4
    expected = [expected_tokens("llama", text, adapter) for text, adapter in zip(texts, adapters, strict=True)]
    assert [one.generated_tokens for one in found] == expected
    with adaptc.debug.assert_no_recompiles():
        found = served(model, texts[::-1], ["second", {"second": 2.0}, "first", None])
    assert found[0].generated_tokens == expected_tokens("llama", texts[-1], "second")


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"config": adaptc.LoraConfig(r=3, use_dora=True, target_modules="all-linear", init_lora_weights=False)},
    "ia3": {"config": adaptc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "embedding": {"config": adaptc.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False)},
    "head": {"config": adaptc.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "lora_head": {"config": adaptc.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)},
    "oft": {"config": adaptc.OFTConfig(oft_block_size=2, r=0, target_modules=["q_proj", "up_proj"])},
    "int8": {
        "config": adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
        "quantize": "int8",
    },
    "bfloat16": {
        "config": adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
        "dtype": torch.bfloat16,
    },
}


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_methods_and_bases(variant: str, tmp_path: Path) -> None:
    """The same tokens as in a bank of prompts."""
    said = VARIANTS[variant]
    model = FAMILIES["llama"].build().to(said.get("dtype", torch.float32))
    if "quantize" in said:
        model = adaptc.quantize(model, said["quantize"])
    generator = adaptc.compile_for_generation(model, said["config"], max_batch=4, max_length=48)
    paths = save_random_adapters(generator.program, tmp_path)
    adapters = {"one": paths[0], "two": paths[1]}
    model = adaptc.compile_for_serving(model, said["config"], adapters=adapters, **SIZES)
    texts, names = prompts(5, 19, 1, 9), ["one", "two", None, "one"]
    found = [one.generated_tokens for one in served(model, texts, names)]
    bank = generator.bank(adapters)
    expected = [
        generated(bank, torch.tensor([text]), new=7, adapters=[name])[0, len(text) :].tolist()
        for text, name in zip(texts, names, strict=True)
    ]
    assert found == expected
    alone = [one.generated_tokens for one in served(model, texts, [None] * 4)]
    assert alone[2] == found[2]
    assert alone != found


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "blocks", "page", "prompt_length", "new"), [("llama", 12, 4, 40, 8), ("gemma2", 5, 5, 13, 12)]
)
def test_a_text_may_fill_the_pool(family: str, blocks: int, page: int, prompt_length: int, new: int) -> None:
    model, (text,) = serving(family), prompts(prompt_length)
    sizes = {"num_blocks": blocks, "page_size": page}
    (found,) = served(model, [text], ["first"], new, **sizes)
    assert found.generated_tokens == expected_tokens(family, text, "first", new)
    with pytest.raises(adaptc.AdaptcError, match=f"the cache has room for {blocks * page}"):
        served(model, [text], ["first"], new + 1, **sizes)
    with running(model, **sizes) as manager:  # one that says no limit gets as many as there is room for
        manager.generation_config.max_new_tokens = None
        (done,) = results(manager, [manager.add_request(text, adapter="first")]).values()
    assert done.generated_tokens == expected_tokens(family, text, "first", new)
