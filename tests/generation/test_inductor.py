"""Compiled steps: the same tokens, and one compilation for all lengths, batches, ranks and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

import adaptc
from adaptc.generation.modes import chunked_prefill
from adaptc.runtime import executor
from tests.generation.models import case, generated, generator, prompt


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_one_step_is_compiled(family: str) -> None:
    found, gen = case(family), generator(family, "inductor")
    texts = [prompt(rows, length, seed=length) for rows, length in ((1, 1), (2, 3), (1, 20), (3, 2), (5, 8))]
    expected = {n: [found.expected(n, text) for text in texts] for n in ("first", "second")}
    generated(gen, prompt(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for name in ("second", "first"):
            adaptc.swap(gen, found.adapters[name])
            for text, want in zip(texts, expected[name], strict=True):
                assert torch.equal(generated(gen, text), want)
                assert torch.equal(
                    generated(gen, text, num_beams=2)[:, : text["input_ids"].shape[1]], text["input_ids"]
                )
            with patch.object(chunked_prefill, "CHUNK_SIZE", 4):
                assert torch.equal(generated(gen, texts[2]), expected[name][2])
        bound = gen.bind(found.adapters["second"])
        assert torch.equal(generated(bound, texts[1]), expected["second"][1])


def test_one_token_of_one_text_runs_code_of_its_own() -> None:
    """Both codes are made at the first call, and each call runs the one for its sizes."""
    made: list[frozenset[str]] = []
    ran: list[bool] = []

    def compile_nothing(
        module: Any, split: Any, main: Any, targets: Any, attachments: Any, ops: Any, sizes: Any
    ) -> Any:
        made.append(sizes)

        def run(*flat: Any) -> Any:
            ran.append(bool(sizes))
            return main.forward(*flat)

        return run

    found, gen = (
        case("llama"),
        adaptc.compile_for_generation(
            case("llama").model, str(case("llama").adapters["first"]), max_batch=4, max_length=32, backend="inductor"
        ),
    )
    with patch.object(executor, "compile_lifted", compile_nothing):
        for rows, length, expected in ((2, 3, [False] * 4), (1, 5, [False, True, True, True]), (1, 1, [True] * 4)):
            ran.clear()
            text = prompt(rows, length)
            assert torch.equal(generated(gen, text, max_new_tokens=4), found.expected("first", text, max_new_tokens=4))
            assert ran == expected
            assert len(made) == 2  # from the first call on
    general, single = made
    assert not general
    assert len(single) == 3  # texts, tokens, and tokens whose logits are kept


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (None, torch.bfloat16),
        ("int8", torch.float32),
        ("int4", torch.float32),
        ("int4", torch.bfloat16),
        ("nf4", torch.float32),
    ],
    ids=str,
)
def test_layers_that_are_sums(scheme: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    """The logits of compiled steps are those of the eager ones, on the same tokens: a prompt, and one token each."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    model = model.to(dtype)
    if scheme is not None:
        model = adaptc.quantize(model, scheme)
    config = adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    steps: list[list[torch.Tensor]] = []
    adapter: Any = config
    for backend in ("eager", "inductor"):
        gen = adaptc.compile_for_generation(model, adapter, max_batch=2, max_length=32, backend=backend)
        adapter = str(adaptc.save_adapter(gen, tmp_path / backend))
        with torch.no_grad():
            out: Any = gen.generate(
                prompt(1, 7)["input_ids"] % 61,
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        steps.append([*out.logits, out.sequences])
    *eager, eager_ids = steps[0]
    *compiled, compiled_ids = steps[1]
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for i, (one, other) in enumerate(zip(eager, compiled, strict=True)):
        error = float((one - other).abs().max() / one.abs().max())
        assert error < tolerance, (i, error)
        if not torch.equal(eager_ids[:, : 7 + i + 1], compiled_ids[:, : 7 + i + 1]):
            break
    assert i >= 1
