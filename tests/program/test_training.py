"""Training through ``prog.module()``: PEFT's gradients and losses, dropout and modes, transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, ConfigError, LoraConfig
from adaptc.passes.train.set_mode import SetMode
from tests.support.families import FAMILIES

KW = {"r": 5, "lora_alpha": 11, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def trained(llama: nn.Module) -> adaptc.AdaptedProgram:
    return adaptc.compile(llama, LoraConfig(**KW, task_type="CAUSAL_LM"), training=True)


def batch(seed: int, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def peft_twin(model: nn.Module, program: adaptc.AdaptedProgram) -> nn.Module:
    """PEFT's model with the program's adapter weights."""
    peft_model = get_peft_model(copy.deepcopy(model), PeftLoraConfig(**KW, task_type="CAUSAL_LM"))
    state = program.state_dict
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "lora_" in name:
                p.copy_(state[name.removeprefix("base_model.model.")])
    return peft_model


def randomised(program: adaptc.AdaptedProgram, seed: int) -> adaptc.AdaptedProgram:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in program.binding.values.values():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return program


def steps(loss_of: Callable[[dict[str, Tensor]], Tensor], params: list[nn.Parameter], count: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    losses = []
    for i in range(count):
        loss = loss_of(batch(i % 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.long
def test_only_adapter_parameters_train_and_their_gradients_are_pefts(llama, trained):
    randomised(trained, 1)
    module, peft_model = trained.module(), peft_twin(llama, trained)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trainable == {n for n in trained.state_dict if "lora_" in n}
    module(**batch(1)).loss.backward()
    peft_model(**batch(1)).loss.backward()
    theirs = {n.removeprefix("base_model.model."): p.grad for n, p in peft_model.named_parameters() if p.requires_grad}
    ours = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for n, p in module.named_parameters() if n not in trainable)
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.long
def test_losses_of_twenty_steps_equal_pefts(llama, trained):
    randomised(trained, 2)
    module, peft_model = trained.module(), peft_twin(llama, trained)
    base = {k: v.clone() for k, v in llama.state_dict().items()}
    ours = steps(lambda b: module(**b).loss, [p for p in module.parameters() if p.requires_grad])
    theirs = steps(lambda b: peft_model(**b).loss, [p for p in peft_model.parameters() if p.requires_grad])
    assert ours[-1] < ours[0] * 0.9
    # Adam's division amplifies rounding; over twenty steps the curves stay within a few float32 ulps of each other.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=0)
    for name, value in llama.state_dict().items():
        assert torch.equal(value, base[name])


@pytest.mark.long
def test_what_was_trained_runs_in_an_inference_program(llama, trained, tmp_path):
    randomised(trained, 3)
    module = trained.module()
    steps(lambda b: module(**b).loss, [p for p in module.parameters() if p.requires_grad], 5)
    adaptc.save_adapter(trained, tmp_path / "adapter")
    inference = adaptc.compile(llama, LoraConfig(r=2, target_modules="all-linear"))
    adaptc.swap(inference, tmp_path / "adapter")
    inputs = {k: v for k, v in batch(50).items() if k != "labels"}
    want = module.eval()(**batch(50)).logits
    torch.testing.assert_close(inference(**inputs).logits, want, rtol=1e-5, atol=1e-6)
    # The program itself sees what its module learned, and fills in the labels it was captured with.
    torch.testing.assert_close(trained(**inputs).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_the_trainer_of_transformers_trains_it_like_peft(llama, trained, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {k: v[0] for k, v in batch(i, rows=1).items()}

    def train(model: nn.Module) -> list[float]:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=Data())
        trainer.train()
        return [h["loss"] for h in trainer.state.log_history if "loss" in h]

    randomised(trained, 4)
    peft_model = peft_twin(llama, trained)
    ours, theirs = train(trained.module()), train(peft_model)
    assert len(ours) == 6
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(11, 1, dropout=0.5, batch_first=True)
        self.down = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2))
        return self.down(self.attention(h, h, h, need_weights=False)[0])


@pytest.fixture
def dropping() -> tuple[nn.Module, adaptc.AdaptedProgram]:
    torch.manual_seed(5)
    model = Dropping().eval()
    config = LoraConfig(r=3, target_modules=["up", "down"], lora_dropout=0.5, init_lora_weights=False)
    return model, adaptc.compile(model, config, example_inputs=torch.randn(4, 6, 7), training=True)


@pytest.mark.long
def test_train_and_eval_switch_every_dropout_and_batch_norm(dropping):
    model, program = dropping
    assert not model.training
    module, x = program.module(), torch.randn(5, 6, 7)
    assert module.training
    assert not torch.equal(module(x), module(x))
    assert module.eval() is module
    assert not module.training
    assert torch.equal(module(x), module(x))
    torch.testing.assert_close(module(x), adaptc.compile(
        model, LoraConfig(r=3, target_modules=["up", "down"]), example_inputs=torch.randn(4, 6, 7)
    ).bind(adapter_of(program), config=program.binding.config)(x), rtol=1e-5, atol=1e-6)  # fmt: skip
    assert not torch.equal(module.train()(x), module.train()(x))
    mean = program.state_dict["norm.running_mean"].clone()
    module.train()(x)
    assert not torch.equal(program.state_dict["norm.running_mean"], mean)


def adapter_of(program: adaptc.AdaptedProgram) -> dict[str, Tensor]:
    from adaptc.binding.bind import file_tensors

    return file_tensors(program.spec(), program.binding)


def test_a_training_program_answers_calls_without_dropout_and_merges_without_it(dropping):
    _, program = dropping
    x = torch.randn(3, 6, 7)
    assert torch.equal(program(x), program(x))
    merged = adaptc.merge(program)
    torch.testing.assert_close(merged(x), program(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.module()(x), program(x), rtol=1e-5, atol=1e-5)
    # The model itself takes a fused path in eval mode, hence not bit for bit.
    torch.testing.assert_close(adaptc.unload(program)(x), dropping[0](x), rtol=1e-5, atol=1e-6)


def test_lora_dropout_acts_on_the_adapter_input_with_the_configured_rate(dropping):
    _, program = dropping
    rates = [
        n.args[1] for n in program.graph.nodes if "dropout" in str(n.target) and "adaptc" in n.meta.get("custom", {})
    ]
    assert rates == [0.5, 0.5]


@pytest.mark.long
def test_a_program_captured_for_inference_says_so_instead_of_training_without_dropout(llama):
    program = adaptc.compile(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    module = program.module()
    assert not module.training
    with pytest.raises(AdaptcError, match="training=True"):
        module.train()
    assert module.eval() is module


@pytest.mark.long
def test_set_mode_is_a_pass_that_counts_and_undoes_itself(dropping):
    _, program = dropping
    off = SetMode(training=False)(program)
    assert off.count > 3
    assert SetMode(training=False)(off.program).count == 0
    on = SetMode(training=True)(off.program)
    assert on.count == off.count
    flags = [[n.args for n in p.graph.nodes if n.op == "call_function"] for p in (program, on.program)]
    assert str(flags[0]) == str(flags[1])


@pytest.mark.long
def test_inference_mode_freezes_the_adapter(llama):
    program = adaptc.compile(llama, LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True), training=True)
    assert not any(p.requires_grad for p in program.module().parameters())


def names(module: nn.Module) -> list[str]:
    return [getattr(n.target, "__name__", "") for n in module.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]


@pytest.mark.long
def test_a_module_that_trains_takes_layers_gates_and_the_loss_in_one_step_each(llama, trained):
    module = randomised(trained, 5).module()
    layers = len(trained.adaptation.attachments)
    # q_proj and v_proj read one tensor, down_proj another; a gate per block, and one loss.
    blocks = layers // 3
    assert names(module).count("lora_linears") == 2 * blocks
    assert names(module).count("gated_activation") == blocks
    assert names(module).count("linear_cross_entropy") == 1
    assert "lora_linears" not in names(trained)
    plain = adaptc.compile(llama, LoraConfig(**KW, task_type="CAUSAL_LM"), training=True, fuse=False)
    adaptc.swap(plain, adapter_of(trained))
    other = plain.module()
    assert not {"lora_linears", "gated_activation", "linear_cross_entropy"} & set(names(other))
    found = []
    for m in (module, other):
        m.zero_grad()
        m(**batch(2)).loss.backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2 * layers
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_a_module_with_nothing_to_train_is_left_as_it_is(llama):
    frozen = adaptc.compile(llama, LoraConfig(**KW, inference_mode=True), training=True).module()
    assert "lora_linears" not in names(frozen)


@pytest.mark.long
def test_weights_that_are_made_trainable_later_get_their_gradients(llama, trained):
    found = []
    for fuse in (True, False):
        program = adaptc.compile(llama, LoraConfig(**KW, task_type="CAUSAL_LM"), training=True, fuse=fuse)
        module = randomised(program, 5).module()
        for p in module.parameters():
            p.requires_grad_()
        module(**batch(3)).loss.backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert all(g is not None for g in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


RECIPES = {
    "llama": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    "gemma2": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "bert": {"target_modules": ["query", "value", "dense"]},
    "t5": {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]},
}


def twins(family: str) -> tuple[adaptc.AdaptedProgram, nn.Module, dict[str, Tensor]]:
    """A program, PEFT's model with the same adapter, and a batch with labels of which some are ignored."""
    kw = {"r": 5, "lora_alpha": 11, **RECIPES[family]}
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(3, 9)
    inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    inputs["labels"][:, ::3] = -100
    peft_model = get_peft_model(copy.deepcopy(model), PeftLoraConfig(**kw)).eval()
    program = adaptc.compile(model, LoraConfig(**kw), example_inputs=inputs, training=True)
    g = torch.Generator().manual_seed(7)
    slots = dict(program.module().named_parameters())
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
                slots[name.removeprefix("base_model.model.")].copy_(p)
    return program, peft_model, inputs


