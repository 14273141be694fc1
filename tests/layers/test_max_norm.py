"""Embeddings with ``max_norm``: the base, adapters of them, training and files are PEFT's; no weight is written to.

torch shortens rows of the weight, in place, when a call looks them up, and PEFT has the columns of LoRA's A looked up
in the same way. PEFT is run on every row before it is compared with, so that all it would write is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from tests.support.subject import FILE, assert_close, loss, quiet

ROWS, WIDTH, OUT = 11, 7, 5
EVERY = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)).reshape(1, ROWS)
IDS = torch.tensor([[3, 0, 7], [7, 10, 1]])


class Net(nn.Module):
    """Rows of lengths from a tenth to ten times what is allowed, and a linear layer behind them."""

    def __init__(self, kind: type = nn.Embedding, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.emb = kind(ROWS, WIDTH, **{"max_norm": 1.5, **options}).double()
        self.head = nn.Linear(WIDTH, OUT).double()
        with torch.no_grad():
            self.emb.weight.mul_(torch.logspace(-1, 1, ROWS)[EVERY[0]].unsqueeze(1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


class Tied(Net):
    """The head reads what the lookup before it left."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Linear(WIDTH, ROWS, bias=False).double()
        self.head.weight = self.emb.weight


def twin(model: nn.Module) -> nn.Module:
    """Calls of it leave ``model`` alone."""
    return copy.deepcopy(model)


def wrapped(model: nn.Module, config: peft.PeftConfig, path: Any) -> nn.Module:
    """PEFT's, with random values, saved before it has been called, and then called with every row."""
    with quiet():
        theirs = peft.get_peft_model(twin(model), config).double().eval()
        torch.manual_seed(8)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p))
        theirs.save_pretrained(str(path))
        theirs(EVERY)
    return theirs


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm_type": 1.0},
    {"norm_type": float("inf")},
    {"norm_type": 3.5, "max_norm": 0.3},
    {"sparse": True},
    {"padding_idx": 7},
    {"scale_grad_by_freq": True},
    {"max_norm": 1000.0},
]


@pytest.mark.few(4)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beside_adapted_layers(options):
    """The most common case. Neither capture nor calls change the model or the program."""
    model = Net(**options)
    before, expected = model.emb.weight.detach().clone(), twin(model)(EVERY)
    config = adaptc.LoraConfig(r=2, target_modules=["head"])
    for given_ in (model, torch.export.export(twin(model), (IDS,))):
        inputs = {} if given_ is not model else {"example_inputs": IDS}
        program = adaptc.compile(given_, config, **inputs)
        assert torch.equal(model.emb.weight, before)
        ids = EVERY if given_ is model else EVERY[:, :6].reshape(2, 3)
        held = {k: t.clone() for k, t in program.state_dict.items()}
        assert_close(program(ids), twin(model)(ids))
        assert_close(adaptc.merge(program)(ids), twin(model)(ids))
        assert_close(program.base(ids), twin(model)(ids))
        assert all(torch.equal(held[k], t) for k, t in program.state_dict.items())
    assert torch.equal(model.emb.weight, before)
    assert not expected.isnan().any()


def test_short_rows_are_the_models_own():
    """Nothing is copied where no row is too long."""
    model = Net(max_norm=1000.0)
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["head"]), example_inputs=IDS)
    assert program.state_dict["emb.weight"].data_ptr() == model.emb.weight.data_ptr()


def configs(name: str) -> peft.PeftConfig:
    if name == "lora":
        return peft.LoraConfig(r=3, lora_alpha=5, target_modules=["emb"], init_lora_weights=False)
    if name == "dora":
        return peft.LoraConfig(r=3, target_modules=["emb"], use_dora=True)
    if name == "oft":
        return peft.OFTConfig(target_modules=["emb"], oft_block_size=7, use_cayley_neumann=False)
    if name == "tokens":
        return peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[2, 7, 9])
    if name == "beside":
        return peft.LoraConfig(r=2, target_modules=["head"], trainable_token_indices={"emb": [10, 3]})
    return peft.LoraConfig(r=2, target_modules=["head"], modules_to_save=["emb"])


