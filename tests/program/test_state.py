"""The state of a program: options that are checked, copies that are copies, devices, and threads that look on."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, BackendError, CheckpointError, ConfigError, LoraConfig, SwapError
from adaptc.passes.graph.storage import storage_key
from adaptc.runtime.options import RunOptions
from adaptc.state import adaptation
from adaptc.state.core import ProgramCore


class Net(nn.Module):
    """Siblings that fuse, a table tied to the head, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 7)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(6))
        self.constant = torch.randn(6)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) + self.shift
        return torch.tanh(self.q(x)).sum(-1) * self.k(x).sum(-1), self.head(x * self.constant)


IDS = torch.tensor([[3, 12, 0], [5, 5, 7]])
CONFIG = LoraConfig(r=3, target_modules=["q", "k", "embed"], init_lora_weights=False)


def net() -> Net:
    torch.manual_seed(5)
    return Net().eval()


@pytest.fixture
def program() -> adaptc.AdaptedProgram:
    torch.manual_seed(7)
    return adaptc.compile(net(), CONFIG, example_inputs=IDS)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- options ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, type[AdaptcError], str]] = [
    ("backend", "banana", BackendError, "unknown backend 'banana'; choose one of eager, inductor"),
    ("backend", None, BackendError, "unknown backend None"),
    ("fuse", "yes", ConfigError, "fuse='yes' is neither True nor False"),
    ("fuse", 1, ConfigError, "fuse=1"),
    ("fuse", None, ConfigError, "fuse=None"),
    ("kernels", "on", ConfigError, "kernels='on' must be True, False or None"),
    ("kernels", 0, ConfigError, "kernels=0"),
    ("hoist_limit", -1, ConfigError, "hoist_limit=-1 is no number of bytes"),
    ("hoist_limit", 1.5, ConfigError, "hoist_limit=1.5"),
    ("hoist_limit", True, ConfigError, "hoist_limit=True"),
    ("hoist_limit", "1 GB", ConfigError, "hoist_limit='1 GB'"),
    ("cuda_graphs", 1, ConfigError, "cuda_graphs=1 must be True or False"),
    ("cuda_graphs", True, BackendError, "needs a base on one CUDA device"),
]


@pytest.mark.few(4)
@pytest.mark.parametrize(("option", "value", "error", "message"), WRONG)
def test_options_are_checked_when_set(
    program: adaptc.AdaptedProgram, option: str, value: Any, error: type[AdaptcError], message: str, tmp_path: Path
) -> None:
    """Whichever way they are set: on a program, for a copy, when compiling, and when loading."""
    expected, before = program(IDS), program.options
    code = program.executor()
    with pytest.raises(error, match=message):
        setattr(program, option, value)
    with pytest.raises(error, match=message):
        program.with_options(**{option: value})
    if option != "kernels":
        with pytest.raises(error, match=message):
            adaptc.compile(net(), CONFIG, example_inputs=IDS, **{option: value})
    if option not in ("kernels", "cuda_graphs"):
        path = adaptc.save(program, tmp_path / "p.pt2")
        with pytest.raises(error, match=message):
            adaptc.load(path, **{option: value})
    assert program.options == before
    assert program.executor() is code
    assert same(program(IDS), expected)


def test_every_option_has_a_property_that_sets_it(
    program: adaptc.AdaptedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "recorder_for", lambda tensors: object())  # as on a GPU
    values = {"backend": "inductor", "hoist_limit": 12, "fuse": False, "kernels": True, "checkpoint": 3}
    values |= {"pack": "float32", "cuda_graphs": True}
    assert {*values, "single_sizes"} == set(vars(RunOptions()))  # generators set the last one, nobody else
    for name, value in values.items():
        before = getattr(program, name)
        setattr(program, name, value)
        assert getattr(program, name) == getattr(program.options, name) == value
        setattr(program, name, before)  # packed weights are for one backend alone


