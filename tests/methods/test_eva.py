"""EVA: A of the principal components of the layers' inputs, and ranks by explained variance, as PEFT makes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from torch import Tensor, nn

import adaptc
from adaptc.methods.lora_family.from_data.eva import InputComponents
from tests.support.data_nets import BATCHES, IDS, LanguageNet, both_losses, data_net, factors, peft_sites
from tests.support.families import FAMILIES
from tests.support.oracle import quiet

CONFIG: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 5,
    "init_lora_weights": "eva",
    "target_modules": ["left", "right", "down"],
}


def compiled(model: nn.Module | None = None, **options: Any) -> adaptc.AdaptedProgram:
    config = adaptc.LoraConfig(**{**CONFIG, **options})
    return adaptc.compile(model or data_net(), config, example_inputs={"ids": IDS}, training=True)


def by_peft(batches: Any = BATCHES, model: nn.Module | None = None, state: Any = None, **options: Any) -> Any:
    config = peft.LoraConfig(**{**CONFIG, "eva_config": peft.EvaConfig(), **options})
    with quiet(".*fan_in_fan_out.*", ".*eva initialization.*"):
        made = peft.get_peft_model(model or data_net(), config)
    whole = {} if isinstance(model, LanguageNet) else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(made, batches, eva_state_dict=state, show_progress_bar=False, **whole)
    return made


def assert_as_in_peft(program: adaptc.AdaptedProgram, theirs: Any) -> None:
    expected, config = peft_sites(theirs), theirs.peft_config["default"]
    ours: Any = program.binding.config
    assert ours.rank_pattern == config.rank_pattern
    assert ours.alpha_pattern == pytest.approx(config.alpha_pattern)
    present = {a.module for a in program.adaptation.attachments if a.id in program.binding.methods}
    assert present == expected.keys()
    for name, (A, B, _) in expected.items():
        a, b = factors(program, name)
        assert a.shape == A.shape
        torch.testing.assert_close(a, A, rtol=2e-3, atol=2e-4)
        assert not bool(b.any())
        assert not bool(B.any())


@pytest.mark.parametrize(
    "eva",
    [{}, {"rho": 1.0}, {"rho": 3.0, "tau": 0.9, "adjust_scaling_factors": False}],
    ids=["default", "equal ranks", "free ranks"],
)
def test_the_values_ranks_and_files_are_pefts(eva: dict[str, Any], tmp_path: Path) -> None:
    theirs = by_peft(eva_config=peft.EvaConfig(**eva))
    program, model = compiled(eva_config=adaptc.EvaConfig(**eva)), data_net()
    report = adaptc.methods.initialize_from_data(program, BATCHES)
    assert_as_in_peft(program, theirs)
    assert sum(s.rank for s in report.sites) == 6
    assert {s.site: s.rank for s in report.sites if s.rank} == {
        n: A.shape[0] for n, (A, *_) in peft_sites(theirs).items()
    }
    assert all(s.explained is not None and 0 < s.explained <= 1 for s in report.sites if s.rank)
    assert "first values by 'eva' at 3 sites, ranks 6 in all" in str(report)
    torch.testing.assert_close(program(ids=IDS), model(ids=IDS))
    (expected, theirs_out), (found, ours_out) = both_losses(theirs), both_losses(program.module())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0]
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-3, atol=1e-4)

    path = adaptc.save_adapter(program, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    one, other = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert one["eva_config"] == other["eva_config"]
    assert one["init_lora_weights"] == other["init_lora_weights"] == "eva"
    with quiet(".*fan_in_fan_out.*", ".*eva.*", ".*EVA.*"):
        loaded = peft.PeftModel.from_pretrained(data_net(), str(path)).eval()
    torch.testing.assert_close(loaded(ids=IDS), ours_out)
    plain = adaptc.compile(data_net(), tmp_path / "theirs", example_inputs={"ids": IDS})
    torch.testing.assert_close(plain(ids=IDS), theirs_out)
    adaptc.swap(plain, path)
    torch.testing.assert_close(plain(ids=IDS), ours_out)
    assert torch.equal(adaptc.unload(program)(ids=IDS), model(ids=IDS))


def test_a_site_without_a_rank_leaves_the_adapter(tmp_path: Path) -> None:
    """The inputs of the last layer lie in a plane, so two terms of it explain more than a second one of the others."""

    def flat() -> nn.Module:
        model = data_net()
        with torch.no_grad():
            model.rows.weight.copy_(torch.linalg.qr(model.rows.weight).Q)
            model.left.weight.zero_()
            model.left.bias.fill_(1)
            model.right.weight.copy_(torch.eye(11, 7)).mul_(torch.arange(7) < 2)
        return model

    batches = [{"ids": torch.arange(17).roll(n)[:16].reshape(2, 8)} for n in range(3)]
    program = compiled(flat(), r=1)
    report = adaptc.methods.initialize_from_data(program, batches)
    theirs = by_peft(batches, model=flat(), r=1)
    assert_as_in_peft(program, theirs)
    ranks = {s.site: s.rank for s in report.sites}
    assert ranks == {"left": 1, "right": 0, "down": 2}
    assert "1 got none" in str(report)
    config: Any = program.binding.config
    assert config.target_modules == ["down", "left"]
    both_losses(program.module())
    with quiet(".*fan_in_fan_out.*", ".*eva.*", ".*EVA.*"):
        loaded = peft.PeftModel.from_pretrained(flat(), str(adaptc.save_adapter(program, tmp_path))).eval()
    torch.testing.assert_close(loaded(ids=IDS), program(ids=IDS))


@pytest.mark.long
def test_padding_and_labels_are_left_out() -> None:
    masked = [
        {
            **b,
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]),
            "labels": torch.tensor([[-100, 3, 4, 5, 6, -100], [-100, -100, 3, 4, 5, 2]]),
        }
        for b in (
            {"input_ids": torch.randint(17, (2, 6), generator=torch.Generator().manual_seed(i))} for i in range(3)
        )
    ]
    for eva in ({}, {"use_label_mask": False}, {"label_mask_value": 4}):
        theirs = by_peft(masked, LanguageNet.make(), eva_config=peft.EvaConfig(**eva))
        config = adaptc.LoraConfig(**CONFIG, eva_config=adaptc.EvaConfig(**eva))
        example = {k: masked[0][k] for k in ("input_ids", "attention_mask")}
        program = adaptc.compile(LanguageNet.make(), config, example_inputs=example, training=True)
        adaptc.methods.initialize_from_data(program, masked)
        assert_as_in_peft(program, theirs)


@pytest.mark.long
@pytest.mark.parametrize("rho", [2.0, 3.0])
def test_a_language_model_gets_pefts_ranks(rho: float) -> None:
    """Three layers of a block read one tensor, and have one search; of equal ones, the same lose their rank."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [0] * 2 + [1] * 7])
    ids = [torch.randint(0, 61, (3, 9), generator=generator) for _ in range(5)]
    batches = [{"input_ids": i, "attention_mask": mask, "labels": i.masked_fill(mask == 0, -100)} for i in ids]
    options = {**CONFIG, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    build = FAMILIES["llama"].build
    example = {k: batches[0][k] for k in ("input_ids", "attention_mask")}
    config = adaptc.LoraConfig(**options, eva_config={"rho": rho})
    program = adaptc.compile(build().eval(), config, example_inputs=example, training=True)
    adaptc.methods.initialize_from_data(program, batches)
    with quiet(".*eva initialization.*"):
        theirs = peft.get_peft_model(build().eval(), peft.LoraConfig(**options, eva_config=peft.EvaConfig(rho=rho)))
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    assert_as_in_peft(program, theirs)
    found: Any = program.binding.config
    assert found.rank_pattern
    assert sorted(found.target_modules) == sorted(theirs.peft_config["default"].target_modules)


def test_whitening_divides_once() -> None:
    """In PEFT the second layer that reads an input divides what the first has divided already."""
    program, plain = compiled(eva_config={"whiten": True, "rho": 1.0}), compiled(eva_config={"rho": 1.0})
    adaptc.methods.initialize_from_data(program, BATCHES)
    adaptc.methods.initialize_from_data(plain, BATCHES)
    theirs = peft_sites(by_peft(eva_config=peft.EvaConfig(whiten=True, rho=1.0)))
    torch.testing.assert_close(factors(program, "left")[0], factors(program, "right")[0])
    length = factors(program, "left")[0].norm(dim=1)
    torch.testing.assert_close(factors(plain, "left")[0] * length[:, None], factors(program, "left")[0])
    torch.testing.assert_close(factors(program, "down")[0], theirs["down"][0], rtol=1e-3, atol=1e-4)
    twice = min(theirs["left"][0].norm(), theirs["right"][0].norm())
    torch.testing.assert_close(twice, (length**2).norm(), rtol=1e-3, atol=1e-4)


def test_the_state_is_kept_in_pefts_form(tmp_path: Path) -> None:
    path = tmp_path / "eva.pt"
    first = compiled()
    adaptc.methods.initialize_from_data(first, BATCHES, cache_file=path)
    theirs = by_peft([], state=torch.load(path))
    assert_as_in_peft(first, theirs)
    again = compiled()
    report = adaptc.methods.initialize_from_data(again, cache_file=path)
    assert_as_in_peft(again, theirs)
    assert [s.explained for s in report.sites] == [None] * 3

    config = peft.LoraConfig(**CONFIG, eva_config=peft.EvaConfig())
    prepared: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    torch.save(get_eva_state_dict(data_net(), BATCHES, config, show_progress_bar=False, **prepared), path)
    other = compiled()
    adaptc.methods.initialize_from_data(other, cache_file=path)
    assert_as_in_peft(other, theirs)


def test_components_are_those_of_all_rows() -> None:
    """Batch by batch, the mean, the variance and the components are those of all rows at once."""
    torch.manual_seed(0)
    data = torch.randn(60, 11) * torch.linspace(3, 0.1, 11) + torch.randn(11)
    found = InputComponents(11, 0.99)
    for part in data.split([20, 25, 15]):
        found.add(part)
    _, S, Vh = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    torch.testing.assert_close(found.values.float(), S, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.ratios.sum().item(), 1.0, rtol=1e-4, atol=1e-4)
    assert found.components is not None
    torch.testing.assert_close((found.components.float() * Vh).sum(1).abs(), torch.ones(11), rtol=1e-3, atol=1e-3)


def nan_net() -> nn.Module:
    model = data_net()
    with torch.no_grad():
        model.rows.weight[3] = torch.inf
    return model


def once() -> Any:
    return iter(BATCHES[:2])


@pytest.mark.parametrize(
    ("model", "options", "batches", "match"),
    [
        (data_net, {}, [], "batches has no batch"),
        (data_net, {}, [{"ids": IDS[:1, :2]}], "'left': no batch gave it more than 2 rows of input, too few for 4"),
        (nan_net, {}, [{"ids": torch.tensor([[1, 3, 2, 4]])}], "'left': its input has NaN"),
        (data_net, {"eva_config": {"tau": 1.0}}, once(), "'left': its components still change .* only once"),
        (data_net, {"eva_config": {"rho": 4.0}}, BATCHES, "'left': rho=4 allows it a rank of 8"),
    ],
    ids=["empty", "few", "nan", "once", "rho"],
)
def test_errors_name_the_site_and_change_nothing(model: Any, options: Any, batches: Any, match: str) -> None:
    program = compiled(model(), **options)
    binding = program.binding
    with pytest.raises(adaptc.AdaptcError, match=match):
        adaptc.methods.initialize_from_data(program, batches)
    assert program.binding is binding


def test_refusals() -> None:
    for options, match in (({"rho": 0.5}, "rho must be at least 1"), ({"tau": 1.5}, "tau must be from 0 to 1")):
        with pytest.raises(adaptc.ConfigError, match=match):
            adaptc.EvaConfig(**options)
    with pytest.raises(adaptc.ConfigError, match="'eva' has no meaning for a site of kind embedding"):
        compiled(target_modules=["rows"])
    with pytest.raises(adaptc.ConfigError, match="eva_config must be an EvaConfig"):
        adaptc.LoraConfig(init_lora_weights="eva", eva_config=[2.0])  # type: ignore[arg-type]
    tokens: Tensor = torch.ones(2, 3)
    program = compiled()
    with pytest.raises(
        adaptc.AdaptcError, match=r"'left': its input of shape \(2, 4, 7\) has no rows for the \(2, 3\)"
    ):
        adaptc.methods.initialize_from_data(program, [{**BATCHES[0], "labels": tokens.long()}])


def test_training_without_data_is_told() -> None:
    prog = compiled(r=2)
    with pytest.warns(adaptc.AdaptcWarning, match="init_lora_weights='eva' and no data yet"):
        prog.module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.methods.initialize_from_data(prog, BATCHES)
        prog.module()


def test_layers_after_the_last_site_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.training.from_data import base_runs

    run_node, seen = base_runs._LookingInterpreter.run_node, list[str]()

    def counted(self: Any, n: Any) -> Any:
        seen.append(n.name)
        return run_node(self, n)

    monkeypatch.setattr(base_runs._LookingInterpreter, "run_node", counted)
    prog = compiled(r=2)
    adaptc.methods.initialize_from_data(prog, BATCHES)
    assert seen
    assert "output" not in seen
