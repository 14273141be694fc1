"""A program that is saved by reference holds no weight of its base, and runs with that base alone."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcError, CheckpointError, ConfigError, LoraConfig
from adaptc.archives.added_files import ADDED_FOLDER
from tests.support.archives import WEIGHTS, read_records, write_records
from tests.support.damage import BLOCK, mutate_bytes, mutate_json
from tests.support.families import FAMILIES

TABLE = ADDED_FOLDER + "base.json"
IDS = torch.tensor([[1, 12, 3, 5], [0, 5, 7, 7], [2, 2, 1, 9]])


class Net(nn.Module):
    """Tied weights, buffers that are saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.norm = nn.BatchNorm1d(6)
        self.lin = nn.Linear(6, 41)
        self.back = nn.Linear(41, 6, bias=False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("hidden", torch.randn(6), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids).mT).mT + self.shift + self.hidden
        return self.head(h + self.back(torch.tanh(self.lin(h))))


class Files:
    def __init__(self, root: Path) -> None:
        torch.manual_seed(3)
        self.root, self.model = root, Net().eval()
        self.config = LoraConfig(r=3, target_modules=["lin", "back"], modules_to_save=["norm"], init_lora_weights=False)
        self.program = adaptc.compile(self.model, self.config, example_inputs=IDS)
        self.adapter = adaptc.save_adapter(self.program, root / "fr")
        self.whole = adaptc.save(self.program, root / "whole.pt2")
        self.file = adaptc.save(self.program, root / "x.pt2", base="reference", adapters={"fr": self.adapter})
        self.tensors = root / "base.safetensors"
        own = {n: t.clone().contiguous() for n, t in self.model.state_dict().items() if n != "head.weight"}
        save_file(own, self.tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("reference"))


#: every way to give the base
BASES: dict[str, Callable[[Files], Any]] = {
    "model": lambda f: f.model,
    "state dict": lambda f: f.model.state_dict(),
    "safetensors": lambda f: f.tensors,
    "safetensors by name": lambda f: str(f.tensors),
    "program": lambda f: f.program,
    "unloaded program": lambda f: adaptc.unload(f.program),
    "exported program": lambda f: torch.export.export(f.model, (IDS,)),
    "loaded program": lambda f: adaptc.load(f.whole),
    "other strides": lambda f: {**f.model.state_dict(), "back.weight": f.model.back.weight.t().clone().t()},
}


@pytest.mark.parametrize("kind", list(BASES))
def test_completed(files: Files, kind: str) -> None:
    loaded = adaptc.load(files.file, base=BASES[kind](files))
    assert torch.equal(loaded(IDS), files.program(IDS))
    assert torch.equal(loaded.bind("fr")(IDS), files.program.bind(files.adapter)(IDS))
    assert torch.equal(adaptc.merge(loaded)(IDS), adaptc.merge(files.program)(IDS))
    state = loaded.state_dict
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert {n: t.stride() for n, t in state.items()} == {n: t.stride() for n, t in files.program.state_dict.items()}
    assert not any(t.requires_grad for n, t in state.items() if n in files.model.state_dict())


def test_as_peft_computes_it(files: Files) -> None:
    loaded = adaptc.load(files.file, base=files.model)
    torch.testing.assert_close(
        loaded(IDS), peft.PeftModel.from_pretrained(copy.deepcopy(files.model), files.adapter).eval()(IDS)
    )


def test_the_file_has_no_weights(files: Files) -> None:
    # The file of the adapter has a counter of the trained module, which no call reads.
    weights = {t.data_ptr(): t for n, t in files.model.state_dict().items() if n != "norm.num_batches_tracked"}
    base = sum(t.nbytes for t in weights.values())
    assert files.file.stat().st_size < files.whole.stat().st_size + 9_000
    stored = sum(len(d) for n, d in read_records(files.file).items() if n.startswith("data/weights/weight_"))
    whole = sum(len(d) for n, d in read_records(files.whole).items() if n.startswith("data/weights/weight_"))
    assert whole - stored == base
    table = json.loads(read_records(files.file)[TABLE])["tensors"]
    assert set(table) == set(files.model.state_dict()) - {"norm.num_batches_tracked"}
    assert table["head.weight"]["tied"] == "embed.weight"
    assert files.model.embed.weight.requires_grad  # what was saved is as it was


