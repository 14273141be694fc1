"""Promise 6: a call that raises leaves the program, the model and the files as they were, and says which key and site,
what was expected, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, LoraConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.q, self.k, self.out = nn.Linear(6, 5), nn.Linear(6, 7), nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(torch.tanh(self.q(x))) * self.k(x).sum(-1, keepdim=True)


IDS = torch.tensor([[3, 12, 0], [5, 5, 7]])
CONFIG = LoraConfig(r=3, target_modules=["q", "k"], init_lora_weights=False)


class World:
    """A model, a program of it, an adapter on disk, and everything that a failed call must leave alone."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(7)
        self.folder, self.model = folder, Net().eval()
        self.program = adaptc.compile(self.model, CONFIG, example_inputs=IDS)
        self.adapter = adaptc.save_adapter(self.program, folder / "adapter")
        self.file = adaptc.save(self.program, folder / "program.pt2")
        self.program(IDS)

    def edited(self, change: Callable[[dict[str, Tensor]], Any], ia3: bool = False) -> Path:
        """A copy of the adapter with other tensors, or an adapter of another method."""
        path = self.folder / "edited"
        if ia3:
            config = adaptc.IA3Config(target_modules=["q", "k"], feedforward_modules=[])
            with torch.random.fork_rng():
                return adaptc.save_adapter(adaptc.compile(self.model, config, example_inputs=IDS), path)
        path.mkdir(exist_ok=True)
        tensors = load_file(self.adapter / "adapter_model.safetensors")
        change(tensors)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path / "adapter_model.safetensors")
        shutil.copy(self.adapter / "adapter_config.json", path)
        return path

    def snapshot(self) -> dict[str, Any]:
        p = self.program
        return {
            "outputs": p(IDS).clone(),
            "model": self.model(IDS).clone(),
            "weights": {k: v.clone() for k, v in p.state_dict.items()},
            "objects": {k: id(v) for k, v in p.state_dict.items()},
            "parameters": {k: (id(v), v.requires_grad) for k, v in self.model.named_parameters()},
            "modes": {k: m.training for k, m in self.model.named_modules()},
            "binding": id(p.binding),
            "options": p.options,
            "graph": [(n.name, str(n.target), n.meta.get("val")) for n in p.graph.nodes if n.op == "placeholder"],
            "files": {str(f): f.read_bytes() for f in sorted(self.folder.rglob("*")) if f.is_file()},
            "random": torch.get_rng_state(),
        }


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def put(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: value(tensors[key])})


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


def nan(t: Tensor) -> Tensor:
    t[0, 0] = float("nan")
    return t


#: a call that must fail, and what its message holds
CALLS: dict[str, tuple[Callable[[World], Any], tuple[str, ...]]] = {
    "swap, a missing key": (lambda w: adaptc.swap(w.program, w.edited(lambda t: t.pop(B))), ("q.lora_B", "q")),
    "swap, a wrong shape": (lambda w: adaptc.swap(w.program, w.edited(put(A, lambda t: t[:, 1:]))), ("q", "6", "5")),
    "swap, ranks that differ": (lambda w: adaptc.swap(w.program, w.edited(put(A, lambda t: t[1:]))), ("q",)),
    "swap, not a number": (lambda w: adaptc.swap(w.program, w.edited(put(B, nan))), ("q.lora_B", "NaN")),
    "swap, a site it lacks": (
        lambda w: adaptc.swap(
            w.program,
            {"out.lora_A.weight": torch.ones(2, 5), "out.lora_B.weight": torch.ones(4, 2)},
            config=CONFIG.replace(target_modules=["out"]),
        ),
        ("out", "compile"),
    ),
    "swap, another method": (
        lambda w: adaptc.swap(w.program, w.edited(nothing, ia3=True)),
        ("q.ia3_l", "'lora'", "IA3", "compile"),
    ),
    "swap, no directory": (lambda w: adaptc.swap(w.program, w.folder / "nowhere"), ("nowhere",)),
    "bind, a wrong form": (lambda w: w.program.bind(w.adapter, form="banana"), ("banana", "apply")),
    "bind, a wrong shape": (lambda w: w.program.bind(w.edited(put(A, lambda t: t[:, 1:]))), ("q",)),
    "compile, a wrong target": (
        lambda w: adaptc.compile(w.model, CONFIG.replace(target_modules=["quu"]), example_inputs=IDS),
        ("quu", "target_modules"),
    ),
    "compile, a damaged file": (
        lambda w: adaptc.compile(w.model, w.edited(put(A, lambda t: t[:, 1:])), example_inputs=IDS),
        ("q",),
    ),
    "compile, a wrong option": (
        lambda w: adaptc.compile(w.model, CONFIG, example_inputs=IDS, backend="banana"),
        ("banana", "eager"),
    ),
    "call, a wrong input": (lambda w: w.program(IDS.float().bool()), ("ids",)),
    "call, an input too many": (lambda w: w.program(IDS, IDS), ("positional",)),
    "set, a wrong option": (lambda w: setattr(w.program, "fuse", "yes"), ("'yes'", "True")),
    "merge, not finite": (
        lambda w: adaptc.merge(
            w.program.with_binding(w.program.bind({k: t * 1e30 for k, t in plain(w).items()}).binding)
        ),
        ("q.weight", "safe=False"),
    ),
    "unmerge, never merged": (lambda w: adaptc.unmerge(w.program), ("merge",)),
    "save, no directory": (lambda w: adaptc.save(w.program, w.folder / "no" / "x.pt2"), ("does not exist",)),
    "save_adapter, another name": (
        lambda w: adaptc.save_adapter(together(w), w.folder / "new", adapter_name="b"),
        ("'b'", "'a'"),
    ),
    "load, a damaged file": (lambda w: adaptc.load(cut(w.file, w.folder / "cut.pt2")), ("cut.pt2",)),
    "to, no such device": (lambda w: w.program.to("cuda:77"), ("cuda:77",)),
    "pickle": (lambda w: w.program.__reduce_ex__(4), ("adaptc.save",)),
}


def together(w: World) -> adaptc.AdaptedProgram:
    with torch.random.fork_rng():
        return adaptc.compile(w.model, {"a": CONFIG}, example_inputs=IDS)


def plain(w: World) -> dict[str, Tensor]:
    return load_file(w.adapter / "adapter_model.safetensors")


def cut(file: Path, to: Path) -> Path:
    to.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return to


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and not isinstance(one, torch._subclasses.FakeTensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one is other if isinstance(one, torch._subclasses.FakeTensor) else one == other


@pytest.mark.parametrize("name", list(CALLS))
def test_everything_is_as_it_was(name: str, tmp_path: Path) -> None:
    call, said = CALLS[name]
    w = World(tmp_path)
    w.edited(nothing)
    (tmp_path / "cut.pt2").write_bytes(b"")
    before = w.snapshot()
    with pytest.raises(AdaptcError) as caught:
        call(w)
    after = w.snapshot()
    for what, value in before.items():
        mine = {"files": ("edited", "cut.pt2")}.get(what, ())  # what the call above wrote itself
        if mine:
            value, other = ({k: v for k, v in d.items() if not any(m in k for m in mine)} for d in (value, after[what]))
            assert equal(value, other), what
        else:
            assert equal(value, after[what]), what
    message = str(caught.value)
    assert all(part in message for part in said), message
    adaptc.swap(w.program, w.adapter)  # and all still works
    torch.testing.assert_close(w.program(IDS), before["outputs"])
