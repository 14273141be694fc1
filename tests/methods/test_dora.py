"""DoRA beyond the table of methods: first values, rows of length zero, dropout, other adapters at the same weight."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc import ConfigError, LoraConfig
from adaptc.methods.lora_family.dora import MAGNITUDE, Dora
from adaptc.methods.lora_family.lora import Lora
from adaptc.passes.graph.ops import Op
from tests.support.cover import examples
from tests.support.oracle import Oracle, shared_base_program

TARGETS = ["emb", "up", "conv", "mix", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7, padding_idx=2)
        self.up = nn.Linear(7, 11)
        self.conv = nn.Conv1d(11, 5, 3, padding=1)
        self.mix = Conv1D(9, 5)
        self.down = nn.Linear(9, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.emb(ids))).transpose(1, 2)
        return self.down(torch.tanh(self.mix(self.conv(h).transpose(1, 2).contiguous())))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(3)
    model = Net()
    nn.init.normal_(model.mix.weight)  # its own are tiny
    return model.to(dtype)


def ids(seed: int = 0, rows: int = 3) -> Tensor:
    return torch.randint(0, 13, (rows, 6), generator=torch.Generator().manual_seed(seed))


def by_peft(model: nn.Module, seed: int = 7, **options: Any) -> Any:
    config = peft.LoraConfig(**{"use_dora": True, "target_modules": TARGETS, "r": 3, "lora_alpha": 5, **options})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.get_peft_model(model, config)


def compiled(model: nn.Module | None = None, seed: int = 7, **options: Any) -> adaptc.AdaptedProgram:
    config = LoraConfig(**{"use_dora": True, "target_modules": TARGETS, "r": 3, "lora_alpha": 5, **options})
    model = net() if model is None else model
    torch.manual_seed(seed)
    return adaptc.compile(model, config, example_inputs=torch.zeros(2, 5, dtype=torch.int64), training=True)


def slots(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    return {n: t for n, t in program.binding.values.items() if "lora_" in n}


def theirs(model: Any) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {n.removeprefix("base_model.model."): p for n, p in named if "lora_" in n}


def same(found: dict[str, Tensor], expected: dict[str, Any], tolerance: float) -> None:
    assert sorted(found) == sorted(expected)
    for key, want in expected.items():
        torch.testing.assert_close(found[key].detach(), want.detach(), rtol=tolerance, atol=tolerance, msg=key)


def spread(program: adaptc.AdaptedProgram, seed: int) -> adaptc.AdaptedProgram:
    """Every tensor of the adapter away from its first value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in slots(program).values():
            t.add_(torch.randn(t.shape, generator=g).to(t.dtype) * 0.4)
    return program


# -- first values and options ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("scheme", "targets"),
    [
        (True, TARGETS),
        (False, TARGETS),
        ("gaussian", TARGETS),
        ("pissa", ["up", "mix", "down"]),
        ("olora", ["up", "down"]),
    ],
)
def test_first_values_are_pefts(scheme, targets):
    """Lengths are those of the rows of W + s B A, also where A and B were taken out of W. PEFT has no float64 PiSSA."""
    dtype = torch.float32 if isinstance(scheme, str) and scheme != "gaussian" else torch.float64
    wrapped = by_peft(net(dtype), init_lora_weights=scheme, target_modules=targets)
    program = compiled(net(dtype), init_lora_weights=scheme, target_modules=targets)
    same(slots(program), theirs(wrapped), 1e-12 if dtype == torch.float64 else 2e-5)
    x = ids(1)
    torch.testing.assert_close(program(x), wrapped.eval()(x), rtol=1e-5, atol=1e-6)
    if scheme is not False:
        torch.testing.assert_close(program(x), net(dtype)(x), rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ConfigError, match="lora_bias=True has no meaning for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="init_lora_weights"):
        compiled(init_lora_weights="pissa", target_modules=["conv"])


def test_the_method_follows_the_config():
    config = LoraConfig(use_dora=True, r=4, rank_pattern={"up": 6}, alpha_pattern={"up": 2}, use_rslora=True)
    assert config.method("down", "linear") == Dora(r=4, rslora=True)
    assert config.method("up", "linear") == Dora(r=6, alpha=2, rslora=True)
    assert type(LoraConfig().method("up", "linear")) is Lora


def test_a_fresh_adapter_of_a_half_precision_base_changes_no_bit():
    """PEFT takes the first lengths in half precision, and does change the model."""
    model = net(torch.bfloat16)
    program = compiled(model)
    assert {t.dtype for t in slots(program).values()} == {torch.float32}
    assert torch.equal(program(ids(1)), adaptc.unload(program)(ids(1)))
    for name, merged in adaptc.merge(program).state_dict.items():
        assert torch.equal(merged, model.state_dict()[name]), name


def test_gradients_and_files_of_a_language_model(tmp_path: Path):
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])
    oracle = Oracle.wrap_and_save("llama", config, tmp_path / "peft")
    program = adaptc.compile(shared_base_program("llama"), config)
    oracle.check_trained(program, tmp_path / "adaptc")
    oracle.check_merged(program, 2e-5)