def test_weights_are_shared(files: Files) -> None:
    model = copy.deepcopy(files.model)
    loaded = adaptc.load(files.file, base=model)
    assert loaded.state_dict["embed.weight"].data_ptr() == model.embed.weight.data_ptr()
    assert model.embed.weight.requires_grad


def test_a_fresh_process(files: Files, tmp_path: Path) -> None:
    torch.save([IDS, files.program(IDS)], tmp_path / "wanted.pt")
    code = (
        "import sys, torch, adaptc\n"
        "ids, wanted = torch.load('wanted.pt')\n"
        "assert torch.equal(adaptc.load(sys.argv[1], base=sys.argv[2])(ids), wanted)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(files.file), str(files.tensors)]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_torch_computes_nothing_with_it(files: Files) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.export.load(files.file).module()(IDS)


@pytest.mark.long
def test_a_language_model(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    model = family.build().eval()
    model.save_pretrained(tmp_path / "model")
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    program = adaptc.compile_for_generation(model, config, max_batch=3, max_length=32)
    other = config.replace(r=5, lora_alpha=7, target_modules=["q_proj"])
    fr = adaptc.save_adapter(adaptc.compile(model, other), tmp_path / "fr")
    file = adaptc.save(program, tmp_path / "gen.pt2", base="reference", adapters={"fr": fr})
    loaded = adaptc.load(file, base=tmp_path / "model")
    ids = family.inputs(2, 5)["input_ids"]
    mask = torch.ones_like(ids)
    wanted = program.generate(ids, attention_mask=mask, max_new_tokens=7)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, max_new_tokens=7), wanted)
    assert list(loaded.adapters) == ["fr"]
    loaded.swap("fr")
    program.swap(fr)
    swapped = program.generate(ids, attention_mask=mask, max_new_tokens=7)
    assert not torch.equal(swapped, wanted)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, max_new_tokens=7), swapped)


# -- other bases -------------------------------------------------------------------------------------------------------


def changed(files: Files, change: Callable[[Net], Any]) -> Net:
    model = copy.deepcopy(files.model)
    with torch.no_grad():
        change(model)
    return model


