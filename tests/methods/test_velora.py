"""VeLoRA beyond the table of methods: gradients of compressed activations, as in PEFT, and the memory they need."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptc
from adaptc import ConfigError, LoraConfig, TargetError, VeloraConfig
from tests.support.chain import (
    FILE,
    as_stored,
    chain,
    compile_chain,
    inputs,
    load_peft_chain,
    peft_chain,
    peft_config,
)
from tests.support.oracle import assert_differs, quiet
from tests.support.repeated_linear import trained_tensors
from tests.support.subject import loss

INIT_TYPES = ["batch_average", "batch_average_once", "random"]


def velora(init_type: str = "batch_average", groups: int = 5, scale: float = 0.7, **options: Any) -> Any:
    own = peft.VeloraConfig(num_groups=groups, scale=scale, init_type=init_type)
    return peft_config("LoraConfig", **{"r": 3, "lora_alpha": 5, "velora_config": own, **options})


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): p.grad for n, p in module.named_parameters() if p.grad is not None}


def step(module: nn.Module, x: Tensor, rate: float = 1e-3) -> tuple[Tensor, dict[str, Tensor]]:
    """Take one step of gradient descent; return the output and the gradients."""
    module.zero_grad()
    out = module(x)
    loss(out).backward()
    found = {n: g.clone() for n, g in gradients(module).items()}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    return out.detach(), found


@pytest.mark.parametrize("init_type", INIT_TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_training_and_files_are_pefts(init_type, bias, tmp_path):
    # 12, 20 and 8 features in 5 groups: none of the layers has groups that fill up.
    theirs = peft_chain(velora(init_type, lora_bias=bias), tmp_path / "a").train()
    program = compile_chain(tmp_path / "a", training=True)
    module = program.module()
    for batch in (4, 7, 3):
        (expected, by_peft), (found, own) = step(theirs, inputs(batch)), step(module, inputs(batch))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert own.keys() == by_peft.keys()
        assert len(own) == (9 if bias else 6)
        for name, grad in by_peft.items():
            torch.testing.assert_close(own[name], grad, rtol=1e-6, atol=1e-7)
    ours = adaptc.save_adapter(program, tmp_path / "b")
    with quiet(".*lora_B.bias.*"):  # which PEFT takes for a shard
        theirs.save_pretrained(str(tmp_path / "c"))
    one, other = (load_file(tmp_path / n / FILE) for n in "bc")
    assert one.keys() == other.keys()
    assert sum(k.endswith("lora_velora_embed") for k in one) == 3
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-7, atol=1e-7)
        assert value.any()
    torch.testing.assert_close(load_peft_chain(ours)(inputs(6)), module.eval()(inputs(6)))


def test_gradients_differ_from_loras_in_training_and_are_loras_in_evaluation(tmp_path):
    theirs = peft_chain(velora(), tmp_path / "a")
    module = compile_chain(tmp_path / "a", training=True).module()
    before = {n: b.clone() for n, b in module.named_buffers()}
    exact = {}
    for mode in (False, True):
        for m in (theirs.train(mode), module.train(mode)):
            m.zero_grad()
            loss(m(inputs(4))).backward()
        found = gradients(module)
        for name, grad in gradients(theirs).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-7)
        if not mode:
            exact = {n: g.clone() for n, g in found.items()}
            assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    assert_differs(found["q.lora_A.weight"], exact["q.lora_A.weight"])
    torch.testing.assert_close(found["v.lora_B.weight"], exact["v.lora_B.weight"])


def test_with_as_many_groups_as_features_the_gradient_is_loras(tmp_path):
    peft_chain(velora("random", groups=20, scale=1.0), tmp_path / "a")
    module = compile_chain(tmp_path / "a", training=True).module()
    found = step(module, inputs(4), 0.0)[1]
    expected = step(module.eval(), inputs(4), 0.0)[1]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(90, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize("groups", [None, 6])
def test_the_backward_keeps_one_number_per_group(groups):
    options = {} if groups is None else {"velora_config": VeloraConfig(num_groups=groups)}
    x = torch.randn(31, 90)
    config = LoraConfig(r=3, target_modules=["up"], init_lora_weights=False, **options)
    module = adaptc.compile(Wide(), config, example_inputs=x, training=True).module()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape[0] * t[0].numel() if t.ndim > 1 and t.shape[0] == 31 else 0), t)[1], lambda t: t
    ):
        module(x)
    assert (31 * 90 in kept) == (groups is None)
    assert (31 * 6 in kept) == (groups is not None)


@pytest.mark.parametrize("init_type", INIT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_first_values_are_pefts(init_type, dtype, tmp_path):
    config = velora(init_type, target_modules=["k"])
    theirs = peft_chain(config, tmp_path / "a", dtype, random_values=False, seed=11)
    config = LoraConfig.from_dict(as_stored(config))
    module = compile_chain(config, dtype, generator=torch.Generator().manual_seed(11)).module()
    found = {plain_name(n): t for n, t in (*module.named_parameters(), *module.named_buffers())}
    expected = {plain_name(n): t for n, t in (*theirs.named_parameters(), *theirs.named_buffers()) if "lora" in n}
    assert "k.lora_velora_embed" in expected
    for name, value in expected.items():
        assert torch.equal(found[name].to(dtype), value.to(dtype)), name  # PEFT has rounded what it holds in float32
    assert bool(found["k.lora_velora_embed"].any()) == (init_type == "random")


@pytest.mark.long
def test_the_direction_of_the_first_batch_outlives_a_file(tmp_path):
    """PEFT forgets it, and takes the first batch after the file was read."""
    peft_chain(velora("batch_average_once"), tmp_path / "a")
    program = compile_chain(tmp_path / "a", training=True)
    step(program.module(), inputs(4))
    adaptc.save_adapter(program, tmp_path / "b")
    again = compile_chain(tmp_path / "b", training=True).module()
    theirs = peft.PeftModel.from_pretrained(chain(), str(tmp_path / "b"), is_trainable=True).train()
    for module in (again, theirs):
        step(module, inputs(7))
    key = "base_model.model.q.lora_velora_embed"
    first = load_file(tmp_path / "b" / FILE)[key]
    assert torch.equal(dict(again.named_buffers())["q.lora_velora_embed.default"], first)
    assert_differs(dict(theirs.named_buffers())["base_model.model.q.lora_velora_embed.default"], first)


def test_batches_of_zeros_have_a_direction_too(tmp_path):
    theirs = peft_chain(velora(), tmp_path / "a").train()
    module = compile_chain(tmp_path / "a", training=True).module()
    for m in (theirs, module):
        step(m, torch.zeros(3, 12, dtype=torch.float64))
    found = dict(module.named_buffers())["q.lora_velora_embed.default"]
    torch.testing.assert_close(found, torch.full((3,), 3**-0.5, dtype=torch.float64))
    torch.testing.assert_close(found, dict(theirs.named_buffers())["base_model.model.q.lora_velora_embed.default"])


@pytest.mark.long
def test_adapters_with_other_options_are_swapped_in_inference_and_need_the_same_in_training(tmp_path):
    peft_chain(velora(groups=5), tmp_path / "a")
    other = peft_chain(velora(groups=3, init_type="random", r=2), tmp_path / "b")
    same = peft_chain(velora(groups=5, r=2), tmp_path / "c").train()
    program = compile_chain(tmp_path / "a")
    adaptc.swap(program, tmp_path / "b")
    torch.testing.assert_close(program(inputs(4)), other(inputs(4)))
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(inputs(4)), other.merge_and_unload()(inputs(4)))

    trains = compile_chain(tmp_path / "a", training=True)
    with pytest.raises(adaptc.AdaptcError, match="num_groups"):
        adaptc.swap(trains, tmp_path / "b")
    adaptc.swap(trains, tmp_path / "c")
    found, expected = step(trains.module(), inputs(4))[1], step(same, inputs(4))[1]
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-7)


def test_a_saved_program_goes_on_training(tmp_path):
    peft_chain(velora(), tmp_path / "a")
    program = compile_chain(tmp_path / "a", training=True)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(inputs(4)), program(inputs(4)))
    one, other = (step(p.module(), inputs(4))[1] for p in (program, loaded))
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad)


@pytest.mark.long
@pytest.mark.parametrize("init_type", INIT_TYPES)
def test_gradient_checkpointing_changes_nothing(init_type):
    options = {"velora_config": {"num_groups": 4, "init_type": init_type}}
    plain, again = (trained_tensors(on, 6, **options) for on in (False, True))
    assert plain.keys() == again.keys()
    assert sum("velora_embed" in n and bool(t.any()) for n, t in plain.items()) == 6
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@pytest.mark.long
def test_dropout_acts_before_the_groups(tmp_path):
    theirs = peft_chain(velora(lora_dropout=0.5), tmp_path / "a").train()
    module = compile_chain(tmp_path / "a", training=True).module()
    results = []
    for m in (theirs, module):
        torch.manual_seed(3)
        results.append(step(m, inputs(6)))
    (expected, by_peft), (found, own) = results
    torch.testing.assert_close(found, expected)
    for name, grad in by_peft.items():
        torch.testing.assert_close(own[name], grad, rtol=1e-6, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("option", ["velora_config", "monteclora_config"])
def test_adapters_with_other_options_share_a_bank_and_are_combined_as_lora(option, tmp_path):
    size, kind = {
        "velora_config": ("num_groups", peft.VeloraConfig),
        "monteclora_config": ("num_samples", peft.MontecloraConfig),
    }[option]
    models = {}
    for name, n, r in (("a", 5, 3), ("b", 3, 2)):
        config = peft_config("LoraConfig", r=r, **{option: kind(**{size: n})})
        models[name] = peft_chain(config, tmp_path / name)
    program, x, names = compile_chain(tmp_path / "a"), inputs(4), ["a", "b", "b", "a"]
    found = program.bank({n: tmp_path / n for n in models})(x, adapters=names)
    for row, out, name in zip(x, found, names, strict=True):
        torch.testing.assert_close(out, models[name](row))

    both = compile_chain(adaptc.combine({str(tmp_path / n): 0.5 for n in models}, method="cat"))
    assert getattr(both.binding.config, option) is None
    deltas = [m.base_model.model.k.get_delta_weight("default") for m in models.values()]
    merged = adaptc.merge(both).state_dict["k.weight"]
    torch.testing.assert_close(merged, chain().k.weight + 0.5 * (deltas[0] + deltas[1]))


def test_fields_and_defaults_are_pefts():
    assert vars(VeloraConfig()) == vars(peft.VeloraConfig())
    given: list[Any] = [
        VeloraConfig(7, 0.5, "random"),
        peft.VeloraConfig(7, 0.5, "random"),
        {"num_groups": 7, "scale": 0.5, "init_type": "random"},
    ]
    for value in given:
        config = LoraConfig(velora_config=value)
        assert config.velora_config == VeloraConfig(7, 0.5, "random")
        assert config.to_dict()["velora_config"] == {"num_groups": 7, "scale": 0.5, "init_type": "random"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"velora_config": {"num_groups": 0}}, r"VeloraConfig\.num_groups must be positive, got 0"),
        ({"velora_config": {"scale": -1.0}}, r"VeloraConfig\.scale must be positive"),
        ({"velora_config": {"init_type": "mean"}}, r"VeloraConfig\.init_type must be one of 'batch_average'"),
        ({"velora_config": {"groups": 4}}, r"VeloraConfig has no field 'groups'"),
        ({"velora_config": 4}, r"velora_config must be a VeloraConfig, or a dict"),
        (
            {"velora_config": {}, "use_dora": True},
            r"use_dora and velora_config are variants of LoRA that do not combine",
        ),
        ({"velora_config": {}, "init_lora_weights": "mica"}, r"variants of LoRA that do not combine"),
        (
            {"velora_config": {}, "ensure_weight_tying": True},
            r"ensure_weight_tying=True has no meaning with velora_config",
        ),
    ],
)
def test_illegal_options_are_named(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**options)


def test_layers_without_features_are_refused_by_name():
    config = LoraConfig(target_modules=["0"], velora_config={})
    for layer, x in ((nn.Embedding(9, 5), torch.tensor([[1, 2]])), (nn.Conv1d(3, 5, 2), torch.randn(2, 3, 7))):
        with pytest.raises(
            TargetError, match=r"VeLoRA acts on the features that a matrix multiplies.*velora_config=None"
        ):
            adaptc.compile(nn.Sequential(layer), config, example_inputs=x)
