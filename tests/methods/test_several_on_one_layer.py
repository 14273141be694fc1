"""Methods above the layer beside LoRA, and beside each other, in one program: each acts as it does alone."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adaptc
from adaptc import AdaptionPromptConfig, LoraConfig, MultitaskPromptTuningConfig, PrefixTuningConfig, PromptTuningConfig
from adaptc.errors import ConfigError
from tests.support.extra_tokens import with_adaption_prompts
from tests.support.families import FAMILIES
from tests.support.oracle import assert_differs, assert_same, file_tensors, load_peft, quiet, shared_base_program
from tests.support.prompts import PROMPT_WARNINGS, run_quietly, text

COUNT = {"prompt": 3, "prefix": 5}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT["prompt"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT["prefix"]),
    "tokens": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}
#: every two of them, and all
TOGETHER = [*itertools.combinations(CONFIGS, 2), tuple(CONFIGS)]


def random(path: Path, kind: str, seed: int = 0, **options: Any) -> Path:
    """An adapter of random values in a directory."""
    generator = torch.Generator().manual_seed(seed)
    program = adaptc.compile(shared_base_program("llama"), CONFIGS[kind].replace(**options), generator=generator)
    with torch.no_grad():
        for t in program.binding.values.values():
            if t.is_floating_point() and t.ndim:
                t.copy_(torch.randn(t.shape, generator=generator) * 0.6)
    return adaptc.save_adapter(program, path)


def formula(parts: dict[str, Path], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """What these adapters make of a call together: PEFT's LoRA, rows in front of embeddings, a cache that begins with
    keys and values, and tokens that attentions have to themselves."""
    return differentiable(parts, inputs, dtype)[0].detach()


def differentiable(
    parts: dict[str, Path], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, and what it follows from: the adapter's name and the file's key -> tensor."""
    plainly = {k: p for k, p in parts.items() if k != "lora"}
    leaves = {
        f"{kind} {n}": t.to(dtype).requires_grad_() for kind, p in plainly.items() for n, t in file_tensors(p).items()
    }
    model = plain = FAMILIES["llama"].build().to(dtype).requires_grad_(False)
    if "lora" in parts:
        with quiet(*PROMPT_WARNINGS):
            model = load_peft(model, parts["lora"])
        plain = model.get_base_model()
        model.to(dtype)
        for name, p in model.named_parameters():
            if "lora_" in name:
                leaves["lora " + name.replace(".default", "")] = p.requires_grad_()
    batch, length = inputs["input_ids"].shape
    mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.int64))
    given: dict[str, Any] = {"inputs_embeds": plain.get_input_embeddings()(inputs["input_ids"])}
    if "prompt" in parts:
        rows = leaves["prompt prompt_embeddings"]
        given["inputs_embeds"] = torch.cat([rows.expand(batch, -1, -1), given["inputs_embeds"]], 1)
        mask = nn.functional.pad(mask, (rows.shape[0], 0), value=1)
    if "prefix" in parts:
        rows = leaves["prefix prompt_embeddings"]
        layers = rows.view(rows.shape[0], 4, 2, 8).permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
        given["past_key_values"] = transformers.DynamicCache(list(zip(layers[::2], layers[1::2], strict=True)))
        mask = nn.functional.pad(mask, (rows.shape[0], 0), value=1)
    slots: dict[str, tuple[Tensor, Tensor]] = {}
    for key, value in leaves.items():
        if key.endswith("adaption_prompt"):
            place = key[key.index("model.layers") :].removesuffix(".adaption_prompt")
            slots[place] = value, leaves[key.replace("_prompt", "_gate")]

    def made(module: Any, tokens: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """By the base's own weights."""
        layers = (getattr(module, n) for n in ("k_proj", "v_proj"))
        found = [getattr(x, "base_layer", x)(tokens).unflatten(-1, (-1, width)) for x in layers]
        return found[0], found[1]

    with with_adaption_prompts(plain, slots, made), quiet(*PROMPT_WARNINGS):
        return model(**given, attention_mask=mask).logits, leaves


def check(program: Any, parts: dict[str, Path]) -> None:
    for size, padding in (((3, 7), "left"), ((1, 2), None), ((2, 11), "right")):
        inputs = text(*size, padding)
        # Rounding: both are up to 4e-5 from float64, in which they agree (the next test).
        assert_same({"y": run_quietly(program, inputs).logits}, {"y": formula(parts, inputs)}, 5e-5)


@pytest.mark.long
@pytest.mark.parametrize("kinds", TOGETHER, ids="+".join)
def test_in_float64(kinds: tuple[str, ...], tmp_path: Path) -> None:
    parts = {k: random(tmp_path / k, k, 1) for k in kinds}
    program = adaptc.compile(FAMILIES["llama"].build().double(), parts)
    for size, padding in (((3, 7), "left"), ((1, 2), None), ((2, 11), "right")):
        inputs = text(*size, padding)
        found, expected = run_quietly(program, inputs).logits, formula(parts, inputs, torch.float64)
        assert_same({"y": found}, {"y": expected}, 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("kinds", TOGETHER, ids="+".join)
def test_swaps_files_and_parts(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """One is exchanged, taken away and written; PEFT reads each alone; the rest stays as it is."""
    one = {k: random(tmp_path / f"one {k}", k, 1) for k in kinds}
    more = {"num_virtual_tokens": 6} if kinds[-1] in COUNT else {}
    other = random(tmp_path / "other", kinds[-1], 2, **more)
    program = adaptc.compile(shared_base_program("llama"), one)
    program.validate()
    check(program, one)
    changed = {**one, kinds[-1]: other}
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    for p in (program, loaded):
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(p, {kinds[-1]: other})
            check(p, changed)
        p.validate()
    check(program.bind({kinds[-1]: one[kinds[-1]]}), one)
    for kind in kinds:
        saved = adaptc.save_adapter(program, tmp_path / f"saved {kind}", adapter_name=kind)
        mine, given = file_tensors(saved), file_tensors(changed[kind])
        assert mine.keys() == given.keys()
        assert all(torch.equal(mine[n], t) for n, t in given.items())
    first = kinds[0]
    adaptc.swap(program, {first: None})
    check(program, {k: p for k, p in changed.items() if k != first})
    adaptc.swap(program, {first: changed[first]})
    check(program, changed)
    unloaded = adaptc.unload(program)
    assert len(unloaded.graph.nodes) == len(shared_base_program("llama").graph.nodes)
    assert_same(run_quietly(unloaded, text(3, 7)), run_quietly(shared_base_program("llama"), text(3, 7)))


@pytest.mark.long
@pytest.mark.parametrize("kinds", [("prompt", "prefix"), ("prefix", "tokens", "lora")], ids="+".join)
def test_the_order_of_adding_is_no_matter(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """In one call, or one after the other; keys and values come before all tokens."""
    parts = {k: random(tmp_path / k, k, 1) for k in kinds}
    for order in itertools.permutations(kinds):
        check(adaptc.compile(shared_base_program("llama"), {k: parts[k] for k in order}), parts)
    program = adaptc.compile(shared_base_program("llama"), {kinds[0]: parts[kinds[0]]})
    for kind in kinds[1:]:
        program = program.add_adapter(kind, parts[kind], recompile=True)
    check(program, parts)


@pytest.mark.long
@pytest.mark.parametrize(
    "kinds", [("lora", "prompt"), ("lora", "prefix"), ("lora", "tokens"), tuple(CONFIGS)], ids="+".join
)
def test_training(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Gradients of all that trains, and a step of it."""
    parts = {k: random(tmp_path / k, k, 1) for k in kinds}
    program = adaptc.compile(FAMILIES["llama"].build(), parts, training=True)
    module, inputs = program.module().eval(), text(3, 5, "left")
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert {n for k in kinds for n in trained if f".{k}." in n or n.endswith(f".{k}")} == set(trained)

    weights = torch.linspace(-1, 2, 3 * 61).view(3, 1, 61)
    expected, leaves = differentiable(parts, inputs)
    for logits in (module(**inputs).logits, expected):
        (logits * weights).sum().backward()
    for name, p in trained.items():
        kind = next(k for k in kinds if f".{k}." in name or name.endswith(f".{k}"))
        key = {"prompt": "prompt_embeddings", "prefix": "prompt_embeddings"}.get(
            kind, re.sub(rf"\.{kind}(?=\.|$)", "", name)
        )
        wanted = next(t for n, t in leaves.items() if n.startswith(kind) and n.endswith(key)).grad
        assert wanted is not None
        torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    with torch.no_grad():
        for p in trained.values():
            p.sub_(p.grad, alpha=1e-4)
    saved = {k: adaptc.save_adapter(module, tmp_path / f"trained {k}", adapter_name=k) for k in kinds}
    assert_same({"y": run_quietly(module, inputs).logits}, {"y": formula(saved, inputs)}, 1e-5)
    assert_differs({"y": formula(parts, inputs)}, {"y": formula(saved, inputs)}, 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kinds", [("lora", "tokens"), ("prompt", "prefix"), tuple(CONFIGS)], ids="+".join)
def test_generating(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Greedy tokens are those that the formula chooses one by one."""
    one = {k: random(tmp_path / f"one {k}", k, 1) for k in kinds}
    other = {k: random(tmp_path / f"other {k}", k, 2) for k in kinds}
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), one, max_length=40)
    ids = text(2, 5, None)["input_ids"]

    def expected(parts: dict[str, Path]) -> Tensor:
        out = ids
        for _ in range(6):
            out = torch.cat([out, formula(parts, {"input_ids": out})[:, -1].argmax(-1, keepdim=True)], 1)
        return out

    def said() -> Tensor:
        return gen.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)

    wanted = expected(one)
    assert torch.equal(said(), wanted)
    for kind in kinds:
        with adaptc.debug.assert_no_recompiles():
            adaptc.swap(gen, {kind: other[kind]})
            assert torch.equal(said(), expected({**one, kind: other[kind]}))
            adaptc.swap(gen, {kind: None})
            assert torch.equal(said(), expected({k: p for k, p in one.items() if k != kind}))
            adaptc.swap(gen, {kind: one[kind]})
    assert torch.equal(said(), wanted)


@pytest.mark.long
def test_tasks_behind_keys(tmp_path: Path) -> None:
    """A prompt that asks a caller for something, behind keys that do not; both in a cache."""
    tasks = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2)
    prefix, both = random(tmp_path / "prefix", "prefix", 1), torch.Generator().manual_seed(4)
    program = adaptc.compile(shared_base_program("llama"), {"task": tasks, "prefix": prefix}, generator=both)
    gen = adaptc.compile_for_generation(FAMILIES["llama"].build(), {"task": tasks, "prefix": prefix}, max_length=40)
    saved = adaptc.save_adapter(program, tmp_path / "task", adapter_name="task")
    adaptc.swap(gen, {"task": saved})
    ids, task = text(3, 5, None)["input_ids"], torch.tensor([1, 0, 1])
    out = ids
    for _ in range(4):
        logits = run_quietly(program, {"input_ids": out, "task_ids": task}).logits
        out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], 1)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(gen.generate(ids, task_ids=task, **how), out)
    with pytest.raises(adaptc.AdaptcError, match="task_ids"):
        gen.generate(ids, **how)


