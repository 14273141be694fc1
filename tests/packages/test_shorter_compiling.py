"""Packages whose equal ops were lowered once compute what packages of the usual way do, or are made in that way."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor import compile_fx, cpu_vec_isa
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table

import adaptc
from adaptc import LoraConfig
from adaptc.packages import compiling
from adaptc.packages.shorter_compiling import equal_ops_once, older_objects_spared, one_check_of_instructions
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.progress import LOGGER
from tests.support.families import FAMILIES
from tests.support.method_table import ENTRIES, Entry
from tests.support.subject import subject

USUAL = compile_fx.aot_export_module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(13), nn.Linear(13, 7), nn.Linear(7, 13, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 13)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return x.cumsum(1) + ids.shape[1]


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(rows))


class Told(logging.Handler):
    """What adaptc's logger is told, whatever other libraries made of logging."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    handler, level = Told(), LOGGER.level
    monkeypatch.setattr(LOGGER, "disabled", False)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    yield handler
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


@pytest.mark.long
@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_packages_are_equal(
    method: str, dtype: torch.dtype, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    config: Any = LoraConfig(r=3, target_modules=["up", "down"], use_dora=method == "dora", init_lora_weights=False)
    if method == "ia3":
        config = adaptc.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    program = adaptc.compile(Net(dtype), config, example_inputs=ids(3, 5))
    short = adaptc.load_package(adaptc.package(program, tmp_path / "short.pt2"))
    assert "of them distinct" in told.text, told.text
    monkeypatch.setattr(compiling, "equal_ops_once", contextlib.nullcontext)
    monkeypatch.setattr(compiling, "one_check_of_instructions", contextlib.nullcontext)
    usual = adaptc.load_package(adaptc.package(program, tmp_path / "usual.pt2"))
    for size in [(3, 5), (2, 7), (11, 2)]:
        assert torch.equal(short(ids(*size)), usual(ids(*size)))
    assert told.text.count("of them distinct") == 1


class Lowered:
    """A program as AOTInductor lowers it: its graph, its signature, and what it computes."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.module: Any = program.module(check_guards=False)
        self.module.graph.set_codegen(fx.graph.CodeGen())
        fakes = [n.meta["val"] for n in self.module.graph.find_nodes(op="placeholder")]
        table = select_decomp_table()
        with hold_graph_lock(), torch.no_grad(), enable_python_dispatcher():
            export = compile_fx.aot_export_module
            self.graph, self.signature = export(self.module, fakes, trace_joint=False, decompositions=table)

    def __call__(self, *args: Tensor) -> Any:
        module, lowered = self.module, self.graph
        tensors = [*module.parameters(), *module.buffers()]
        with torch.no_grad():
            return lowered(*tensors, *args)  # type: ignore[operator]  # a GraphModule

    def output_names(self) -> list[str]:
        graph: Any = self.graph
        return [node.name for node in graph.graph.output_node().args[0]]


#: a method and a layer that it takes
PAIRS = [
    pytest.param(entry, layer, id=f"{entry.name}-{layer}")
    for entry in ENTRIES
    for layer in ("linear", "conv2d", "embedding")
    if layer in entry.tested_layers and layer not in entry.refused_layers
]


@pytest.mark.few(12)
@pytest.mark.parametrize(("entry", "layer"), PAIRS)
def test_methods(entry: Entry, layer: str) -> None:
    s = subject(entry.name, layer)
    with equal_ops_once():
        short = Lowered(s.program)
    usual = Lowered(s.program)
    for batch in (2, 5):
        for found, expected in zip(short(*s.args(batch)), usual(*s.args(batch)), strict=True):
            assert torch.equal(found, expected)
    for name in ("parameters", "buffers", "buffers_to_mutate", "user_inputs_to_mutate", "input_tokens"):
        assert getattr(short.signature, name) == getattr(usual.signature, name)
    ours, theirs = short.signature, usual.signature
    for name in ("inputs_to_parameters", "inputs_to_buffers"):
        assert list(getattr(ours, name).values()) == list(getattr(theirs, name).values())
    assert len(ours.user_inputs) == len(theirs.user_inputs)


class Steps(nn.Module):
    """Layers that each write to caches of their own, as decode steps do; or to a part of them."""

    def __init__(self, part: bool = False) -> None:
        super().__init__()
        self.layers, self.part = nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), part

    def forward(self, x: Tensor, caches: list[Tensor], slots: Tensor) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            if self.part:
                cache[:1].mul_(2.0)
            x = layer(x + cache.index_copy_(0, slots, x).sum(0))
        return x


def steps() -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 5, generator=generator), [torch.zeros(7, 5) for _ in range(4)], torch.tensor([3, 1])


def test_steps_that_write_to_caches_are_lowered_once(told: Told) -> None:
    program = torch.export.export(Steps(), steps())
    with equal_ops_once():
        short = Lowered(program)
    assert "of them distinct" in told.text
    usual = Lowered(program)
    x, caches, slots = steps()
    found, expected = short(x, *caches, slots), usual(x, *caches, slots)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for signature in (short.signature, usual.signature):
        written = signature.user_inputs_to_mutate.values()
        assert [signature.user_inputs.index(name) for name in written] == [1, 2, 3, 4]
    assert list(short.signature.user_inputs_to_mutate) == short.output_names()[:4]
    assert short.signature.user_outputs == short.output_names()[4:]


@pytest.mark.long
class OnlyLoweredError(Exception):
    """Raised in the place of compiling."""


def only_lower(module: Any, args: Any, kwargs: Any, options: Any) -> Any:
    """Do of ``aot_compile`` what lowers a program."""
    module.graph.set_codegen(fx.graph.CodeGen())
    fakes = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), enable_python_dispatcher():
        compile_fx.aot_export_module(module, fakes, trace_joint=False, decompositions=select_decomp_table())
    raise OnlyLoweredError


def generates(name: str) -> Any:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    return adaptc.compile_for_generation(FAMILIES[name].build(), config, max_length=24)


def serves(name: str) -> Any:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    return adaptc.compile_for_serving(FAMILIES[name].build(), config, num_blocks=8, page_size=4)


@pytest.mark.long
@pytest.mark.few(3)
#: full attention with and without shared keys, sliding windows, and a decoder with an encoder
@pytest.mark.parametrize(
    ("make", "name"),
    [(generates, n) for n in ("llama", "gpt2", "gemma2", "bart")] + [(serves, n) for n in ("llama", "gemma2")],
)
def test_real_decoders_are_lowered_once(
    make: Any, name: str, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = make(name)
    if make is serves:
        lora = adaptc.compile(FAMILIES[name].build(), LoraConfig(r=3, target_modules="all-linear"))
        program.bank.add("one", adaptc.save_adapter(lora, tmp_path / "one"))
    monkeypatch.setattr("torch._inductor.aot_compile", only_lower)
    with pytest.raises(adaptc.BackendError):
        adaptc.package(program, tmp_path / "package.pt2")
    assert "of them distinct" in told.text, told.text
    assert "as a whole" not in told.text, told.text


@pytest.mark.long
def test_packaged_steps_write_to_their_caches(tmp_path: Path, told: Told) -> None:
    program = torch.export.export(Steps(), steps())
    (file := tmp_path / "folder").mkdir()
    compiling.compile_archive({"model": program}, file, tmp_path / "steps.pt2", {"model": {}})
    assert "of them distinct" in told.text
    run = torch._inductor.aoti_load_package(str(tmp_path / "steps.pt2"))
    x, caches, slots = steps()
    _, own_caches, _ = own = steps()
    with torch.no_grad():
        torch.testing.assert_close(run(x, caches, slots), program.module()(*own), atol=1e-6, rtol=0)
    for cache, own_cache in zip(caches, own_caches, strict=True):
        torch.testing.assert_close(cache, own_cache, atol=1e-6, rtol=0)
        assert cache.any()


def test_the_usual_way_by_a_reason(told: Told) -> None:
    program = torch.export.export(Steps(part=True), steps())
    with equal_ops_once():
        short = Lowered(program)
    assert "lowering the program as a whole: aten.mul_.Tensor may do more" in told.text
    assert short.signature.user_inputs_to_mutate == Lowered(program).signature.user_inputs_to_mutate != {}


def test_the_usual_way_after_an_error(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise KeyError("of another torch")

    monkeypatch.setattr("adaptc.packages.shorter_compiling.lower_once", fails)
    with equal_ops_once():
        lowered = Lowered(torch.export.export(Net(), (ids(3, 5),)))
    assert "lowering the program as a whole, after KeyError" in told.text
    (out,) = lowered(ids(3, 5))
    assert out.shape == (3, 5, 13)


def test_another_torch(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compile_fx, "aot_export_module")
    with equal_ops_once():
        assert not hasattr(compile_fx, "aot_export_module")
    assert "this torch lowers programs in another way" in told.text


def test_other_threads_and_errors_leave_torch_as_it_is(told: Told) -> None:
    program, found = torch.export.export(Net(), (ids(3, 5),)), []

    def stops() -> None:
        with equal_ops_once():
            thread = threading.Thread(target=lambda: found.append(Lowered(program)))
            thread.start()
            thread.join()
            assert compile_fx.aot_export_module is not USUAL
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stops()
    assert found
    assert "distinct" not in told.text
    assert compile_fx.aot_export_module is USUAL


class Kind:
    """A kind of vector instructions that works or not, and counts how often that is checked."""

    def __init__(self, name: str, works: bool) -> None:
        self.name, self.works, self.checks = name, works, 0

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.checks += 1
        return self.works


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    made = [Kind("avx9", True), Kind("avx512 x", False), Kind("avx512", True), Kind("avx2", True)]
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx512", "x", "avx2"])
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", made)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    yield made
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_one_check_of_instructions(kinds: list[Any]) -> None:
    with one_check_of_instructions():
        assert cpu_vec_isa.pick_vec_isa() is kinds[2]
        assert cpu_vec_isa.pick_vec_isa() is kinds[2]
    assert [k.checks for k in kinds] == [0, 1, 1, 0]
    assert cpu_vec_isa.supported_vec_isa_list is kinds
    assert cpu_vec_isa.pick_vec_isa() is kinds[2]  # all others are checked now
    assert cpu_vec_isa.valid_vec_isa_list() == kinds[2:]


def test_no_instructions_work(kinds: list[Any]) -> None:
    for kind in kinds:
        kind.works = False
    with one_check_of_instructions():
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa
    assert cpu_vec_isa.supported_vec_isa_list is kinds


def test_chosen_instructions(kinds: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with one_check_of_instructions():
        assert cpu_vec_isa.pick_vec_isa() is kinds[3]
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    with inductor_config.patch({"cpp.simdlen": 4}), one_check_of_instructions():
        assert cpu_vec_isa.valid_vec_isa_list() == kinds[2:]


@pytest.fixture
def thawed() -> Iterator[None]:
    """No frozen objects in the test; what pytest's configuration had frozen is frozen again afterwards."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if frozen:
        gc.freeze()


def stop_inside_of_spared_objects(seen: list[int]) -> None:
    with older_objects_spared():
        seen.append(gc.get_freeze_count())
        raise KeyboardInterrupt


@pytest.mark.usefixtures("thawed")
def test_older_objects_are_spared_while_it_lasts() -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        stop_inside_of_spared_objects(seen)
    assert seen[0] > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.long
@pytest.mark.usefixtures("thawed")
def test_objects_that_somebody_froze_stay_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with older_objects_spared():
        pass
    assert gc.get_freeze_count() > frozen // 2