# -- the mathematics ---------------------------------------------------------------------------------------------------


@settings(max_examples=examples(25), deadline=None)
@given(out=st.integers(1, 11), inner=st.integers(1, 13), r=st.integers(1, 5), dead=st.booleans())
def test_rows_have_the_lengths_they_are_given(out, inner, r, dead):
    op, method = Op("linear", (out, inner), torch.ops.aten.linear.default), Dora(r=r)
    values = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in method.slots(op).items()}
    W = torch.randn(op.shape, dtype=torch.float64)
    if dead:
        W[0], values["lora_B.weight"][0] = 0, 0
    new = method.weight(op, W, values, torch.tensor(1.5, dtype=torch.float64))
    turned = W + 1.5 * values["lora_B.weight"] @ values["lora_A.weight"]
    torch.testing.assert_close(new.norm(dim=1)[dead:], values[MAGNITUDE].abs()[dead:])
    cosine = F.cosine_similarity(new, turned)[dead:] * values[MAGNITUDE].sign()[dead:]
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert not new[:dead].any()


@pytest.mark.parametrize("form", ["apply", "weight"])
def test_a_row_of_zeros_learns_like_lora_at_first(form):
    """PEFT divides zero by zero there, and every gradient is NaN."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[2] = 0
    model, x = nn.Sequential(layer), torch.randn(6, 5)
    config = LoraConfig(use_dora=True, target_modules=["0"], r=2, lora_alpha=3)
    program = adaptc.compile(model, config, example_inputs=x, training=True, form=form)
    plain = adaptc.compile(model, LoraConfig(target_modules=["0"], r=2, lora_alpha=3), example_inputs=x, training=True)
    with torch.no_grad():
        plain.binding.values["0.lora_A.default.weight"].copy_(program.binding.values["0.lora_A.default.weight"])
    assert torch.equal(program(x), model(x))
    for p in (program, plain):
        p.module()(x).square().sum().backward()
    B = [p.binding.values["0.lora_B.default.weight"] for p in (program, plain)]
    torch.testing.assert_close(B[0].grad[2], B[1].grad[2])
    assert B[0].grad[2].any()
    for p in slots(program).values():
        assert p.grad.isfinite().all()
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None
    program.module()(x).square().sum().backward()
    assert slots(program)[f"0.{MAGNITUDE}.default.weight"].grad[2] != 0
    assert program(x).isfinite().all()
    wrapped = by_peft(nn.Sequential(layer), target_modules=["0"])
    assert not wrapped(x).isfinite().all()


def test_each_expert_has_lengths_of_its_own():
    op, method = Op("experts", (3, 5, 7)), Dora(r=2)
    values = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in method.slots(op).items()}
    assert values[MAGNITUDE].shape == (3, 5)
    W = torch.randn(op.shape, dtype=torch.float64)
    new = method.weight(op, W, values, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(new.norm(dim=2), values[MAGNITUDE].abs())
    A, B = values["lora_A.weight"].reshape(3, 2, 7), values["lora_B.weight"].reshape(5, 2, 3)
    for e in range(3):
        one = {"lora_A.weight": A[e], "lora_B.weight": B[:, :, e], MAGNITUDE: values[MAGNITUDE][e]}
        torch.testing.assert_close(new[e], method.weight(Op("weight", (5, 7)), W[e], one, 0.7))


def test_multihead_attention_has_it_once():
    """PEFT refuses it there. Its LoRA acts twice at the output projection; a length can be set only once."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(2)
    model, x = Attending().double(), torch.randn(3, 4, 6).double()
    config = LoraConfig(use_dora=True, target_modules=["attention"], r=2, init_lora_weights=False)
    program = adaptc.compile(model, config, example_inputs=x, training=True)
    spread(program, 4)
    merged = Attending().double()
    merged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a in program.adaptation.attachments:
            weight = merged.get_parameter(a.fqn)
            A, B, m = (program.binding.values[a.slots[n]] for n in ("lora_A.weight", "lora_B.weight", MAGNITUDE))
            turned = weight + 4 * B @ A
            weight.copy_(m[:, None] * turned / turned.norm(dim=1, keepdim=True))
    assert len(program.adaptation.attachments) == 2
    torch.testing.assert_close(program(x), merged(x))