def test_a_copy_with_options_leaves_the_program_as_it_is(program: adaptc.AdaptedProgram) -> None:
    expected = program(IDS)
    code = program.executor()
    other = program.with_options(fuse=False)
    torch.testing.assert_close(other(IDS), expected)
    assert (program.fuse, other.fuse) == (True, False)
    assert program.executor() is code
    assert program.fusion.groups
    assert not other.fusion.groups


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_a_program_of_its_own(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    expected, old = program(IDS), {k: v.clone() for k, v in program.state_dict.items()}
    twin = copy.deepcopy(program)
    twin.graph.lint()
    twin.validate()
    assert same(twin(IDS), expected)
    mine = {storage_key(t) for t in [*program.state_dict.values(), *program.constants.values()]}
    assert not mine & {storage_key(t) for t in [*twin.state_dict.values(), *twin.constants.values()]}
    assert twin.state_dict["head.weight"] is twin.state_dict["embed.weight"]  # tied as it was
    with torch.no_grad():
        for t in twin.state_dict.values():
            t.add_(1.0)
    assert not same(twin(IDS), expected)
    assert same(program(IDS), expected)
    assert all(torch.equal(v, old[k]) for k, v in program.state_dict.items())
    adapter = adaptc.save_adapter(program, tmp_path)
    adaptc.swap(copy.deepcopy(twin), adapter)
    assert not same(twin(IDS), expected)


def test_a_deep_copy_can_be_trained_merged_and_unmerged(program: adaptc.AdaptedProgram) -> None:
    twin = copy.deepcopy(program)
    merged = adaptc.merge(twin)
    torch.testing.assert_close(merged(IDS), program(IDS))
    assert same(adaptc.unmerge(merged)(IDS), program(IDS))
    assert same(adaptc.unmerge(copy.deepcopy(merged))(IDS), program(IDS))
    module = twin.module()
    module(IDS)[1].sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if p.requires_grad and "embed" in n)
    assert all(t.grad is None for t in program.state_dict.values())


def test_a_deep_copy_in_a_structure_keeps_what_was_shared(program: adaptc.AdaptedProgram) -> None:
    """copy.deepcopy of a dict with a program and one of its tensors: the tensor is the copy's own."""
    twin = copy.deepcopy({"program": program, "weight": program.state_dict["q.weight"], "again": program})
    assert twin["again"] is twin["program"]
    assert twin["program"].state_dict["q.weight"] is twin["weight"]


def test_a_shallow_copy_shares_tensors_and_swaps_alone(program: adaptc.AdaptedProgram) -> None:
    expected = program(IDS)
    twin = copy.copy(program)
    assert twin.state_dict["q.weight"] is program.state_dict["q.weight"]
    other = adaptc.compile(net(), CONFIG.replace(r=5), example_inputs=IDS)
    adaptc.swap(twin, other.binding)
    assert same(program(IDS), expected)
    torch.testing.assert_close(twin(IDS), other(IDS))
    twin.backend = "inductor"
    assert program.backend == "eager"


@pytest.mark.parametrize("how", ["pickle", "torch.save", "of a merged one"])
def test_pickle_says_what_to_do_instead(program: adaptc.AdaptedProgram, how: str) -> None:
    expected = program(IDS)
    subject = adaptc.merge(program) if how == "of a merged one" else program
    with pytest.raises(AdaptcError, match=r"cannot be pickled: write it with adaptc\.save"):
        torch.save(subject, io.BytesIO()) if how == "torch.save" else pickle.dumps(subject)
    assert same(program(IDS), expected)


@pytest.mark.parametrize("form", ["apply", "weight"])
def test_what_is_bound_is_copied_and_not_pickled(program: adaptc.AdaptedProgram, form: str) -> None:
    bound = program.bind(program.binding, form=form)
    expected = bound(IDS)
    twin, shared = copy.deepcopy(bound), copy.copy(bound)
    assert (twin.form, shared.form) == (form, form)
    assert same(twin(IDS), expected)
    with torch.no_grad():
        twin.program.state_dict["q.weight"].add_(1.0)
        for t in twin.binding.values.values():
            t.mul_(2.0)
    assert same(bound(IDS), expected)
    assert same(shared(IDS), expected)
    with pytest.raises(AdaptcError, match=r"cannot be pickled: .*adaptc\.save_adapter"):
        pickle.dumps(bound)