def curve(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None, count: int) -> list[float]:
    """Losses, after which the adapter is as it was."""
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    losses = []
    for _ in range(count):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**inputs).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert not scaler.is_enabled() or scaler.get_scale() == 2.0**10  # no step was left out
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    return losses


def slopes(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**inputs).loss
    loss.backward()
    grads = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", RECIPES)
def test_mixed_precision_trains_as_in_peft(family: str, dtype: torch.dtype) -> None:
    program, peft_model, inputs = twins(family)
    module = program.module().eval()
    program.fuse = False
    plain = program.module().eval()
    exact = slopes(peft_model, inputs, None)
    found, theirs, unfused = (slopes(m, inputs, dtype) for m in (module, peft_model, plain))
    assert found.keys() == exact.keys()
    # Roundings fall in other places, so a gradient is compared with the exact one, from which PEFT's is away by the
    # same roundings: a relative norm of a few eps for each of the layers that the gradient went through.
    eps = torch.finfo(dtype).eps
    for grads in (found, unfused):
        away = {n: [float((g[n] - e).norm() / e.norm()) for g in (grads, theirs)] for n, e in exact.items()}
        assert all(g.dtype == torch.float32 for g in grads.values())
        assert all(ours <= 2 * peft + 8 * eps for ours, peft in away.values())
        assert sum(ours for ours, _ in away.values()) <= 1.5 * sum(peft for _, peft in away.values()) + eps
    ours, unfused, theirs, exact = (
        torch.tensor(curve(m, inputs, d, 20))
        for m, d in ((module, dtype), (plain, dtype), (peft_model, dtype), (peft_model, None))
    )
    assert exact[-1] < exact[0] * 0.95
    # Each logit is rounded to half an eps of itself, and so is what it was made of; a loss is a mean of differences of
    # logits, in float32.
    for other in (unfused, theirs, exact):
        torch.testing.assert_close(ours, other, rtol=eps, atol=0)