@pytest.mark.long
@pytest.mark.few(4)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["lora", "dora", "oft", "tokens", "beside", "saved"])
def test_adapters_of_it_are_pefts(name, options, tmp_path):
    """As PEFT trains and runs them; a merge, which is another model in PEFT, computes the same here."""
    model = Net(**options)
    theirs = wrapped(model, configs(name), tmp_path / "peft")
    expected = theirs(EVERY).detach()
    assert float((expected - twin(model)(EVERY)).detach().abs().max()) > 1e-2
    program = adaptc.compile(model, tmp_path / "peft", example_inputs=IDS)
    assert_close(program(EVERY), expected, 1e-6)
    assert_close(adaptc.merge(program)(EVERY), program(EVERY).detach(), 1e-6)
    assert_close(adaptc.unmerge(adaptc.merge(program))(EVERY), program(EVERY).detach(), 0)
    assert_close(adaptc.unload(program)(EVERY), twin(model)(EVERY))
    adaptc.save(program, tmp_path / "x.pt2")
    loaded = adaptc.load(tmp_path / "x.pt2")
    assert_close(loaded(EVERY), program(EVERY).detach(), 1e-12)
    assert_close(adaptc.merge(loaded)(EVERY), program(EVERY).detach(), 1e-6)
    other = adaptc.compile(model, configs(name), example_inputs=IDS)
    adaptc.swap(other, tmp_path / "peft")
    assert_close(other(EVERY), expected, 1e-6)
    report = adaptc.verify(program, model)
    assert report.ok, report
    ours = load_file(adaptc.save_adapter(program, tmp_path / "ours") / FILE)
    given_ = load_file(tmp_path / "peft" / FILE)
    assert ours.keys() == given_.keys()
    assert all(torch.equal(ours[k], t) for k, t in given_.items())


