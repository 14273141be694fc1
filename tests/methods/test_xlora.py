"""X-LoRA next to PEFT's: outputs, scalings, gradients, files both ways, swaps; and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import adaptc
from adaptc import debug
from adaptc.errors import AdaptcError, CheckpointError, ConfigError, MergeError, SwapError, TargetError
from adaptc.methods.routed.xlora_classifier import ScalingRule
from adaptc.passes.protocol.regions import COEFFICIENT_ROLE, node_tag
from tests.support.families import FAMILIES, VOCAB
from tests.support.oracle import (
    EXPECTED_WARNINGS,
    assert_differs,
    assert_same,
    file_tensors,
    load_peft,
    loss,
    quiet,
    shared_base_program,
)
from tests.support.training import check_gradient_checkpointing
from tests.support.xlora import (
    OTHERS,
    build,
    classifier_of,
    config_of,
    experts,
    peft_model,
    save_xlora_adapter,
    scalings_of,
)

NAMES = ["llama", "gpt2"]
#: options that each change what experts count
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 11},
    "top k": {"top_k_lora": 2, "softmax_temperature": 0.4},
    "no softmax": {"enable_softmax": False, "global_scaling_weight": 1.7},
    "softmax of top k": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "deep": {"xlora_depth": 3, "xlora_size": 7, "xlora_dropout_p": 0.0},
    "first pass": {"scaling_pass_value": 0.6, "layerwise_scalings": True},
    "first pass of some": {"scaling_pass_value": -0.6, "top_k_lora": 2, "enable_softmax": False},
}


def called(module: Any, ids: Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return module(input_ids=ids, **more)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(name: str, others: bool = False) -> dict[str, str]:
        return experts(name, tmp_path_factory.mktemp("experts"), OTHERS[name] if others else ())

    return make


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs(name, options, adapters, tmp_path):
    """Outputs and scalings are PEFT's, for other sizes than those that were captured, too."""
    wrapped = peft_model(name, adapters(name), **OPTIONS[options])
    program = adaptc.compile(shared_base_program(name), save_xlora_adapter(wrapped, tmp_path))
    program.validate()
    for batch, length in ((2, 7), (3, 2), (1, 5)):
        ids = tokens(batch, length)
        assert_same(called(program, ids), called(wrapped, ids), 2e-5)  # sums in another order, of large weights
        want = scalings_of(wrapped)
        assert want.shape[2:] == (len(program.adaptation.attachments), 3)
        torch.testing.assert_close(debug.xlora_scalings(program, input_ids=ids), want, rtol=1e-4, atol=1e-5)
    plain = called(FAMILIES[name].build(), ids)
    assert_differs(called(program, ids), plain)
    if "scaling_pass_value" in OPTIONS[options]:
        without = peft_model(name, adapters(name), **{**OPTIONS[options], "scaling_pass_value": 0.0})
        assert_differs(called(without, ids), called(program, ids), 1e-3)
    bare = adaptc.unload(program)
    assert_same(called(bare, ids), plain)
    assert len(bare.graph.nodes) == len(shared_base_program(name).graph.nodes)


def test_a_head_that_reads_less_than_the_layers_give(adapters, tmp_path):
    """OPT projects the last hidden state before its head; PEFT's classifier is given what the head is."""
    wrapped = peft_model("opt", adapters("opt"))
    program = adaptc.compile(shared_base_program("opt"), save_xlora_adapter(wrapped, tmp_path))
    ids = tokens(3, 7)
    assert_same(called(program, ids), called(wrapped, ids), 2e-5)  # sums in another order, of large weights
    assert_differs(called(program, ids), called(FAMILIES["opt"].build(), ids))
    with pytest.raises(TargetError, match="give hidden_size=20"):
        adaptc.compile(shared_base_program("opt"), config_of("opt", adapters("opt")).replace(hidden_size=24))


