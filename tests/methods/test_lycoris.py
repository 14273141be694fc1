"""LoHa and LoKr: illegal options, PEFT's first values, patterns, what training drops, tables of embeddings."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import ConfigError, TargetError
from adaptc.methods.lycoris.loha import LoHa
from adaptc.methods.lycoris.lokr import LoKr
from adaptc.passes.graph.ops import Op
from tests.support.layer_table import Experts
from tests.support.lycoris import (
    CONFIGS,
    assert_close,
    make_layers,
    normal,
    peft_wrapped,
    randomize,
    save_peft_adapter,
    slots_by_file_key,
)


def config(cls, **options):
    return getattr(adaptc, cls)(**{"target_modules": ["a"], **options})


BAD = [
    {"r": 0},
    {"r": True},
    {"r": 2.0},
    {"rank_pattern": {"a": -1}},
    {"rank_dropout": 1.0},
    {"module_dropout": -0.1},
    {"init_weights": "gaussian"},
    {"init_weights": None},
]


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_illegal_options_are_named(cls, bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=rf"{cls}\.{name}"):
        config(cls, **bad)


def test_loha_has_no_lycoris_scheme_and_lokr_has():
    with pytest.raises(ConfigError, match="init_weights must be one of True, False, got 'lycoris'"):
        config("LoHaConfig", init_weights="lycoris")
    assert config("LoKrConfig", init_weights="lycoris").init_weights == "lycoris"


@pytest.mark.parametrize("cls", CONFIGS)
def test_fields_and_defaults_are_pefts(cls):
    def fields(config):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}

    theirs, ours = fields(getattr(peft, cls)()), fields(getattr(adaptc, cls)())
    del ours["target_parameters"], theirs["peft_type"]
    assert {**theirs, "peft_version": None} == ours


@pytest.mark.parametrize("method", [LoHa(), LoKr()])
def test_vectors_are_refused(method):
    with pytest.raises(TargetError, match="two axes"):
        method.slots(Op("weight", (7,)))


SCHEMES = [(c, s) for c in CONFIGS for s in (True, False, "lycoris") if (c, s) != ("LoHaConfig", "lycoris")]
LAYERS = {
    "linear": (lambda: nn.Linear(15, 22), (3, 15), {}),
    "both": (lambda: nn.Linear(15, 22), (3, 15), {"decompose_both": True, "decompose_factor": 11}),
    "conv1d": (lambda: nn.Conv1d(15, 22, 3), (3, 15, 7), {"use_effective_conv2d": True}),
    "conv2d": (lambda: nn.Conv2d(15, 22, (3, 1)), (3, 15, 7, 5), {"use_effective_conv2d": True}),
    "flat": (lambda: nn.Conv2d(15, 22, (3, 2)), (3, 15, 7, 5), {}),
    "whole": (lambda: nn.Conv2d(15, 22, (3, 2)), (3, 15, 7, 5), {"r": 9}),
}


@pytest.mark.few(5)
@pytest.mark.parametrize(("cls", "scheme"), SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_seed_gives_pefts_first_values(cls, scheme, layer):
    build, shape, options = LAYERS[layer]
    known = {f.name for f in dataclasses.fields(getattr(peft, cls))}
    options = {"r": 3, **{k: v for k, v in options.items() if k in known}}
    model = make_layers(build())
    theirs = peft_wrapped(model, cls, seed=4, target_modules=["a"], init_weights=scheme, **options)
    torch.manual_seed(4)
    program = adaptc.compile(model, config(cls, init_weights=scheme, **options), example_inputs=normal(*shape))
    expected = peft.get_peft_model_state_dict(theirs)
    found = slots_by_file_key(program)
    assert {f"base_model.model.{k}" for k in found} == set(expected)
    for key, value in found.items():
        assert torch.equal(value, expected[f"base_model.model.{key}"]), key
    again = adaptc.compile(
        model,
        config(cls, init_weights=scheme, **options),
        example_inputs=normal(*shape),
        generator=torch.Generator().manual_seed(4),
    )
    assert all(torch.equal(v, found[k]) for k, v in slots_by_file_key(again).items())


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_factored_kernels_of_loha_are_pefts_but_for_two_gradients(kind, tmp_path):
    """PEFT differentiates by hand, and takes one half's tensors for the other's in those of hada_w1_a and hada_w2_a."""
    build, shape, options = LAYERS[kind]
    model, x = make_layers(build()), normal(5, *shape[1:])
    theirs = save_peft_adapter(model, "LoHaConfig", tmp_path, target_modules=["a"], r=2, alpha=3, **options)
    program = adaptc.compile(model, tmp_path, example_inputs=x[:3], training=True)
    assert_close(program(x), theirs(x))
    weigh = torch.randn_like(theirs(x))
    (theirs(x) * weigh).sum().backward()
    (program.module()(x) * weigh).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for key, value in slots_by_file_key(program).items():
        grad = expected[f"base_model.model.{key}.default"]
        assert torch.allclose(value.grad, grad, rtol=1e-8, atol=1e-8) != key.endswith("_a"), key
    tensors = [t.detach().clone().requires_grad_() for t in slots_by_file_key(program).values()]
    names = [k.removeprefix("a.") for k in slots_by_file_key(program)]

    def run(*values):
        made = dict(zip(names, values, strict=True))
        (a,) = program.adaptation.attachments
        return a.method.weight(program.ops[a.id], model.a.weight.detach(), made, torch.tensor(1.5))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("cls", CONFIGS)
def test_patterns(cls, tmp_path):
    model, x = make_layers(nn.Linear(15, 22), nn.Linear(22, 6)), normal(5, 15)
    options = {"target_modules": ["a", "b"], "r": 2, "alpha": 3, "rank_pattern": {"b": 1}, "alpha_pattern": {"^a": 1}}
    theirs = save_peft_adapter(model, cls, tmp_path, **options)
    program = adaptc.compile(model, tmp_path, example_inputs=x[:3])
    assert [a.method.r for a in program.adaptation.attachments] == [2, 1]
    assert [float(program.binding.values[a.scale_slot]) for a in program.adaptation.attachments] == [0.5, 3]
    assert_close(program(x), theirs(x))
    with pytest.raises(TargetError, match="rank_pattern"):
        adaptc.compile(model, config(cls, rank_pattern={"c": 4}), example_inputs=x[:3])


def dropped(cls, form, example, model, **options):
    """A training program with random slots, and the change of each output when nothing is dropped."""
    program = adaptc.compile(model, config(cls, r=2, **options), example_inputs=example, training=True, form=form)
    randomize(program)
    module = program.module()
    module.eval()
    base = model(example)
    full = (module(example) - base).detach()
    module.train()
    return program, lambda: (module(example) - base).detach(), full


FORMS = [("LoHaConfig", "weight", False), ("LoKrConfig", "weight", False), ("LoKrConfig", "apply", True)]


@pytest.mark.parametrize(("cls", "form", "centred"), FORMS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_rank_dropout_drops_rows_of_the_change(cls, form, centred, layer):
    build, shape = (nn.Linear(15, 22), (3, 15)) if layer == "linear" else (nn.Conv2d(15, 22, 3), (3, 15, 5, 4))
    options = {"rank_dropout": 0.4, **({"rank_dropout_scale": True} if centred else {})}
    program, change, full = dropped(cls, form, normal(*shape), make_layers(build), **options)
    torch.manual_seed(0)
    counts = []
    for _ in range(12):
        rows = change().movedim(1, 0).flatten(1)
        kept = rows.abs().amax(1) > 1e-9
        counts.append(int(kept.sum()))
        # LoHa divides by the share of rows that are left, LoKr if told to.
        factor = 22 / counts[-1] if centred or cls == "LoHaConfig" else 1
        assert_close(rows, full.movedim(1, 0).flatten(1) * kept.unsqueeze(1) * factor, 1e-9)
    assert len(set(counts)) > 2
    assert 9 < sum(counts) / 12 < 17
    example = normal(*shape)
    merged = adaptc.merge(program)
    assert_close(merged(example), full + adaptc.unload(program)(example), 1e-9)


@pytest.mark.parametrize(("cls", "form", "centred"), FORMS)
def test_nothing_left_is_no_change(cls, form, centred):
    """Where PEFT divides zero by zero."""
    options = {"rank_dropout": 0.9999, **({"rank_dropout_scale": True} if centred else {})}
    _, change, full = dropped(cls, form, normal(3, 15), make_layers(nn.Linear(15, 22)), **options)
    torch.manual_seed(0)
    assert full.abs().max() > 0.1
    assert_close(change(), torch.zeros_like(full), 1e-12)


@pytest.mark.parametrize(("cls", "form", "centred"), FORMS)
def test_module_dropout_drops_all_or_nothing(cls, form, centred):
    _, change, full = dropped(cls, form, normal(3, 15), make_layers(nn.Linear(15, 22)), module_dropout=0.5)
    torch.manual_seed(0)
    seen = set()
    for _ in range(12):
        found = change()
        seen.add(bool(found.abs().max() > 1e-9))
        assert_close(found, full if found.abs().max() > 1e-9 else torch.zeros_like(full), 1e-12)
    assert seen == {True, False}


@pytest.mark.parametrize("cls", CONFIGS)
def test_experts_are_dropped_too(cls):
    model, x = make_layers(Experts(6, 10)), normal(3, 6)
    options = {"target_modules": None, "target_parameters": ["a.matrices"], "rank_dropout": 0.5}
    _, change, full = dropped(cls, "auto", x, model, **options)
    torch.manual_seed(0)
    rows = change().abs().amax(0) > 1e-9
    assert full.abs().amax(0).min() > 1e-9
    assert len({tuple(r.tolist()) for r in rows}) == 3


@pytest.mark.parametrize("cls", CONFIGS)
def test_tables_of_embeddings(cls, tmp_path):
    """Looking up changed rows is a lookup in the changed table: the padding row has no gradient."""
    model = make_layers(nn.Embedding(15, 22, padding_idx=4))
    ids = torch.tensor([[4, 14, 4], [7, 0, 7]])
    program = adaptc.compile(model, config(cls, r=2), example_inputs=ids, form="apply", training=True)
    expected = adaptc.compile(model, config(cls, r=2), example_inputs=ids, form="weight", training=True)
    grads = []
    for p in (randomize(program), randomize(expected)):
        (p.module()(ids) * torch.arange(132.0).reshape(2, 3, 22)).sum().backward()
        grads.append({k: t.grad for k, t in slots_by_file_key(p).items()})
    assert_close(program(ids), expected(ids))
    assert program(ids).sub(model(ids)).abs().min() > 1e-9
    for key, grad in grads[0].items():
        assert_close(grad, grads[1][key], 1e-9)
        assert grad.abs().max() > 0.1, key


@pytest.mark.parametrize("cls", CONFIGS)
def test_tables_with_gradients_by_frequency_have_the_weight_form(cls):
    model, ids = make_layers(nn.Embedding(15, 22, scale_grad_by_freq=True)), torch.tensor([[3, 14, 3]])
    with pytest.raises(ConfigError, match="apply form"):
        adaptc.compile(model, config(cls, r=2), example_inputs=ids, form="apply")
    assert adaptc.compile(model, config(cls, r=2), example_inputs=ids).adaptation.attachments[0].form == "weight"
