"""LoRA-GA: first values of the mean gradient of each weight, as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import adaptc
from tests.support.data_nets import BATCHES, IDS, both_losses, data_net, factors, peft_sites
from tests.support.oracle import assert_differs, quiet

CONFIG: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 5,
    "init_lora_weights": "lora_ga",
    "target_modules": ["left", "right", "down"],
}
TARGET = torch.linspace(-1, 1, 72).reshape(2, 4, 9)


def loss(out: Tensor) -> Tensor:
    return (out - TARGET).square().sum()


def compiled(model: nn.Module | None = None, **options: Any) -> adaptc.AdaptedProgram:
    config = adaptc.LoraConfig(**{**CONFIG, **options})
    return adaptc.compile(model or data_net(), config, example_inputs={"ids": IDS}, training=True)


def by_peft(cache_file: str | None = None, **options: Any) -> Any:
    model, config = data_net(), peft.LoraConfig(**CONFIG, lora_ga_config=peft.LoraGAConfig(**options))

    def step() -> None:
        for batch in BATCHES:
            loss(model(**batch)).backward()

    torch.manual_seed(5)
    with quiet(".*fan_in_fan_out.*", "Full backward hook is firing.*"):
        preprocess_loraga(model, config, step, cache_file)
        return peft.get_peft_model(model, config)


@pytest.mark.few(4)
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_values_are_pefts(direction: Any, scale: Any) -> None:
    """But for "stable" at a Conv1D, where PEFT takes the number of inputs for that of outputs."""
    theirs, original = by_peft(direction=direction, scale=scale), data_net()
    program = compiled(lora_ga_config=adaptc.LoraGAConfig(direction=direction, scale=scale))
    adaptc.methods.initialize_from_data(program, BATCHES, loss=loss, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(ids=IDS), original(ids=IDS), rtol=1e-4, atol=1e-3)
    for name, (A, B, W) in peft_sites(theirs).items():
        a, b = factors(program, name)
        own, first = program.state_dict[f"{name}.weight"].detach(), original.state_dict()[f"{name}.weight"]
        B = B * (9 / 11) ** 0.25 if name == "down" and scale == "stable" else B
        # The signs of singular vectors are free, and A has others than B, so each is compared on its own.
        torch.testing.assert_close(a * (a * A).sum(1, keepdim=True).sign(), A, rtol=1e-3, atol=1e-3)
        # PEFT draws what it estimates the largest singular value of a weight from.
        tolerance = 2e-2 if scale == "weight_svd" else 1e-3
        torch.testing.assert_close(b * (b * B).sum(0).sign(), B, rtol=tolerance, atol=1e-2)
        change = 2.5 * b @ a
        torch.testing.assert_close(own, first - (change.T if name == "down" else change))
        assert_differs(W, first)
    assert all(torch.equal(adaptc.unload(program).state_dict[k], v) for k, v in original.state_dict().items())


@pytest.mark.long
def test_random_takes_the_same_terms_for_both() -> None:
    options = adaptc.LoraGAConfig(direction="random", scale="unit")
    found = []
    for seed in (1, 1, 2, 3):
        program = compiled(lora_ga_config=options)
        adaptc.methods.initialize_from_data(program, BATCHES, loss=loss, generator=torch.Generator().manual_seed(seed))
        found.append(factors(program, "left"))
    torch.testing.assert_close(found[0], found[1])
    assert any((found[0][0] - A).abs().max() > 0.1 for A, _ in found[2:])
    model = data_net()
    for batch in BATCHES:
        loss(model(**batch)).backward()
    assert model.left.weight.grad is not None
    values = torch.linalg.svdvals(model.left.weight.grad / len(BATCHES))
    for A, B in found:
        torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=1e-4, atol=1e-4)
        assert all((values[:4] - n).abs().min() < 1e-3 * n for n in B.norm(dim=0))


def test_training_follows_peft_and_a_converted_file_loads_anywhere(tmp_path: Path) -> None:
    options = {"scale": "gd_scale"}
    theirs = by_peft(**options)
    program, plain = compiled(lora_ga_config=options), compiled(init_lora_weights=True)
    before = program.binding
    adaptc.methods.initialize_from_data(program, BATCHES, loss=loss)
    with torch.no_grad():  # what the signs leave open is made equal
        for name, module in ((n, theirs.get_submodule(f"base_model.model.{n}")) for n in ("left", "right", "down")):
            module.lora_A["default"].weight.copy_(factors(program, name)[0])
            module.lora_B["default"].weight.copy_(factors(program, name)[1])
            module.base_layer.weight.copy_(program.state_dict[f"{name}.weight"])
    (expected, theirs_out), (found, ours_out) = both_losses(theirs), both_losses(program.module())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0]
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-2, atol=1e-2)
    with pytest.raises(adaptc.CheckpointError, match="by data that no file"):
        adaptc.swap(plain, adaptc.save_adapter(program, tmp_path / "as it is"))
    adaptc.swap(plain, adaptc.save_adapter(adaptc.convert_to_lora(program, rank=4), tmp_path / "converted"))
    torch.testing.assert_close(plain(ids=IDS), ours_out, rtol=1e-3, atol=1e-3)
    trained = program.binding
    adaptc.swap(program, before)
    torch.testing.assert_close(program(ids=IDS), data_net()(ids=IDS))
    adaptc.swap(program, trained)
    torch.testing.assert_close(program(ids=IDS), ours_out)


def test_the_gradients_are_kept_in_pefts_form(tmp_path: Path) -> None:
    theirs, ours = str(tmp_path / "theirs.pt"), tmp_path / "deep" / "ours.pt"
    by_peft(theirs)
    adaptc.methods.initialize_from_data(compiled(), BATCHES, loss=loss, cache_file=ours)
    one, other = torch.load(ours), torch.load(theirs)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-4)
    results = []
    for path in (theirs, ours):
        program = compiled()
        adaptc.methods.initialize_from_data(program, cache_file=path)
        results.append([t for n in ("left", "right", "down") for t in factors(program, n)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-2, atol=1e-2)


class WithLoss(nn.Module):
    """A net that returns its loss, as models of transformers do, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.dropout = data_net(), nn.Dropout(0.5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(ids)
        return {"loss": nn.functional.cross_entropy(self.dropout(logits).flatten(0, 1), labels.flatten())}


def test_the_loss_of_the_outputs_and_dropout() -> None:
    batches = [{**b, "labels": b["ids"] % 9} for b in BATCHES]
    config = adaptc.LoraConfig(**CONFIG)
    gradients = []
    for training in (True, True, False):
        model = WithLoss().train()
        program = adaptc.compile(model, config, example_inputs=batches[0], training=training)
        torch.manual_seed(9 if gradients else 8)
        adaptc.methods.initialize_from_data(program, batches)
        gradients.append(factors(program, "net.left")[1])
        assert set(program.binding.changed_base) == {f"net.{n}.weight" for n in ("left", "right", "down")}
    assert_differs(gradients[0], gradients[1], 1e-4)  # dropout acts, as in training


class Normed(nn.Module):
    """A net whose batch norm counts and averages in training."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.norm, self.down = nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.left(x))))


@pytest.mark.parametrize("scheme", ["lora_ga", "corda", "eva"])
def test_values_made_in_inference_mode_can_be_trained(scheme: str) -> None:
    """The batches are made in it, too, as those of an evaluation are."""
    found: list[Any] = []
    for mode in (torch.no_grad, torch.inference_mode):
        program = compiled(init_lora_weights=scheme)
        with mode():
            batches = [{n: t.clone() for n, t in batch.items()} for batch in BATCHES]
            of = {"loss": loss, "generator": torch.Generator().manual_seed(0)} if scheme == "lora_ga" else {}
            adaptc.methods.initialize_from_data(program, batches, **of)
        module = program.module()
        loss(module(ids=IDS)).backward()
        found.append([(p.detach().abs(), p.grad) for p in module.parameters() if p.requires_grad])
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


def test_gradients_keep_inputs_that_were_made_in_inference_mode() -> None:
    """A layer's input is needed for the gradient of its weight, and torch keeps no tensor of inference mode."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9)), torch.randn(3, 5)
    found: list[Any] = []
    for mode in (torch.no_grad, torch.inference_mode):
        config = adaptc.LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga")
        program = adaptc.compile(model, config, example_inputs=x, training=True)
        with mode():
            adaptc.methods.initialize_from_data(
                program, [x * 2], loss=lambda out: out.square().sum(), generator=torch.Generator().manual_seed(0)
            )
        found.append([t.detach().abs() for t in factors(program, "0")])
    torch.testing.assert_close(found[0], found[1])


def test_a_model_made_in_inference_mode_has_no_gradients() -> None:
    with torch.inference_mode():
        model = data_net()
    with pytest.raises(adaptc.CaptureError, match=r"its tensors were made in torch\.inference_mode"):
        compiled(model)
    config = adaptc.LoraConfig(**CONFIG)
    program = adaptc.compile(model, config, example_inputs={"ids": IDS})
    with pytest.raises(adaptc.AdaptcError, match=r"'left'.*was made in torch\.inference_mode"):
        adaptc.methods.initialize_from_data(program, BATCHES, loss=loss)


def test_buffers_are_not_written_to() -> None:
    torch.manual_seed(4)
    model, x = Normed().train(), torch.randn(6, 7)
    config = adaptc.LoraConfig(**{**CONFIG, "target_modules": ["left", "down"]})
    program = adaptc.compile(model, config, example_inputs=x, training=True)
    state = {k: t.clone() for k, t in model.state_dict().items()}
    adaptc.methods.initialize_from_data(program, [x, x + 3], loss=lambda out: out.square().sum())
    assert set(program.binding.changed_base) == {"left.weight", "down.weight"}
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(adaptc.unload(program).state_dict[name], tensor)
    twin = Normed().train()
    twin.load_state_dict(state)
    for batch in (x, x + 3):
        twin(batch).square().sum().backward()
    assert twin.down.weight.grad is not None
    U, S, _ = torch.linalg.svd(twin.down.weight.grad / 2)
    _, B = factors(program, "down")
    expected = U[:, 2:4] * S[2:4] * 5**0.25 / 4
    torch.testing.assert_close(B.abs(), expected.abs(), rtol=1e-3, atol=1e-3)


def nan_net() -> nn.Module:
    model = data_net()
    with torch.no_grad():
        model.rows.weight[3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "batches", "function", "match"),
    [
        (data_net, [], loss, "batches has no batch"),
        (data_net, BATCHES, None, "the outputs have none: give batches with labels"),
        (data_net, BATCHES, lambda out: out, "a function of the outputs that returns a scalar"),
        (data_net, BATCHES, lambda out: (out * 0).sum(), "'left': the loss does not depend on its weight"),
        (nan_net, [{"ids": torch.tensor([[1, 3, 2, 4]] * 2)}], loss, "'left': the gradient of its weight has NaN"),
    ],
    ids=["empty", "no loss", "no scalar", "unreached", "nan"],
)
def test_errors_name_the_site_and_change_nothing(model: Any, batches: Any, function: Any, match: str) -> None:
    program = compiled(model())
    binding = program.binding
    with pytest.raises(adaptc.AdaptcError, match=match):
        adaptc.methods.initialize_from_data(program, batches, loss=function)
    assert program.binding is binding


def test_refusals() -> None:
    with pytest.raises(adaptc.ConfigError, match="takes 2 r singular terms of the gradient, so r=4 is too large"):
        compiled(r=4)
    with pytest.raises(adaptc.ConfigError, match="stable_gamma must be a positive integer"):
        adaptc.LoraGAConfig(stable_gamma=0)
    with pytest.raises(adaptc.ConfigError, match=r"LoraGAConfig\.direction must be"):
        adaptc.LoraGAConfig(direction="BrAr")  # type: ignore[arg-type]
    quantised = adaptc.quantize(compiled(lora_alpha=3), "int8")
    with pytest.raises(adaptc.ConfigError, match="which is quantised: take the float model"):
        adaptc.methods.initialize_from_data(quantised, BATCHES, loss=loss)
    with pytest.raises(adaptc.ConfigError, match="lora_alpha must be positive"):
        adaptc.methods.initialize_from_data(compiled(lora_alpha=0), BATCHES, loss=loss)
