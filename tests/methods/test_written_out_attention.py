"""Prefixes in attention that is written out: next to PEFT, and to PyTorch's own attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

import adaptc
from adaptc import AdaptionPromptConfig, CartridgeConfig, PrefixTuningConfig
from tests.support.families import FAMILIES, perturb
from tests.support.oracle import (
    Oracle,
    assert_differs,
    assert_same,
    assert_same_gradients,
    file_tensors,
    gradients,
    quiet,
)
from tests.support.prompts import PROMPT_WARNINGS, labels, run_quietly, text
from tests.support.written_out import eager_base_program, eager_model, unpadded_logits

#: grouped queries, one layer for all three, normed queries, a cap, softmax in float32, heads and batches on one axis,
#: masks by ``where``
NAMES = ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "bloom", "gpt_neo"]
#: those whose attention is PyTorch's by default, and the same
BOTH = ["llama", "gpt2", "qwen3", "gpt_neox"]


def prefix(name: str, path: Path, cls: str = "PrefixTuningConfig", seed: int = 0, **config: Any) -> Oracle:
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **config}
    return Oracle.wrap_and_save(name, getattr(peft, cls)(**config), path, model=eager_model(name), seed=seed)


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["right", "left", None])
def test_outputs(name: str, padding: str | None, tmp_path: Path) -> None:
    oracle = prefix(name, tmp_path)
    program = adaptc.compile(eager_base_program(name), tmp_path)
    program.validate()
    other = adaptc.compile(FAMILIES[name].build(), tmp_path) if name in BOTH else None
    for batch, length in ((3, 11), (1, 7), (2, 3)):
        inputs = text(batch, length, padding)
        expected = unpadded_logits(oracle.model, inputs)
        assert_same(unpadded_logits(program, inputs), expected)
        assert_differs(expected, unpadded_logits(eager_base_program(name), inputs))
        if other is not None:
            assert_same(unpadded_logits(program, inputs), unpadded_logits(other, inputs))
    assert_same(unpadded_logits(adaptc.unload(program), text(3, 11)), unpadded_logits(eager_model(name), text(3, 11)))


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_training(name: str, tmp_path: Path) -> None:
    oracle = prefix(name, tmp_path)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    module = oracle.module_with_peft_values(adaptc.compile(eager_model(name), config, training=True)).eval()
    inputs = {**text(3, 7, "left"), "labels": labels(text(3, 7))}
    with quiet(*PROMPT_WARNINGS):
        got, want = module(**inputs), oracle.model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    ours, theirs = gradients(module, got), gradients(oracle.model, want)
    assert_same_gradients(ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swaps_to_other_numbers_of_tokens(backend: str, tmp_path: Path) -> None:
    program = adaptc.compile(eager_base_program("gemma2"), PrefixTuningConfig(num_virtual_tokens=3), backend=backend)
    oracles = {n: prefix("gemma2", tmp_path / str(n), num_virtual_tokens=n, seed=n) for n in (1, 4, 9)}
    run_quietly(program, text(2, 5))
    with adaptc.debug.assert_no_recompiles():
        for n, oracle in oracles.items():
            adaptc.swap(program, oracle.path)
            for size in ((3, 11), (1, 2)):
                assert_same(unpadded_logits(program, text(*size)), unpadded_logits(oracle.model, text(*size)), 1e-5)
            bound = program.bind(file_tensors(oracle.path))
            assert bound.binding.config.num_virtual_tokens == n
            assert_same(
                unpadded_logits(bound, text(3, 7, "left")), unpadded_logits(oracle.model, text(3, 7, "left")), 1e-5
            )
    assert_same(
        unpadded_logits(program.bind(None), text(3, 7)), unpadded_logits(eager_model("gemma2"), text(3, 7)), 1e-5
    )
    program.validate()


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_saved_programs(name: str, tmp_path: Path) -> None:
    one, other = (prefix(name, tmp_path / str(n), num_virtual_tokens=n) for n in (3, 8))
    program, inputs = adaptc.compile(eager_base_program(name), one.path), text(3, 5, "left")
    adaptc.swap(program, other.path)
    torch.export.save(program, tmp_path / "torch.pt2")
    again = torch.export.load(tmp_path / "torch.pt2").module()
    assert_same(unpadded_logits(again, inputs), unpadded_logits(other.model, inputs))
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    adaptc.swap(loaded, one.path)
    assert_same(unpadded_logits(loaded, inputs), unpadded_logits(one.model, inputs))
    unloaded = adaptc.unload(loaded)
    assert_same(unpadded_logits(unloaded, inputs), unpadded_logits(eager_model(name), inputs))
    assert len(unloaded.graph.nodes) == len(eager_base_program(name).graph.nodes)


@pytest.mark.long
def test_cartridges_and_those_of_a_text(tmp_path: Path) -> None:
    oracle = prefix("qwen3", tmp_path, "CartridgeConfig", num_frozen_tokens=2)
    program = adaptc.compile(eager_base_program("qwen3"), oracle.path)
    assert_same(run_quietly(program, text(3, 7)), run_quietly(oracle.model, text(3, 7)))
    usual = adaptc.compile(FAMILIES["qwen3"].build(), CartridgeConfig(num_virtual_tokens=3))
    for p in (program, usual):
        adaptc.prefixes.initialize_kv_prefix_from_text(p, text=torch.arange(4, 17), num_virtual_tokens=9)
    assert_same(run_quietly(program, text(3, 7)), run_quietly(usual, text(3, 7)))
    assert_differs(run_quietly(usual, text(3, 7)), run_quietly(eager_base_program("qwen3"), text(3, 7)))


@pytest.mark.long
def test_half_precision() -> None:
    """Chances are computed in float32 and cast back, as in the model."""
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    outs = []
    for how in ("eager", "sdpa"):
        model = FAMILIES["llama"].build().bfloat16()
        model.set_attn_implementation(how)
        program = adaptc.compile(model, PrefixTuningConfig(num_virtual_tokens=3))
        outs.append(run_quietly(program.bind({"prompt_embeddings": rows}), text(3, 7)).logits)
    assert outs[0].dtype == torch.bfloat16
    assert_same({"logits": outs[0]}, {"logits": outs[1]}, 3e-2)


@pytest.mark.long
def test_programs_in_other_ops() -> None:
    """A program that was decomposed before: products of three axes, and softmax in the ops that backends have."""
    model, free = eager_model("llama"), {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = {**text(2, 6), "use_cache": False}
    shapes = {"input_ids": free, "attention_mask": free, "use_cache": None}
    captured = torch.export.export(model, (), inputs, dynamic_shapes=shapes).run_decompositions()
    assert not captured.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    config = PrefixTuningConfig(num_virtual_tokens=5, num_layers=2)
    programs = [adaptc.compile(captured, config), adaptc.compile(eager_base_program("llama"), config)]
    for count in (5, 1, 8):
        rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
        one, two = (
            run_quietly(p.bind({"prompt_embeddings": rows}), {**text(3, 7, "left"), **more}).logits
            for p, more in zip(programs, ({"use_cache": False}, {}), strict=True)
        )
        assert_same({"logits": one}, {"logits": two})
    assert_same(
        run_quietly(adaptc.unload(programs[0]), {**text(3, 7), "use_cache": False}), run_quietly(model, text(3, 7))
    )


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


@pytest.mark.long
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
        one, two = (run_quietly(p, inputs).last_hidden_state for p in programs)
        assert_same({"out": one}, {"out": two})
        assert_differs({"out": one}, {"out": run_quietly(models[0], inputs).last_hidden_state})
    if (name, kind) == ("t5", "prefix"):
        with behind_a_cache(models[0], values["prompt_encoder.default.embedding.weight"]):
            expected = run_quietly(models[0], inputs).last_hidden_state
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
