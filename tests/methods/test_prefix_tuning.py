"""Prefix tuning and cartridges next to PEFT's: outputs, losses, gradients, files, swaps; and what can go wrong."""

from __future__ import annotations

import json
from functools import cache

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc import CartridgeConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, MergeError, SwapError, TargetError
from tests.support.cover import examples
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    load_peft,
    quiet,
    shared_base_program,
    with_head,
)
from tests.support.prompts import CALLS, PROMPT_WARNINGS, check_saved_program, labels, prompt_oracle, run_quietly, text

#: grouped queries, absolute positions, windows, normed keys, windows in some layers, positions by the mask, experts
NAMES = ["llama", "gpt2", "mistral", "qwen3", "gemma3_text", "opt", "mixtral"]
PREFIX, CARTRIDGE = "PrefixTuningConfig", "CartridgeConfig"
CONFIGS = {PREFIX: PrefixTuningConfig, CARTRIDGE: CartridgeConfig}


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["right", "left", None])
def test_outputs(name, padding, tmp_path):
    oracle = prompt_oracle(name, tmp_path, PREFIX, num_virtual_tokens=5)
    program = adaptc.compile(shared_base_program(name), tmp_path)
    program.validate()
    for batch, length in ((3, 11), (1, 7), (2, 3)):
        inputs = text(batch, length, padding)
        expected = run_quietly(oracle.model, inputs)
        assert_same(run_quietly(program, inputs), expected)
        assert_differs(expected, run_quietly(shared_base_program(name), inputs))
    assert_same(run_quietly(adaptc.unload(program), text(3, 11)), run_quietly(FAMILIES[name].build(), text(3, 11)))


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("cls", "more"), [(PREFIX, {}), (PREFIX, {"prefix_projection": True, "encoder_hidden_size": 13}), (CARTRIDGE, {})]
)
def test_training(name, cls, more, tmp_path):
    """Losses and gradients with labels, what trains, and files both ways."""
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **more}
    oracle = prompt_oracle(name, tmp_path / "peft", cls, **options)
    program = adaptc.compile(shared_base_program(name), CONFIGS[cls](**options))
    module = oracle.module_with_peft_values(program).eval()
    if cls == CARTRIDGE:  # what does not train, too
        frozen = oracle.model.prompt_encoder["default"].frozen_embedding
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        own["prompt_encoder.default.frozen_embedding"].copy_(frozen)
    inputs = {**text(3, 7), "labels": labels(text(3, 7))}
    captured = adaptc.compile(FAMILIES[name].build(), CONFIGS[cls](**options), training=True)
    saved = adaptc.save_adapter(program, tmp_path / "ours")
    adaptc.swap(captured, saved)
    out = captured.module().eval()
    with quiet(*PROMPT_WARNINGS):
        got, want = out(**inputs), oracle.model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    ours, theirs = gradients(out, got), gradients(oracle.model, want)
    assert_same_gradients(ours, theirs)
    # Files: the same keys of PEFT's, and the network of a projection beside them.
    own_, theirs_ = file_tensors(saved), file_tensors(oracle.path)
    for key, value in theirs_.items():
        torch.testing.assert_close(own_[key], value, rtol=0, atol=1e-6)
    assert bool(more) == (own_.keys() != theirs_.keys())
    stored = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft")]
    assert {**stored[0], "inference_mode": True} == stored[1]
    inputs.pop("labels")
    expected = run_quietly(oracle.model, inputs)
    with quiet(*PROMPT_WARNINGS):
        assert_same(run_quietly(load_peft(FAMILIES[name].build(), saved), inputs), expected)
    assert_same(run_quietly(adaptc.compile(shared_base_program(name), oracle.path), inputs), expected)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_to_other_numbers_of_tokens(backend, tmp_path):
    """From a directory, a state dict and a binding; one token, and the base, are numbers as all others."""
    program = adaptc.compile(shared_base_program("llama"), PrefixTuningConfig(num_virtual_tokens=3), backend=backend)
    counts = (1, 2, 13)
    oracles = {n: prompt_oracle("llama", tmp_path / str(n), PREFIX, num_virtual_tokens=n, seed=n) for n in counts}
    run_quietly(program, text(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for n, oracle in oracles.items():
            adaptc.swap(program, oracle.path)
            for size in ((3, 11), (1, 2)):
                assert_same(run_quietly(program, text(*size)), run_quietly(oracle.model, text(*size)))
            bound = program.bind(file_tensors(oracle.path))
            assert bound.binding.config.num_virtual_tokens == n
            assert_same(run_quietly(bound, text(3, 7, "left")), run_quietly(oracle.model, text(3, 7, "left")))
    built = FAMILIES["llama"].build()
    assert_same(run_quietly(program.bind(None), text(3, 7)), run_quietly(built, text(3, 7)))
    assert adaptc.verify(program, built).ok
    program.validate()


@pytest.mark.long
def test_cartridges_swap(tmp_path):
    """Other numbers of tokens, and of frozen ones among them."""
    program = adaptc.compile(shared_base_program("qwen3"), CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=2))
    with adaptc.debug.assert_no_recompiles():
        for n, frozen in ((1, 1), (7, 0), (11, 3)):
            options = {"num_virtual_tokens": n, "num_frozen_tokens": frozen}
            oracle = prompt_oracle("qwen3", tmp_path / str(n), CARTRIDGE, seed=n, **options)
            adaptc.swap(program, oracle.path)
            assert_same(run_quietly(program, text(3, 7)), run_quietly(oracle.model, text(3, 7)))
            saved = adaptc.save_adapter(program, tmp_path / f"saved{n}")
            assert json.loads((saved / "adapter_config.json").read_text())["num_frozen_tokens"] == frozen
            assert torch.equal(file_tensors(saved)["prompt_embeddings"], file_tensors(oracle.path)["prompt_embeddings"])


@pytest.mark.long
def test_saved_programs(tmp_path):
    one, other = (prompt_oracle("gpt2", tmp_path / str(n), PREFIX, num_virtual_tokens=n) for n in (3, 8))
    unloaded = check_saved_program(one, other, text(3, 5, "left"), tmp_path)
    assert len(unloaded.graph.nodes) == len(shared_base_program("gpt2").graph.nodes)


@pytest.mark.slow
def test_packages(tmp_path):
    one, other, longer = (
        prompt_oracle("llama", tmp_path / f"{n}{s}", PREFIX, num_virtual_tokens=n, seed=s)
        for n, s in ((5, 0), (5, 1), (6, 0))
    )
    program = adaptc.compile(shared_base_program("llama"), one.path)
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "package.pt2"))
    assert_same(run_quietly(runner, text(3, 11)), run_quietly(one.model, text(3, 11)))
    runner.swap(other.path)
    assert_same(run_quietly(runner, text(2, 3)), run_quietly(other.model, text(2, 3)))
    with pytest.raises(SwapError, match=r"shape \(6, 64\), and the compiled code takes \(5, 64\) alone"):
        runner.swap(longer.path)
    assert_same(run_quietly(runner, text(2, 3)), run_quietly(other.model, text(2, 3)))


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("head", ["features", "classes", "llama"])
def test_encoders_and_heads(head, tmp_path):
    """Encoders as PEFT runs them. It fails for those with a head, where rows that are their own prefixes are zeros: a
    prefix of n zeros is one that adds n keys of score zero, and no value."""
    name = "llama" if head == "llama" else "bert"
    kind = {
        "features": "BertModel",
        "classes": "BertForSequenceClassification",
        "llama": "LlamaForSequenceClassification",
    }
    model = with_head(getattr(transformers, kind[head]), name, num_labels=3)
    if head == "features":
        config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)
        oracle = Oracle.wrap_and_save("bert", config, tmp_path, model=with_head(transformers.BertModel, "bert"))
        program = adaptc.compile(model, tmp_path)
        for padding in ("right", "left", None):
            assert_same(run_quietly(program, text(3, 7, padding)), run_quietly(oracle.model, text(3, 7, padding)))
        return
    program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=4))
    inputs = text(3, 7)
    inputs["input_ids"] *= inputs["attention_mask"]
    out = run_quietly(program, inputs).logits
    assert out.shape == (3, 3)
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        alone = run_quietly(program, {"input_ids": ids[mask.bool()][None]}).logits[0]
        torch.testing.assert_close(out[row], alone)
    assert_differs({"logits": out}, {"logits": run_quietly(model, inputs).logits})


