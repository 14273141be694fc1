"""Gradient checkpointing: gradients to the bit, less kept, and blocks that must not run twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import adaptc
from adaptc import (
    AdaptcError,
    AdaptcWarning,
    ConfigError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
)
from adaptc.passes.analysis.block_chains import find_block_chains
from adaptc.passes.train import recomputed
from adaptc.passes.train.checkpoint import UNALIASED_FUNCTIONS, checkpoint, set_checkpointing
from adaptc.passes.train.recomputed import RecomputedSegment
from adaptc.passes.train.set_mode import set_mode
from tests.support.families import FAMILIES, Family
from tests.support.pass_checks import export
from tests.support.repeated_nets import (
    Block,
    assert_same_step,
    forget_names,
    loss_of,
    make_block_chain,
    random_input,
    step,
)

LAYERS = ("num_hidden_layers", "num_layers")
ADAPTED = ["up", "down"]
KW = {"example_inputs": random_input(), "training": True}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": ADAPTED, **changes})


def deep(name: str, layers: int = 6) -> Family:
    family = FAMILIES[name]
    model, config, options = family.build.args  # type: ignore[attr-defined]
    options = {**options, **{k: layers for k in LAYERS if k in options}}
    return Family(name, partial(family.build.func, model, config, options), family.inputs, family.kind)  # type: ignore[attr-defined]


def randomised(program: adaptc.AdaptedProgram) -> adaptc.AdaptedProgram:
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in program.binding.values.values():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return program


def segments(module: nn.Module) -> list[RecomputedSegment]:
    return [m for m in module.modules() if isinstance(m, RecomputedSegment)]


def runs_of(module: nn.Module, inputs: Any) -> tuple[Any, int]:
    """What a step gives, and how often segments ran."""
    count = [0]

    def ran(*_: Any) -> None:
        count[0] += 1

    hooks = [m.body.register_forward_pre_hook(ran) for m in segments(module)]
    found = step(module, inputs)
    for hook in hooks:
        hook.remove()
    return found, count[0]


@pytest.fixture(scope="module")
def program() -> adaptc.AdaptedProgram:
    return randomised(adaptc.compile(make_block_chain(), lora(), **KW))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "t5", "mixtral")]


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["vit", "llama", "bert", *SLOW])
def test_a_step_of_a_transformer_is_equal_to_the_bit_and_keeps_less(name: str, fuse: bool) -> None:
    family = deep(name)
    # In a mixture "all-linear" reaches the experts, which have no input to drop.
    config = lora(target_modules="all-linear", lora_dropout=0.0 if name == "mixtral" else 0.1)
    program = randomised(adaptc.compile(family.build(), config, example_inputs=family.inputs(2, 7), training=True))
    program.fuse = fuse
    plain, module = program.module(), program.module(gradient_checkpointing=True)
    assert len(segments(module)) == (12 if name == "t5" else 6)
    for rows, length in ((2, 7), (3, 5)):
        expected, (found, runs) = step(plain, family.inputs(rows, length)), runs_of(module, family.inputs(rows, length))
        assert_same_step(found, expected)
        assert runs == 2 * len(segments(module))
        assert 2 * found[2] < expected[2]
    # In inference they run once, and keep what the plain module keeps.
    plain.eval()
    module.eval()
    expected, (found, runs) = step(plain, family.inputs(2, 7)), runs_of(module, family.inputs(2, 7))
    assert_same_step(found, expected)
    assert (runs, found[2]) == (len(segments(module)), expected[2])


METHODS: dict[str, Any] = {
    "lora": lora(),
    "lora on some": lora(layers_to_transform=[0, 2], layers_pattern="blocks"),
    "lora of several ranks": lora(rank_pattern={"blocks.1.up": 5}),
    "dora": lora(use_dora=True),
    "ia3": IA3Config(target_modules=ADAPTED, feedforward_modules=["down"]),
    "oft": OFTConfig(r=1, oft_block_size=0, target_modules=ADAPTED, module_dropout=0.0),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=ADAPTED, rank_dropout=0.0),
    "miss": MissConfig(r=1, target_modules=ADAPTED, miss_dropout=0.1),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, fuse: bool) -> None:
    program = randomised(adaptc.compile(make_block_chain(), METHODS[method], **KW))
    program.fuse = fuse
    expected, module = step(program.module(), random_input(4)), program.module(gradient_checkpointing=True)
    found, runs = runs_of(module, random_input(4))
    assert_same_step(found, expected)
    assert (len(segments(module)), runs) == (5, 10)
    assert found[2] < expected[2]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
def test_several_blocks_are_one_segment(program: adaptc.AdaptedProgram, every: int) -> None:
    module = program.module(gradient_checkpointing=every)
    found, runs = runs_of(module, random_input())
    assert_same_step(found, step(program.module(), random_input()))
    assert len(segments(module)) == -(-5 // every)
    assert runs == 2 * len(segments(module))


def test_a_program_says_what_its_modules_do() -> None:
    program = randomised(adaptc.compile(make_block_chain(), lora(), checkpoint=2, **KW))
    assert program.checkpoint == 2
    found, runs = runs_of(program.module(), random_input())
    assert_same_step(found, step(program.module(gradient_checkpointing=False), random_input()))
    assert runs == 2 * 3
    assert len(segments(copy.deepcopy(program).module())) == 3
    assert len(segments(program.module(gradient_checkpointing=True))) == 5
    program.checkpoint = "auto"
    assert len(segments(program.module())) == 5
    program.checkpoint = None
    assert not segments(program.module())


@pytest.mark.parametrize("value", [0, -1, 2.0, "two", [1]])
def test_what_is_no_number_of_blocks_is_refused(program: adaptc.AdaptedProgram, value: Any) -> None:
    with pytest.raises(ConfigError, match="no number of blocks"):
        program.checkpoint = value
    with pytest.raises(ConfigError, match=r"checkpoint=.*no number of blocks"):
        adaptc.compile(make_block_chain(), lora(), checkpoint=value, **KW)
    assert program.checkpoint is None


def test_a_program_for_inference_has_nothing_to_compute_again() -> None:
    with pytest.raises(ConfigError, match="training=True"):
        adaptc.compile(make_block_chain(), lora(), **{**KW, "training": False}, checkpoint="auto")


def test_names_are_not_needed(program: adaptc.AdaptedProgram) -> None:
    module = program.module()
    forget_names(module)
    assert checkpoint(module).count == 5
    assert_same_step(step(module, random_input()), step(program.module(), random_input()))


def test_parameters_and_buffers_keep_their_names_and_values(program: adaptc.AdaptedProgram) -> None:
    plain, module = program.module(), program.module(gradient_checkpointing=True)
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in plain.named_parameters()}
    assert {n: id(b) for n, b in module.named_buffers()} == {n: id(b) for n, b in plain.named_buffers()}
    assert list(module.state_dict()) == list(plain.state_dict())


def test_it_is_turned_off_and_on(program: adaptc.AdaptedProgram) -> None:
    plain, module = program.module(), program.module(gradient_checkpointing=True)
    expected = step(plain, random_input())
    for on in (False, True, True, False):
        assert set_checkpointing(module, on) == 5
        found, runs = runs_of(module, random_input())
        assert_same_step(found, expected)
        assert runs == (10 if on else 5)
        assert (found[2] == expected[2]) == (not on)
    assert set_checkpointing(plain, True) == 0


def test_train_and_eval_reach_into_segments(program: adaptc.AdaptedProgram) -> None:
    module, plain = program.module(gradient_checkpointing=True), program.module()
    for mode in (False, True, False, True):
        assert module.train(mode) is module
        plain.train(mode)
        found, runs = runs_of(module, random_input())
        assert_same_step(found, step(plain, random_input()))
        assert runs == (10 if mode else 5)
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(module(random_input()), module(random_input())) == (not mode)


def test_without_gradients_segments_run_once(program: adaptc.AdaptedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr(recomputed, "checkpoint", never)
    module = program.module(gradient_checkpointing=True)
    with torch.no_grad():
        module(random_input())
    module.eval()(random_input())
    with pytest.raises(AssertionError, match="checkpointed"):
        module.train()(random_input())


def test_a_mode_that_is_set_before_the_backward_does_not_change_it(program: adaptc.AdaptedProgram) -> None:
    expected, module = step(program.module(), random_input()), program.module(gradient_checkpointing=True)
    module.zero_grad()
    torch.manual_seed(3)
    out = module(random_input())
    module.eval()
    loss_of(out).backward()
    assert all(torch.equal(module.get_parameter(name).grad, grad) for name, grad in expected[1].items())


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")
def test_copies_are_modules_of_their_own(program: adaptc.AdaptedProgram) -> None:
    module = program.module(gradient_checkpointing=True)
    expected = step(module, random_input())
    twin = copy.deepcopy(module)
    twin.graph.lint()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}
    found, runs = runs_of(twin, random_input())
    assert_same_step(found, expected)
    assert runs == 10
    set_checkpointing(twin, False)
    assert runs_of(module, random_input())[1] == 10


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_compiled_module_has_one_graph_and_equal_gradients(dropout: float) -> None:
    program = randomised(adaptc.compile(make_block_chain(count=2), lora(lora_dropout=dropout), **KW))
    program.fuse = False
    expected, module = step(program.module(), random_input()), program.module(gradient_checkpointing=True)
    torch._dynamo.reset()
    found = step(torch.compile(module, backend="aot_eager", fullgraph=True), random_input())
    gradients = {n.removeprefix("_orig_mod."): g for n, g in found[1].items()}
    torch.testing.assert_close((found[0], gradients), expected[:2], rtol=1e-5, atol=1e-7)


class Once(Block):
    """``how(self, h)`` is done to the hidden values of a block."""

    def __init__(self, how: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm1d = nn.BatchNorm1d(11)
        self.register_buffer("count", torch.zeros(()))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        h = self.how(self, self.up(self.norm(x)))
        out = x + self.down(self.drop(h))
        return out if self.how is not shared_outputs else (out, h.mean(-1, keepdim=True))


def shared_outputs(block: Any, h: Tensor) -> Tensor:
    return h.sin()


def in_no_grad(block: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        weight = block.drop(h.abs()) + 0.5
    return torch.tanh(h) * weight


def in_autocast(block: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block.drop(h @ torch.eye(11))
    return y.float().tanh()


def attention(block: Any, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h.sin(), h, dropout_p=0.1 if block.training else 0.0)


def in_cond(block: Any, h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))


def in_place(block: Any, h: Tensor) -> Tensor:
    return F.relu_(h + 0.1).mul_(2) * h


def in_place_of_context(block: Any, h: Tensor) -> Tensor:
    """Integers that need no gradient, made in a block and written to there, as T5 does with its buckets."""
    steps = torch.arange(h.shape[-1], device=h.device) * 1
    steps += 3
    return h.tanh() * steps.clamp(max=7)


HELD = (shared_outputs, in_no_grad, in_autocast, attention, in_cond, in_place, in_place_of_context)
BODIES = {f.__name__: f for f in HELD}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.few(3)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("body", [pytest.param(b, marks=pytest.mark.slow) if b == "in_cond" else b for b in BODIES])
def test_what_blocks_may_hold(body: str, fuse: bool) -> None:
    config = lora(target_modules=["down"] if body == "in_no_grad" else ADAPTED)
    program = randomised(adaptc.compile(make_block_chain(lambda: Once(BODIES[body])), config, **KW))
    program.fuse = fuse
    plain, module = program.module(), program.module(gradient_checkpointing=True)
    module.graph.lint()
    for mode in (True, False, True):
        found, runs = runs_of(module.train(mode), random_input(4))
        assert_same_step(found, step(plain.train(mode), random_input(4)))
        assert (len(segments(module)), runs) == (5, 10 if mode else 5)


def norm(block: Any, h: Tensor) -> Tensor:
    return block.norm1d(h.transpose(1, 2)).transpose(1, 2)


def counted(block: Any, h: Tensor) -> Tensor:
    block.count.add_(1)
    return h * block.count


@pytest.mark.long
@pytest.mark.parametrize(("writes", "reason"), [(norm, "running statistics"), (counted, "count.*not of the block")])
def test_blocks_that_write_to_buffers_run_once(writes: Any, reason: str) -> None:
    program = adaptc.compile(make_block_chain(lambda: Once(writes)), lora(), **KW)
    before = str(program.module().graph)
    module = program.module()
    with pytest.raises(AdaptcError, match=rf"no block twice: the block from .*{reason}.*; and 2 more"):
        checkpoint(module)
    assert str(module.graph) == before
    # Where some do, these alone are left.
    kinds = iter([F.gelu, F.gelu, writes, F.gelu, F.gelu])
    mixed = randomised(adaptc.compile(make_block_chain(lambda: Once(as_how(next(kinds)))), lora(), **KW))
    state = copy.deepcopy(mixed.state_dict)
    expected = step(mixed.module(), random_input())
    after = {k: v.clone() for k, v in mixed.state_dict.items()}
    for k, v in state.items():
        mixed.state_dict[k].data.copy_(v)
    with pytest.warns(AdaptcWarning, match=reason):
        module = mixed.module(gradient_checkpointing=True)
    found, runs = runs_of(module, random_input())
    assert_same_step(found, expected)
    assert runs == 2 * len(segments(module)) == 8
    assert any(not torch.equal(v, state[k]) for k, v in after.items())
    assert all(torch.equal(v, mixed.state_dict[k]) for k, v in after.items())


def as_how(function: Any) -> Callable[[Any, Tensor], Any]:
    return function if function in (norm, counted) else lambda block, h: function(h)


def test_blocks_may_share_parameters() -> None:
    one = Once(lambda block, h: h.sin())
    program = randomised(adaptc.compile(make_block_chain(lambda: one), lora(), **KW))
    module = program.module(gradient_checkpointing=True)
    found, runs = runs_of(module, random_input())
    assert_same_step(found, step(program.module(), random_input()))
    assert (len(segments(module)), runs) == (5, 10)


def test_a_sequence_of_equal_blocks() -> None:
    torch.manual_seed(8)
    layers = [[nn.Linear(5, 11), nn.GELU(), nn.Dropout(0.1), nn.Linear(11, 5)] for _ in range(6)]
    model = nn.Sequential(*(nn.Sequential(*block) for block in layers))
    program = randomised(adaptc.compile(model, lora(target_modules="all-linear"), **KW))
    module = program.module(gradient_checkpointing=True)
    found, runs = runs_of(module, random_input())
    assert_same_step(found, step(program.module(), random_input()))
    assert (len(segments(module)), runs) == (6, 12)


@pytest.mark.long
def test_requests_that_cannot_be_met_are_refused_and_change_nothing(program: adaptc.AdaptedProgram) -> None:
    for wrong in (0, -1, 1.5, "all"):
        with pytest.raises(ConfigError, match="number of blocks from 1"):
            program.module(gradient_checkpointing=wrong)  # type: ignore[arg-type]
    single = adaptc.compile(make_block_chain(count=1), lora(), **KW)
    module = single.module()
    before = str(module.graph)
    with pytest.raises(AdaptcError, match="found no repeated block"):
        checkpoint(module)
    assert str(module.graph) == before
    with pytest.raises(AdaptcError, match="found no repeated block"):
        single.module(gradient_checkpointing=True)
    module = program.module(gradient_checkpointing=2)
    before = str(module.graph)
    with pytest.raises(AdaptcError, match="has checkpoints already"):
        checkpoint(module, 1)
    assert str(module.graph) == before
    frozen = adaptc.compile(make_block_chain(), lora(), example_inputs=random_input())
    with pytest.raises(AdaptcError, match=r"captured for inference.*training=True"):
        frozen.module(gradient_checkpointing=True)


def test_the_pass_works_on_modules_of_plain_programs() -> None:
    model = make_block_chain().train()
    plain = export(model, random_input()).module()
    module: fx.GraphModule = export(model, random_input()).module()  # type: ignore[assignment]
    assert [len(c.blocks) for c in find_block_chains(module, UNALIASED_FUNCTIONS)] == [5]
    result = checkpoint(module, 2)
    assert (result.count, result.notes, result.trail) == (3, (), (("checkpoint", 3),))
    assert len(result.data) == 3
    set_mode(module, True)
    for m in module.modules():
        m.training = True
    assert_same_step(step(module, random_input()), step(plain, random_input()))