@given(st.data())
@settings(deadline=None)
def test_what_experts_count(data):
    """As PEFT's layer says, for any number of layers and experts, with ties and zeros."""
    from peft.tuners.xlora.layer import XLoraLayer

    layers, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    k = data.draw(st.none() | st.integers(1, count))
    softmax_topk = data.draw(st.booleans())
    rows = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=6 * layers * count, max_size=6 * layers * count)
    scalings = torch.tensor(data.draw(rows)).reshape(2, 3, layers, count)
    config = type("Config", (), {"top_k_lora": k, "enable_softmax_topk": softmax_topk})()
    got = ScalingRule(False, k, softmax_topk).zero_unselected(scalings)
    for i in range(layers):
        theirs = XLoraLayer(None, None, None, i, config)  # type: ignore[arg-type]
        torch.testing.assert_close(got[:, :, i], theirs.get_maybe_topk_scalings(scalings))


def test_one_first_pass_serves_all_sites(adapters):
    program = adaptc.compile(shared_base_program("llama"), config_of("llama", adapters("llama")))
    tags = {n: t for n in program.graph.nodes if (t := node_tag(n)) and t["role"] == COEFFICIENT_ROLE}
    (made,) = [n for n in tags if any(u not in tags for u in n.users)]
    assert len({node_tag(u)["site"] for u in made.users}) == len(program.adaptation.attachments)
    assert sum(bool(t.get("first_pass")) for t in tags.values()) == 1
    products = [n for n in tags if n.target is torch.ops.aten.linear.default]
    # Those of the base once more, all but the head's, and the classifier's.
    plain = shared_base_program("llama").graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(products) == len(plain) - 1 + 1


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training(name, trained, adapters, tmp_path):
    """Gradients of the classifier are PEFT's, and of the experts where they train; what is written is read by PEFT."""
    options = {"use_trainable_adapters": trained, **OPTIONS["layerwise"]}
    wrapped = peft_model(name, adapters(name), **options)
    program = adaptc.compile(build(name), config_of(name, adapters(name), **options))
    module = program.module()
    found = {n.replace(".default", ""): p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in classifier_of(wrapped).items():
            found[key].copy_(value.reshape(found[key].shape))
    ids = tokens(3, 7)
    grads = []
    for model in (module, wrapped):
        model.zero_grad()
        loss(model(input_ids=ids)).backward()
    theirs = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in theirs) == any("lora_A" in n for n in found) == trained
    for key, p in found.items():
        if key.startswith("internal_xlora_classifier"):
            want = theirs[f"base_model.{key}"].grad.reshape(p.shape)
        else:
            module_path, _, slot = key.partition(".lora_")
            half, axis = slot, 0 if "A" in slot.partition(".")[0][-1:] else 1
            stem = f"base_model.lora_model.model.{module_path}.lora_{half.partition('.')[0]}"
            parts = [g.grad for i in range(3) for n, g in theirs.items() if n.startswith(f"{stem}.{i}")]
            want = torch.cat(parts, axis)
        grads.append(float(want.abs().max()))
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-4 * grads[-1], msg=lambda m, k=key: f"{k}: {m}")
    assert sum(g > 0 for g in grads) > 0.6 * len(grads)
    adaptc.save_adapter(program, tmp_path)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        f"base_model.{k}": tuple(t.shape) for k, t in classifier_of(wrapped).items()
    }
    if name == "llama":  # PEFT itself does not know experts of others
        assert_same(called(load_peft(build(name), tmp_path), ids), called(wrapped, ids))
    again = adaptc.compile(shared_base_program(name), tmp_path)
    assert_same(called(again, ids), called(program, ids))
    for i, path in adapters(name).items():
        before, after = file_tensors(Path(path)), file_tensors(tmp_path / i)
        kept = {k: t for k, t in before.items() if ".base_layer." not in k}
        assert sorted(after) == sorted(kept)
        assert all(torch.equal(after[k], t) for k, t in kept.items())
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    with quiet(*EXPECTED_WARNINGS):
        wrapped.save_pretrained(str(tmp_path / "peft"))
    assert sorted(stored) == sorted(json.loads((tmp_path / "peft" / "adapter_config.json").read_text()))


@pytest.mark.long
def test_a_training_step_with_dropout_and_checkpoints(tmp_path):
    """The classifier's dropout and the experts' act, the same again where a block is computed once more."""
    found = experts("llama", tmp_path, lora_dropout=0.3)
    config = config_of("llama", found, xlora_depth=2, xlora_size=9, xlora_dropout_p=0.5, use_trainable_adapters=True)
    program = adaptc.compile(build("llama"), config, training=True)
    ids = tokens(3, 7)
    module, grads = check_gradient_checkpointing(program, input_ids=ids, labels=ids)
    module.eval()
    module(input_ids=ids, labels=ids).loss.backward()
    assert any(not torch.allclose(p.grad, grads[n]) for n, p in module.named_parameters() if p.grad is not None)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.few(1)
