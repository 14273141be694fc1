"""How strongly adapters that act together do so, held against PEFT on a model with layers of several kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, AdaptcWarning, CheckpointError, ConfigError, LoraConfig, MergeError, SwapError
from tests.support.interrupts import LineInterrupt
from tests.support.subject import assert_close, assert_valid, quiet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(11, 17), nn.Linear(17, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 11)
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(11, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.randint(13, (3, 4), generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, dict[str, Any]] = {
    "style": {"r": 3, "lora_alpha": 5, "target_modules": ["up", "embed"], "modules_to_save": ["head"]},
    "task": {"r": 2, "use_rslora": True, "target_modules": ["up", "down"], "rank_pattern": {"layers.3.up": 4}},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(11)
    return Net().double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both adapters with random tensors, as PEFT writes them."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        with quiet():
            wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config), adapter_name=name)
            with torch.no_grad():
                for p in wrapped.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p) * 0.3)
            wrapped.save_pretrained(str(path))
    return path


class Twins:
    """adaptc's program and PEFT's model with the same adapters."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.ours = adaptc.compile(model, {n: folder / n for n in CONFIGS}, example_inputs=IDS)
        with quiet():
            self.theirs: Any = peft.PeftModel.from_pretrained(
                copy.deepcopy(model), str(folder / "style"), adapter_name="style"
            )
            self.theirs.load_adapter(str(folder / "task"), adapter_name="task")
            self.theirs.base_model.set_adapter(["style", "task"])

    def check(self) -> None:
        with torch.no_grad():
            assert_close(self.ours(IDS), self.theirs(IDS), 1e-9)

    def scale(self, factor: float, name: str, part: str = "") -> None:
        for path, module in self.theirs.named_modules():
            if hasattr(module, "set_scale") and part in f"{path}.":
                module.set_scale(name, factor)


@pytest.fixture
def twins(model: nn.Module, folder: Path) -> Twins:
    return Twins(model, folder)


@pytest.mark.long
def test_factors_as_peft(twins: Twins) -> None:
    twins.check()
    for factor in (0.5, 0.5, -2.0, 0):
        twins.ours.set_active({"style": factor, "task": None})
        twins.scale(factor, "style")
        twins.check()
    twins.ours.set_active({"style": None, "task": 3}, modules="layers.1")
    twins.scale(3, "task", ".layers.1.")
    twins.check()
    assert len(twins.ours.binding.scale_factors) == 13 + 2  # layers.1 is none of layers.10 and layers.11
    twins.ours.set_active({"task": 0.25, "style": None}, modules=["layers.10.down", "layers.3"])
    twins.scale(0.25, "task", ".layers.10.down.")
    twins.scale(0.25, "task", ".layers.3.")
    twins.check()
    twins.ours.set_active({"style": 7, "task": None}, r"layers\.[0-4]\.up")
    for i in range(5):
        twins.scale(7, "style", f".layers.{i}.up.")
    twins.check()
    assert_valid(twins.ours)


def test_the_active_ones_as_peft(twins: Twins) -> None:
    everything = twins.ours(IDS)
    for names in (["style"], ["task"], ["task", "style"]):
        twins.ours.set_active(names)
        with quiet():
            twins.theirs.base_model.set_adapter(names)
        if names != ["task", "style"]:
            twins.check()
        assert sorted(twins.ours.active_adapters) == sorted(names)
    assert torch.equal(twins.ours(IDS), everything)  # the order is that of the program, whatever that of the names
    twins.ours.set_active({"task": 0.7, "style": 0.2})
    with quiet():
        twins.theirs.base_model.set_adapter(["style", "task"])
    twins.scale(0.7, "task")
    twins.scale(0.2, "style")
    twins.check()
    twins.ours.set_active({"task": 9})
    twins.ours.set_active(("style",))
    assert twins.ours.active_adapters == ["style"]
    twins.ours.set_active({"style", "task"})  # which keep their factors, that are off or on
    twins.scale(9, "task")
    twins.check()
    twins.ours.set_active({"task": 4}, "layers.2")
    assert twins.ours.active_adapters == ["task"]
    twins.ours.set_active(["style", "task"])
    twins.scale(4, "task", ".layers.2.")
    twins.check()


