"""Lily: factors that groups of layers have in common, in programs, training and files, held against PEFT."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import LilyConfig
from adaptc.methods.shared_factors.lily import Lily
from tests.support.subject import FILE, assert_close, assert_valid, file_key_of, loss, quiet

#: more layers than have one digit, so that order by name is not order in the model
LAYERS = 11


class Net(nn.Module):
    """Layers of which two have one shape, and two the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Module()
        self.blocks.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(7, 7), "v": nn.Linear(7, 7), "o": nn.Linear(7, 5), "u": nn.Linear(5, 7)})
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks.layers:
            x = x + torch.tanh(layer["q"](x) + layer["v"](x)) + 0.3 * layer["u"](torch.tanh(layer["o"](x)))
        return x


OPTIONS: dict[str, Any] = {
    "r": 3,
    "num_B": 3,
    "stride_A": 5,
    "scaling": 0.6,
    "target_modules": ["q", "v", "o"],
    "init_weights": False,
}
SLOTS = ("lily_A.weight", "lily_B.weight", "lily_router.weight")
#: what another adapter for the same program may have
OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"r": 5, "scaling": -1.5},
    "alone": {"stride_A": 1},
    "pairs": {"stride_A": 2},
    "all": {"stride_A": 99},
    "some layers": {"layers_to_transform": [1, 3, 4, 10], "stride_A": 3},
    "fewer modules": {"target_modules": ["q"], "stride_A": 2},
    "one expression": {"target_modules": r".*\.(q|v|o)", "stride_A": 3},
}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(3)
    return Net().double().eval()


@pytest.fixture(scope="module")
def plain(net: Net) -> adaptc.AdaptedProgram:
    return adaptc.unload(adaptc.compile(net, LilyConfig(**OPTIONS), example_inputs=inputs(3)))


def inputs(batch: int) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, 4, 7, dtype=torch.float64)


def wrapped(net: Net, seed: int = 7, **changes: Any) -> Any:
    with quiet():
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(net), peft.LilyConfig(**{**OPTIONS, **changes})).eval()


def tensors_of(program: adaptc.AdaptedProgram, slot: str) -> list[Tensor]:
    values, found = program.binding.values, program.adaptation.attachments
    return [values[a.slots[slot]] for a in found if a.id in program.binding.methods]


@pytest.mark.long
def test_first_values_and_groups_are_those_of_peft(net: Net, plain: Any) -> None:
    theirs = wrapped(net)
    torch.manual_seed(7)
    program = adaptc.compile(plain, LilyConfig(**OPTIONS), training=True)
    assert_valid(program)
    assert_close(program(inputs(5)), theirs(inputs(5)))
    module = program.module()
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    status = adaptc.debug.get_model_status(program)
    assert count == status.trainable_params == theirs.get_nb_trainable_parameters()[0]
    assert adaptc.report(program).trainable == count
    # Three groups of layers, and of "o" as many.
    assert len({id(t) for t in tensors_of(program, "lily_A.weight")}) == 3 * 3
    assert len({id(t) for t in tensors_of(program, "lily_B.weight")}) == 3
    assert len({id(t) for t in tensors_of(program, "lily_router.weight")}) == 3 * LAYERS


@pytest.mark.few(2)
@pytest.mark.parametrize("how", OTHERS)
def test_other_groups_run_through_the_same_code(how: str, net: Net, plain: Any, tmp_path: Any) -> None:
    theirs, x = wrapped(net, 11, **OTHERS[how]), inputs(5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    program = adaptc.compile(plain, LilyConfig(**OPTIONS), training=True)
    program(x)
    with adaptc.debug.assert_no_recompiles(), torch.no_grad():
        adaptc.swap(program, tmp_path / "theirs")
        assert_close(program(x), theirs(x))
    assert not torch.allclose(theirs(x), net(x), rtol=1e-3, atol=1e-3)
    assert_valid(program)
    assert adaptc.debug.get_model_status(program).trainable_params == theirs.get_nb_trainable_parameters()[0]
    written = adaptc.save_adapter(program, tmp_path / "ours")
    ours, given = load_file(written / FILE), load_file(tmp_path / "theirs" / FILE)
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[k], t) for k, t in given.items())
    with quiet():
        back = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(written)).eval()
    assert_close(back(x), theirs(x))


def gradients_of(program: adaptc.AdaptedProgram, x: Tensor) -> dict[str, Tensor | None]:
    module = program.module()
    module.eval()
    module.zero_grad()
    loss(module(x)).backward()
    return {f: p.grad for f, p in module.named_parameters() if p.requires_grad}


