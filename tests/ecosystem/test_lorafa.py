"""LoRA-FA next to PEFT's: losses in a loop and in a Trainer, its state, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

import adaptc
from tests.support.custom_models import Mixture
from tests.support.training import CONFIG, Data, arguments, batch, losses, model, trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

#: ranks and alphas of their own at some layers, which PEFT takes from the layers as well
PATTERNS: dict[str, Any] = {**CONFIG, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 6}}
KINDS: dict[str, dict[str, Any]] = {
    "patterns": PATTERNS,
    "rslora": {**CONFIG, "use_rslora": True},
    "an embedding": {**CONFIG, "target_modules": ["q_proj", "embed_tokens"]},
    "a whole module": {**CONFIG, "modules_to_save": ["norm"]},
}
FACTORS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.02}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT rounds its products to bfloat16 where there is any."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)


def compiled(config: dict[str, Any], path: Path) -> adaptc.AdaptedProgram:
    program = adaptc.compile(model(), adaptc.LoraConfig(**config), training=True)
    adaptc.save_adapter(program, path)
    return program


def by_peft(path: Path, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model()), str(path), is_trainable=True)
    return wrapped, create_lorafa_optimizer(wrapped, r=5, lora_alpha=11, **{**FACTORS, **options})


def loop(module: nn.Module, optimizer: torch.optim.Optimizer, count: int = 20) -> list[float]:
    found = []
    for _ in range(count):
        loss = module(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def close(ours: list[float], theirs: list[float], tolerance: float = 1e-5) -> None:
    assert len(set(ours)) == len(ours) > 2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_twenty_steps_are_pefts(kind: str, tmp_path: Path) -> None:
    program = compiled(KINDS[kind], tmp_path)
    module = program.module()
    optimizer = adaptc.training.lorafa_optimizer(program, **FACTORS)
    frozen = {n: p.clone() for n, p in module.named_parameters() if "lora_A" in n or "embedding_A" in n}
    ours = loop(module, optimizer)
    close(ours, loop(*by_peft(tmp_path)))
    assert len(frozen) > 2
    assert all(
        torch.equal(module.get_parameter(n), p) and not module.get_parameter(n).requires_grad for n, p in frozen.items()
    )


@pytest.mark.long
def test_with_what_peft_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = compiled(PATTERNS, tmp_path)
    close(loop(program.module(), adaptc.training.lorafa_optimizer(program, **FACTORS)), loop(*by_peft(tmp_path)))


@pytest.mark.long
def test_before_the_module_is_made_or_of_a_module(tmp_path: Path) -> None:
    program = compiled(PATTERNS, tmp_path)
    twin = copy.deepcopy(program).module()
    of_twin = adaptc.training.lorafa_optimizer(twin, **FACTORS)
    optimizer = adaptc.training.lorafa_optimizer(program, **FACTORS)
    module = program.module()
    assert [n for n, p in module.named_parameters() if p.requires_grad and "lora_B" not in n] == []
    close(loop(module, optimizer, 4), loop(twin, of_twin, 4))


@pytest.mark.long
def test_in_a_trainer_that_goes_on(tmp_path: Path) -> None:
    def run(trained: Any, optimizer: Any, folder: Path, resume: Any = None, **more: Any) -> list[float]:
        args = transformers.TrainingArguments(**arguments(folder, weight_decay=0.02, **more))
        data = {"train_dataset": Data()}
        trainer = transformers.Trainer(model=trained, args=args, optimizers=(optimizer, None), **data)
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    program = compiled(PATTERNS, tmp_path / "adapter")
    second = copy.deepcopy(program)
    saving = {"save_strategy": "steps", "save_steps": 2}
    ours = run(program.module(), adaptc.training.lorafa_optimizer(program, **FACTORS), tmp_path / "ours", **saving)
    close(ours, run(*by_peft(tmp_path / "adapter"), tmp_path / "theirs"))
    optimizer = adaptc.training.lorafa_optimizer(second, **FACTORS)
    rest = run(second.module(), optimizer, tmp_path / "rest", str(tmp_path / "ours" / "checkpoint-4"))
    assert rest == ours, "losses after the checkpoint, to the bit; those before it are in its log"


@pytest.mark.long
def test_its_state_is_saved_and_loaded(tmp_path: Path) -> None:
    program = compiled(PATTERNS, tmp_path)
    module, optimizer = program.module(), adaptc.training.lorafa_optimizer(program, **FACTORS)
    loop(module, optimizer, 3)
    adaptc.save_adapter(program, tmp_path / "on the way")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = adaptc.compile(model(), tmp_path / "on the way", training=True)
    other = adaptc.training.lorafa_optimizer(again, lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert loop(again.module(), other, 3) == loop(module, optimizer, 3)


def test_each_expert_of_a_stack_is_projected_by_its_own_factor() -> None:
    """The weight moves as it would under the gradient of the whole weight, projected on what A lets it reach."""
    torch.manual_seed(0)
    net, x = Mixture(False).eval(), torch.randn(5, 7)
    config = adaptc.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.down"])
    program = adaptc.compile(net, config, example_inputs=x)
    module = program.module()
    optimizer = adaptc.training.lorafa_optimizer(program, lr=1e-3, betas=(0.0, 0.0), eps=1.0)
    named = {n.rpartition(".lora_")[2][0]: p for n, p in module.named_parameters() if ".lora_" in n}
    A, B = named["A"], named["B"]
    module(x).square().sum().backward()
    (site,) = program.adaptation.attachments
    n = program.ops[site.id].experts
    a = A.detach().reshape(n, 2, -1)
    g = B.grad.detach().reshape(B.shape[0], 2, n).permute(2, 0, 1)  # type: ignore[union-attr]
    step = torch.stack([g[e] @ torch.linalg.inv(a[e] @ a[e].T) / 9 for e in range(n)])
    optimizer.step()
    moved = -B.detach().reshape(B.shape[0], 2, n).permute(2, 0, 1) / 1e-3
    torch.testing.assert_close(moved, step / (step.abs() + 1), rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Any, str]] = {
    "OFT": (adaptc.OFTConfig(oft_block_size=8, target_modules=["q_proj"]), "for LoRA, and the program's.*OFT"),
    "AdaLoRA": (
        adaptc.AdaLoraConfig(total_step=9, target_modules=["q_proj"], target_r=2, init_r=3),
        "for LoRA.*ADALORA",
    ),
    "DoRA": (adaptc.LoraConfig(use_dora=True, target_modules=["q_proj"]), r"q_proj.weight' is dora"),
    "frozen": (adaptc.LoraConfig(inference_mode=True, target_modules=["q_proj"]), "not trainable"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", list(REFUSED))
def test_refusals(kind: str) -> None:
    config, says = REFUSED[kind]
    program = adaptc.compile(model(), config)
    before = [p.requires_grad for p in program.module().parameters()]
    with pytest.raises(adaptc.AdaptcError, match=says):
        adaptc.training.lorafa_optimizer(program, lr=1e-3)
    assert [p.requires_grad for p in program.module().parameters()] == before


@pytest.mark.long
@pytest.mark.parametrize(
    "values", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-9}, {"weight_decay": -0.1}], ids=str
)
def test_values_that_are_not_possible(values: dict[str, Any]) -> None:
    program = adaptc.compile(model(), adaptc.LoraConfig(**CONFIG))
    with pytest.raises(adaptc.ConfigError, match=next(iter(values))):
        adaptc.training.lorafa_optimizer(program, **{"lr": 1e-3, **values})
    assert len(trainable(program.module())) > 4
    assert isinstance(next(iter(program.binding.values.values())), Tensor)