def test_blocks_as_peft(twins: Twins, model: nn.Module) -> None:
    ours, theirs = twins.ours, twins.theirs
    ours.set_active({"task": 0.5, "style": None})
    twins.scale(0.5, "task")
    before = ours(IDS)
    with ours.scaled(3), rescale_adapter_scale(theirs, 3):
        twins.check()
        with ours.scaled(-0.5), rescale_adapter_scale(theirs, -0.5):
            twins.check()
            with ours.disabled(), theirs.disable_adapter():
                twins.check()
                assert_close(ours(IDS), model(IDS), 1e-9)
                with ours.disabled():
                    assert_close(ours(IDS), model(IDS), 1e-9)
                assert_close(ours(IDS), model(IDS), 1e-9)
            twins.check()
    assert torch.equal(ours(IDS), before)


BLOCKS = {
    "disabled": lambda p: p.disabled(),
    "a factor": lambda p: p.scaled(2),
    "factors": lambda p: p.scaled({"task": 2}),
}


@pytest.mark.long
@pytest.mark.parametrize("block", list(BLOCKS))
def test_a_block_that_raises_leaves_nothing(twins: Twins, block: str) -> None:
    ours = twins.ours
    before = ours(IDS)
    with pytest.raises(KeyError), BLOCKS[block](ours):
        raise KeyError
    assert torch.equal(ours(IDS), before)


@pytest.mark.long
def test_blocks_with_names(twins: Twins, model: nn.Module) -> None:
    """What calls in the block compute is what they would after ``set_active``; numbers of other blocks multiply."""
    ours, other = twins.ours, copy.copy(twins.ours)
    ours.set_active({"task": 0.5, "style": 3})
    before = ours(IDS)

    def check(factors: dict[str, float]) -> None:
        other.set_active(factors)
        assert_close(ours(IDS), other(IDS), 1e-9)

    with ours.scaled({"task": 0.3}):
        check({"task": 0.3})
        with ours.scaled(2):
            check({"task": 0.6})
            with ours.scaled({"style": -1, "task": None}):
                check({"style": -2, "task": 1})
            check({"task": 0.6})
        with ours.scaled({}):
            assert_close(ours(IDS), model(IDS), 1e-9)
        with ours.disabled():
            assert_close(ours(IDS), model(IDS), 1e-9)
    assert torch.equal(ours(IDS), before)


def test_calls_and_what_is_bound(twins: Twins, folder: Path) -> None:
    ours = twins.ours
    before = ours(IDS)
    with ours.scaled({"task": 0.3}):
        found = ours(IDS)
    with ours.scaled(0.5):
        both = ours(IDS)
    bound = ours.bind({"style": folder / "style"}, scale=0.5)(IDS)
    named = ours.bind(ours, scale={"style": 0.5})
    assert_close(ours.bind(ours, scale={"style": 0.5}, form="weight")(IDS), bound, 1e-9)
    assert torch.equal(ours(IDS), before)
    ours.set_active({"task": 0.3})
    assert torch.equal(ours(IDS), found)
    ours.set_active({"task": 0.5, "style": 0.5})
    assert torch.equal(ours(IDS), both)
    ours.set_active({"task": 1, "style": 0.5})
    assert torch.equal(ours(IDS), bound)
    assert torch.equal(named(IDS), bound)
    for block in BLOCKS.values():
        with block(ours):
            assert torch.equal(named(IDS), bound)  # what is bound keeps what it has


def test_what_calls_ask_for_is_remembered_and_let_go(twins: Twins) -> None:
    ours = twins.ours
    for factor in range(9):
        with ours.scaled(factor / 4):
            ours(IDS)
    assert len(ours.call_state.scaled_bindings) == 4
    ours.set_active({"task": 2})
    assert not ours.call_state.scaled_bindings


