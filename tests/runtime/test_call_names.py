"""Inputs by position and by name, left out and None, and what is said of those that are not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, ConfigError, LoraConfig, SwapError
from tests.support.families import FAMILIES

CONFIG = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)

    def forward(self, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = self.lin(x)
        y = y if gain is None else y * gain
        return y if shift is None else y + shift


X, GAIN, SHIFT = torch.randn(3, 5), torch.randn(7), torch.randn(7)


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module", params=["tuple", "dict", "loaded", "module", "packaged"])
def run(request: pytest.FixtureRequest, model: Net, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    example: Any = {"x": X, "shift": SHIFT} if request.param == "dict" else (X, None, SHIFT)
    prog = adaptc.compile(model, CONFIG, example_inputs=example)
    path = tmp_path_factory.mktemp("names") / "net.pt2"
    match request.param:
        case "loaded":
            prog = adaptc.load(adaptc.save(prog, path))
        case "module":
            return prog.module()
        case "packaged":
            return adaptc.load_package(adaptc.package(prog, path))
    return prog


@pytest.mark.long
def test_every_way_the_model_is_called(run: Any) -> None:
    expected = run(x=X, shift=SHIFT)
    for args, kwargs in [
        ((X,), {"shift": SHIFT}),
        ((X, None), {"shift": SHIFT}),
        ((X, None, SHIFT), {}),
        ((), {"shift": SHIFT, "x": X}),
        ((), {"shift": SHIFT, "gain": None, "x": X}),
    ]:
        torch.testing.assert_close(run(*args, **kwargs), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((X, GAIN, SHIFT), {}, "'gain' (is an input of the model, but|was captured as the constant None)"),
        ((X,), {}, "missing input 'shift'"),
        ((), {}, "missing inputs 'x', 'shift'"),
        ((X, None, SHIFT, X), {}, "got 4 positional inputs, which is too many"),
        ((X,), {"x": X, "shift": SHIFT}, "got input 'x' by position and by name"),
        ((X,), {"shfit": SHIFT, "shift": SHIFT}, "'shfit' is not an input of the program; nearest are 'shift'"),
        ((X,), {"a": 1, "bc": None, "shift": SHIFT}, "'a' is not an input.*'bc' is not an input"),
        ((X,), {"shift": SHIFT, "adapter_names": ["a"]}, r"'adapter_names' is not taken: rows.*prog\.bank"),
        ((X,), {"shift": SHIFT, "alora_offsets": [1]}, "'alora_offsets' is not taken: where activated LoRA acts"),
        ((X,), {"shift": SHIFT, "task_ids": [1]}, "'task_ids' is not taken"),
        ((X,), {"shift": None}, "'shift' must be a tensor"),
    ],
)
def test_what_is_not_taken_is_named(run: Any, args: tuple, kwargs: dict, match: str) -> None:
    with pytest.raises(AdaptcError, match=match) as error:
        run(*args, **kwargs)
    if "captured as" not in str(error.value) and "must be" not in str(error.value):
        assert "The program takes" in str(error.value)


def test_a_program_of_somebody_else_knows_its_own_inputs_by_name(model: Net) -> None:
    prog = adaptc.compile(torch.export.export(model, (X, GAIN)), CONFIG)
    assert torch.equal(prog(gain=GAIN, x=X), prog(X, GAIN))
    with pytest.raises(AdaptcError, match="'shift' is not an input of the program"):
        prog(X, GAIN, shift=None)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)

    def forward(self, *parts: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.lin(sum(parts)) * extra["gain"]  # type: ignore[arg-type]


def test_inputs_without_names_and_in_containers() -> None:
    model = Many()
    args, kwargs = (X, X.clone(), X.clone()), {"extra": {"gain": GAIN}}
    ep = torch.export.export(model, args, kwargs)
    prog = adaptc.compile(ep, LoraConfig(r=2, target_modules=["lin"]))
    torch.testing.assert_close(prog(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(AdaptcError, match="missing input"):
        prog(X, X, **kwargs)
    with pytest.raises(AdaptcError, match="another structure"):
        prog(*args, extra={"loss": GAIN})


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_language_models_are_called_as_ever(name: str) -> None:
    family = FAMILIES[name]
    model, kwargs = family.build(), family.inputs(2, 5)
    prog = adaptc.compile(model, LoraConfig(r=2, init_lora_weights=False))
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    rest = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
    expected = prog(**kwargs)[0]
    assert torch.equal(prog(ids, mask, **rest)[0], expected)
    assert torch.equal(prog(ids, mask, use_cache=False, return_dict=True, inputs_embeds=None, **rest)[0], expected)
    ones = prog(input_ids=ids, attention_mask=torch.ones_like(mask), **rest)[0]
    assert torch.equal(prog(ids, **rest)[0], ones)
    assert torch.equal(prog(ids, None, **rest)[0], ones)
    assert torch.equal(prog(input_ids=ids, attention_mask=None, **rest)[0], ones)
    with pytest.raises(AdaptcError, match=r"'output_hidden_states' (would change the answer|is an input of)"):
        prog(ids, output_hidden_states=True, **rest)
    with pytest.raises(AdaptcError, match=r"'inputs_embeds' is an input of the model, but .* captured without it"):
        prog(ids, inputs_embeds=torch.randn(2, 5, 8), **rest)


# -- what stands for an adapter --------------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "lin.lora_A.weight": torch.randn(2, 5, generator=g),
        "lin.lora_B.weight": torch.randn(7, 2, generator=g),
    }


def test_what_is_bound_stands_for_its_adapter(model: Net) -> None:
    prog = adaptc.compile(model, CONFIG, example_inputs=X)
    one, two = adaptc.bind(prog, tensors(1)), prog.bind(tensors(2), form="weight")
    adaptc.swap(prog, one)
    assert prog.binding is one.binding
    assert torch.equal(prog(X), one(X))
    adaptc.swap(prog, two)
    torch.testing.assert_close(prog(X), two(X))
    again = prog.bind(one)
    adaptc.swap(prog, prog)
    assert torch.equal(again(X), one(X))
    other = adaptc.compile(Net(), LoraConfig(r=2, target_modules=["lin"], modules_to_save=None), example_inputs=X)
    adaptc.swap(other, one)
    stranger = adaptc.compile(nn.Sequential(nn.Linear(5, 7)), LoraConfig(r=2, target_modules=["0"]), example_inputs=X)
    with pytest.raises(SwapError, match="other sites"):
        adaptc.swap(stranger, one)


def test_none_is_the_base(model: Net) -> None:
    prog = adaptc.compile(model, CONFIG, example_inputs=X)
    base = adaptc.bind(prog, None)
    torch.testing.assert_close(base(X), model(X))
    adaptc.swap(prog, tensors(1))
    torch.testing.assert_close(base(X), model(X))
    assert "the base" in repr(base)
    assert base.why == "the base has no adapter"
    assert not torch.allclose(prog(X), base(X))
    torch.testing.assert_close(prog.bind(None, form="auto")(X), model(X))
    torch.testing.assert_close(adaptc.unload(prog).bind(None)(X), model(X))
    for wrong, error, match in [
        (lambda: prog.bind(None, form="fast"), ConfigError, "form='fast'"),
        (lambda: prog.bind(None, config=CONFIG), ConfigError, "the base has no config"),
        (lambda: adaptc.swap(prog, None), SwapError, r"prog\.bind\(None\)"),
        (lambda: adaptc.swap(prog, 3), AdaptcError, r"or what prog\.bind returned; got int"),
        (lambda: adaptc.swap(prog, base), SwapError, "this is the base, which is no adapter"),
    ]:
        with pytest.raises(error, match=match):
            wrong()


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile_leaves_programs_as_they_are(model: Net, backend: str) -> None:
    prog = adaptc.compile(model, CONFIG, example_inputs=X, backend=backend)
    bound = prog.bind(tensors(3))
    compiled, also = torch.compile(prog), torch.compile(bound)
    prog(X)
    with adaptc.debug.assert_no_recompiles():
        for seed in (1, 2):
            adaptc.swap(prog, tensors(seed))
            for n in (1, 2, 7):
                x = torch.randn(n, 5)
                assert torch.equal(compiled(x), prog(x))
                assert torch.equal(also(x), bound(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_module_is_what_compilers_take(model: Net) -> None:
    prog = adaptc.compile(model, CONFIG, example_inputs=X)
    module = torch.compile(prog.module(), dynamic=True, fullgraph=True)
    for n in (2, 3, 7):
        x = torch.randn(n, 5)
        torch.testing.assert_close(module(x), prog(x))
