"""kohya's, LyCORIS's and torchtune's tensors, against the formula and against peft."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import adaptc
from adaptc import CheckpointError, ConfigError, LoHaConfig, LoKrConfig, LoraConfig
from tests.support.component_nets import (
    CONV,
    LINEAR,
    SHAPES,
    TO_Q,
    check_program_output,
    flat,
    image,
    loha,
    lokr,
    lora_change,
    net,
    output_with_changes,
    program,
    program_with_all_sites,
    random_lora_factors,
    with_kohya_names,
)
from tests.support.cover import examples

# --- kohya and LyCORIS ------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=examples(15), deadline=None)
def test_every_module_has_its_own_rank_and_alpha(data: st.DataObject) -> None:
    model, wide = net(), program_with_all_sites()
    tensors, changes = {}, {}
    for module in data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True)):
        rank = data.draw(st.integers(1, 4))
        alpha = data.draw(st.none() | st.sampled_from([1.0, 2.5, 0.3, 7.0]))
        a, b = random_lora_factors(module, rank)
        tensors |= {f"{flat(module)}.lora_down.weight": a, f"{flat(module)}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{flat(module)}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        changes[module] = lora_change(a, b, 1.0 if alpha is None else alpha / rank)
    keys = data.draw(st.permutations(list(tensors)))
    adaptc.swap(wide, {k: tensors[k] for k in keys})
    with torch.no_grad():
        torch.testing.assert_close(wide(image()), output_with_changes(model, changes), rtol=1e-5, atol=1e-5)


def test_names_that_end_as_another_keep_their_own_rank_and_stay_alone() -> None:
    """PEFT's lists and tables match the ends of names."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_out = nn.Linear(5, 7)
            self.blocks = nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(7, 5)}) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[:2]:
                x = block["proj_out"](self.proj_out(x))
            return self.blocks[2]["proj_out"](self.proj_out(x))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 5)
    tensors = {}
    for name, rank, shape in (
        ("proj_out", 1, (7, 5)),
        ("blocks.0.proj_out", 2, (5, 7)),
        ("blocks.1.proj_out", 2, (5, 7)),
    ):
        front = f"lora_transformer_{name.replace('.', '_')}"
        tensors[f"{front}.lora_down.weight"] = torch.randn(rank, shape[1])
        tensors[f"{front}.lora_up.weight"] = torch.randn(shape[0], rank)
        tensors[f"{front}.alpha"] = torch.tensor(float(rank * 3))
    made = adaptc.compile(model, tensors, example_inputs=x)
    found = {s.fqn: s.rank for s in adaptc.report(made).sites}
    assert found == {"proj_out.weight": 1, "blocks.0.proj_out.weight": 2, "blocks.1.proj_out.weight": 2}
    changed = Two()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("proj_out", "blocks.0.proj_out", "blocks.1.proj_out"):
            front = f"lora_transformer_{name.replace('.', '_')}.lora"
            change = tensors[f"{front}_up.weight"] @ tensors[f"{front}_down.weight"] * 3
            changed.get_submodule(name).weight += change
        torch.testing.assert_close(made(x), changed(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_loha_is_lycoris_formula(module: str, model: nn.Module) -> None:
    tensors, change = loha(module, 2)
    made = program(model, with_kohya_names(module, tensors, 3.0))
    assert type(made.binding.config) is LoHaConfig
    check_program_output(made, model, {module: change * 1.5})


def test_loha_with_a_factor_for_the_kernel(model: nn.Module) -> None:
    tensors, change = loha(CONV, 2, kernel=True)
    check_program_output(program(model, with_kohya_names(CONV, tensors, 3.0)), model, {CONV: change * 1.5})


def test_loha_of_pefts_own_tensors(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoHaConfig(r=2, alpha=5, target_modules=[TO_Q, CONV], init_weights=False))
    state = peft.get_peft_model_state_dict(theirs)
    given = {}
    for key, t in state.items():
        module, _, slot = key.removeprefix("base_model.model.").rpartition(".")
        given[f"{flat(module)}.{slot}"] = t
        given[f"{flat(module)}.alpha"] = torch.tensor(5.0)
    made = program(net(), given)
    with torch.no_grad():
        torch.testing.assert_close(made(image()), theirs.eval()(image()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "r", "split", "both"),
    [(TO_Q, 1, (3, 2), None), (TO_Q, None, (3, 2), None), (CONV, 1, (2, 1), None), (CONV, None, (2, 1), None)],
)
def test_lokr_is_lycoris_formula(
    module: str, r: int | None, split: tuple[int, int], both: int | None, model: nn.Module
) -> None:
    tensors, change = lokr(module, r, split, both)
    made = program(model, with_kohya_names(module, tensors, 3.0))
    assert type(made.binding.config) is LoKrConfig
    # Two whole factors are not scaled, whatever the alpha.
    check_program_output(made, model, {module: change * (1.0 if r is None else 3.0 / r)})


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 2, "decompose_both": True, "decompose_factor": 4}, {"r": 64}])
def test_lokr_of_pefts_own_tensors(options: dict[str, object]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 36), nn.Linear(36, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model, x = Wide(), torch.randn(3, 24)
    twin = Wide()
    twin.load_state_dict(model.state_dict())
    theirs = peft.get_peft_model(
        twin, peft.LoKrConfig(alpha=3, target_modules=["a", "b"], init_weights=False, **options)
    )
    given = {}
    for key, t in peft.get_peft_model_state_dict(theirs).items():
        module, _, slot = key.removeprefix("base_model.model.").rpartition(".")
        given[f"lycoris_{module}.{slot}"] = t
        given[f"lycoris_{module}.alpha"] = torch.tensor(3.0)
    if options["r"] == 64:  # whole factors: PEFT scales these, LyCORIS does not
        for module in (theirs.base_model.model.a, theirs.base_model.model.b):
            module.scaling["default"] = 1.0
    made = adaptc.compile(model, given, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(made(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_three_factors_of_a_convolution_are_two(model: nn.Module) -> None:
    torch.manual_seed(2)
    down, mid, up = torch.randn(2, 7, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(10, 2, 1, 1)
    given = with_kohya_names(CONV, {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, 3.0)
    change = torch.einsum("or,rikl,ij->ojkl", up.flatten(1), mid, down.flatten(1)) * 1.5
    check_program_output(program(model, given), model, {CONV: change})
    given[f"{flat(CONV)}.lora_mid.weight"] = torch.randn(2, 3, 3, 3)
    with pytest.raises(CheckpointError, match=r"lora_mid \(2, 3, 3, 3\) does not go with lora_down \(2, 7, 1, 1\) at"):
        program(model, given)


@pytest.mark.parametrize("module", [TO_Q, CONV])
def test_dora(module: str, model: nn.Module) -> None:
    a, b = random_lora_factors(module, 2)
    weight = model.get_submodule(module).weight.detach()
    lengths = torch.rand(weight.shape[0]) + 0.5
    scale = lengths.reshape(-1, *[1] * (weight.ndim - 1))
    given = with_kohya_names(module, {"lora_down.weight": a, "lora_up.weight": b, "dora_scale": scale}, 3.0)
    full = (weight + lora_change(a, b, 1.5).reshape(weight.shape)).flatten(1)
    turned = full * (lengths / full.norm(dim=1)).unsqueeze(1)
    check_program_output(program(model, given), model, {module: turned - weight.flatten(1)})
    columns = torch.rand(1, weight.shape[1], *[1] * (weight.ndim - 2))
    with pytest.raises(CheckpointError, match=r"dora_scale.*lengths of columns"):
        program(model, given | {f"{flat(module)}.dora_scale": columns})
    alone = given | with_kohya_names(
        LINEAR, dict(zip(("lora_down.weight", "lora_up.weight"), random_lora_factors(LINEAR, 2), strict=True))
    )
    with pytest.raises(ConfigError, match="1 of 2 modules have 'lora_magnitude_vector'"):
        program(model, alone)


def test_kernels_of_one_position_and_linear_layers_are_exchanged(model: nn.Module) -> None:
    proj = "down_blocks.0.attentions.0.proj_in"
    given, changes = {}, {}
    for module, axes in ((proj, 2), (TO_Q, 4)):
        a, b = random_lora_factors(module, 2)
        changes[module] = lora_change(a, b, 1.0)
        a, b = (t.flatten(1) if axes == 2 else t[..., None, None] for t in (a, b))
        given |= with_kohya_names(module, {"lora_down.weight": a, "lora_up.weight": b})
    check_program_output(program(model, given), model, changes)


# --- torchtune --------------------------------------------------------------------------------------------------------


class Tune(nn.Module):
    def __init__(self, llama: bool) -> None:
        super().__init__()
        layers = nn.ModuleList([nn.Module()])
        if llama:
            self.model = nn.Module()
            self.model.layers = layers
            layers[0].mlp = nn.ModuleDict({"gate_proj": nn.Linear(6, 9)})
            layers[0].self_attn = nn.ModuleDict({"q_proj": nn.Linear(9, 6)})
        else:
            self.layers = layers
            layers[0].mlp = nn.ModuleDict({"w1": nn.Linear(6, 9)})
            layers[0].attn = nn.ModuleDict({"q_proj": nn.Linear(9, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for part in next(m for m in self.modules() if isinstance(m, nn.ModuleList))[0].children():
            for layer in part.children():
                x = layer(x)
        return x


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tune(llama=False), torch.randn(2, 6)
    given = {}
    for name, (out, into) in {"layers.0.mlp.w1": (9, 6), "layers.0.attn.q_proj": (6, 9)}.items():
        given |= {f"{name}.lora_a.weight": torch.randn(3, into), f"{name}.lora_b.weight": torch.randn(out, 3)}
        if dora:
            given[f"{name}.magnitude"] = torch.rand(out)
    torch.save(given, tmp_path / "adapter_0.pt")
    with pytest.raises(CheckpointError, match="does not say its alpha"):
        adaptc.compile(model, tmp_path / "adapter_0.pt", example_inputs=x)
    # torchtune writes this beside its own files.
    said = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "w1"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    made = adaptc.compile(model, tmp_path / "adapter_0.pt", example_inputs=x)
    assert made.binding.origin.format == "torchtune"
    assert [m.scale(made.ops[i]) for i, m in made.binding.methods.items()] == [2.0, 2.0]
    names = {"lora_a": "lora_A", "lora_b": "lora_B", "magnitude": "lora_magnitude_vector"}
    same = {}
    for key, t in given.items():
        for old, new in names.items():
            key = key.replace(old, new)
        same[key] = t
    theirs = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["w1", "q_proj"], use_dora=dora)
    twin = adaptc.compile(model, same, config=theirs, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(made(x), twin(x), rtol=1e-5, atol=1e-5)


def test_torchtune_for_transformers_names(tmp_path: Path) -> None:
    model, x = Tune(llama=True), torch.randn(2, 6)
    w1 = {"layers.0.mlp.w1.lora_a.weight": torch.randn(2, 6), "layers.0.mlp.w1.lora_b.weight": torch.randn(9, 2)}
    q = {
        "layers.0.attn.q_proj.lora_a.weight": torch.randn(2, 9),
        "layers.0.attn.q_proj.lora_b.weight": torch.randn(6, 2),
    }
    made = adaptc.compile(model, w1, config=LoraConfig(r=2), example_inputs=x)
    assert list(made.binding.config.target_modules) == ["model.layers.0.mlp.gate_proj"]
    with pytest.raises(CheckpointError, match="q_proj and k_proj in another order"):
        adaptc.compile(model, w1 | q, config=LoraConfig(r=2), example_inputs=x)
