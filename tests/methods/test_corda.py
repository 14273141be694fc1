"""CorDA: first values of the weight times the covariance of the layer's inputs, as PEFT makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

import adaptc
from tests.support.data_nets import BATCHES, IDS, both_losses, data_net, factors, peft_sites
from tests.support.families import FAMILIES
from tests.support.oracle import assert_differs, quiet
from tests.support.site_checks import adapter_parameters

CONFIG: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "init_lora_weights": "corda",
    "target_modules": ["left", "right", "down"],
}


def compiled(model: nn.Module | None = None, **options: Any) -> adaptc.AdaptedProgram:
    config = adaptc.LoraConfig(**{**CONFIG, **options})
    return adaptc.compile(model or data_net(), config, example_inputs={"ids": IDS}, training=True)


def by_peft(batches: list[dict[str, Tensor]] = BATCHES, **corda: Any) -> Any:
    """Return PEFT's model; it takes samples one by one, since its covariance has no axis for a batch."""
    model, config = data_net(), peft.LoraConfig(**CONFIG, corda_config=PeftCordaConfig(**corda))

    def run() -> None:
        for batch in batches:
            for row in batch["ids"]:
                model(ids=row[None])

    preprocess_corda(model, config, run)
    with quiet(".*fan_in_fan_out.*"):
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_values_are_pefts(mode: str, tmp_path: Path) -> None:
    theirs = by_peft(corda_method=mode)
    program = compiled(corda_config=adaptc.CordaConfig(corda_method=mode))  # type: ignore[arg-type]
    before, original = program.binding, data_net()
    report = adaptc.methods.initialize_from_data(program, BATCHES)
    assert [s.rows for s in report.sites] == [32, 32, 32]
    torch.testing.assert_close(program(ids=IDS), original(ids=IDS), rtol=1e-4, atol=1e-5)
    for name, (A, B, W) in peft_sites(theirs).items():
        a, b = factors(program, name)
        torch.testing.assert_close(b @ a, B @ A, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(a.norm(dim=1), A.norm(dim=1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(program.state_dict[f"{name}.weight"].detach(), W, rtol=1e-3, atol=2e-4)
        assert_differs(W, original.state_dict()[f"{name}.weight"])
    (expected, theirs_out), (found, ours_out) = both_losses(theirs), both_losses(program.module())
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.99 * found[0]
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-3, atol=1e-4)

    trained, state = program.binding, {k: v.clone() for k, v in original.state_dict().items()}
    adaptc.swap(program, before)
    torch.testing.assert_close(program(ids=IDS), original(ids=IDS))
    adaptc.swap(program, trained)
    torch.testing.assert_close(program(ids=IDS), ours_out)
    torch.testing.assert_close(adaptc.merge(program)(ids=IDS), ours_out, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(adaptc.unload(program).state_dict[k], v) for k, v in state.items())
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    torch.testing.assert_close(loaded(ids=IDS), ours_out)


def test_the_two_modes_take_the_two_ends() -> None:
    kept = {}
    for mode in ("ipm", "kpm"):
        program = compiled(corda_config={"corda_method": mode})
        adaptc.methods.initialize_from_data(program, BATCHES)
        A, B = factors(program, "left")
        kept[mode] = (B @ A).norm()
    assert kept["ipm"] > 2 * kept["kpm"]


def test_before_data_it_starts_as_usual_and_swaps() -> None:
    program, model = compiled(), data_net()
    torch.testing.assert_close(program(ids=IDS), model(ids=IDS))
    assert not program.binding.changed_base
    A, B = factors(program, "left")
    assert bool(A.any())
    assert not bool(B.any())
    other = compiled(init_lora_weights=False, r=5)
    adaptc.swap(program, other.binding)
    torch.testing.assert_close(program(ids=IDS), other(ids=IDS))


def test_files_of_statistics_are_pefts(tmp_path: Path) -> None:
    covariances, cache = str(tmp_path / "deep" / "cov.pt"), str(tmp_path / "cache.pt")
    theirs = by_peft(covariance_file=covariances, cache_file=cache)
    expected = {n: B @ A for n, (A, B, _) in peft_sites(theirs).items()}
    for files in ({"covariance_file": covariances}, {"cache_file": cache}):
        program = compiled(corda_config=files)
        report = adaptc.methods.initialize_from_data(program)  # without a batch
        assert [s.rows for s in report.sites] == [0, 0, 0]
        for n, product in expected.items():
            a, b = factors(program, n)
            torch.testing.assert_close(b @ a, product, rtol=2e-3, atol=2e-4)

    ours = {"covariance_file": str(tmp_path / "ours" / "cov.pt"), "cache_file": str(tmp_path / "ours" / "cache.pt")}
    adaptc.methods.initialize_from_data(compiled(corda_config=ours), BATCHES)
    for files in ({"covariance_file": ours["covariance_file"]}, {"cache_file": ours["cache_file"]}):
        for n, (A, B, _) in peft_sites(by_peft([], **files)).items():
            torch.testing.assert_close(B @ A, expected[n], rtol=2e-3, atol=2e-4)

    torch.save({**torch.load(cache), "left.eigens.U_WC": torch.zeros(3, 3)}, cache)
    with pytest.raises(adaptc.CheckpointError, match=r"left.eigens.U_WC' has shape \(3, 3\), expected \(11, 3\)"):
        adaptc.methods.initialize_from_data(compiled(), cache_file=cache)


def test_dora_has_the_lengths_of_the_original_rows() -> None:
    program, model = compiled(use_dora=True), data_net()
    adaptc.methods.initialize_from_data(program, BATCHES)
    lengths = adapter_parameters(program)["left.lora_magnitude_vector"].detach()
    torch.testing.assert_close(lengths, model.left.weight.norm(dim=1).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(program(ids=IDS), model(ids=IDS), rtol=1e-4, atol=1e-5)


def test_an_adapter_file_holds_no_base_so_it_is_converted(tmp_path: Path) -> None:
    program = compiled()
    adaptc.methods.initialize_from_data(program, BATCHES)
    _, trained = both_losses(program.module())
    path = adaptc.save_adapter(program, tmp_path / "corda")
    stored = json.loads((path / "adapter_config.json").read_text())
    assert stored["corda_config"] == vars(PeftCordaConfig())
    plain = compiled(init_lora_weights=True)
    before = plain.binding
    with pytest.raises(adaptc.CheckpointError, match=r"base weight 'left.weight', by data .*convert_to_lora"):
        adaptc.swap(plain, path)
    assert plain.binding is before
    converted = adaptc.save_adapter(adaptc.convert_to_lora(program, rank=6), tmp_path / "converted")
    adaptc.swap(plain, converted)
    torch.testing.assert_close(plain(ids=IDS), trained, rtol=1e-4, atol=1e-4)
    with quiet(".*fan_in_fan_out.*"):
        theirs = peft.PeftModel.from_pretrained(data_net(), str(converted)).eval()
    torch.testing.assert_close(theirs(ids=IDS), trained, rtol=1e-4, atol=1e-4)


def test_a_module_loads_its_own_state_again() -> None:
    """As Trainer does for a checkpoint: the tensors are of the adapter that is there, and so is its base."""
    program = compiled()
    adaptc.methods.initialize_from_data(program, BATCHES)
    module = program.module()
    state, before = {k: t.clone() for k, t in module.state_dict().items()}, module(ids=IDS)
    _, trained = both_losses(module)
    assert_differs(trained, before)
    module.load_state_dict(state)
    torch.testing.assert_close(module(ids=IDS), before)
    both_losses(module)
    adaptc.swap(program, state)
    torch.testing.assert_close(program(ids=IDS), before)
    untouched = compiled()
    adaptc.swap(untouched, state)  # which had no data, so its base is the original
    plain = compiled(init_lora_weights=True)
    adaptc.swap(plain, state)
    torch.testing.assert_close(untouched(ids=IDS), plain(ids=IDS))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*no data yet")
@pytest.mark.parametrize("given", [True, False])
def test_a_module_generates_on_the_changed_base(given: bool) -> None:
    """Generation captures the model once more, on the base as the data changed it."""
    build, ids = FAMILIES["llama"].build, torch.arange(18).reshape(2, 9)
    config = adaptc.LoraConfig(**{**CONFIG, "target_modules": ["q_proj"]})
    program = adaptc.compile(build().eval(), config, example_inputs={"input_ids": ids}, training=True)
    if given:
        adaptc.methods.initialize_from_data(program, [{"input_ids": ids}])
        assert program.binding.changed_base
    found = program.module().eval().generate(ids, max_new_tokens=4, do_sample=False)
    expected = build().eval().generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_a_second_call_starts_over_from_the_original_weights() -> None:
    one, two = compiled(), compiled()
    adaptc.methods.initialize_from_data(one, BATCHES)
    adaptc.methods.initialize_from_data(two, BATCHES[::-1][:2])
    adaptc.methods.initialize_from_data(two, BATCHES)
    for name, tensor in one.state_dict.items():
        torch.testing.assert_close(two.state_dict[name], tensor)


class Functional(nn.Module):
    """A net that reads a weight without calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.mid = nn.Embedding(17, 7), nn.Linear(7, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.einsum("bti,oi->bto", self.rows(ids), torch.exp(self.mid.weight))


def test_a_site_without_an_input_is_named() -> None:
    program = compiled(Functional().eval(), target_modules=["mid"])
    before = program.binding
    with pytest.raises(adaptc.AdaptcError, match="no data reaches 'mid'"):
        adaptc.methods.initialize_from_data(program, BATCHES)
    assert program.binding is before


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = data_net().to(dtype)
    program, wide = compiled(model), compiled()
    for one in (program, wide):
        adaptc.methods.initialize_from_data(one, BATCHES)
    tolerance = 0.06 if dtype == torch.bfloat16 else 1e-10
    torch.testing.assert_close(program(ids=IDS), model(ids=IDS), rtol=tolerance, atol=tolerance)
    (a, b), (A, B) = factors(program, "left"), factors(wide, "left")
    assert a.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close((b @ a).float(), B @ A, rtol=0.05, atol=0.03)


def nan_net() -> nn.Module:
    model = data_net()
    with torch.no_grad():
        model.rows.weight[3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "batches", "match"),
    [
        (data_net, [], "batches has no batch"),
        (data_net, [{"ids": IDS[:1, :2]}], "'left': only 2 rows of input reached it, too few for its rank 3"),
        (nan_net, [{"ids": torch.tensor([[1, 3, 2, 4]])}], "'left': its input has NaN"),
        (data_net, [torch.zeros(2, 4)], "input 'ids': expected torch.int64"),
        (data_net, [3], "a batch is a dict of inputs"),
    ],
    ids=["empty", "few", "nan", "dtype", "no batch"],
)
def test_errors_name_the_site_and_change_nothing(model: Any, batches: list[Any], match: str) -> None:
    program = compiled(model())
    binding, state = program.binding, dict(program.state_dict)
    with pytest.raises(adaptc.AdaptcError, match=match):
        adaptc.methods.initialize_from_data(program, batches)
    assert program.binding is binding
    assert all(program.state_dict[k] is t for k, t in state.items())


def test_programs_that_cannot_take_data_are_refused(tmp_path: Path) -> None:
    program = compiled()
    adaptc.methods.initialize_from_data(program, BATCHES)
    loaded = adaptc.load(adaptc.save(program, tmp_path / "program.pt2"))
    with pytest.raises(adaptc.ConfigError, match=r"'left\.weight', of which the program's file has no original"):
        adaptc.methods.initialize_from_data(loaded, BATCHES)
    bound = program.bind(program.binding)
    with pytest.raises(adaptc.AdaptcError, match="not a Runner"):
        adaptc.methods.initialize_from_data(bound, BATCHES)
    configs = {n: adaptc.LoraConfig(**CONFIG) for n in ("fr", "de")}
    several = adaptc.compile(data_net(), configs, example_inputs={"ids": IDS}, training=True)
    with pytest.raises(adaptc.ConfigError, match=r"has the adapters \['de', 'fr'\]"):
        adaptc.methods.initialize_from_data(several, BATCHES)


@pytest.mark.long
def test_refusals() -> None:
    with pytest.raises(adaptc.ConfigError, match="'corda' has no meaning for a site of kind embedding"):
        compiled(target_modules=["rows"])
    with pytest.raises(adaptc.ConfigError, match="r=14 is too large"):
        compiled(r=14)
    with pytest.raises(adaptc.ConfigError, match="prune_temporary_fields=False"):
        adaptc.CordaConfig(prune_temporary_fields=False)
    with pytest.raises(adaptc.ConfigError, match=r"CordaConfig\.corda_method must be"):
        adaptc.CordaConfig(corda_method="kmp")  # type: ignore[arg-type]
    with pytest.raises(adaptc.ConfigError, match="CordaConfig has no field 'method'"):
        adaptc.LoraConfig(init_lora_weights="corda", corda_config={"method": "kpm"})
    with pytest.warns(adaptc.AdaptcWarning, match="corda_config=.* has no effect without init_lora_weights='corda'"):
        adaptc.LoraConfig(corda_config=adaptc.CordaConfig())
    with pytest.raises(adaptc.ConfigError, match="changes the base weight, and before the tokens"):
        adaptc.LoraConfig(init_lora_weights="corda", alora_invocation_tokens=[3])
    with pytest.raises(adaptc.ConfigError, match="ensure_weight_tying=True has no meaning"):
        adaptc.LoraConfig(init_lora_weights="corda", ensure_weight_tying=True)
    with pytest.raises(adaptc.ConfigError, match="take no data"):
        adaptc.methods.initialize_from_data(compiled(init_lora_weights="pissa"), BATCHES)
    with pytest.raises(adaptc.AdaptcError, match=r"takes a program .* not a ProgramModule"):
        adaptc.methods.initialize_from_data(compiled(init_lora_weights=True).module(), BATCHES)
    with pytest.raises(adaptc.ConfigError, match="loss= is for 'lora_ga'"):
        adaptc.methods.initialize_from_data(compiled(), BATCHES, loss=lambda out: out.sum())
    with pytest.raises(adaptc.ConfigError, match="batches must be an iterable of batches"):
        adaptc.methods.initialize_from_data(compiled(), BATCHES[0])  # type: ignore[arg-type]