@pytest.mark.long
def test_gradients_of_what_layers_have_in_common_add_up(net: Net, plain: Any, tmp_path: Any) -> None:
    theirs, x = wrapped(net, 5), inputs(3)
    theirs.save_pretrained(str(tmp_path))
    loss(theirs(x)).backward()
    expected = {file_key_of(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    program = adaptc.compile(plain, tmp_path, training=True)
    found = gradients_of(program, x)
    assert len(found) == len(expected)
    for name, grad in found.items():
        theirs_ = expected[name.replace(".default", "")]
        assert grad is not None
        assert_close(grad / theirs_.abs().max(), theirs_.reshape(grad.shape) / theirs_.abs().max(), 1e-9)
    before = {f: t.detach().clone() for f, t in program.binding.values.items()}
    optimizer = torch.optim.AdamW([p for p in program.module().parameters() if p.requires_grad], lr=0.01)
    optimizer.step()
    for slot in ("lily_A.weight", "lily_B.weight"):
        for a in program.adaptation.attachments:
            assert not torch.equal(program.binding.values[a.slots[slot]], before[a.slots[slot]])
    adaptc.swap(program, adaptc.save_adapter(program, tmp_path / "trained"))  # whose copies agree


@pytest.mark.long
def test_a_program_that_was_loaded_or_copied_trains_one_tensor(plain: Any, tmp_path: Any) -> None:
    program = adaptc.compile(plain, LilyConfig(**OPTIONS), training=True)
    count = sum(p.numel() for p in program.module().parameters() if p.requires_grad)
    assert count == sum({id(t): t.numel() for s in SLOTS for t in tensors_of(program, s)}.values()) < 800
    others = {
        "loaded": adaptc.load(adaptc.save(program, tmp_path / "program.pt2")),
        "copied": copy.deepcopy(program),
        "moved": program.to("cpu"),
        "module copied": copy.deepcopy(program.module()).program,
    }
    x = inputs(3)
    expected = gradients_of(program, x)
    for how, other in others.items():
        assert sum(p.numel() for p in other.module().parameters() if p.requires_grad) == count, how
        found = gradients_of(other, x)
        assert found.keys() == expected.keys(), how
        for name, grad in found.items():
            assert_close(grad, expected[name])
    module = program.module()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.zero_()
    other.load_state_dict(state)
    assert_close(other(x), module(x))


def test_copies_that_differ_are_refused(plain: Any, tmp_path: Any) -> None:
    program = adaptc.compile(plain, LilyConfig(**OPTIONS))
    path = adaptc.save_adapter(program, tmp_path)
    tensors, before = load_file(path / FILE), program(inputs(3))
    apart = "base_model.model.blocks.layers.10.v.lily_B.weight"
    save_file({k: t * 1.5 if k == apart else t for k, t in tensors.items()}, path / FILE)
    for attempt in (
        lambda: adaptc.swap(program, path),
        lambda: program.bind(path),
        lambda: adaptc.compile(plain, path),
    ):
        with pytest.raises(adaptc.CheckpointError, match=r"layers\.10\.v\.lily_B\.weight.*one tensor, and differ"):
            attempt()
    assert torch.equal(program(inputs(3)), before)
    # A factor of one layer alone is nobody else's.
    own = "base_model.model.blocks.layers.10.v.lily_router.weight"
    save_file({k: t * 1.5 if k == own else t for k, t in tensors.items()}, path / FILE)
    adaptc.swap(program, path)
    first = "base_model.model.blocks.layers.10.v.lily_A.weight"  # layers 10 and after, which is one
    save_file({k: t * 1.5 if k == first else t for k, t in tensors.items()}, path / FILE)
    adaptc.swap(program, path)
    assert not torch.equal(program(inputs(3)), before)


@pytest.mark.long
def test_another_number_of_factors_needs_other_code(net: Net, plain: Any, tmp_path: Any) -> None:
    wrapped(net, num_B=2).save_pretrained(str(tmp_path))
    program = adaptc.compile(plain, LilyConfig(**OPTIONS))
    with pytest.raises(adaptc.SwapError, match=r"count=3.*count=2"):
        adaptc.swap(program, tmp_path)
    both = adaptc.compile(plain, [LilyConfig(**OPTIONS), LilyConfig(**{**OPTIONS, "num_B": 2})])
    adaptc.swap(both, tmp_path)
    with torch.no_grad():
        assert_close(both(inputs(3)), wrapped(net, num_B=2)(inputs(3)))


def test_a_row_depends_on_its_batch_as_in_peft(net: Net, plain: Any) -> None:
    theirs, x = wrapped(net), inputs(5)
    torch.manual_seed(7)
    program = adaptc.compile(plain, LilyConfig(**OPTIONS))
    with torch.no_grad():
        assert_close(program(x[:1]), theirs(x[:1]))
        assert float((program(x)[:1] - program(x[:1])).abs().max()) > 1e-5
    with pytest.raises(adaptc.TargetError, match="what lily does to a row depends on the whole batch"):
        program.bank({})


@pytest.mark.parametrize(
    ("targets", "names", "entries"),
    [
        (["q_proj", "proj"], ["a.0.q_proj", "a.1.proj"], ["q_proj", "proj"]),
        (["self.q", "q"], ["a.0.self.q", "a.0.cross.q"], ["self.q", "q"]),
        (["a.0.q"], ["a.0.q"], ["a.0.q"]),
        ("all-linear", ["a.0.self.q", "a.0.cross.q"], ["q", "q"]),
        (r".*q", ["a.0.q", "b.q"], [r".*q", r".*q"]),
    ],
)
def test_the_entry_that_a_layer_is_of(targets: Any, names: list[str], entries: list[str]) -> None:
    config = LilyConfig(target_modules=targets)
    found = [config.method(n, "linear") for n in names]
    assert [m.entry for m in found if isinstance(m, Lily)] == entries


@pytest.mark.parametrize("option", [{"r": 0}, {"stride_A": 0}, {"num_B": 1}, {"num_B": 2.5}, {"scaling": "x"}])
def test_values_without_a_meaning_are_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(adaptc.ConfigError, match=next(iter(option))):
        LilyConfig(**option)
