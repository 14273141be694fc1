"""Prefixes and adaption prompts in attention that is written out: next to PEFT, and to PyTorch's own attention."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import AdaptionPromptConfig, CartridgeConfig, LoraConfig, PrefixTuningConfig
from adaptc.errors import TargetError
from tests.support.extra_tokens import apart, by_head, extra_tokens
from tests.support.families import FAMILIES, VOCAB, perturb
from tests.support.oracle import Oracle, assert_differs, assert_same, file_tensors, gradients, quiet
from tests.support.prompts import SAID, called, labels, text

#: grouped queries, one layer for all three, normed queries, a cap, softmax in float32, heads and batches on one axis,
#: masks by ``where``
NAMES = ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "bloom", "gpt_neo"]
#: those whose attention is PyTorch's by default, and the same
BOTH = ["llama", "gpt2", "qwen3", "gpt_neox"]


def written_out(name: str) -> Any:
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    return model


@cache
def base(name: str) -> adaptc.AdaptedProgram:
    model, example = written_out(name), FAMILIES[name].inputs(2, 6)
    found = adaptc.compile(model, LoraConfig(r=2, target_modules="all-linear"), example_inputs=example)
    program = adaptc.unload(found)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return program


def prefix(name: str, path: Path, cls: str = "PrefixTuningConfig", seed: int = 0, **config: Any) -> Oracle:
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **config}
    return Oracle.of(name, getattr(peft, cls)(**config), path, model=written_out(name), seed=seed)


def attended(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of tokens that count: with a window, one that is padding may see nothing at all, and is anything."""
    logits = called(model, inputs).logits
    return {"logits": logits[inputs["attention_mask"].bool()] if "attention_mask" in inputs else logits}


@pytest.mark.few(7)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["right", "left", None])
def test_outputs(name: str, padding: str | None, tmp_path: Path) -> None:
    oracle = prefix(name, tmp_path)
    program = adaptc.compile(base(name), tmp_path)
    program.validate()
    other = adaptc.compile(FAMILIES[name].build(), tmp_path) if name in BOTH else None
    for batch, length in ((3, 11), (1, 7), (2, 3)):
        inputs = text(batch, length, padding)
        expected = attended(oracle.model, inputs)
        assert_same(attended(program, inputs), expected)
        assert_differs(expected, attended(base(name), inputs))
        if other is not None:
            assert_same(attended(program, inputs), attended(other, inputs))
    assert_same(attended(adaptc.unload(program), text(3, 11)), attended(written_out(name), text(3, 11)))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_training(name: str, tmp_path: Path) -> None:
    oracle = prefix(name, tmp_path)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    module = oracle.fill(adaptc.compile(written_out(name), config, training=True)).eval()
    inputs = {**text(3, 7, "left"), "labels": labels(text(3, 7))}
    with quiet(*SAID):
        got, want = module(**inputs), oracle.model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    ours, theirs = gradients(module, got), gradients(oracle.model, want)
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swaps_to_other_numbers_of_tokens(backend: str, tmp_path: Path) -> None:
    program = adaptc.compile(base("gemma2"), PrefixTuningConfig(num_virtual_tokens=3), backend=backend)
    oracles = {n: prefix("gemma2", tmp_path / str(n), num_virtual_tokens=n, seed=n) for n in (1, 4, 9)}
    called(program, text(2, 5))
    with adaptc.assert_no_recompiles():
        for n, oracle in oracles.items():
            adaptc.swap(program, oracle.path)
            for size in ((3, 11), (1, 2)):
                assert_same(attended(program, text(*size)), attended(oracle.model, text(*size)), 1e-5)
            bound = program.bind(file_tensors(oracle.path))
            assert bound.binding.config.num_virtual_tokens == n
            assert_same(attended(bound, text(3, 7, "left")), attended(oracle.model, text(3, 7, "left")), 1e-5)
    assert_same(attended(program.bind(None), text(3, 7)), attended(written_out("gemma2"), text(3, 7)), 1e-5)
    program.validate()


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_saved_programs(name: str, tmp_path: Path) -> None:
    one, other = (prefix(name, tmp_path / str(n), num_virtual_tokens=n) for n in (3, 8))
    program, inputs = adaptc.compile(base(name), one.path), text(3, 5, "left")
    adaptc.swap(program, other.path)
    torch.export.save(program, tmp_path / "torch.pt2")
    again = torch.export.load(tmp_path / "torch.pt2").module()
    assert_same(attended(again, inputs), attended(other.model, inputs))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    adaptc.swap(loaded, one.path)
    assert_same(attended(loaded, inputs), attended(one.model, inputs))
    unloaded = adaptc.unload(loaded)
    assert_same(attended(unloaded, inputs), attended(written_out(name), inputs))
    assert len(unloaded.graph.nodes) == len(base(name).graph.nodes)