@pytest.mark.long
def test_labelled_logits_train_the_same_on_rows_that_have_a_label(llama):
    program, peft_model, inputs = twins("llama")
    inputs["labels"][0] = -100
    module, every = program.module(logits="labelled").eval(), program.module().eval()
    out, whole = module(**inputs), every(**inputs)
    # Labels are one further than the logits that are for them.
    kept = (nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100)[..., None]
    assert torch.equal(out.logits, out.logits * kept)
    torch.testing.assert_close(out.logits, whole.logits * kept, rtol=1e-5, atol=1e-6)
    for other in (every, peft_model):
        torch.testing.assert_close(slopes(module, inputs, None), slopes(other, inputs, None), rtol=1e-4, atol=1e-6)
        found, expected = (torch.tensor(curve(m, inputs, None, 5)) for m in (module, other))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
        found, expected = (torch.tensor(curve(m, inputs, torch.bfloat16, 5)) for m in (module, other))
        torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    inputs["labels"][:] = -100
    assert module(**inputs).loss.isnan()


@pytest.mark.long
def test_which_logits_are_computed_is_all_or_labelled(llama, trained):
    with pytest.raises(ConfigError, match=r"'all', 'labelled'.*'some'"):
        trained.module(logits="some")
    frozen = adaptc.compile(llama, LoraConfig(**KW, inference_mode=True), training=True)
    with pytest.raises(ConfigError, match=r"'all', 'labelled'.*None"):
        frozen.module(logits=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="something to train"):
        frozen.module(logits="labelled")


@pytest.mark.long
def test_a_frozen_module_runs_under_autocast(llama):
    module = adaptc.compile(llama, LoraConfig(**KW, inference_mode=True), training=True).module().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = module(**batch(4)), llama(**batch(4))
    torch.testing.assert_close(found.loss, expected.loss, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