@cache
def programs():
    config = PrefixTuningConfig(num_virtual_tokens=3)
    return {
        name: (FAMILIES[name].build(), adaptc.compile(shared_base_program(name), config))
        for name in ("llama", "gpt2", "mistral")
    }


@pytest.mark.long
@settings(max_examples=examples(25))
@given(
    name=st.sampled_from(["llama", "gpt2", "mistral"]),
    calls=CALLS,
    seed=st.integers(0, 1000),
)
def test_any_sizes(name, calls, seed):
    """Numbers of tokens, batches, lengths and paddings, in any order, through one program; the base's own cache in
    front of the call says what is right."""
    model, program = programs()[name]
    generator = torch.Generator().manual_seed(seed)
    heads, width = (4, 6) if name == "gpt2" else (2, 8)
    for count, batch, length, padding in calls:
        rows = torch.randn(count, 4 * heads * width, generator=generator)
        inputs = text(batch, length, padding, seed)
        mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.int64))
        layers = rows.view(count, 4, heads, width).permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
        cache = transformers.DynamicCache(list(zip(layers[::2], layers[1::2], strict=True)))
        longer = {
            "input_ids": inputs["input_ids"],
            "attention_mask": nn.functional.pad(mask, (count, 0), value=1),
            "past_key_values": cache,
        }
        expected = run_quietly(model, longer).logits
        bound = program.bind({"prompt_embeddings": rows})
        torch.testing.assert_close(run_quietly(bound, inputs).logits, expected, rtol=0, atol=1e-5)
        adaptc.swap(program, {"prompt_embeddings": rows})
        torch.testing.assert_close(run_quietly(program, inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.long
def test_projections_go_on_from_files(tmp_path):
    """Training goes on from a file of ours; of PEFT's there are the rows alone, which do not train."""
    options = {"num_virtual_tokens": 5, "prefix_projection": True}
    first = adaptc.compile(shared_base_program("llama"), PrefixTuningConfig(**options, init_weights=None))
    saved = adaptc.save_adapter(first, tmp_path / "ours")
    again = adaptc.compile(shared_base_program("llama"), saved, training=True)
    one, two = (dict(p.module().named_parameters()) for p in (first, again))
    trained = {n: p for n, p in two.items() if p.requires_grad}
    assert (
        sorted(n.removeprefix("prompt_encoder.") for n in trained)
        == [
            "default.embedding.weight",
            "default.transform.0.bias",
            "default.transform.0.weight",
            "default.transform.2.bias",
            "default.transform.2.weight",
        ]
        or sorted(trained) == []
    )
    for name, value in trained.items():
        assert torch.equal(one[name], value)
    theirs = prompt_oracle("llama", tmp_path / "peft", PREFIX, **options)
    program = adaptc.compile(shared_base_program("llama"), theirs.path)
    assert_same(run_quietly(program, text(3, 7)), run_quietly(theirs.model, text(3, 7)))
    with pytest.raises(CheckpointError, match="a PrefixTuningConfig without prefix_projection"):
        adaptc.compile(shared_base_program("llama"), theirs.path, training=True)


@pytest.mark.parametrize("projection", [False, True])
def test_first_values(projection):
    """Zeros where they are asked for: keys of score zero, and values of nothing."""
    config = PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=projection, init_weights="zero")
    with quiet(*PROMPT_WARNINGS):
        options = {"num_virtual_tokens": 5, "prefix_projection": projection, "init_weights": "zero"}
        theirs = peft.get_peft_model(
            FAMILIES["llama"].build(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", **options)
        ).eval()
    assert_same(
        run_quietly(adaptc.compile(shared_base_program("llama"), config), text(3, 7)), run_quietly(theirs, text(3, 7))
    )
    if not projection:
        random = adaptc.compile(shared_base_program("llama"), config.replace(init_weights=None, num_virtual_tokens=300))
        (rows,) = random.binding.values.values()
        assert abs(float(rows.detach().std()) - 1) < 0.03


class Causal(nn.Module):
    """One attention that masks by order itself, of tokens without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(31, 12), nn.Linear(12, 36), nn.Linear(12, 7)

    def forward(self, ids, front=None):
        b, length = ids.shape
        q, k, v = (t.view(b, length, 3, 4).transpose(1, 2) for t in self.mix(self.table(ids)).split(12, -1))
        if front is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (torch.cat([f.expand(b, -1, -1, -1), t], 2) for f, t in zip(front, (k, v), strict=True))
            mask = torch.ones(length, k.shape[2], dtype=torch.bool).tril(k.shape[2] - length)
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(b, length, 12))


def test_attention_that_masks_by_order():
    torch.manual_seed(0)
    model, ids = Causal(), torch.arange(15).reshape(3, 5)
    program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=4), example_inputs=(ids,))
    for count in (7, 1):
        rows = torch.randn(count, 24)
        adaptc.swap(program, {"prompt_embeddings": rows})
        front = rows.view(count, 2, 3, 4).permute(1, 2, 0, 3)
        torch.testing.assert_close(program(ids[:2]), model(ids[:2], front))
    torch.testing.assert_close(program.bind(None)(ids), model(ids))
    torch.testing.assert_close(adaptc.unload(program)(ids), model(ids))


@pytest.mark.long
def test_beside_other_adapters(tmp_path):
    """LoRA at projections and at the tokens' embedding acts as it does alone; one at positions is refused."""
    config = peft.LoraConfig(r=3, target_modules=["k_proj", "v_proj", "embed_tokens"], init_lora_weights=False)
    with quiet(*PROMPT_WARNINGS, ".*embedding layers.*"):
        Oracle.wrap_and_save("llama", config, tmp_path / "lora")
        wrapped = load_peft(FAMILIES["llama"].build(), tmp_path / "lora")
        prefix = prompt_oracle("llama", tmp_path / "prefix", PREFIX, num_virtual_tokens=5)
    program = adaptc.compile(shared_base_program("llama"), {"style": tmp_path / "lora", "task": prefix.path})
    inputs = text(3, 7)
    cache = prefix.model.get_prompt(3)
    mask = nn.functional.pad(inputs["attention_mask"], (5, 0), value=1)
    expected = run_quietly(wrapped, {**inputs, "attention_mask": mask, "past_key_values": cache}).logits
    torch.testing.assert_close(run_quietly(program, inputs).logits, expected)
    adaptc.swap(program, {"task": None})
    assert_same(run_quietly(program, inputs), run_quietly(wrapped, inputs))
    with pytest.raises(TargetError, match=r"lora adapter 'style' changes .*beside the tokens"):
        adaptc.compile(
            shared_base_program("gpt2"),
            {"style": LoraConfig(r=3, target_modules=["wpe"]), "task": PrefixTuningConfig(num_virtual_tokens=3)},
        )


@pytest.mark.long
def test_one_program_for_several_methods(tmp_path):
    """An adapter of one method leaves the other's places alone."""
    configs = PromptTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=5)
    alone = [
        adaptc.compile(shared_base_program("llama"), c, generator=torch.Generator().manual_seed(1)) for c in configs
    ]
    saved = [adaptc.save_adapter(p, tmp_path / str(i)) for i, p in enumerate(alone)]
    both = adaptc.compile(shared_base_program("llama"), saved)
    for path, program in zip([*saved, saved[0]], [*alone, alone[0]], strict=True):
        adaptc.swap(both, path)
        assert_same(run_quietly(both, text(3, 7)), run_quietly(program, text(3, 7)))


@pytest.mark.long
def test_reports_and_refusals():
    program = adaptc.compile(shared_base_program("llama"), PrefixTuningConfig(num_virtual_tokens=5))
    assert "prompt_embeddings 5x64" in str(adaptc.report(program))
    with pytest.raises(MergeError, match="prefix_tuning changes what the program reads"):
        adaptc.merge(program)
    with pytest.raises(CheckpointError, match=r"prompt_embeddings.*\(5, 63\)"):
        adaptc.swap(program, {"prompt_embeddings": torch.zeros(5, 63)})
    with pytest.raises(ConfigError, match=r"num_layers=3, and the program has 2"):
        adaptc.compile(shared_base_program("llama"), PrefixTuningConfig(num_virtual_tokens=5, num_layers=3))
    gpt2 = adaptc.compile(shared_base_program("gpt2"), PrefixTuningConfig(num_virtual_tokens=50))
    with pytest.raises(AdaptcError, match="50 tokens in front"):
        gpt2(**text(2, 15))
    assert gpt2(**text(2, 14)).logits.shape == (2, 14, VOCAB)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PrefixTuningConfig, {}, "num_virtual_tokens must say"),
        (PrefixTuningConfig, {"num_virtual_tokens": 3, "init_weights": "ones"}, "init_weights"),
        (PrefixTuningConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 0}, "positive integer"),
        (CartridgeConfig, {"num_virtual_tokens": 3, "num_frozen_tokens": 4}, "more than the 3"),
        (CartridgeConfig, {"num_virtual_tokens": 3, "num_frozen_tokens": -1}, "at least 0"),
    ],
)
def test_bad_options(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