def test_cartridges_and_those_of_a_text(tmp_path: Path) -> None:
    oracle = prefix("qwen3", tmp_path, "CartridgeConfig", num_frozen_tokens=2)
    program = adaptc.compile(base("qwen3"), oracle.path)
    assert_same(called(program, text(3, 7)), called(oracle.model, text(3, 7)))
    usual = adaptc.compile(FAMILIES["qwen3"].build(), CartridgeConfig(num_virtual_tokens=3))
    for p in (program, usual):
        adaptc.initialize_kv_prefix_from_text(p, text=torch.arange(4, 17), num_virtual_tokens=9)
    assert_same(called(program, text(3, 7)), called(usual, text(3, 7)))
    assert_differs(called(usual, text(3, 7)), called(base("qwen3"), text(3, 7)))


def test_half_precision() -> None:
    """Chances are computed in float32 and cast back, as in the model."""
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    outs = []
    for how in ("eager", "sdpa"):
        model = FAMILIES["llama"].build().bfloat16()
        model.set_attn_implementation(how)
        program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=3))
        outs.append(called(program.bind({"prompt_embeddings": rows}), text(3, 7)).logits)
    assert outs[0].dtype == torch.bfloat16
    assert_same({"logits": outs[0]}, {"logits": outs[1]}, 3e-2)


def test_programs_in_other_ops() -> None:
    """A program that was decomposed before: products of three axes, and softmax in the ops that backends have."""
    model, free = written_out("llama"), {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = {**text(2, 6), "use_cache": False}
    shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
    captured = torch.export.export(model, (), inputs, dynamic_shapes=shapes).run_decompositions()
    assert not captured.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    config = PrefixTuningConfig(num_virtual_tokens=5, num_layers=2)
    programs = [adaptc.compile(captured, config), adaptc.compile(base("llama"), config)]
    for count in (5, 1, 8):
        rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
        one, two = (
            called(p.bind({"prompt_embeddings": rows}), {**text(3, 7, "left"), **more}).logits
            for p, more in zip(programs, ({"use_cache": False}, {}), strict=True)
        )
        assert_same({"logits": one}, {"logits": two})
    assert_same(called(adaptc.unload(programs[0]), {**text(3, 7), "use_cache": False}), called(model, text(3, 7)))


def bidirectional(name: str) -> tuple[Any, Any]:
    """Models whose tokens see those behind them, one for each form of attention."""
    kinds = {"bert": transformers.BertModel, "t5": transformers.T5EncoderModel}
    config = copy.deepcopy(FAMILIES[name].build().config)
    models = []
    for how in ("eager", "sdpa"):
        torch.manual_seed(3)
        models.append(kinds[name](config).eval())
        perturb(models[-1])
        models[-1].set_attn_implementation(how)
    return models[0], models[1]


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("kind", ["prefix", "adaption prompt"])
def test_encoders(name: str, kind: str) -> None:
    """T5 adds a bias by how far keys are, which those in front have, too."""
    config: Any = PrefixTuningConfig(num_virtual_tokens=5)
    if kind != "prefix":
        config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
    models = bidirectional(name)
    programs = [adaptc.compile(m, config, example_inputs=text(2, 6)) for m in models]
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(t.shape, generator=generator) for n, t in programs[0].binding.values.items()}
    for program in programs:
        with torch.no_grad():
            for n, t in program.binding.values.items():
                t.copy_(values[n])
    for padding in ("right", "left", None):
        inputs = text(3, 7, padding)
        one, two = (called(p, inputs).last_hidden_state for p in programs)
        assert_same({"out": one}, {"out": two})
        assert_differs({"out": one}, {"out": called(models[0], inputs).last_hidden_state})
    if (name, kind) == ("t5", "prefix"):
        with behind_a_cache(models[0], values["prompt_encoder.default.embedding.weight"]):
            expected = called(models[0], inputs).last_hidden_state
        assert_same({"out": one}, {"out": expected})


