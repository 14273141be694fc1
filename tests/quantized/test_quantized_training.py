"""A step of training on a quantised base: its memory and gradients, and what a module may become."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import adaptc
from adaptc.errors import AdaptcError, BackendError, CheckpointError
from adaptc.passes.quantized import quantized_linear
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.passes.train.choose_base_products import ChooseBaseMatmuls

LORA = adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "labels": IDS}


def model(name: str = "llama", width: int = 64, layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "initializer_range": 0.1}
    if name == "gpt2":
        sizes |= {"n_embd": width, "n_head": 4, "n_layer": layers, "n_positions": 40}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    sizes |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))


def program_of(base: Any, scheme: str = "nf4", dtype: torch.dtype = torch.bfloat16, config: Any = LORA) -> Any:
    return adaptc.compile(adaptc.quantize(base.to(dtype), scheme), config, training=True)


@cache
def program() -> Any:
    """Return a program that is not to be changed."""
    return program_of(model())


@cache
def wide_program(name: str) -> Any:
    """Return a program that is not to be changed, whose weights are larger than what its activations take."""
    return program_of(model(name, 256))


def module() -> Any:
    return copy.deepcopy(program()).module().train()


def gradients(trained: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    trained(**(inputs or INPUTS)).loss.backward()
    return {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check tensors that were computed in bfloat16, and not by the same kernels: each rounds elsewhere."""
    assert found
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert (found[name] - t).float().norm() < 0.03 * t.float().norm(), name


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())


def quantized(state: Any) -> list[str]:
    return [n for n, t in state if isinstance(t, QuantizedTensor)]


def allocations(step: Callable[[], object]) -> list[int]:
    """Return the bytes of all memory that ``step`` takes on the CPU, in its order; what it gives back is negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak(sizes: list[int]) -> int:
    taken = most = 0
    for size in sizes:
        taken += size
        most = max(most, taken)
    return most


def test_the_profiler_sees_what_is_allocated() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        torch.empty(3_000_000, dtype=torch.uint8)
        kept.append(torch.empty(2_000_000, dtype=torch.uint8))

    sizes = allocations(step)
    assert (peak(sizes), sum(sizes)) == (3_000_000, 2_000_000)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_makes_no_float_weight(name: str, checkpoints: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are dequantised in blocks of rows, one after the other. So a step never has one whole float weight, and
    not two at a time. Of its forward nothing lives on that is as large as a weight."""
    monkeypatch.setattr(quantized_linear, "BLOCK_ELEMENTS", 1 << 13)
    trained = copy.deepcopy(wide_program(name)).module().train()
    if checkpoints:
        trained.gradient_checkpointing_enable()
    ids = IDS[:1, :5]
    gradients(trained, input_ids=ids, labels=ids)  # what is made once
    weights = [t.numel() * t.element_size() for t in trained.parameters() if isinstance(t, QuantizedTensor)]
    losses: list[Tensor] = []
    forward = allocations(lambda: losses.append(trained(input_ids=ids, labels=ids).loss))
    backward = allocations(losses.pop().backward)
    assert max(forward + backward) < min(weights)
    assert peak(forward + backward) - sum(forward) < 2 * min(weights)
    assert sum(forward) < min(weights) * len(weights) / 4


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_float_of_a_weight_is_kept_for_the_backward(name: str) -> None:
    trained = program_of(model(name)).module().train()
    sizes: list[tuple[int, ...]] = []
    memory = {s.data_ptr() for t in trained.parameters() if isinstance(t, QuantizedTensor) for s in t.stored.values()}
    memory |= {t.data_ptr() for t in trained.parameters() if not isinstance(t, QuantizedTensor)}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, QuantizedTensor) and t.data_ptr() not in memory:
            sizes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trained(**INPUTS)
    shapes = {tuple(t.shape) for t in trained.parameters() if isinstance(t, QuantizedTensor)}
    assert sizes
    assert not shapes & {*sizes, *(s[::-1] for s in sizes)}


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("scheme", ["nf4", "int8", "int8_dynamic", "int4"])
def test_gradients_with_checkpoints_are_the_same_to_the_bit(scheme: str) -> None:
    """Also through layers without an adapter, which are ops and no fused step."""
    found = []
    config = adaptc.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    own = program_of(model(), scheme, config=config)
    for checkpoints in (False, True):
        trained = copy.deepcopy(own).module().train()
        if checkpoints:
            trained.gradient_checkpointing_enable()
        found.append(gradients(trained))
    assert_equal(*found)