@pytest.mark.parametrize("factor", [np.float16(0.5), np.float32(0.5), np.int64(2)])
def test_numbers_of_numpy_are_factors(twins: Twins, factor: Any) -> None:
    twins.ours.set_active({"task": factor, "style": None})
    twins.scale(float(factor), "task")
    twins.check()


def test_a_swap_is_of_one_adapter_as_it_was_made(twins: Twins, folder: Path) -> None:
    ours = twins.ours
    ours.set_active({"style": 0.5, "task": 3})
    ours.set_active(["task"])
    adaptc.swap(ours, {"style": folder / "style"})
    twins.scale(3, "task")
    twins.check()
    adaptc.swap(ours, {"task": folder / "task"}, scale=0.2)
    twins.scale(0.2, "task")
    twins.check()
    adaptc.swap(ours, {n: folder / n for n in CONFIGS}, scale={"style": 4})
    twins.scale(4, "style")
    twins.scale(1, "task")
    twins.check()
    adaptc.swap(ours, {"task": None})
    with pytest.raises(ConfigError, match="no sites here"):
        ours.set_active({"task": 2})


def test_a_model_s_own_input_of_that_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor, adapter_scale: Tensor) -> Tensor:
            return self.layer(x) * adapter_scale

    inputs = {"x": torch.randn(2, 5), "adapter_scale": torch.tensor(3.0)}
    program = adaptc.compile(Own(), LoraConfig(target_modules=["layer"]), example_inputs=inputs)
    with torch.no_grad():
        assert_close(program(**inputs), 3 * program(inputs["x"], torch.tensor(1.0)), 1e-6)
        with program.disabled():
            assert_close(program(**inputs), 3 * program(inputs["x"], adapter_scale=torch.tensor(1.0)), 1e-6)


@pytest.mark.long
def test_one_that_is_deleted_is_gone(twins: Twins, model: nn.Module, folder: Path, tmp_path: Path) -> None:
    ours = twins.ours
    ours.set_active({"task": 0.5, "style": None})
    ours.delete_adapter("style")
    with quiet():
        twins.theirs.delete_adapter("style")
    twins.scale(0.5, "task")
    twins.check()
    assert_valid(ours)
    assert_close(adaptc.merge(ours)(IDS), ours(IDS), 1e-9)
    assert adaptc.verify(ours, model).ok
    assert "style" not in adaptc.report(ours).adapter
    assert ours.available_adapters == ["task"]
    for attempt in (
        lambda: ours.set_active(["style"]),
        lambda: ours.set_active({"style": 0.5}),
        lambda: ours.delete_adapter("style"),
        lambda: ours.scaled({"style": 1}),
        lambda: adaptc.swap(ours, {"style": folder / "style"}),
        lambda: adaptc.save_adapter(ours, tmp_path, adapter_name="style"),
    ):
        with pytest.raises(AdaptcError, match="task"):
            attempt()
    with pytest.raises(SwapError, match="only adapter"):
        ours.delete_adapter("task")
    adaptc.swap(ours, {"task": folder / "task"})
    twins.scale(1, "task")
    twins.check()
    loaded = adaptc.load(adaptc.save(ours, tmp_path / "program.pt2"))
    assert loaded.available_adapters == ["task"]
    assert torch.equal(loaded(IDS), ours(IDS))
    with adaptc.debug.assert_no_recompiles():
        assert ours.add_adapter("style", folder / "style") is ours
        assert ours.available_adapters == ["style", "task"]
    assert_close(ours(IDS), Twins(model, folder).ours(IDS), 1e-9)


@pytest.mark.long
def test_adapter_files_have_what_was_made(twins: Twins, folder: Path, tmp_path: Path) -> None:
    ours = twins.ours
    ours.set_active({"task": 0.5, "style": None})
    with pytest.warns(AdaptcWarning, match=r"'task' is scaled by 0.5 at 24 sites.*as it was made"):
        adaptc.save_adapter(ours, tmp_path, adapter_name="task")
    ours.set_active(["task"])
    adaptc.save_adapter(ours, tmp_path, adapter_name="style")  # which is off
    for name in CONFIGS:
        one, two = (adaptc.load_adapter(p / name).tensors for p in (folder, tmp_path))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    half = adaptc.compile(ours.base, 0.5 * adaptc.load_adapter(tmp_path / "task"))  # what the warning tells to do
    assert_close(half(IDS), ours(IDS), 1e-9)


