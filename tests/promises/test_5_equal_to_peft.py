"""Promise 5: outputs, merged weights, gradients and files are PEFT's, both ways; and where PEFT is wrong, they are what
torch computes with the changed weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adaptc
from tests.support.families import FAMILIES
from tests.support.subject import file_key_of, loss, possible_file_keys, quiet

MODELS = ["llama", "bert", "t5"]
METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 5, "lora_alpha": 3, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 6, "d_initial": 0.3},
    "OFTConfig": {"oft_block_size": 4, "init_weights": False},
    "LoHaConfig": {"r": 3, "alpha": 2, "init_weights": False},
    "MissConfig": {"r": 4, "init_weights": False},
}
TARGETS = {"llama": ["q_proj", "o_proj"], "bert": ["query", "output.dense"], "t5": ["q", "o"]}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", list(METHODS))
def test_both_ways(method: str, model: str, tmp_path: Path) -> None:
    family = FAMILIES[model]
    options = {"target_modules": TARGETS[model], **METHODS[method]}
    if method == "VeraConfig":
        options["target_modules"] = options["target_modules"][:1]  # its shared tensors want layers of one size
    with quiet():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(family.build(), getattr(peft, method)(**options)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    inputs = family.inputs(3, 7)

    ours = adaptc.compile(family.build(), tmp_path / "theirs", training=True, example_inputs=inputs)
    module = ours.module()
    module.eval()
    our_out = module(**inputs)[0]
    with quiet():
        their_out = theirs(**inputs)[0]
    torch.testing.assert_close(our_out, their_out, rtol=1e-4, atol=2e-5)
    with theirs.disable_adapter(), torch.no_grad(), quiet():
        assert not torch.allclose(theirs(**inputs)[0], their_out, atol=1e-3)

    # gradients
    loss(our_out).backward()
    loss(their_out).backward()
    expected = {file_key_of(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = {
        a.file_key(n, s): t.grad
        for a in ours.adaptation.attachments
        for n, s in a.method.slots(ours.ops[a.id]).items()
        if (t := ours.binding.values[a.slots[n]]).grad is not None
    }
    assert expected
    for key, gradient in expected.items():
        name = next(k for k in possible_file_keys(key) if k in found)
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name] / size, gradient / size, rtol=1e-3, atol=1e-3)

    # files
    adaptc.save_adapter(ours, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(family.build(), str(tmp_path / "ours")).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs)[0], their_out, rtol=1e-5, atol=1e-5)

    # merged weights
    merged = adaptc.merge(ours).state_dict
    with quiet():
        folded = theirs.merge_and_unload().state_dict()
    for name, weight in folded.items():
        if name in merged:
            torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)


RIGHT: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (3, 4, 7, 8)),
    "padding by name": (nn.Conv1d(4, 6, 3, padding="same"), (3, 4, 9)),
    "circular padding": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 5, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 7)),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_right_where_peft_is_not(name: str) -> None:
    """The oracle is the layer itself, with W + s B A in it."""
    torch.manual_seed(5)
    layer, shape = RIGHT[name]
    net, x = nn.Sequential(layer, nn.Tanh()).double().eval(), torch.randn(shape, dtype=torch.float64)
    config = adaptc.LoraConfig(r=4, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    program = adaptc.compile(net, config, example_inputs=x)
    A, B = (program.binding.values[f"0.lora_{f}.default.weight"].double() for f in "AB")
    if name == "groups":
        # One half of the outputs reads one half of the inputs: B mixes the ranks of its own group only.
        half = [B[:3].flatten(1) @ A[:2].flatten(1), B[3:].flatten(1) @ A[2:].flatten(1)]
        change = torch.cat([h.reshape(3, 4, 3, 3) for h in half])
        weight = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
        weight[:3, :2], weight[3:, 2:] = layer.weight[:3], layer.weight[3:]
        expected = torch.tanh(nn.functional.conv2d(x, weight + 3 / 4 * change, layer.bias))
    else:
        change = (B.flatten(1) @ A.flatten(1)).reshape(layer.weight.shape)
        state = {"0.weight": layer.weight + 3 / 4 * change}
        expected = torch.func.functional_call(net, state, x)
    torch.testing.assert_close(program(x), expected)
    torch.testing.assert_close(adaptc.merge(program)(x), expected)


def test_right_gradients_of_circulant_blocks() -> None:
    """The gradient that C3A hands to the layer below; PEFT's own backward takes the blocks for their transposes."""
    torch.manual_seed(6)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9)).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    config = adaptc.C3AConfig(block_size=3, target_modules=["1"], init_weights="gaussian")
    program = adaptc.compile(net, config, example_inputs=x, training=True)
    merged = adaptc.merge(program)
    grads = []
    for p in (program, merged):
        given = x.clone().requires_grad_()
        loss(p.module()(given)).backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(grads[0], torch.autograd.grad(loss(net(y := x.clone().requires_grad_())), y)[0])


@pytest.mark.long
def test_right_at_tied_weights() -> None:
    """An adapter on one of two tied weights changes that one; PEFT's merge changes both."""
    model = FAMILIES["gpt2"].build()
    assert model.transformer.wte.weight is model.lm_head.weight
    config = adaptc.LoraConfig(r=3, target_modules=["wte"], init_lora_weights=False)
    program = adaptc.compile(model, config)
    inputs = FAMILIES["gpt2"].inputs(2, 5)
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(**inputs).logits, program(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.state_dict["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(merged.state_dict["transformer.wte.weight"], model.lm_head.weight)