# -- devices -----------------------------------------------------------------------------------------------------------


def devices(program: adaptc.AdaptedProgram) -> set[str]:
    """Of everything a program holds, and of the values in its graph."""
    held = [*program.state_dict.values(), *program.constants.values(), *program.originals.values()]
    held += [*program.binding.values.values(), *program.binding.changed_base.values()]
    in_graph = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    return {t.device.type for t in [*held, *in_graph] if isinstance(t, Tensor)}


@pytest.mark.parametrize("scheme", [False, "pissa"])
def test_to_a_device_moves_everything(scheme: Any) -> None:
    torch.manual_seed(7)
    config = CONFIG.replace(init_lora_weights=scheme, target_modules=["q", "k"])
    program = adaptc.compile(net(), config, example_inputs=IDS)
    expected = program(IDS)
    there = program.to("meta")
    there.graph.lint()
    there.validate()
    assert devices(there) == {"meta"}
    assert there.device.type == "meta"
    out = there(IDS.to("meta"))
    assert [(o.shape, o.dtype, o.device.type) for o in out] == [(o.shape, o.dtype, "meta") for o in expected]
    assert devices(program) == {"cpu"}  # the first one stays
    assert same(program(IDS), expected)


def test_to_the_device_it_is_on_is_the_program_itself(program: adaptc.AdaptedProgram) -> None:
    assert program.to("cpu") is program
    assert program.to(torch.device("cpu")) is program


def test_what_is_bound_stays_where_it_was(program: adaptc.AdaptedProgram) -> None:
    bound, expected = program.bind(program.binding), program(IDS)
    there = program.to("meta")
    assert same(bound(IDS), expected)
    for use in (there.bind, lambda b: adaptc.swap(there, b)):
        with pytest.raises(SwapError, match=r"on cpu, and the program is on meta.*binding\.to"):
            use(program.binding)
    adaptc.swap(there, program.binding.to("meta"))
    assert devices(there) == {"meta"}
    with pytest.raises(BackendError, match="device 'nowhere' cannot be used here"):
        program.binding.to("nowhere")


def test_load_to_a_device(program: adaptc.AdaptedProgram, tmp_path: Path) -> None:
    path = adaptc.save(program, tmp_path / "p.pt2")
    there = adaptc.load(path, device="meta")
    assert devices(there) == {"meta"}
    assert same(adaptc.load(path, device="cpu")(IDS), program(IDS))
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(BackendError, match=f"device '{device}' cannot be used here"):
            adaptc.load(path, device=device)
        with pytest.raises(BackendError, match=f"device '{device}' cannot be used here"):
            program.to(device)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_who_looks_while_another_thread_follows_a_swap_sees_all_of_it(
    program: adaptc.AdaptedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph and the state dict follow a swap when first looked at. Whoever comes second waits for the first."""
    other = adaptc.compile(net(), CONFIG.replace(r=11), example_inputs=IDS)
    program.state_dict  # noqa: B018  # follows what it was compiled with
    adaptc.swap(program, other.binding)
    begun, go_on, follow = threading.Event(), threading.Event(), ProgramCore._export_binding

    def slow(self: ProgramCore, old: Any, binding: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return follow(self, old, binding)

    monkeypatch.setattr(ProgramCore, "_export_binding", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: program.state_dict)
        assert begun.wait(20)
        second = pool.submit(lambda: dict(program.state_dict))
        assert not second.done()
        threading.Timer(0.2, go_on.set).start()
        assert second.result(20)["q.lora_A.default.weight"].shape == (11, 6)
        assert first.result(20)["q.lora_A.default.weight"].shape == (11, 6)


# -- files of other versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [None, 1, 3, "2"])
def test_a_file_of_another_format_is_refused_by_its_number(
    program: adaptc.AdaptedProgram, number: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr("adaptc.state.adaptation.FORMAT", number)
        path = adaptc.save(program, tmp_path / "other.pt2")
    with pytest.raises(CheckpointError, match=f"its format is {number!r}, and this one reads 2.*Save the"):
        adaptc.load(path)