@pytest.mark.long
def test_a_file_with_the_base_is_shortened_too(tmp_path):
    """PEFT writes the weights of an embedding whose vocabulary has changed."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(ROWS, WIDTH, max_norm=0.7)
            self.head = nn.Linear(WIDTH, OUT)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed_tokens(ids))

    for targets in (["head"], ["head", "embed_tokens"]):
        torch.manual_seed(1)
        grown, model = Named().eval(), Named().eval()
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        with quiet():
            theirs = peft.get_peft_model(twin(grown), config).eval()
            theirs.save_pretrained(str(tmp_path))
        key = f"base_model.model.embed_tokens.{'base_layer.' if len(targets) > 1 else ''}weight"
        save_file({**load_file(tmp_path / FILE), key: grown.embed_tokens.weight.detach()}, tmp_path / FILE)
        model.head.load_state_dict(grown.head.state_dict())
        program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=targets), example_inputs=IDS)
        adaptc.swap(program, tmp_path)
        assert_close(program(EVERY), theirs(EVERY).detach(), 1e-5)


@pytest.mark.long
@given(
    st.sampled_from(["lora", "loha", "lokr", "adalora", "vera", "hra", "boft", "dora"]),
    st.floats(0.1, 20.0),
    st.sampled_from([0.5, 1.0, 2.0, 2.5, float("inf")]),
    st.integers(2, 13),
    st.integers(2, 9),
)
def test_forms_agree(name, most, order, rows, width):
    """The form around the layer and the one in front of its weight, with any norm, merged and not."""
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Embedding(rows, width, max_norm=most, norm_type=order).double())
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, rows).unsqueeze(1))
    classes: dict[str, Callable[[], Any]] = {
        "lora": lambda: adaptc.LoraConfig(r=3, target_modules=["0"]),
        "dora": lambda: adaptc.LoraConfig(r=3, use_dora=True, target_modules=["0"]),
        "loha": lambda: adaptc.LoHaConfig(r=2, target_modules=["0"]),
        "lokr": lambda: adaptc.LoKrConfig(r=2, target_modules=["0"]),
        "adalora": lambda: adaptc.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["0"]),
        "vera": lambda: adaptc.VeraConfig(r=3, target_modules=["0"]),
        "hra": lambda: adaptc.HRAConfig(r=2, target_modules=["0"]),
        "boft": lambda: adaptc.BOFTConfig(boft_block_size=width, target_modules=["0"]),
    }
    ids = torch.arange(rows).reshape(1, rows)
    base = twin(model)(ids).detach()
    found = []
    for form in ("apply", "weight"):
        torch.manual_seed(6)
        with quiet():
            program = adaptc.compile(model, classes[name](), example_inputs=torch.arange(2).reshape(1, 2), form=form)
        assert_close(program.base(ids), base)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, t in sorted(program.binding.values.items()):
                if isinstance(t, nn.Parameter):
                    t.add_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
        found += [program(ids), adaptc.merge(program)(ids)]
    for other in found[1:]:
        assert_close(other, found[0].detach(), 1e-7)


def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    out = []
    for i in range(4):
        optimizer.zero_grad()
        value = loss(module((IDS + 2 * i) % ROWS)) + module((IDS + 5) % ROWS).square().sum()
        value.backward()
        optimizer.step()
        out.append(value.detach())
    return out


@pytest.mark.few(5)
@pytest.mark.parametrize("options", OPTIONS[:4] + OPTIONS[5:], ids=str)
@pytest.mark.parametrize("name", ["lora", "tokens", "saved"])
def test_training_is_pefts(name, options, tmp_path):
    """Without momentum and decay, which move rows that no call has looked up: PEFT leaves those long, and here they are
    shortened with the others."""
    model = Net(**options)
    with quiet():
        theirs = peft.get_peft_model(twin(model), configs(name)).double()
    torch.manual_seed(8)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    with quiet():
        theirs.save_pretrained(str(tmp_path))
    program = adaptc.compile(model, tmp_path, example_inputs=IDS, training=True)
    module = program.module()
    ours = steps(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.03))
    expected = steps(theirs, torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.03))
    assert_close(ours, expected, 1e-6)
    assert not torch.allclose(expected[0], expected[-1])
    assert_close(module(EVERY).detach(), theirs(EVERY).detach(), 1e-6)


def test_a_tied_head_reads_what_the_lookup_left(tmp_path):
    """Of a head tied to it torch shortens the rows that were looked up, and no others."""
    model = Tied().eval()
    before, expected = model.emb.weight.detach().clone(), [twin(model)(ids) for ids in (IDS, EVERY)]
    last = nn.Sequential(model, nn.Linear(ROWS, 3).double())
    program = adaptc.compile(last, adaptc.LoraConfig(r=2, target_modules=["1"]), example_inputs=IDS)
    for ids, value in zip((IDS, EVERY), expected, strict=True):
        assert_close(program(ids), last[1](value))
    assert torch.equal(model.emb.weight, before)
    with pytest.raises(adaptc.TargetError, match=r"emb\.weight' is changed by aten\.embedding_renorm.*max_norm"):
        adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["emb"]), example_inputs=IDS)
    with torch.no_grad():  # what the message says
        torch.embedding_renorm_(model.emb.weight.detach(), torch.arange(ROWS), 1.5, 2.0)
    theirs = wrapped(model, peft.LoraConfig(r=2, target_modules=["emb"], init_lora_weights=False), tmp_path)
    program = adaptc.compile(model, tmp_path, example_inputs=IDS)
    assert_close(program(EVERY), theirs(EVERY).detach(), 1e-6)


class Twice(Net):
    """One weight with two limits, and a lookup without any."""

    def forward(self, ids: Tensor) -> Tensor:
        w = self.emb.weight
        free = F.embedding(ids.flip(1), w)
        mild = F.embedding(ids, w, max_norm=1.2)
        return self.head(
            free + mild * 2 + F.embedding(ids + 0, w, max_norm=0.4, norm_type=1.0) * 3 + F.embedding(ids, w)
        )


class Quiet(Net):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.emb(ids)
        return self.head(x)


class Sliced(Net):
    """What is looked up is computed, so that nothing of the model is written to."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.embedding(ids, self.emb.weight * 2, max_norm=0.9))


