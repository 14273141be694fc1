"""``ensure_weight_tying``: layers that share the input embedding are adapted as one, with PEFT's keys and outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adaptc
from adaptc import AdaptcWarning, CheckpointError, ConfigError, LoraConfig, SwapError, TargetError
from tests.support.oracle import randomize
from tests.support.subject import assert_close, assert_valid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*fan_in_fan_out.*", "ignore:.*tied.*")
X = torch.tensor([[3, 8, 36, 1, 3], [0, 2, 8, 5, 8]])


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


MODELS = {"llama": (llama, "embed_tokens", "q_proj"), "gpt2": (gpt2, "wte", "c_attn")}
#: E and Q stand for the embedding and a projection
KINDS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["E", "lm_head", "Q"]},
    "the head": {"target_modules": ["lm_head"]},
    "an expression": {"target_modules": ".*(lm_head|Q)"},
    "the embedding whole": {"target_modules": ["Q"], "modules_to_save": ["E", "lm_head"]},
    "the head whole": {"target_modules": ["Q"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["Q"], "trainable_token_indices": [1, 8]},
    "the same rows": {"target_modules": ["Q"], "trainable_token_indices": {"E": [1, 8], "lm_head": [1, 8]}},
}


def options(model: str, kind: str) -> dict[str, Any]:
    _, embedding, projection = MODELS[model]
    text = json.dumps(KINDS[kind]).replace('"E"', f'"{embedding}"').replace("Q", projection)
    return {"r": 3, "lora_alpha": 5, "ensure_weight_tying": True, **json.loads(text)}


def by_peft(model: str, kind: str, path: Path) -> peft.PeftModel:
    wrapped = peft.get_peft_model(MODELS[model][0](), peft.LoraConfig(**options(model, kind))).eval()
    randomize(wrapped)
    wrapped.save_pretrained(str(path))
    return wrapped


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a file, without the base weights that PEFT adds where it knows a layer by its name."""
    return {k: t for k, t in load_file(path / "adapter_model.safetensors").items() if ".base_layer." not in k}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("model", list(MODELS))
def test_as_peft(model: str, kind: str, tmp_path: Path) -> None:
    build = MODELS[model][0]
    wrapped = by_peft(model, kind, tmp_path / "peft")
    want = wrapped(input_ids=X).logits
    read = adaptc.compile(build(), tmp_path / "peft")
    program = adaptc.compile(build(), LoraConfig(**options(model, kind)))
    adaptc.swap(program, tmp_path / "peft")
    loaded = adaptc.load(adaptc.save(program, tmp_path / "p.pt2"))
    for one in (read, program, loaded, adaptc.merge(program)):
        assert_close(one(input_ids=X).logits, want, 3e-5)
    assert_valid(program)
    ours, theirs = tensors(Path(adaptc.save_adapter(read, tmp_path / "ours"))), tensors(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items())
    again = peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()
    assert_close(again(input_ids=X).logits, want, 3e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["both", "the head whole"])
def test_one_parameter_takes_both_gradients(kind: str, tmp_path: Path) -> None:
    """PEFT's two parameters of LoRA lie in one memory, so that plain steps add up as the gradients of one do."""

    def losses(module: Any) -> list[float]:
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
        found = []
        for _ in range(4):
            loss = module(input_ids=X, attention_mask=torch.ones_like(X), labels=X).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    wrapped = by_peft("llama", kind, tmp_path)
    program = adaptc.compile(llama(), tmp_path, training=True)
    module = program.module()
    tied = [n for n, p in module.named_parameters() if p.requires_grad and ("embed" in n or "lm_head" in n)]
    assert len(tied) == (2 if kind == "both" else 1)
    ours = losses(module)
    assert len(set(ours)) == 4
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses(wrapped)), rtol=1e-5, atol=0)
    state = module.state_dict()
    if kind == "both":
        up = state["base_model.model.model.embed_tokens.lora_embedding_B"]
        assert torch.equal(state["base_model.model.lm_head.lora_A.weight"].T, up)


def test_first_values_change_nothing_and_learn() -> None:
    program = adaptc.compile(llama(), LoraConfig(**options("llama", "both")))
    assert_close(program(input_ids=X).logits, llama()(input_ids=X).logits, 1e-5)
    values = {k: t for k, t in program.binding.values.items() if "embedding" in k}
    assert sorted(bool(t.any()) for t in values.values()) == [False, True]


@pytest.mark.long
def test_ranks_change(tmp_path: Path) -> None:
    program = adaptc.compile(llama(), LoraConfig(**options("llama", "both")))
    other = LoraConfig(**{**options("llama", "both"), "r": 5, "init_lora_weights": False})
    wider = adaptc.compile(llama(), other)
    adaptc.swap(program, adaptc.save_adapter(wider, tmp_path))
    assert_close(program(input_ids=X).logits, wider(input_ids=X).logits, 1e-5)
    assert_valid(program)


@pytest.mark.long
def test_files_that_are_not_tied(tmp_path: Path) -> None:
    tied = LoraConfig(**{**options("llama", "both"), "init_lora_weights": False})
    program = adaptc.compile(llama(), tied)
    apart = {"target_modules": ["embed_tokens"], "ensure_weight_tying": False}
    alone = adaptc.save_adapter(adaptc.compile(llama(), tied.replace(**apart)), tmp_path / "alone")
    with pytest.raises(SwapError, match="as one"):
        adaptc.swap(program, alone)
    file = Path(adaptc.save_adapter(program, tmp_path / "differs")) / "adapter_model.safetensors"
    changed = load_file(file)
    changed["base_model.model.lm_head.lora_B.weight"] += 1
    save_file(changed, file)
    with pytest.raises(CheckpointError, match="are one tensor, and differ"):
        adaptc.compile(llama(), tmp_path / "differs")


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"use_dora": True}, ConfigError, "use_dora"),
        ({"lora_bias": True}, ConfigError, "lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, ConfigError, "other rows for tied layers"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, ConfigError, "change the base weight"),
    ],
    ids=str,
)
def test_refusals(more: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        adaptc.compile(llama(), LoraConfig(**{"target_modules": ["q_proj"], "ensure_weight_tying": True, **more}))


@pytest.mark.long
def test_what_has_no_effect_is_told() -> None:
    config = LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True)
    with pytest.warns(AdaptcWarning, match=r"trains none of \['model.embed_tokens', 'lm_head'\]"):
        adaptc.compile(llama(), config)
    with pytest.warns(AdaptcWarning, match="nothing is tied to the input embedding"):
        adaptc.compile(llama(tied=False), copy.copy(config))
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 5)), torch.randn(2, 3)
    with pytest.raises(TargetError, match="no one input embedding"):
        adaptc.compile(net, config.replace(target_modules=["0"]), example_inputs=x)