@pytest.mark.long
@pytest.mark.parametrize("fuse", [True, False])
def test_autocast_computes_as_on_plain_weights(fuse: bool) -> None:
    """Also in layers without an adapter."""
    config = adaptc.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    own = program_of(model(), dtype=torch.float32, config=config).with_options(fuse=fuse)
    plain = adaptc.compile(model(), config, training=True).with_options(fuse=fuse)
    adaptc.swap(plain, own.module().state_dict())
    twin = plain.module()
    with torch.no_grad():
        for name, t in own.module().named_parameters():
            if isinstance(t, QuantizedTensor):
                twin.get_parameter(name).copy_(t.dequantize())
    found = []
    for trained in (own.module().train(), twin.train()):
        with torch.autocast("cpu", torch.bfloat16):
            out = trained(**INPUTS)
        found.append((out.logits, gradients(trained)))
    assert_near(*({"logits": logits, **own} for logits, own in found))


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic"])
def test_a_layer_under_autocast_has_its_dtype(scheme: str) -> None:
    """Also where a kernel computes it that autocast does not see."""
    torch.manual_seed(0)
    layer = adaptc.quantize(nn.Linear(64, 15), scheme)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = [layer(torch.randn(3, 64, dtype=d)).dtype for d in (torch.float32, torch.bfloat16)]
    assert found == [torch.bfloat16] * 2


class Choice(NamedTuple):
    kind: str = "linear"
    classes: tuple[int, ...] = ()


@pytest.mark.long
def test_no_matmul_of_plain_weights_is_chosen_for_a_quantised_one() -> None:
    asked: list[tuple[int, int]] = []

    def choose(rows: int, columns: int, dtype: torch.dtype) -> Choice:
        asked.append((rows, columns))
        return Choice()

    ChooseBaseMatmuls(choose, choose)(module().graph_module.graph)
    assert asked == [(61, 64)] * 2, "other weights than that of the head"


@pytest.mark.long
def test_it_becomes_what_other_modules_become() -> None:
    expected = gradients(module())
    assert_equal(gradients(copy.deepcopy(module())), expected)
    assert_equal(gradients(pickle.loads(pickle.dumps(module()))), expected)
    assert_equal(gradients(module().to("cpu")), expected)
    assert_equal(gradients(copy.deepcopy(program()).to("cpu").module().train()), expected)
    clipped = module()
    gradients(clipped)
    norm = torch.nn.utils.clip_grad_norm_(clipped.parameters(), 0.1)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected.values()]).norm())
    wide = module().to(torch.float32)
    assert {t.dtype for t in wide.parameters()} == {torch.float32}
    assert quantized(wide.named_parameters()) == quantized(module().named_parameters())
    assert wide(**INPUTS).logits.dtype == torch.float32


def test_what_it_cannot_become_is_refused_by_name() -> None:
    with pytest.raises(AdaptcError, match=r"converted from torch.bfloat16 to torch.float16.*autocast"):
        module().half()(**INPUTS)
    with pytest.raises(AdaptcError, match=r"moved from cpu to meta.*program.to\('meta'\)"):
        module().to("meta")(**INPUTS)
    with pytest.raises(BackendError, match=r"device 'torch.float32' cannot be used"):
        program().to(torch.float32)


