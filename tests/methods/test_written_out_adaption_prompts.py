"""Adaption prompts at attention that is written out: next to PEFT, and to the formula."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import adaptc
from adaptc import AdaptionPromptConfig
from tests.support.extra_tokens import (
    draw_adaption_prompts,
    from_interleaved_layer,
    from_separate_layers,
    with_adaption_prompts,
)
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import assert_differs, assert_same, assert_same_gradients, file_key_of, quiet
from tests.support.prompts import PROMPT_WARNINGS, run_quietly, text
from tests.support.written_out import OPTIONS, eager_base_program, eager_model, unpadded_logits


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_adaption_prompts_are_those_of_peft(name: str, tmp_path: Path) -> None:
    settings = copy.deepcopy(FAMILIES[name].build().config)
    settings.head_dim = None if name == "gpt2" else 6  # PEFT's are as wide together as the model
    torch.manual_seed(4)
    model = type(FAMILIES[name].build())(settings).eval()
    model.set_attn_implementation("eager")
    with quiet(*PROMPT_WARNINGS):
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **OPTIONS)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.7)
    theirs.save_pretrained(str(tmp_path))
    program = adaptc.compile(model, tmp_path, training=True)
    for padding in ("left", None):
        inputs = text(3, 7, padding)
        assert_same({"logits": run_quietly(program, inputs).logits}, {"logits": run_quietly(theirs, inputs).logits})
        assert_differs({"logits": run_quietly(theirs, inputs).logits}, {"logits": run_quietly(model, inputs).logits})
    module = program.module().eval()
    grads = []
    for m in (module, theirs):
        (m(**text(3, 7)).logits * torch.linspace(-1, 2, VOCAB)).sum().backward()
        named = ((file_key_of(n), p.grad) for n, p in m.named_parameters() if p.requires_grad)
        grads.append({n: g for n, g in named if g is not None})
    assert len(grads[1]) == 4
    assert_same_gradients(*grads)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_neox"])
def test_adaption_prompts_by_the_formula(name: str, tmp_path: Path) -> None:
    """What the model makes of scores before it adds a mask is made of those of the tokens, too: Gemma 2 caps them."""
    model, program = eager_model(name), adaptc.compile(eager_base_program(name), AdaptionPromptConfig(**OPTIONS))
    if name == "gemma2":  # so that the cap acts
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 2.0
        program = adaptc.compile(model, AdaptionPromptConfig(**OPTIONS))
    slots = draw_adaption_prompts(program)
    inputs = text(3, 9, "left")
    made = from_interleaved_layer("query_key_value") if name == "gpt_neox" else from_separate_layers
    with with_adaption_prompts(model, slots, made, is_eager=True):
        expected = run_quietly(model, inputs).logits
    assert_same({"logits": run_quietly(program, inputs).logits}, {"logits": expected})
    assert_differs({"logits": expected}, {"logits": run_quietly(model, inputs).logits})
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_same({"logits": run_quietly(loaded, inputs).logits}, {"logits": expected})
    short = {f: t[:, :2] if t.ndim == 3 else t for f, t in program.binding.values.items()}
    with adaptc.debug.assert_no_recompiles():
        adaptc.swap(program, {f.replace(".default", ""): t for f, t in short.items()})
    with with_adaption_prompts(model, {k: (p[:, :2], g) for k, (p, g) in slots.items()}, made, is_eager=True):
        assert_same({"logits": run_quietly(program, inputs).logits}, {"logits": run_quietly(model, inputs).logits})
    assert_same(unpadded_logits(adaptc.unload(program), inputs), unpadded_logits(model, inputs))