# -- training ----------------------------------------------------------------------------------------------------------


def test_steps_of_training_with_dropout_are_pefts():
    """One seed gives both the same masks: what is added reads the dropped input, base product and all."""
    wrapped, program = by_peft(net(), lora_dropout=0.4), compiled(lora_dropout=0.4)
    module = program.module()
    wrapped.train()
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.8)
        for m in (module, wrapped)
    ]
    for step in range(6):
        losses = []
        for model, optimizer in zip((module, wrapped), optimizers, strict=True):
            torch.manual_seed(step)
            losses.append((model(ids(step)) - 1).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
        same(slots(program), theirs(wrapped), 1e-9)
    torch.manual_seed(1)
    dropped = module(ids(1))
    assert not torch.allclose(dropped, program(ids(1)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(program(ids(1)), wrapped.eval()(ids(1)))
    torch.testing.assert_close(module.eval()(ids(1)), wrapped(ids(1)))


# -- other adapters at the same weight ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["auto", "weight"])
def test_lora_and_dora_in_one_program(form, tmp_path: Path):
    """Each is a variant with regions of its own, and the one that is not in use leaves the other's weight alone."""
    configs = {
        "lora": LoraConfig(target_modules=TARGETS, r=4, lora_alpha=7, init_lora_weights=False),
        "dora": LoraConfig(target_modules=TARGETS, use_dora=True, r=2, init_lora_weights=False),
        "part": LoraConfig(target_modules=["up"], use_dora=True, r=3, init_lora_weights=False),
    }
    files, expected, x = {}, {}, ids(5)
    for i, (name, config) in enumerate(configs.items()):
        torch.manual_seed(i)
        program = adaptc.compile(net(), config, example_inputs=ids(2))
        files[name] = adaptc.save_adapter(spread(program, i), tmp_path / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            expected[name] = peft.PeftModel.from_pretrained(net(), str(files[name]))(x)
    outputs = list(expected.values())
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-2)
    for first, second in (("lora", "dora"), ("dora", "lora")):
        program = adaptc.compile(net(), [files[first], files[second]], example_inputs=ids(2), form=form)
        assert {a.method.name for a in program.adaptation.attachments} == {"lora", "dora"}
        for name in (first, second, "part", first):
            adaptc.swap(program, files[name])
            program.validate()
            torch.testing.assert_close(program(x), expected[name], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(adaptc.merge(program)(x), expected[name], rtol=1e-9, atol=1e-9)
            written = load_file(adaptc.save_adapter(program, tmp_path / "back") / "adapter_model.safetensors")
            given = load_file(files[name] / "adapter_model.safetensors")
            assert written.keys() == given.keys()
            assert all(torch.equal(written[k], t) for k, t in given.items())


@pytest.mark.long
def test_what_would_lose_its_dropout_is_refused():
    """DoRA finds the base's weight at the layer, beside LoRA too; in front of the weight no input is dropped."""
    configs = [LoraConfig(target_modules=["up"], use_dora=d, lora_dropout=0.0 if d else 0.2) for d in (False, True)]
    program = adaptc.compile(net(), configs, example_inputs=ids(2), training=True)
    assert {a.form for a in program.adaptation.attachments} == {"apply"}
    for one in (configs, configs[0]):
        with pytest.raises(adaptc.ConfigError, match=r"would lose its dropout.*asked for"):
            adaptc.compile(net(), one, example_inputs=ids(2), training=True, form="weight")


@pytest.mark.long
def test_a_program_for_lora_says_that_it_has_no_dora(tmp_path: Path):
    file = adaptc.save_adapter(compiled(), tmp_path)
    program = adaptc.compile(net(), LoraConfig(target_modules=TARGETS), example_inputs=ids(2))
    with pytest.raises(adaptc.SwapError, match="no slot in the program"):
        adaptc.swap(program, file)
    plain = adaptc.save_adapter(program, tmp_path / "plain")
    with pytest.raises(adaptc.SwapError, match="no slot in the program"):
        adaptc.swap(compiled(), plain)


def test_options_of_a_region_survive_json():
    method = Dora(r=3, alpha=5, rslora=True, dropout=0.25, training=True)
    assert Dora.from_options(method.options()) == method
    assert {f.name for f in dataclasses.fields(Dora)} == {f.name for f in dataclasses.fields(Lora)}
    assert method.structure() != Lora().structure()
    assert method.is_variant_of(Lora())
