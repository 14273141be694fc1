"""Options of programs and functions of adapters, for what generates as for programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.passes.lower.choose_products import MatmulChoice
from adaptc.passes.protocol.matmul_op import LINEAR, ROW_CLASS_LIMITS, onednn_supports
from adaptc.runtime import executor
from adaptc.tuning import packed_weights
from tests.generation.models import case, generated, generator, prompt
from tests.generation.test_encoder_decoders import expected, said
from tests.support.families import FAMILIES


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_packed_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parts of a program; what is bound to it keeps them, and setting the program's option frees them."""
    monkeypatch.delenv("ADAPTC_PRODUCTS")
    monkeypatch.setattr(executor, "choose_matmul", lambda *_: MatmulChoice(LINEAR, (), "for a test"))
    always = MatmulChoice("packed", tuple(range(len(ROW_CLASS_LIMITS) + 1)), "for a test", (0.5,))
    monkeypatch.setattr(packed_weights, "choose_packed", lambda *_: always)
    found, text = case(family), prompt(2, 5)
    call, alone = (generated, found.expected) if family == "llama" else (said, lambda *a: expected(family, *a))
    gen = adaptc.compile_for_generation(found.model, found.adapters["first"], max_length=48, pack="float32")
    assert gen.program.pack == "float32"
    bound = gen.bind(found.adapters["second"])
    for one, name in ((gen, "first"), (bound, "second"), (gen.base, None)):
        assert torch.equal(call(one, text), alone(name, text))
    if onednn_supports(torch.float32):
        assert gen.program.packed.count > 0
        assert "packed: a second copy of" in str(adaptc.report(gen))
    gen.program.pack = None
    assert gen.program.packed.count == 0
    assert torch.equal(call(gen, text), alone("first", text))
    assert torch.equal(call(bound, text), alone("second", text))


@pytest.mark.long
def test_packed_weights_are_for_eager_calls_of_their_type() -> None:
    found = case("llama")
    for how, error, message in (
        ({"pack": "bf16"}, adaptc.ConfigError, "packs weights of torch.bfloat16"),
        ({"pack": "int8"}, adaptc.ConfigError, "pack='int8' is not one of"),
        ({"pack": "float32", "backend": "inductor"}, adaptc.BackendError, "is for backend='eager'"),
    ):
        with pytest.raises(error, match=message):
            adaptc.compile_for_generation(found.model, found.adapters["first"], **how)


@pytest.mark.long
def test_what_generates_stands_for_its_adapter(tmp_path: Path) -> None:
    """As the adapter of a swap, of a sum, and of a conversion; and its model for one of another method."""
    found, gen, text = case("llama"), generator(), prompt(2, 5)
    bound = gen.bind(found.adapters["second"])
    try:
        adaptc.swap(gen, bound)
        assert torch.equal(generated(gen, text), found.expected("second", text))
        for one in (bound, gen):
            made = adaptc.convert_to_lora(one, rank=5)
            assert made.report.error < 1e-4
            adaptc.swap(gen, made)
            assert torch.equal(generated(gen, text), found.expected("second", text))
    finally:
        adaptc.swap(gen, found.adapters["first"])
    half = adaptc.combine([(gen, 0.5), (gen, 0.5)])
    adaptc.swap(gen, half)
    assert torch.equal(generated(gen, text), found.expected("first", text))
    adaptc.swap(gen, found.adapters["first"])
    loha = adaptc.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False)
    other = adaptc.compile_for_generation(FAMILIES["llama"].build(), loha, max_length=48)
    as_lora = adaptc.convert_to_lora(other, rank=8)
    same = adaptc.compile_for_generation(FAMILIES["llama"].build(), as_lora, max_length=48)
    torch.testing.assert_close(
        same.forward(text["input_ids"]).logits, other.forward(text["input_ids"]).logits, rtol=1e-3, atol=1e-4
    )
    path = adaptc.save_adapter(other, tmp_path / "loha")
    again = adaptc.convert_to_lora(path, other, rank=8)
    for name, tensor in as_lora.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)
    with pytest.raises(adaptc.AdaptcError, match="has no adapter"):
        adaptc.convert_to_lora(gen.base, rank=2)