@pytest.mark.long
def test_its_whole_state_is_saved_and_loaded_as_data() -> None:
    trained = module()
    expected = gradients(trained)
    file = io.BytesIO()
    torch.save(trained.state_dict(base=True), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert quantized(state.items()) == quantized(trained.named_parameters())
    other = module()
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1)
    weight = other.get_parameter("model.layers.0.mlp.up_proj.weight")
    other.load_state_dict(state)
    assert other.get_parameter("model.layers.0.mlp.up_proj.weight") is weight
    assert_equal(gradients(other), expected)
    assert_equal(gradients(module()) if module().load_state_dict(state, assign=True) else {}, expected)


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("scheme", ["int8", None])
def test_the_state_of_another_base_is_refused_and_changes_nothing(scheme: str | None) -> None:
    other = model().to(torch.bfloat16) if scheme is None else adaptc.quantize(model().to(torch.bfloat16), scheme)
    state = adaptc.compile(other, LORA, training=True).module().state_dict(base=True)
    trained = module()
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    found = "stored as int8" if scheme else "torch.bfloat16 and not quantised"
    with pytest.raises(CheckpointError, match=rf"q_proj.weight' is {found}.*stored as nf4.*frozen.*adapter alone"):
        trained.load_state_dict(state)
    assert_equal(trained.state_dict(), before)


def test_accelerate_prepares_and_steps_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    trained = module()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(trained, optimizer)
    losses = []
    for _ in range(3):
        loss = prepared(**INPUTS).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    state = {n: t.clone() for n, t in prepared.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for p in prepared.parameters():
            if p.requires_grad:
                p.add_(1)
    accelerator.load_state(str(tmp_path))
    assert_equal(prepared.state_dict(), state)


@pytest.mark.long
def test_it_is_exported_again(tmp_path: Path) -> None:
    trained = module().eval()
    exported = torch.export.export(trained, (), {"input_ids": IDS}, strict=False)
    assert quantized(exported.state_dict.items()) == quantized(trained.named_parameters())
    torch.export.save(exported, tmp_path / "exported.pt2")
    loaded = torch.export.load(tmp_path / "exported.pt2")
    with torch.no_grad():
        first, again = (p.module()(input_ids=IDS).logits for p in (exported, loaded))
        assert torch.equal(first, again)
        # The exported program takes kernels for few rows, which a step of training does not.
        assert_near({"logits": first}, {"logits": trained(input_ids=IDS).logits})
        for found in (exported, loaded):
            assert len(quantized(found.state_dict.items())) == 14


# Of torch's compiler, about what it makes itself.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_gives_the_same(backend: str) -> None:
    torch.compiler.reset()
    trained = module()
    torch.compile(trained, backend=backend)(**INPUTS).loss.backward()
    found = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    assert_equal(found, gradients(module()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_compiler_does_not_trace_into_the_choice_of_a_kernel(scheme: str) -> None:
    torch.compiler.reset()
    layer, x = adaptc.quantize(nn.Linear(64, 96).bfloat16(), scheme), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        found = torch.compile(layer, backend="eager")(x)
    assert torch.equal(found, layer.weight.linear_of_values(x, layer.bias))


def test_a_step_takes_no_kernel_for_few_rows() -> None:
    """They round elsewhere than the gradient does, and keep a copy of the codes."""
    trained = module()
    gradients(trained)
    assert not any(t.prepared_bytes for t in trained.parameters() if isinstance(t, QuantizedTensor))


def test_a_module_that_is_trained_as_a_whole_has_plain_values(tmp_path):
    """The base's weight is frozen, and the adapter's is another one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 7))
    config = adaptc.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    x = torch.randn(5, 32)
    program = adaptc.compile(adaptc.quantize(net, "nf4"), config, example_inputs=x, training=True)
    module = program.module()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    (name,) = [n for n in trained if n.endswith("modules_to_save.default.weight")]
    assert type(trained[name]) is nn.Parameter
    assert torch.equal(trained[name], net[2].weight.dequantize())
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    before = trained[name].detach().clone()
    module(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(trained[name], before)
    path = adaptc.save_adapter(program, tmp_path / "adapter")
    again = adaptc.compile(net, path, example_inputs=x)
    torch.testing.assert_close(again(x), module(x).detach(), rtol=1e-5, atol=1e-6)
    merged = adaptc.merge(again, dequantize=True)
    torch.testing.assert_close(merged(x), again(x), rtol=1e-5, atol=1e-6)
