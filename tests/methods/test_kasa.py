"""KaSA next to PEFT's: first values, training with its loss, files both ways, merges; and what PEFT cannot do.

PEFT decomposes weights in float32 whatever their dtype, so that the two agree up to its rounding.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import KasaConfig, LoraConfig
from adaptc.errors import AdaptcError, ConfigError, TargetError
from adaptc.methods.lora_family.variants.kasa import Kasa
from adaptc.passes.graph.ops import Op
from adaptc.training import kasa_loss
from tests.support.oracle import assert_differs
from tests.support.subject import quiet

OPTIONS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "target_modules": ["up", "down"],
    "rank_pattern": {"down": 5},
    "kasa_config": {"beta": 0.02, "gamma": 0.3},
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(13, 19), nn.Linear(19, 7, bias=False)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(*shape, 13, dtype=torch.float64)


X = inputs(4, 3)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def peft_model(path: Path | None = None, seed: int | None = 5, **options: Any) -> Any:
    """PEFT's model, with random tensors where there is a seed, saved to ``path``."""
    model = peft.get_peft_model(Net(), peft.LoraConfig(**{**OPTIONS, **options}))
    if seed is not None:
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, dtype=p.dtype) * 0.5
    if path is not None:
        with quiet():
            model.save_pretrained(str(path))
    return model.eval()


def compiled(adapter: Any = None, **options: Any) -> adaptc.AdaptedProgram:
    adapter = LoraConfig(**OPTIONS) if adapter is None else adapter
    return adaptc.compile(Net(), adapter, example_inputs=X, **options)


def trained(module: nn.Module, extra_loss: Any) -> list[float]:
    """The losses of some steps with what KaSA adds to them."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.linspace(-1, 1, 84, dtype=torch.float64).reshape(4, 3, 7), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (module(X) - target).square().mean() + extra_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_with_its_loss_and_files_are_pefts(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path / "peft")
    program = compiled(tmp_path / "peft", training=True)
    module = program.module()
    close(module(X), theirs(X))
    close(kasa_loss(program).float(), theirs._get_kasa_loss())
    close(kasa_loss(module), kasa_loss(program), 0)
    expected, found = trained(theirs, theirs._get_kasa_loss), trained(module, lambda: kasa_loss(program))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    names = {
        n.removesuffix(".weight").removesuffix(".default") for n, p in module.named_parameters() if p.requires_grad
    }
    assert names == {f"{m}.lora_{t}" for m in ("up", "down") for t in ("A", "B", "diag")}
    close(module(X), theirs(X))

    adaptc.save_adapter(program, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert one["base_model.model.down.lora_diag"].shape == (5,)
    for key in one:
        close(one[key], other[key])
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")]
    assert configs[0]["kasa_config"] == configs[1]["kasa_config"] == {"beta": 0.02, "gamma": 0.3}
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours")).eval()
    close(loaded(X), module(X))
    merged, unloaded = adaptc.merge(program), theirs.merge_and_unload()
    for name in ("up.weight", "down.weight"):
        close(merged.state_dict[name], unloaded.state_dict()[name])


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_are_pefts(init: bool | str) -> None:
    """The weight has lost its smallest terms, so that a fresh adapter is not the identity."""
    options = {**OPTIONS, "init_lora_weights": init}
    base = adaptc.unload(adaptc.compile(Net(torch.float32), LoraConfig(**OPTIONS), example_inputs=X.float()))
    net = Net(torch.float32)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(net, peft.LoraConfig(**options))
    program = adaptc.compile(base, LoraConfig(**options), generator=torch.Generator().manual_seed(1))
    found = {n: t for n, t in program.binding.values.items() if "lora_" in n and t.ndim}
    assert len(found) == 6
    for name, value in found.items():
        assert torch.equal(value, theirs.get_parameter(f"base_model.model.{name}")), name
    close(program(X.float()), theirs(X.float()))
    assert_differs(program(X.float()), Net(torch.float32)(X.float()))
    singular = torch.linalg.svdvals(adaptc.merge(compiled()).state_dict["down.weight"])
    close(singular[:2], torch.linalg.svdvals(Net().down.weight)[:2], 1e-12)
    close(singular[2:], torch.zeros(5, dtype=torch.float64), 1e-12)


def test_singular_values_are_drawn_in_the_dtype_of_the_weight() -> None:
    """For more than 15 numbers, torch draws others in float32 than in float64."""
    net = nn.Sequential(nn.Linear(23, 19)).double()
    options: dict[str, Any] = {"r": 17, "target_modules": ["0"], "kasa_config": {}}
    program = adaptc.compile(net, LoraConfig(**options), example_inputs=torch.ones(2, 23, dtype=torch.float64))
    base = adaptc.unload(program)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(net, peft.LoraConfig(**options))
    program = adaptc.compile(base, LoraConfig(**options), generator=torch.Generator().manual_seed(1))
    ours = program.binding.values["0.lora_diag.default"]
    assert torch.equal(ours, theirs.get_parameter("base_model.model.0.lora_diag.default"))


def test_the_base_stays_and_swaps_change_ranks(tmp_path: Path) -> None:
    """PEFT's base is cut for good; here it is back in every bit."""
    a, b = peft_model(tmp_path / "a"), peft_model(tmp_path / "b", 6, r=6, rank_pattern={}, use_rslora=True)
    with quiet():
        cut = a.unload()
    assert_differs(cut(X), Net()(X))
    program = compiled(tmp_path / "a")
    base = Net().state_dict()
    for directory, expected in (("b", b), ("a", peft_model())):
        adaptc.swap(program, tmp_path / directory)
        close(program(X), expected(X))
        assert torch.equal(program(X), compiled(tmp_path / directory)(X))
        unloaded = adaptc.unload(program)
        assert all(torch.equal(t, base[n]) for n, t in unloaded.state_dict.items())
    merged = adaptc.merge(program)
    close(merged(X), program(X), 1e-12)
    back = adaptc.unmerge(merged)
    assert torch.equal(back(X), program(X))
    assert all(torch.equal(back.state_dict[n], t) for n, t in base.items())