OTHERS: dict[str, tuple[Callable[[Files], Any], str]] = {
    "a value": (
        lambda f: changed(f, lambda m: m.back.weight[2, 5].add_(1e-3)),
        "'back.weight' has other values, of 10 weights",
    ),
    "a buffer": (lambda f: changed(f, lambda m: m.norm.running_var.add_(1)), "'norm.running_var' has other values"),
    "a dtype": (
        lambda f: changed(f, lambda m: m.back.to(torch.bfloat16)),
        "'back.weight' is torch.bfloat16, expected torch.float32",
    ),
    "a shape": (
        lambda f: {**f.model.state_dict(), "shift": torch.ones(7)},
        r"'shift' has shape \(7,\), expected \(6,\)",
    ),
    "a name": (lambda f: {n: t for n, t in f.model.state_dict().items() if n != "shift"}, "'shift' is missing"),
    "no name": (lambda f: {"x": torch.ones(3)}, r"'embed.weight' is missing; .*; and 7 more, of 10 weights"),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_another_base(files: Files, kind: str) -> None:
    make, said = OTHERS[kind]
    with pytest.raises(CheckpointError, match=said) as info:
        adaptc.load(files.file, base=make(files))
    assert str(info.value).startswith(f"{files.file} was saved with another base: ")


def test_no_base(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"10 weights, such as 'embed.weight'.*adaptc.load\(path, base=...\)"):
        adaptc.load(files.file)
    with pytest.raises(ConfigError, match="holds its base: leave base= out"):
        adaptc.load(files.whole, base=files.model)
    for bad in (3, {}, {"a": 3}, [files.model]):
        with pytest.raises(ConfigError, match="is no base: expected a model"):
            adaptc.load(files.file, base=bad)
    with pytest.raises(CheckpointError, match="there is no base at"):
        adaptc.load(files.file, base=tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read as a base"):
        adaptc.load(files.file, base=files.whole)
    with pytest.raises(CheckpointError, match=r"expected a transformers model directory"):
        adaptc.load(files.file, base=tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(files.tensors.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"bad.safetensors"):
        adaptc.load(files.file, base=tmp_path / "bad.safetensors")


def test_bases_that_no_file_can_refer_to(files: Files, tmp_path: Path) -> None:
    pissa = LoraConfig(r=2, target_modules=["back"], init_lora_weights="pissa")
    changing = adaptc.compile(files.model, pissa, example_inputs=IDS)
    with pytest.raises(CheckpointError, match=r"the adapter has its own version of 'back.weight'.*base=\"included\""):
        adaptc.save(changing, tmp_path / "x.pt2", base="reference")
    quantised = adaptc.quantize(files.model, "int8")
    program = adaptc.compile(quantised, LoraConfig(target_modules=["lin"]), example_inputs=IDS)
    with pytest.raises(CheckpointError, match=r"'embed.weight' is stored in few bits.*base=\"included\""):
        adaptc.save(program, tmp_path / "x.pt2", base="reference")
    with pytest.raises(ConfigError, match="base='none' is neither"):
        adaptc.save(files.program, tmp_path / "x.pt2", base="none")
    assert not list(tmp_path.iterdir())


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::adaptc.AdaptcWarning")
def test_a_table_of_other_weights(files: Files, tmp_path: Path) -> None:
    records = read_records(files.file)
    table = json.loads(records[TABLE])
    less = copy.deepcopy(table)
    del less["tensors"]["shift"]
    circle = copy.deepcopy(table)
    circle["tensors"]["embed.weight"]["tied"] = "head.weight"
    cases = {"'shift' is missing in its table": less, "is tied to": circle, "its format is 2": {**table, "format": 2}}
    for said, data in cases.items():
        bad = write_records(tmp_path / "bad.pt2", records | {TABLE: json.dumps(data).encode()})
        with pytest.raises(CheckpointError, match=said):
            adaptc.load(bad, base=files.model)
    without = {n: d for n, d in records.items() if n != TABLE}
    assert WEIGHTS in without
    with pytest.raises(CheckpointError, match=r"no values of 'embed\.weight'"):
        adaptc.load(write_records(tmp_path / "bad.pt2", without))


@pytest.mark.filterwarnings("ignore::adaptc.AdaptcWarning")
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_any_damage(files: Files, tmp_path: Path, block: int) -> None:
    data, records, wanted = files.file.read_bytes(), read_records(files.file), files.program(IDS)
    table = json.loads(records[TABLE])
    for case in range(block * BLOCK, block * BLOCK + BLOCK):
        rng = random.Random(case)
        (tmp_path / "bad.pt2").write_bytes(mutate_bytes(data, rng))
        _refused_or_right(tmp_path / "bad.pt2", files, wanted, case)
        forged = json.dumps(mutate_json(table, rng)[0]).encode()
        _refused_or_right(write_records(tmp_path / "bad.pt2", records | {TABLE: forged}), files, wanted, case)


def _refused_or_right(path: Path, files: Files, wanted: Tensor, case: int) -> None:
    try:
        found = adaptc.load(path, base=files.model)(IDS)
    except AdaptcError:
        return
    assert torch.equal(found, wanted), case
