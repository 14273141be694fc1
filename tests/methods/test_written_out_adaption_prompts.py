"""Adaption prompts at attention that is written out: next to PEFT, and to the formula."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import adaptc
from adaptc import AdaptionPromptConfig
from tests.support.extra_tokens import apart, by_head, drawn, extra_tokens
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import assert_differs, assert_same, file_name, quiet, same_gradients
from tests.support.prompts import SAID, called, text
from tests.support.written_out import OPTIONS, attended, base, written_out


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_adaption_prompts_are_those_of_peft(name: str, tmp_path: Path) -> None:
    settings = copy.deepcopy(FAMILIES[name].build().config)
    settings.head_dim = None if name == "gpt2" else 6  # PEFT's are as wide together as the model
    torch.manual_seed(4)
    model = type(FAMILIES[name].build())(settings).eval()
    model.set_attn_implementation("eager")
    with quiet(*SAID):
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
        assert_same({"logits": called(program, inputs).logits}, {"logits": called(theirs, inputs).logits})
        assert_differs({"logits": called(theirs, inputs).logits}, {"logits": called(model, inputs).logits})
    module = program.module().eval()
    grads = []
    for m in (module, theirs):
        (m(**text(3, 7)).logits * torch.linspace(-1, 2, VOCAB)).sum().backward()
        named = ((file_name(n), p.grad) for n, p in m.named_parameters() if p.requires_grad)
        grads.append({n: g for n, g in named if g is not None})
    assert len(grads[1]) == 4
    same_gradients(*grads)


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_neox"])
def test_adaption_prompts_by_the_formula(name: str, tmp_path: Path) -> None:
    """What the model makes of scores before it adds a mask is made of those of the tokens, too: Gemma 2 caps them."""
    model, program = written_out(name), adaptc.compile(base(name), AdaptionPromptConfig(**OPTIONS))
    if name == "gemma2":  # so that the cap acts
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 2.0
        program = adaptc.compile(model, AdaptionPromptConfig(**OPTIONS))
    slots = drawn(program)
    inputs = text(3, 9, "left")
    made = by_head("query_key_value") if name == "gpt_neox" else apart
    with extra_tokens(model, slots, made, written_out=True):
        expected = called(model, inputs).logits
    assert_same({"logits": called(program, inputs).logits}, {"logits": expected})
    assert_differs({"logits": expected}, {"logits": called(model, inputs).logits})
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    assert_same({"logits": called(loaded, inputs).logits}, {"logits": expected})
    short = {f: t[:, :2] if t.ndim == 3 else t for f, t in program.binding.values.items()}
    with adaptc.assert_no_recompiles():
        adaptc.swap(program, {f.replace(".default", ""): t for f, t in short.items()})
    with extra_tokens(model, {k: (p[:, :2], g) for k, (p, g) in slots.items()}, made, written_out=True):
        assert_same({"logits": called(program, inputs).logits}, {"logits": called(model, inputs).logits})
    assert_same(attended(adaptc.unload(program), inputs), attended(model, inputs))