class Ordered(nn.Module):
    """One attention that masks by order itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.o = nn.Embedding(31, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.out = nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        b, length = ids.shape
        q, k, v = (t.view(b, length, 3, 4).transpose(1, 2) for t in self.mix(self.table(ids)).split(12, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.o(y.transpose(1, 2).reshape(b, length, 12)))


@pytest.mark.long
def test_attention_that_masks_by_order() -> None:
    """Rows in front of queries are no queries of the tokens that an attention has to itself."""
    torch.manual_seed(0)
    model, ids = Ordered().eval(), torch.arange(15).reshape(3, 5)
    configs = {
        "prefix": PrefixTuningConfig(num_virtual_tokens=4),
        "tokens": AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    }
    outs = []
    for order in (("prefix", "tokens"), ("tokens", "prefix")):
        program = adaptc.compile(model, {k: configs[k] for k in order}, example_inputs=(ids,))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, t in sorted(program.binding.values.items()):
                t.copy_(torch.randn(t.shape, generator=generator))
        outs.append(program(ids).detach())
        program.set_active(["prefix"])
        alone = program(ids).detach()
        program.set_active(["tokens"])
        added = (program(ids) - model(ids)).detach()
        torch.testing.assert_close(outs[-1], alone + added)
        assert float(added.abs().max()) > 1e-2
        torch.testing.assert_close(adaptc.unload(program)(ids), model(ids))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_two_of_a_kind_are_refused(kind: str) -> None:
    """Which one came first would be no adapter's to say: PEFT has no word for it, and files have no place."""
    with pytest.raises(ConfigError, match=r"'a' and 'b' both train the first tokens"):
        adaptc.compile(
            shared_base_program("llama"),
            {n: CONFIGS[kind].replace(num_virtual_tokens=i) for i, n in enumerate("ab", 2)},
        )


@pytest.mark.long
def test_each_is_peft_s_alone(tmp_path: Path) -> None:
    """A directory written from a program of several is one that PEFT loads."""
    parts = {k: random(tmp_path / k, k, 1) for k in ("lora", "prompt")}
    program = adaptc.compile(shared_base_program("llama"), parts)
    saved = adaptc.save_adapter(program, tmp_path / "saved", adapter_name="prompt")
    folder = saved if (saved / "adapter_config.json").exists() else saved / "prompt"
    with quiet(*PROMPT_WARNINGS):
        theirs = load_peft(FAMILIES["llama"].build(), folder)
    assert isinstance(theirs, peft.PeftModel)
    assert_same({"y": run_quietly(theirs, text(3, 7)).logits}, {"y": formula({"prompt": parts["prompt"]}, text(3, 7))})