@pytest.mark.parametrize("options", ["layerwise", "first pass"])
def test_swaps_to_other_experts(backend, options, adapters, tmp_path):
    """Another number of experts, other ranks, other layers among the compiled ones, another classifier."""
    models = [peft_model("llama", adapters("llama", o), seed=int(o), **OPTIONS[options]) for o in (False, True)]
    paths = [save_xlora_adapter(m, tmp_path / str(i)) for i, m in enumerate(models)]
    program = adaptc.compile(shared_base_program("llama"), paths[0], backend=backend)
    called(program, tokens(2, 5))
    with debug.assert_no_recompiles():
        for i in (1, 0):
            adaptc.swap(program, paths[i])
            for size in ((2, 7), (1, 3)):
                assert_same(called(program, tokens(*size)), called(models[i], tokens(*size)), 2e-5)
            program.validate()
            bound = program.bind(paths[1 - i])
            assert_same(called(bound, tokens(3, 4)), called(models[1 - i], tokens(3, 4)), 2e-5)
            want = scalings_of(models[1 - i])
            torch.testing.assert_close(debug.xlora_scalings(bound, input_ids=tokens(3, 4)), want, rtol=1e-4, atol=1e-5)
    plain = called(FAMILIES["llama"].build(), tokens(3, 4))
    assert_same(called(program.bind(None), tokens(3, 4)), plain)
    with program.scaled(0.0):
        assert_same(called(program, tokens(3, 4)), plain)
    assert adaptc.verify(program, FAMILIES["llama"].build()).ok