class behind_a_cache:
    """While it holds, attentions of a T5 encoder have a cache of these rows."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.modules = [m for m in model.modules() if type(m).__name__ == "T5Attention"]
        n, heads = rows.shape[0], self.modules[0].n_heads
        layers = rows.view(n, 2 * len(self.modules), heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
        self.pairs, self.count = list(zip(layers[::2], layers[1::2], strict=True)), n

    def __enter__(self) -> None:
        for i, module in enumerate(self.modules):
            module.forward = self._forward(module, i)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            del module.forward

    def _forward(self, module: Any, index: int) -> Any:
        usual = module.forward
        name = "cache" if "cache" in usual.__func__.__wrapped__.__code__.co_varnames else "past_key_values"

        def forward(x: Tensor, mask: Any = None, **options: Any) -> Any:
            module.layer_idx = 0
            pair = tuple(t.expand(x.shape[0], -1, -1, -1) for t in self.pairs[index])
            options[name] = transformers.DynamicCache([pair])
            return usual(x, None if mask is None else nn.functional.pad(mask, (self.count, 0)), **options)

        return forward


# -- adaption prompts --------------------------------------------------------------------------------------------------

OPTIONS = {"adapter_len": 5, "adapter_layers": 2}


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
        grads.append([p.grad for p in m.parameters() if p.requires_grad])
    for ours, wanted in zip(*(sorted(g, key=lambda t: tuple(t.shape)) for g in grads), strict=True):
        assert ours.shape == wanted.shape
    total = [sum(float((g * g).sum()) for g in found) for found in grads]
    assert abs(total[0] - total[1]) < 1e-4 * total[1]


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt_neox"])
def test_adaption_prompts_by_the_formula(name: str, tmp_path: Path) -> None:
    """What the model makes of scores before it adds a mask is made of those of the tokens, too: Gemma 2 caps them."""
    model, program = written_out(name), adaptc.compile(base(name), AdaptionPromptConfig(**OPTIONS))
    if name == "gemma2":  # so that the cap acts
        for module in model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = 2.0
        program = adaptc.compile(model, AdaptionPromptConfig(**OPTIONS))
    torch.manual_seed(4)
    slots = {}
    with torch.no_grad():
        for a in program.adaptation.attachments:
            prompt, gate = (program.binding.values[a.slots[n]] for n in ("adaption_prompt", "adaption_gate"))
            slots[a.key] = prompt.copy_(torch.randn_like(prompt)), gate.copy_(torch.randn_like(gate))
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


# -- forms -------------------------------------------------------------------------------------------------------------

HEADS, WIDTH = 3, 4


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) / 2 + mask).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.where(mask < 0, -1e9, (q * 0.5) @ k.transpose(-1, -2))
    return torch.softmax(scores, 3, dtype=torch.float64).to(v.dtype) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).mul_(0.5).masked_fill(mask < 0, -1e9)
    return torch.matmul(scores.softmax(-1), v)


def one_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length, w = q.shape
    q, k, v = (t.reshape(b * h, -1, w) for t in (q, k, v))
    bias = mask.expand(b, h, length, length).reshape(b * h, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.5)
    return torch.bmm(scores.view(b, h, length, length).softmax(-1).view(b * h, length, length), v).view(b, h, length, w)


def turned_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, length, w = q.shape
    keys = k.transpose(2, 3).reshape(b * h, w, length)
    scores = torch.bmm(q.reshape(b * h, length, w), keys).view(b, h, length, length) * 0.5 + mask
    return torch.bmm(scores.softmax(-1).reshape(b * h, length, length), v.reshape(b * h, length, w)).view(q.shape)


def sunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One more score that stands for nothing."""
    scores = q @ k.mT * 0.5 + mask
    sink = torch.full((1, 1, 1, 1), 0.3).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Written(nn.Module):
    """An attention of tokens without a mask of the caller's; ``front``: keys and values (heads, count, width)."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend, inner = attend, HEADS * WIDTH
        self.table, self.mix = nn.Embedding(31, 10), nn.Linear(10, 3 * inner)
        self.o, self.out = nn.Linear(inner, 10), nn.Linear(10, 7)

    def forward(self, ids: Tensor, front: Any = None) -> Tensor:
        b, length = ids.shape
        q, k, v = (t.view(b, length, HEADS, WIDTH).transpose(1, 2) for t in self.mix(self.table(ids)).chunk(3, -1))
        there = torch.arange(length)
        mask = torch.where(there[:, None] < there[None, :], -1e9, 0.0)[None, None]
        if front is not None:
            k, v = (torch.cat([f.expand(b, -1, -1, -1), t], 2) for f, t in zip(front, (k, v), strict=True))
            mask = nn.functional.pad(mask, (front[0].shape[1], 0))
        y = self.attend(q, k, v, mask)
        return self.out(self.o(y.transpose(1, 2).reshape(b, length, HEADS * WIDTH)))


@pytest.mark.parametrize("attend", [plain, chosen, filled, one_axis, turned_before, sunk])
def test_forms(attend: Any) -> None:
    torch.manual_seed(0)
    model, ids = Written(attend).eval(), torch.arange(15).reshape(3, 5)
    program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=4), example_inputs=(ids,))
    by_hand = Written(sunk if attend is sunk else plain).eval()
    by_hand.load_state_dict(model.state_dict())
    for count in (7, 1, 4):
        rows = torch.randn(count, 2 * HEADS * WIDTH)
        adaptc.swap(program, {"prompt_embeddings": rows})
        front = rows.view(count, 2, HEADS, WIDTH).permute(1, 2, 0, 3)
        with torch.no_grad():
            expected = by_hand(ids[:2], front)
            torch.testing.assert_close(program(ids[:2]), expected)
            assert float((expected - model(ids[:2])).abs().max()) > 1e-2
    torch.testing.assert_close(program.bind(None)(ids), model(ids))
    torch.testing.assert_close(adaptc.unload(program)(ids), model(ids))
    if attend in (filled, chosen, one_axis):
        adaption(model, by_hand, ids)


def adaption(model: nn.Module, by_hand: Any, ids: Tensor) -> None:
    program = adaptc.compile(model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1), example_inputs=(ids,))
    slots = {n: program.binding.values[f] for n, f in program.adaptation.attachments[0].slots.items()}
    with torch.no_grad():
        for t in slots.values():
            t.copy_(torch.randn_like(t))
        made = by_hand.mix(slots["adaption_prompt"][0]).view(3, 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        gate = slots["adaption_gate"]
        usual = by_hand.attend
        by_hand.attend = lambda q, k, v, m: usual(q, k, v, m) + gate * ((q @ made[1].mT / 2).softmax(-1) @ made[2])
        torch.testing.assert_close(program(ids[:2]), by_hand(ids[:2]))
    by_hand.attend = usual


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + (q * 2) @ (k + 1).mT + mask).softmax(-1) @ v


def other_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-2) @ v


def turned_chances(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (v.mT @ (q @ k.mT + mask).softmax(-1).mT).mT


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (two_products, r"nearest is 'softmax': its scores are made of 2 products, 'matmul"),
        (other_axis, "nearest is 'softmax': it is not along the last axis"),
        (turned_chances, "nearest is 'softmax': its chances are the second factor of 'matmul_1'"),
    ],
)
@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=4), AdaptionPromptConfig(**OPTIONS)])
def test_what_is_not_understood_is_named(attend: Any, message: str, config: Any) -> None:
    with pytest.raises(TargetError, match=f"looked for scaled_dot_product_attention, and for a softmax.*{message}"):
        adaptc.compile(Written(attend).eval(), config, example_inputs=(torch.arange(15).reshape(3, 5),))


def test_scores_that_other_tokens_have_not() -> None:
    def weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT + mask) * torch.arange(1, k.shape[2] + 1)).softmax(-1) @ v

    ids = torch.arange(15).reshape(3, 5)
    with pytest.raises(TargetError, match=r"'mul' = aten.mul.Tensor changes the scores of 'matmul_1'"):
        adaptc.compile(Written(weighed), AdaptionPromptConfig(adapter_len=3, adapter_layers=1), example_inputs=(ids,))