@pytest.mark.parametrize("kind", [Twice, Quiet, Sliced])
def test_other_uses(kind):
    model = kind().eval()
    before = model.emb.weight.detach().clone()
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["head"]), example_inputs=IDS)
    for ids in (IDS, EVERY, IDS):
        assert_close(program(ids), twin(model)(ids))
    assert torch.equal(model.emb.weight, before)


def test_inside_a_block(tmp_path):
    model = Quiet().eval()
    theirs = wrapped(model, configs("lora"), tmp_path)
    program = adaptc.compile(model, tmp_path, example_inputs=IDS)
    assert_close(program(EVERY), theirs(EVERY).detach(), 1e-6)
    assert_close(adaptc.merge(program)(EVERY), theirs(EVERY).detach(), 1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode, tmp_path):
    """PEFT has no adapters of bags but whole modules."""
    model = Net(nn.EmbeddingBag, mode=mode).eval()
    both = torch.cat([EVERY, EVERY.flip(1) // 2])
    before, expected = model.emb.weight.detach().clone(), twin(model)(both)
    program = adaptc.compile(model, adaptc.LoraConfig(r=2, target_modules=["head"]), example_inputs=IDS)
    assert_close(program(both), expected)
    assert torch.equal(model.emb.weight, before)
    theirs = wrapped(model, configs("saved"), tmp_path)
    assert_close(adaptc.compile(model, tmp_path, example_inputs=IDS)(both), theirs(both).detach(), 1e-6)
    own = adaptc.compile(model, adaptc.LoHaConfig(r=2, target_modules=["emb"], init_weights=False), example_inputs=IDS)
    assert_close(adaptc.merge(own)(both), own(both).detach(), 1e-7)


@pytest.mark.parametrize("kind", [Net, Twice])
def test_a_decomposed_program(kind, tmp_path):
    """It gives the rows back as an output, to be written to the weight, which is left out."""
    model = kind().eval()
    exported = torch.export.export(twin(model), (IDS,)).run_decompositions({})
    program = adaptc.compile(exported, adaptc.LoraConfig(r=2, target_modules=["head"]))
    held = {k: t.clone() for k, t in program.state_dict.items()}
    assert_close(program(IDS), twin(model)(IDS))
    assert all(torch.equal(held[k], t) for k, t in program.state_dict.items())
    if kind is Net:
        theirs = wrapped(model, configs("lora"), tmp_path)
        assert_close(adaptc.compile(exported, tmp_path)(IDS), theirs(IDS).detach(), 1e-6)


@pytest.mark.slow
def test_compiled(tmp_path):
    model = Net().eval().float()
    theirs = wrapped(model, configs("lora"), tmp_path)
    program = adaptc.compile(model, tmp_path, example_inputs=IDS, backend="inductor")
    assert_close(program(EVERY), theirs.float()(EVERY).detach(), 1e-5)


@pytest.mark.slow
def test_packaged(tmp_path):
    """Sites of a package keep to the same, and so does what is swapped in."""
    model = Net(norm_type=float("inf")).eval()
    theirs = wrapped(model, configs("lora"), tmp_path / "peft")
    program = adaptc.compile(model, configs("lora"), example_inputs=IDS)
    adaptc.package(program, tmp_path / "x.pt2")
    package = adaptc.load_package(tmp_path / "x.pt2")
    assert [op.max_norm for op in package.ops.values()] == [(1.5, float("inf"))]
    adaptc.swap(package, tmp_path / "peft")
    assert_close(package(IDS), theirs(IDS).detach(), 1e-6)