@pytest.mark.long
def test_saved_programs(adapters, tmp_path):
    one, other = (peft_model("gpt2", adapters("gpt2", o), **OPTIONS["top k"]) for o in (False, True))
    program = adaptc.compile(shared_base_program("gpt2"), save_xlora_adapter(one, tmp_path / "one"))
    ids = tokens(3, 6)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "ours.pt2"))
    assert_same(called(loaded, ids), called(one, ids))
    adaptc.swap(loaded, save_xlora_adapter(other, tmp_path / "other"))
    assert_same(called(loaded, ids), called(other, ids))
    torch.export.save(loaded, tmp_path / "torch.pt2")
    again = torch.export.load(tmp_path / "torch.pt2").module()
    assert_same(called(again, ids, attention_mask=torch.ones_like(ids)), called(other, ids))
    torch.testing.assert_close(debug.xlora_scalings(loaded, input_ids=ids), scalings_of(other), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_rows_with_adapters_of_their_own(adapters, tmp_path):
    models = [peft_model("llama", adapters("llama"), seed=i) for i in range(2)]
    paths = [save_xlora_adapter(m, tmp_path / str(i)) for i, m in enumerate(models)]
    program = adaptc.compile(shared_base_program("llama"), paths[0])
    bank = program.bank({"a": paths[0], "b": paths[1]}, capacity=3)
    ids = tokens(3, 6)
    got = called(bank, ids, adapters=["b", None, "a"]).logits
    rows = [called(models[1], ids), called(FAMILIES["llama"].build(), ids), called(models[0], ids)]
    for i, want in enumerate(rows):
        torch.testing.assert_close(got[i], want.logits[i], rtol=0, atol=2e-5)
    other = save_xlora_adapter(peft_model("llama", adapters("llama", True)), tmp_path / "other")
    bank = program.bank({"a": paths[0], "c": other})
    with pytest.raises(AdaptcError, match=r"layers and experts can be filled up.*agree in them"):
        called(bank, ids, adapters=["a", "c", "a"])


@pytest.mark.long
def test_half_precision(adapters, tmp_path):
    model = FAMILIES["llama"].build().bfloat16()
    wrapped = peft_model("llama", adapters("llama"))
    program = adaptc.compile(model, save_xlora_adapter(wrapped, tmp_path))
    assert_same(called(program, tokens(2, 5)).logits.float(), called(wrapped, tokens(2, 5)).logits, 6e-2)


@pytest.mark.slow
def test_packages(adapters, tmp_path):
    wrapped = peft_model("llama", adapters("llama"))
    program = adaptc.compile(shared_base_program("llama"), save_xlora_adapter(wrapped, tmp_path / "a"))
    runner = adaptc.load_package(adaptc.package(program, tmp_path / "package.pt2"))
    assert_same(called(runner, tokens(2, 5)), called(wrapped, tokens(2, 5)))
    model = FAMILIES["llama"].build()
    assert_same(called(runner.base, tokens(2, 5)), called(model, tokens(2, 5)))
    assert adaptc.verify(runner, model).ok
    other = save_xlora_adapter(
        peft_model("llama", experts("llama", tmp_path / "one", [(3, ["q_proj"])])), tmp_path / "b"
    )
    with pytest.raises(SwapError, match="the compiled code takes"):
        adaptc.swap(runner, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": None}, "adapters names no experts"),
        ({"adapters": {"0": "nowhere"}}, r"adapter '0', which this one is made of, is not in 'nowhere'"),
        ({"top_k_lora": 4}, r"top_k_lora=4 is more than there are adapters \(3\)"),
        ({"top_k_lora": 0}, "top_k_lora must be a positive integer"),
        ({"enable_softmax_topk": True}, "softmax over those that top_k_lora chooses"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must not be zero"),
        ({"xlora_depth": 0}, "xlora_depth must be a positive integer"),
        ({"xlora_dropout_p": 1.5}, "xlora_dropout_p must lie in"),
        ({"target_modules": ["q_proj"]}, "the experts say which layers are adapted"),
        ({"layers_to_transform": [1]}, "the experts say which layers are adapted"),
        ({"modules_to_save": ["lm_head"]}, "X-LoRA trains its classifier"),
        ({"hidden_size": 23}, r"reads none that is \(batch, length, 23\).*reads one of 24 values: give hidden_size=24"),
    ],
)
def test_configs(options, message, adapters):
    with pytest.raises((ConfigError, CheckpointError, TargetError), match=message):
        adaptc.compile(shared_base_program("llama"), config_of("llama", adapters("llama")).replace(**options))


@pytest.mark.long
def test_refusals(adapters, tmp_path):
    wrapped = peft_model("llama", adapters("llama"), **OPTIONS["layerwise"])
    path = save_xlora_adapter(wrapped, tmp_path / "a")
    program = adaptc.compile(shared_base_program("llama"), path)
    before = called(program, tokens(2, 5))
    with pytest.raises(MergeError, match="weighs its experts token by token"):
        adaptc.merge(program)
    with pytest.raises(ConfigError, match="xlora acts on activations"):
        adaptc.convert_to_lora(path, program, rank=2)
    with pytest.raises(ConfigError, match="one X-LoRA adapter that a program runs, and of such this one has none"):
        debug.xlora_scalings(shared_base_program("llama"), input_ids=tokens(2, 5))
    with quiet(*EXPECTED_WARNINGS):
        wrapped.save_pretrained(str(tmp_path / "lossy"))
    with pytest.raises(CheckpointError, match=r"no 'internal_xlora_classifier.layers.0.weight'. PEFT 0.21 leaves out"):
        adaptc.swap(program, tmp_path / "lossy")
    other = save_xlora_adapter(peft_model("llama", adapters("llama"), **OPTIONS["top k"]), tmp_path / "b")
    with pytest.raises(SwapError):
        adaptc.swap(program, other)
    dora = experts("llama", tmp_path / "dora", [(2, ["q_proj"])], use_dora=True)
    with pytest.raises(ConfigError, match="of plain LoRA adapters"):
        adaptc.compile(shared_base_program("llama"), config_of("llama", dora))
    uneven = experts("llama", tmp_path / "x", [(2, ["q_proj"])], lora_dropout=0.1)
    config = config_of("llama", {**adapters("llama"), "3": uneven["0"]})
    with pytest.raises(ConfigError, match="lora_dropouts that differ"):
        adaptc.compile(build("llama"), config, training=True)
    assert_same(called(program, tokens(2, 5)), before, 0)
    assert "xlora" in str(adaptc.report(program))