@pytest.mark.long
def test_program_files_have_what_calls_compute(twins: Twins, tmp_path: Path) -> None:
    ours = twins.ours
    before = ours(IDS)
    ours.set_active({"style": 0.5, "task": 2})
    loaded = adaptc.load(adaptc.save(ours, tmp_path / "program.pt2"))
    assert torch.equal(loaded(IDS), ours(IDS))
    assert_close(torch.export.load(tmp_path / "program.pt2").module()(IDS), ours(IDS), 1e-9)  # without adaptc
    loaded.set_active({"style": 1, "task": 1})
    assert_close(loaded(IDS), before, 1e-9)
    ours.set_active(["style"])
    with pytest.raises(CheckpointError, match=r"'task' would be lost.*set_active"):
        adaptc.save(ours, tmp_path / "other.pt2")
    assert not (tmp_path / "other.pt2").exists()


def test_an_interrupt_as_a_block_begins_leaves_nothing(twins: Twins) -> None:
    files, before = ("state/overrides.py",), twins.ours(IDS)

    def call_in_block() -> None:
        with twins.ours.scaled(2):
            twins.ours(IDS)

    call_in_block()  # the first makes what the others remember
    with LineInterrupt(files=files) as lines:
        call_in_block()
    # Python handles no signal before the last line, which the trace can interrupt: it puts back what was.
    for stop in range(1, lines.count):
        with pytest.raises(KeyboardInterrupt), LineInterrupt(stop, files):
            call_in_block()
        assert torch.equal(twins.ours(IDS), before), stop


def test_a_merged_adapter_cannot_be_left_out(twins: Twins) -> None:
    merged = adaptc.merge(twins.ours)
    for block in (merged.disabled, merged.disable_adapter):
        with pytest.raises(MergeError, match=r"merged into the weights.*adaptc\.unmerge"):
            block()
    with adaptc.unmerge(merged).disabled(), adaptc.unload(twins.ours).disabled():
        pass


def test_merging_sees_the_program_and_no_block(twins: Twins) -> None:
    ours = twins.ours
    ours.set_active({"task": 0.5})
    expected = ours(IDS)
    merged = adaptc.merge(ours)
    assert_close(merged(IDS), expected, 1e-9)
    ours.set_active({"style": 3})
    assert torch.equal(adaptc.unmerge(merged)(IDS), expected)
    for block in BLOCKS.values():
        with block(ours):
            with pytest.raises(AdaptcError, match="merge is called inside of"):
                adaptc.merge(ours)
            with pytest.raises(AdaptcError, match="save_adapter is called inside of"):
                adaptc.save_adapter(ours, "nowhere")


