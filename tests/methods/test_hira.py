"""HiRA: what is particular to it. The checks that hold for every method are in ``test_every_method``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.adapter_files.directory import read_config
from adaptc.methods.weight_dependent.hira import Hira
from adaptc.passes.graph.ops import Op
from adaptc.runtime.rank_padding import find_paddings
from tests.support.chain import chain, compile_chain, inputs, peft_chain, peft_config, tensor_files_are_equal
from tests.support.custom_models import OneLayer
from tests.support.subject import assert_close, assert_valid, file_key_of, loss, quiet


class Net(nn.Module):
    """An embedding with a padding index, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(23, 15, padding_idx=4)
        self.up = nn.Linear(15, 21)
        self.conv = nn.Conv1d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.up(self.emb(x))))


X = torch.tensor([[3, 9, 22], [0, 4, 9], [7, 7, 1], [11, 2, 3]])
TARGETS = ["emb", "up", "conv"]


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net().double().eval()


def random_adapter(path: Path, seed: int, **options: Any) -> Path:
    """A random adapter of PEFT's, in a directory."""
    with quiet():
        model = peft.get_peft_model(net(), peft.HiraConfig(**{"target_modules": TARGETS, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "hira_" in n:
                nn.init.normal_(p, std=0.5)
    model.save_pretrained(str(path))
    return path


def by_peft(*paths: Path) -> peft.PeftModel:
    """PEFT's model with all of these adapters active."""
    wrapped = peft.PeftModel.from_pretrained(net(), str(paths[0]), adapter_name=paths[0].name, is_trainable=True)
    for path in paths[1:]:
        wrapped.load_adapter(str(path), adapter_name=path.name, is_trainable=True)
    wrapped.base_model.set_adapter([p.name for p in paths])
    return wrapped.eval()


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_are_peft_s(init, tmp_path):
    options = {"r": 5, "target_modules": TARGETS, "init_weights": init}
    first, second = net(), net()
    torch.manual_seed(4)
    with quiet():
        peft.get_peft_model(first, peft.HiraConfig(**options)).save_pretrained(str(tmp_path / "a"))
    torch.manual_seed(4)
    program = adaptc.compile(second, adaptc.HiraConfig(**options), example_inputs=X)
    adaptc.save_adapter(program, tmp_path / "b")
    assert tensor_files_are_equal(tmp_path / "a", tmp_path / "b")
    # In float64, PEFT's cast from float32 has no digits below float32's.
    assert all(torch.equal(t, t.float().double()) for t in program.binding.values.values())
    assert torch.allclose(program(X), net()(X)) == (init is not False)


@pytest.mark.long
@pytest.mark.parametrize("form", ["auto", "weight"])
def test_changes_of_several_add_up(form, tmp_path):
    """Each reads the model's own weight, not what the one before made of it; gradients and merge too."""
    paths = [random_adapter(tmp_path / n, i, r=3 + i) for i, n in enumerate(("one", "two"))]
    program = adaptc.compile(net(), {p.name: p for p in paths}, example_inputs=X, training=True, form=form)
    assert_valid(program)
    wrapped = by_peft(*paths)
    want = wrapped(X)
    assert_close(program(X), want, 1e-9)
    alone = adaptc.compile(adaptc.merge(adaptc.compile(net(), paths[0], example_inputs=X)), paths[1])
    assert not torch.allclose(alone(X), want, rtol=1e-3)  # one after the other is something else
    assert_close(adaptc.merge(program)(X), want, 1e-9)
    module = program.module().eval()
    for out in (module(X), want):
        loss(out).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in wrapped.named_parameters() if "hira_" in n}
    assert set(grads) == set(expected)
    assert len(grads) == 12
    for name, grad in expected.items():
        if "hira_embedding" not in name:  # of which the next test tells
            assert_close(grads[name], grad, 1e-8)
    with quiet():
        assert_close(wrapped.merge_and_unload()(X), want, 1e-9)


@pytest.mark.parametrize("form", ["apply", "weight"])
def test_a_padding_index_gets_no_gradient(form, tmp_path):
    """As in the embedding itself; PEFT's lookup in the changed table forgets the index."""
    path = random_adapter(tmp_path / "one", 3, target_modules=["emb"], r=3)
    with torch.no_grad():
        model = net()
        model.emb.weight[4] = 1.5  # a model may have trained this row
    program = adaptc.compile(model, path, example_inputs=X, training=True, form=form)
    module = program.module().eval()
    found: dict[str, Tensor] = {}
    loss(module(X)).backward()
    found = {n.split(".")[1]: p.grad for n, p in module.named_parameters() if p.grad is not None}
    factors = {n.split(".")[1]: t.detach().clone().requires_grad_() for n, t in program.binding.values.items()}
    table = model.emb.weight.detach()
    table = table * (1 + factors["hira_embedding_A"].T @ factors["hira_embedding_B"].T)
    rows = nn.functional.embedding(X, table, padding_idx=4)
    loss(model.conv(torch.tanh(model.up(rows)))).backward()
    assert set(found) == set(factors)
    for name, leaf in factors.items():
        assert_close(found[name], leaf.grad, 1e-9)
    assert not found["hira_embedding_A"][:, 4].any()
    assert found["hira_embedding_A"][:, 9].all()


def test_lookups_scaled_by_frequency_keep_the_weight_form():
    torch.manual_seed(2)
    model = OneLayer(nn.Embedding(23, 15, scale_grad_by_freq=True)).double()
    config = adaptc.HiraConfig(r=3, target_modules=["layer"], init_weights=False)
    program = adaptc.compile(model, config, example_inputs=X)
    (a,) = program.adaptation.attachments
    assert a.form == "weight"
    assert_close(adaptc.merge(program)(X), program(X), 1e-9)


def test_an_embedding_needs_no_table():
    """The rows that are read are changed, not the vocabulary."""
    program = adaptc.compile(net(), adaptc.HiraConfig(r=3, target_modules=TARGETS), example_inputs=X)
    assert {a.module: a.form for a in program.adaptation.attachments} == {
        "emb": "apply",
        "up": "weight",
        "conv": "weight",
    }


def test_max_norm(tmp_path):
    """PEFT changes the rows that the embedding has shortened, and does not shorten the result."""
    torch.manual_seed(5)
    model = OneLayer(nn.Embedding(23, 15, max_norm=1.0)).double().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with quiet():
        wrapped = peft.get_peft_model(model, peft.HiraConfig(r=3, target_modules=["layer"], init_weights=False))
        wrapped.save_pretrained(str(tmp_path))
        want = wrapped.eval()(X)
    fresh = OneLayer(nn.Embedding(23, 15, max_norm=1.0)).double().eval()
    fresh.load_state_dict(state)
    for form in ("apply", "weight"):
        assert_close(adaptc.compile(fresh, tmp_path, example_inputs=X, form=form)(X), want, 1e-9)


@pytest.mark.parametrize("layer", [nn.Linear(15, 21), nn.Conv1d(15, 21, 3, padding=1)], ids=["linear", "conv"])
def test_dropout_is_peft_s(layer, tmp_path):
    x = torch.randn(4, 15, 15, dtype=torch.float64)
    options = {"r": 3, "hira_dropout": 0.4, "target_modules": ["layer"], "init_weights": False}
    with quiet():
        wrapped = peft.get_peft_model(OneLayer(layer).double(), peft.HiraConfig(**options))
        wrapped.save_pretrained(str(tmp_path))
    program = adaptc.compile(wrapped.unload(), tmp_path, example_inputs=x, training=True)
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(OneLayer(layer).double(), str(tmp_path), is_trainable=True)
    module = program.module()
    for train in (True, False):
        outputs = []
        for m in (wrapped.train(train), module.train(train)):
            torch.manual_seed(8)
            outputs += [m(x), m(x)]
        assert_close(outputs[:2], outputs[2:], 1e-9)
        assert torch.allclose(outputs[0], outputs[1]) != train


def test_groups_of_a_convolution_keep_their_channels():
    """PEFT refuses them. The change is the weight by entries, so a grouped weight stays grouped."""
    torch.manual_seed(6)
    layer, x = nn.Conv2d(6, 9, 3, groups=3).double(), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    config = adaptc.HiraConfig(r=4, target_modules=["layer"], init_weights=False)
    program = adaptc.compile(OneLayer(layer), config, example_inputs=x)
    slots = {n.split(".")[1]: t for n, t in program.binding.values.items()}
    assert {n: tuple(t.shape) for n, t in slots.items()} == {"hira_A": (4, 2, 3, 3), "hira_B": (9, 4, 1, 1)}
    factor = torch.einsum("or,rikl->oikl", slots["hira_B"][:, :, 0, 0], slots["hira_A"])
    changed = nn.functional.conv2d(x, layer.weight * (1 + factor), layer.bias, groups=3)
    assert_close(program(x), torch.tanh(changed), 1e-9)
    assert adaptc.merge(program).state_dict["layer.weight"].shape == layer.weight.shape


def ranks(program: adaptc.AdaptedProgram) -> dict[str, int | None]:
    return {a.key: program.binding.methods[a.id].sizes.rank() for a in program.adaptation.attachments}


@pytest.mark.long
def test_ranks_that_peft_forgets(tmp_path):
    """PEFT does not look at rank_pattern for the first adapter of a layer, and writes it beside tensors of rank r."""
    path = tmp_path / "peft"
    model = peft_chain(peft_config("HiraConfig", r=5, rank_pattern={"k": 3}), path)
    assert read_config(path)["rank_pattern"] == {"k": 3}
    swapped = compile_chain(adaptc.HiraConfig(r=2, target_modules=["q", "k", "v"]))
    adaptc.swap(swapped, path)
    for program in (swapped, compile_chain(path)):
        assert ranks(program) == {"q": 5, "k": 5, "v": 5}
        assert_close(program(inputs(4)), model(inputs(4)), 1e-10)
        ours = adaptc.save_adapter(program, tmp_path / "ours")
        assert tensor_files_are_equal(path, ours)
        assert read_config(ours)["rank_pattern"] == {}
        again = peft.PeftModel.from_pretrained(chain(), str(ours)).eval()
        assert_close(again(inputs(4)), model(inputs(4)), 1e-10)


def test_ranks_of_modules(tmp_path):
    """They are what the config says; PEFT reads and writes such a file where a layer has an adapter already."""
    config = adaptc.HiraConfig(r=5, rank_pattern={"k": 3}, target_modules=["q", "k", "v"], init_weights=False)
    program = compile_chain(config)
    assert ranks(program) == {"q": 5, "k": 3, "v": 5}
    ours = adaptc.save_adapter(program, tmp_path / "ours")
    peft_chain(peft_config("HiraConfig", r=2), tmp_path / "other")
    wrapped = peft.PeftModel.from_pretrained(chain(), str(tmp_path / "other"))
    wrapped.load_adapter(str(ours), adapter_name="second")
    wrapped.set_adapter("second")
    assert_close(wrapped.eval()(inputs(4)), program(inputs(4)), 1e-10)
    wrapped.save_pretrained(str(tmp_path / "again"), selected_adapters=["second"])
    again = tmp_path / "again" / "second"
    adaptc.swap(program, tmp_path / "other")
    adaptc.swap(program, again)
    assert ranks(program) == {"q": 5, "k": 3, "v": 5}
    assert read_config(adaptc.save_adapter(program, tmp_path / "last"))["rank_pattern"] == {"k": 3}
    assert tensor_files_are_equal(again, ours)


def test_ranks_can_be_padded():
    linear, conv = Op("linear", (7, 5), torch.ops.aten.linear.default), Op("conv_transpose", (7, 5, 3))
    for op, forms in ((linear, ["weight"]), (conv, ["weight"])):
        assert all(find_paddings(Hira(r=2), op, f) for f in forms)
    embedding = Op("embedding", (7, 5), torch.ops.aten.embedding.default, (-1, False, False))
    assert find_paddings(Hira(r=2), embedding, "apply")


def test_files_of_convolutions_and_embeddings_go_both_ways(tmp_path):
    program = adaptc.compile(net(), adaptc.HiraConfig(r=3, target_modules=TARGETS), example_inputs=X)
    with torch.no_grad():
        for t in program.binding.values.values():
            t.copy_(torch.randn(t.shape))
    loaded = peft.PeftModel.from_pretrained(net(), str(adaptc.save_adapter(program, tmp_path))).eval()
    assert_close(loaded(X), program(X), 1e-9)
    assert {file_key_of(n) for n, _ in loaded.named_parameters() if "hira_" in n} == {
        *(f"{n}.hira_{f}" for n in ("up", "conv") for f in "AB"),
        *(f"emb.hira_embedding_{f}" for f in "AB"),
    }


def test_refusals():
    for options, why in (
        ({"r": 0}, "HiraConfig.r must be a positive integer"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be a positive integer"),
        ({"hira_dropout": 1.0}, "hira_dropout must lie in"),
        ({"init_weights": "normal"}, "True, False or 'gaussian', got 'normal'"),
        ({"init_weights": None}, "init_weights"),
    ):
        with pytest.raises(adaptc.ConfigError, match=why):
            adaptc.HiraConfig(**options)
    assert adaptc.HiraConfig(init_weights="Gaussian").method("up", "linear").scheme == "gaussian"
    with pytest.raises(adaptc.TargetError, match="HiRA needs a weight with two axes or more"):
        Hira().slots(Op("weight", (7,)))