def test_dropout_acts_on_what_a_reads_alone(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path, lora_dropout=0.5).train()
    module = compiled(tmp_path, training=True).module()
    torch.manual_seed(0)
    expected = theirs(X)
    torch.manual_seed(0)
    close(module(X), expected)
    assert_differs(module(X), expected)


def test_a_bias_is_that_of_lora(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path, lora_bias=True, rank_pattern={}, target_modules=["up"])
    program = compiled(tmp_path)
    close(program(X), theirs(X))
    close(adaptc.merge(program)(X), theirs.merge_and_unload()(X))


def test_the_loss_at_other_layers_is_that_of_their_matrices() -> None:
    """Of each expert, and of a kernel with its positions in the columns."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.experts = nn.Conv1d(5, 9, 3), nn.Parameter(torch.randn(2, 7, 9))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bit,eoi->beot", self.conv(x), self.experts)

    torch.manual_seed(4)
    config = LoraConfig(r=2, kasa_config=KasaConfig(0.5, 0.25), target_modules=["conv"], target_parameters=["experts"])
    program = adaptc.compile(Layers(), config, example_inputs=torch.randn(3, 5, 8))
    conv, experts = ([program.binding.values[f] for f in a.slots.values()][:3] for a in program.adaptation.attachments)
    for B in (conv[1], experts[1]):
        B.data.normal_()
    expected = torch.zeros(())
    own = [(experts[0][2 * e : 2 * e + 2], experts[1][:, e::2], experts[2][2 * e : 2 * e + 2]) for e in range(2)]
    for A, B, diagonal in (conv, *own):
        A, B, one = A.flatten(1), B.flatten(1), torch.eye(2)
        expected = expected + 0.5 * diagonal.square().sum() + 0.25 * ((B.T @ B - one).norm() + (A @ A.T - one).norm())
    close(kasa_loss(program), expected)


def test_the_callback_for_trainer_adds_the_loss() -> None:
    program = compiled(training=True)
    module, callback = program.module(), adaptc.training.trainer_callback(program)
    callback.on_train_begin(SimpleNamespace(should_save=False), SimpleNamespace(), None, model=module)
    assert torch.equal(module.extra_loss(), kasa_loss(program))
    module.eval()
    assert module.extra_loss() == 0


def test_other_adapters_act_beside_it(tmp_path: Path) -> None:
    """PEFT refuses them, since its base is another one then; two of KaSA would cut it twice, and are refused here."""
    lora = {"target_modules": ["up"], "r": 2, "init_lora_weights": False}
    peft_model(tmp_path)
    with pytest.raises(ValueError, match="KaSA cannot be combined with adapters that don't use KaSA"):
        peft_model().add_adapter("plain", peft.LoraConfig(**lora))
    peft_model(tmp_path / "kasa")
    adaptc.save_adapter(compiled(LoraConfig(**lora)), tmp_path / "lora")
    program = compiled({"one": tmp_path / "kasa", "two": tmp_path / "lora"})
    change = adaptc.merge(compiled(tmp_path / "lora")).state_dict["up.weight"] - Net().up.weight
    expected = adaptc.merge(compiled(tmp_path / "kasa")).state_dict["up.weight"] + change
    close(adaptc.merge(program).state_dict["up.weight"], expected.detach(), 1e-7)
    close(program(X), adaptc.merge(program)(X), 1e-9)
    close(kasa_loss(program), kasa_loss(compiled(tmp_path / "kasa")), 0)
    with pytest.raises(ConfigError, match=r"both train the smallest singular terms in 'up\.weight'"):
        compiled({"one": LoraConfig(**OPTIONS), "two": LoraConfig(**OPTIONS)})


def test_it_becomes_lora(tmp_path: Path) -> None:
    """PEFT cannot convert it; the change of the weight has a rank of 2 r at most."""
    peft_model(tmp_path, rank_pattern={})
    program = compiled(tmp_path)
    made = adaptc.convert_to_lora(program, rank=6)
    assert made.config.kasa_config is None
    close(compiled(made)(X), program(X), 1e-6)
    with pytest.raises(ConfigError):
        adaptc.combine({str(tmp_path): 1.0}, method="cat")


def test_tensors_alone_tell_the_method(tmp_path: Path) -> None:
    theirs = peft_model(tmp_path, rank_pattern={}, lora_alpha=3)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    close(compiled(tmp_path)(X), theirs(X))
    found = LoraConfig.options_from_tensors(
        [{n.rpartition("down.")[2]: t for n, t in tensors.items() if ".down." in n}], [(7, 19)]
    )
    assert found == {"kasa_config": {}}
    del tensors["base_model.model.down.lora_diag"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdaptcError, match=r"down\.lora_diag"):
        compiled(tmp_path)


def test_its_options_as_peft_has_them() -> None:
    theirs = peft.KasaConfig(beta=0.5, gamma=2)
    assert dataclasses.asdict(KasaConfig()) == dataclasses.asdict(peft.KasaConfig())
    for value in (theirs, KasaConfig(0.5, 2.0), {"beta": 0.5, "gamma": 2}):
        config = LoraConfig(kasa_config=value)
        assert config.kasa_config == KasaConfig(0.5, 2.0)
        assert LoraConfig.from_dict(config.to_dict()).kasa_config == config.kasa_config
    assert LoraConfig(kasa_config={}).kasa_config == KasaConfig()
    for options, said in (
        ({"kasa_config": {"beta": -1.0}}, "KasaConfig.beta must not be negative, got -1.0"),
        ({"kasa_config": {"gama": 1.0}}, "KasaConfig has no field 'gama'.*gamma"),
        ({"kasa_config": 3}, "kasa_config must be a KasaConfig"),
        ({"kasa_config": {"beta": "much"}}, r"KasaConfig\.beta"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has no meaning for KaSA"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' has no meaning for KaSA"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True has no meaning with kasa_config"),
        ({"use_dora": True}, "use_dora and kasa_config .*do not combine"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoraConfig(**{**OPTIONS, **options})


def test_what_is_refused() -> None:
    with pytest.raises(TargetError, match=r"r=7 leaves none .*\(7, 19\); r=6 is the most that fits"):
        compiled(LoraConfig(**{**OPTIONS, "rank_pattern": {"down": 7}}))
    with pytest.raises(AdaptcError, match="no adapter of KaSA"):
        kasa_loss(compiled(LoraConfig(target_modules=["up"])))
    op = Op("linear", (7, 19), torch.ops.aten.linear.default, ())
    assert Kasa(r=2).kernels.why_missing(op) == "kasa has no kernels"  # those of LoRA know no dropped terms
    with pytest.raises(ConfigError, match="not finite"):
        Kasa(r=2).init(op, torch.full((7, 19), float("nan")), torch.float32)