BAD = {
    "no number": (lambda p: p.set_active({"style": "much"}), "factor of 'style' must be a number"),
    "a truth value": (lambda p: p.set_active({"task": True}), "factor of 'task' must be a number"),
    "not finite": (lambda p: p.set_active({"task": float("nan")}), "finite"),
    "too large with the alpha": (lambda p: p.set_active({"style": 3e38}), "finite in float32"),
    "a factor alone": (lambda p: p.set_active(0.5), "a dict of names and factors"),
    "no such name": (lambda p: p.set_active({"styles": 0.5}), "called 'styles' here; there are 'style', 'task'"),
    "no such names": (lambda p: p.set_active(["style", "taste"]), "'taste'"),
    "no names": (lambda p: p.set_active(3), "a list of names"),
    "no such module": (lambda p: p.set_active({"task": 0.5}, "layer.3"), "nearest are 'layers.3'"),
    "a module of the other": (lambda p: p.set_active({"task": 0.5}, ["up", "embed"]), "'embed' chooses nothing"),
    "not of each": (lambda p: p.set_active({"style": 1, "task": 1}, "embed"), "'embed' chooses nothing.*'task'"),
    "saved as a whole": (lambda p: p.set_active({"style": 0.5}, "head"), "'head.weight'.*no scale there"),
    "no module": (lambda p: p.set_active({"style": 0.5}, []), "empty list"),
    "modules by number": (lambda p: p.set_active({"style": 0.5}, 3), "modules=3 must be the name of a module"),
    "an expression": (lambda p: p.set_active({"style": 0.5}, "(up"), "modules"),
    "modules of no factor": (lambda p: p.set_active(["style"], "up"), "give a dict of names and factors"),
    "modules of no factors": (lambda p: p.set_active({"style": None}, "up"), "give a dict of names and factors"),
    "no factor": (lambda p: p.scaled("2"), "scale must be a number"),
    "no factors": (lambda p: p.scaled({"task": "2"}), "factor of 'task' must be a number"),
    "a block of no such name": (lambda p: p.scaled({"styles": 2}), "called 'styles' here"),
    "names that are none": (lambda p: p.set_adapters(3, 0.5), "adapter_names=3 must be a name or a list of names"),
    "a name that is there": (
        lambda p: p.add_adapter("task", LoraConfig(target_modules=["up"])),
        "called 'task' already",
    ),
    "other sites": (
        lambda p: p.add_adapter("third", LoraConfig(target_modules=["down"])),
        r"at layers.\{0..11\}.down: .*recompile=True",
    ),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", list(BAD))
def test_what_is_refused_changes_nothing(model: nn.Module, folder: Path, case: str, memo: dict[str, Twins]) -> None:
    ours = memo.setdefault("twins", Twins(model, folder)).ours
    before, binding = ours(IDS), ours.binding
    attempt, match = BAD[case]
    with pytest.raises(AdaptcError, match=match) as caught:
        attempt(ours)
    assert isinstance(caught.value, (ConfigError, SwapError))
    assert ours.binding is binding
    assert torch.equal(ours(IDS), before)


@pytest.fixture(scope="module")
def memo() -> dict[str, Twins]:
    return {}


@pytest.mark.long
def test_reports_say_it(twins: Twins, model: nn.Module) -> None:
    ours = twins.ours
    ours.set_active({"task": 0.5})
    ours.set_active({"task": 3}, modules="layers.7")
    said = "'style' is off, 'task' is scaled by 0.5 at 22 sites, 'task' is scaled by 3 at 2 sites"
    report = adaptc.report(ours)
    assert said in str(report)
    assert said in repr(ours)
    assert {s.factor for s in report.sites if s.adapter == "task"} == {0.5, 3}
    verified = adaptc.verify(ours, model)
    assert verified.ok
    assert said in str(verified)
    assert verified.to_dict()["strength"] == said


# -- the verbs of PEFT and diffusers ----------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("names", ["style", ["task"], ["task", "style"]])
def test_set_adapter_and_disable_adapter_as_peft(twins: Twins, names: str | list[str]) -> None:
    twins.ours.set_adapter(names)
    twins.theirs.base_model.set_adapter(names)
    twins.check()
    with twins.ours.disable_adapter(), twins.theirs.disable_adapter():
        twins.check()
    twins.check()


@pytest.mark.long
@pytest.mark.parametrize("weights", [None, 0.25, [0.5, -2.0], [None, 0.5]])
def test_set_adapters_weighs_as_diffusers_does(twins: Twins, weights: Any) -> None:
    twins.ours.set_adapters(["task", "style"], weights)
    values = weights if isinstance(weights, list) else [1.0 if weights is None else weights] * 2
    for name, value in zip(["task", "style"], values, strict=True):
        twins.scale(1.0 if value is None else value, name)
    twins.check()
    before = twins.ours(IDS)
    for names, wrong, match in (
        (["task", "style"], [1.0], "2 adapter names and 1 adapter_weights"),
        (["task", "task"], None, "named twice"),
        (["nobody"], None, "nobody"),
    ):
        with pytest.raises(ConfigError, match=match):
            twins.ours.set_adapters(names, wrong)
        assert torch.equal(twins.ours(IDS), before)
