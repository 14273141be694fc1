"""Adapters of denoisers and text encoders are trained as PEFT trains them, and go into pipelines."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.debug import assert_no_recompiles
from tests.support import pipelines
from tests.support.pipelines import adapted, images, pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_diffusion.py"
LAYERS = {"unet": ["to_q", "to_k", "to_out.0", "conv1", "ff.net.2"], "text_encoder": pipelines.TEXT_LAYERS}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_train_diffusion", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configs(kind: Any) -> dict[str, Any]:
    return {
        name: kind(r=3, lora_alpha=5, target_modules=layers, init_lora_weights=False) for name, layers in LAYERS.items()
    }


def with_peft(pipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models of PEFT for the components, and the adapters in them as a program takes them."""
    models: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    for seed, (name, config) in enumerate(configs(peft.LoraConfig).items()):
        torch.manual_seed(seed)
        model = peft.inject_adapter_in_model(config, copy.deepcopy(getattr(pipe, name)).double().eval(), "default")
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
        models[name] = model
        adapters[name] = {k: t.detach().clone() for k, t in peft.get_peft_model_state_dict(model).items()}
    return models, adapters


@pytest.mark.long
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_gradients_are_those_of_peft(gamma: float | None, example: ModuleType) -> None:
    base = pipeline("sd")
    models, adapters = with_peft(base)
    scheduler = example.DDPMScheduler(clip_sample=False)
    modules: dict[str, Any] = {}
    for name, config in configs(adaptc.LoraConfig).items():
        program = adaptc.compile(getattr(base, name).double(), config, training=True)
        adaptc.swap(program, adapters[name], config=config)
        modules[name] = program.module().eval()
    source = torch.Generator().manual_seed(4)
    latents, noise = torch.randn(2, 3, 4, 6, 10, generator=source, dtype=torch.float64)
    times = torch.tensor([3, 400, 981])
    ids = torch.randint(2, 60, (3, 7), generator=source)
    losses = [
        example.noise_loss(made["unet"], made["text_encoder"], scheduler, ids, latents, noise, times, gamma)
        for made in (modules, models)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    for name, model in models.items():
        wanted = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
        got = {n: p.grad for n, p in modules[name].named_parameters() if p.requires_grad}
        assert len(got) == len(wanted) > 0
        pairs = pair_by_layer(got, wanted)
        assert max(float(w.abs().max()) for _, w in pairs) > 1e-4
        for g, w in pairs:
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)


def pair_by_layer(got: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the same tensor: names of PEFT end in ``lora_A.weight``, and those of modules have no ``weight``."""
    by_key = {n.replace(".weight", ""): g for n, g in wanted.items()}
    assert {k.replace(".weight", "").replace(".default", "") for k in got} == by_key.keys()
    return [(g, by_key[n.replace(".weight", "").replace(".default", "")]) for n, g in got.items()]


def test_weights_of_rows(example: ModuleType) -> None:
    scheduler = example.DDPMScheduler(clip_sample=False)
    times = torch.tensor([1, 300, 900])
    ratios = scheduler.alphas_cumprod[times] / (1 - scheduler.alphas_cumprod[times])
    assert ratios[0] > 5 > ratios[1]
    got = example.snr_weights(scheduler, times, 5.0)
    torch.testing.assert_close(got, torch.stack([5 / ratios[0], torch.tensor(1.0), torch.tensor(1.0)]))
    assert torch.equal(example.snr_weights(scheduler, times, None), torch.ones(3))


def test_the_average_of_adapters(example: ModuleType) -> None:
    module = torch.nn.Linear(3, 5)
    module.bias.requires_grad_(False)
    average = example.AdapterAverage([module], decay=0.75)
    assert len(average.average) == 1
    first = module.weight.detach().clone()
    module.weight.data += 4
    average.update()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), first + 1)
    torch.testing.assert_close(module.weight.detach(), first + 4)


@pytest.mark.long
def test_programs_go_into_a_pipeline_by_component(tmp_path: Path) -> None:
    base, ours = pipeline("sd"), adapted("sd")
    programs = {
        name: adaptc.compile(getattr(base, name), config, training=True)
        for name, config in configs(adaptc.LoraConfig).items()
    }
    images(ours, "sd")
    ours.load_lora_weights({"text_encoder": programs["text_encoder"]}, adapter_name="before")
    with assert_no_recompiles():
        ours.load_lora_weights(programs, adapter_name="trained")
    got = images(ours, "sd")
    ours.save_lora_weights(tmp_path, "trained")
    base.load_lora_weights(tmp_path)
    torch.testing.assert_close(got, images(base, "sd"), rtol=0, atol=1e-4)
    with torch.no_grad():  # the pipeline has values of its own
        for parameter in programs["unet"].module().parameters():
            parameter += parameter.requires_grad
    assert torch.equal(got, images(ours, "sd"))
    wrong = {"got int": {"unet": 3}, "a dict of nothing is no adapter": {}, "peft_type": {"unet": {}}}
    wrong["a dict of 'any' is no adapter"] = {"any": programs["unet"]}
    for said, source in wrong.items():
        with pytest.raises(adaptc.AdaptcError, match=said):
            ours.load_lora_weights(source, adapter_name="wrong")
    assert ours.get_active_adapters() == ["trained"]
    lacks = adaptc.compile(pipelines.PIPELINES["sd3"]())
    vars(lacks)["text_encoder_2"] = None
    with pytest.raises(adaptc.CheckpointError, match="adapter for text_encoder_2, which the pipeline lacks"):
        lacks.load_lora_weights({"text_encoder_2": programs["text_encoder"]})


@pytest.mark.long
def test_the_example(example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_diffusion.py", "--snr-gamma", "5", "--steps", "40"])
    threads = torch.get_num_threads()
    code = example.main()
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("ok  ") == 4
