"""One file holds a base once and adapters by name: swapped by name they are what their own directories are."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptc
from adaptc import AdaptcWarning, CheckpointError, ConfigError, LoraConfig, SwapError, XLoraConfig
from adaptc.archives.added_files import ADDED_FOLDER
from tests.support.archives import read_records, write_records
from tests.support.damage import BLOCK, mutate_bytes, mutate_json
from tests.support.families import FAMILIES
from tests.support.saved_programs import outputs, save_small

INDEX = ADDED_FOLDER + "adapters.json"
NAMES = ("fr", "de", "über alles", "fr.2")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


X = torch.linspace(-1, 2, 55).view(11, 5)


class Files:
    """A model, a program of it, and adapters of several ranks and options in directories of their own."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(3)
        self.root, self.model = root, Net().eval()
        self.program = self.compile(r=2, target_modules=["first", "second"])
        self.directories = {
            "fr": self.adapter("a", r=3, lora_alpha=7, target_modules=["first", "second"]),
            "de": self.adapter("b", r=5, use_rslora=True, target_modules=["second"]),
            "über alles": self.adapter("c", r=1, rank_pattern={"first": 4}, target_modules=["first", "second"]),
            "fr.2": self.adapter("d", r=2, target_modules=["first"]),
        }
        self.file = adaptc.save(self.program, root / "all.pt2", adapters=self.directories)

    def compile(self, **options: Any) -> Any:
        config = LoraConfig(**options, init_lora_weights=False)
        rows = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
        return adaptc.compile(torch.export.export(self.model, (X,), dynamic_shapes=rows), config)

    def adapter(self, name: str, **options: Any) -> Path:
        return adaptc.save_adapter(self.compile(**options), self.root / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def program(files: Files) -> Any:
    return adaptc.load(files.file)


def test_names_are_adapters(files: Files, program: Any) -> None:
    assert tuple(program.adapters) == NAMES
    other = copy.copy(files.program)
    for name, directory in files.directories.items():
        report = adaptc.swap(other, directory)
        found = program.swap(name)
        assert (found.ranks, found.sites, found.identity) == (report.ranks, report.sites, report.identity)
        assert name in found.source
        assert torch.equal(program(X), other(X))
        assert torch.equal(program.bind(name)(X), other(X))
        assert torch.equal(adaptc.load(files.file).bind(name, scale=0.5)(X), other.bind(directory, scale=0.5)(X))
        peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(files.model), directory)
        torch.testing.assert_close(program(X), peft_model(X), rtol=1e-5, atol=1e-6)


def test_a_bank_takes_names(files: Files, program: Any) -> None:
    bank = program.bank({"one": "fr", "two": files.directories["de"]})
    bank.add("three", "de")
    out = bank(X[:3], adapters=["one", "two", "three"])
    torch.testing.assert_close(out[:1], program.bind("fr")(X[:2])[:1])
    torch.testing.assert_close(out[1:], program.bind("de")(X[:3])[1:])


CHARACTERS = st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/\\:")
ADAPTERS = st.dictionaries(
    st.text(CHARACTERS, min_size=1, max_size=9).filter(lambda n: not n.startswith(".")),
    st.tuples(st.integers(1, 6), st.sampled_from([["first"], ["second"], ["first", "second"]]), st.booleans()),
    max_size=4,
)  # fmt: skip


@hypothesis.given(adapters=ADAPTERS, kind=st.sampled_from(["directory", "object", "binding", "runner"]))
def test_any_adapters(files: Files, tmp_path_factory: pytest.TempPathFactory, adapters: Any, kind: str) -> None:
    """Any names, ranks, targets and kinds of sources. The file is the base's, the adapters', and a little for each."""
    folder = tmp_path_factory.mktemp("any")
    sources: dict[str, Any] = {}
    directory_bytes = 0
    for number, (name, (rank, targets, rslora)) in enumerate(adapters.items()):
        made = files.compile(r=rank, lora_alpha=rank + 2, target_modules=targets, use_rslora=rslora)
        directory = adaptc.save_adapter(made, folder / str(number))
        kinds = {"directory": lambda d: d, "object": adaptc.load_adapter, "runner": files.program.bind}
        kinds["binding"] = lambda d: files.program.bind(d).binding
        sources[name] = kinds[kind](directory)
        directory_bytes += sum(f.stat().st_size for f in directory.iterdir() if f.name != "README.md")
    plain = adaptc.save(files.program, folder / "plain.pt2")
    loaded = adaptc.load(adaptc.save(files.program, folder / "all.pt2", adapters=sources))
    assert list(loaded.adapters) == list(adapters)
    assert not any(name.endswith("README.md") for name in read_records(folder / "all.pt2"))
    for number, name in enumerate(adapters):
        assert torch.equal(loaded.bind(name)(X), files.program.bind(folder / str(number))(X))
    # In the file each adapter has two records, an entry of the index and one of the certificate with its config.
    limit = plain.stat().st_size + directory_bytes + 500 + 4000 * len(adapters)
    assert (folder / "all.pt2").stat().st_size <= limit


def test_a_fresh_process(files: Files, tmp_path: Path) -> None:
    wanted = {name: files.program.bind(d)(X) for name, d in files.directories.items()}
    torch.save([X, wanted], tmp_path / "wanted.pt")
    code = (
        "import sys, torch, adaptc\n"
        "x, wanted = torch.load('wanted.pt')\n"
        "prog = adaptc.load(sys.argv[1])\n"
        "for name, out in wanted.items():\n"
        "    prog.swap(name)\n"
        "    assert torch.equal(prog(x), out), name\n"
        "assert list(prog.adapters) == list(wanted)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(files.file)], cwd=tmp_path, check=True)


def test_torch_reads_the_file(files: Files) -> None:
    assert torch.equal(torch.export.load(files.file).module()(X), files.program(X))


# -- names and paths ---------------------------------------------------------------------------------------------------


def test_a_name_is_no_path(files: Files, program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name means the stored adapter in every working directory, and a Path what lies on the disk."""
    monkeypatch.chdir(tmp_path)
    os.symlink(files.directories["de"], "fr")
    stored, on_disk = files.program.bind(files.directories["fr"])(X), files.program.bind(files.directories["de"])(X)
    assert torch.equal(program.bind("fr")(X), stored)
    assert torch.equal(program.bind(Path("fr"))(X), on_disk)
    assert torch.equal(program.bind("./fr")(X), on_disk)
    os.symlink(files.directories["de"], "other")
    assert torch.equal(program.bind("other")(X), on_disk)


def test_unknown_names(files: Files, program: Any) -> None:
    before = program.binding
    for call in (program.swap, program.bind, lambda n: adaptc.swap(program, n), lambda n: program.bank({"x": n})):
        with pytest.raises(
            SwapError, match=r"no adapter 'frr': the program's file has 'fr', 'de', .* nearest are 'fr'"
        ):
            call("frr")
    assert program.binding is before
    with pytest.raises(CheckpointError, match="no adapter directory frr"):
        files.program.bind("frr")  # it has no file, so this is a path


@pytest.mark.parametrize("option", ["config", "adapter_name", "key_mapping", "component"])
def test_options_of_files(program: Any, option: str) -> None:
    value = {"config": LoraConfig(r=2), "key_mapping": {"a": "b"}}.get(option, "default")
    with pytest.raises(ConfigError, match=f"^{option} is for files and state dicts, and 'fr' is"):
        program.swap("fr", **{option: value})


@pytest.mark.parametrize("name", ["", ".fr", "a/b", "a\\b", "a:b", "a\nb", "x" * 201, 3])
def test_names_that_no_file_can_hold(files: Files, tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of an adapter"):
        adaptc.save(files.program, tmp_path / "x.pt2", adapters={name: files.directories["fr"]})
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit(files: Files, tmp_path: Path) -> None:
    wide = adaptc.compile(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]), example_inputs=X[:, :4])
    bad = {"wide": adaptc.save_adapter(wide, tmp_path / "wide"), "none": tmp_path / "nothing"}
    for name, source in bad.items():
        with pytest.raises(adaptc.AdaptcError, match=f"^'{name}': "):
            adaptc.save(files.program, tmp_path / "x.pt2", adapters={"fr": files.directories["fr"], name: source})
    with pytest.raises(ConfigError, match="must be a dict of adapters by name"):
        adaptc.save(files.program, tmp_path / "x.pt2", adapters=[files.directories["fr"]])
    assert not (tmp_path / "x.pt2").exists()


def test_programs_that_take_none(files: Files, tmp_path: Path) -> None:
    adapters = {"fr": files.directories["fr"]}
    with pytest.raises(ConfigError, match="no adapter sites"):
        adaptc.save(adaptc.merge(files.program), tmp_path / "x.pt2", adapters=adapters)
    with pytest.raises(ConfigError, match="plain ExportedProgram"):
        adaptc.save(torch.export.export(files.model, (X,)), tmp_path / "x.pt2", adapters=adapters)
    two = {"a": str(files.directories["fr"]), "b": LoraConfig(target_modules=["first"])}
    both = adaptc.compile(files.model, two, example_inputs=(X,))
    with pytest.raises(ConfigError, match="several adapters act together"):
        adaptc.save(both, tmp_path / "x.pt2", adapters=adapters)


@pytest.mark.long
def test_x_lora_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    expert = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for name in ("0", "1"):
        adaptc.save_adapter(adaptc.compile(family.build(), expert), tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("0", "1")}
    hidden = family.build().config.hidden_size
    program = adaptc.compile(family.build(), XLoraConfig(hidden_size=hidden, adapters=paths))
    adapter = adaptc.save_adapter(program, tmp_path / "routed")
    with pytest.raises(ConfigError, match="'x': an X-LoRA adapter is several directories"):
        adaptc.save(program, tmp_path / "x.pt2", adapters={"x": adapter})


# -- what becomes of them ----------------------------------------------------------------------------------------------


def test_they_stay_with_the_program(files: Files, program: Any, tmp_path: Path) -> None:
    again = adaptc.load(adaptc.save(program, tmp_path / "again.pt2"))
    assert tuple(again.adapters) == NAMES
    assert torch.equal(again.bind("de")(X), program.bind("de")(X))
    some = adaptc.load(
        adaptc.save(program, tmp_path / "some.pt2", adapters={"en": "de", "fr": files.directories["fr.2"]})
    )
    assert list(some.adapters) == ["en", "fr"]
    assert torch.equal(some.bind("en")(X), program.bind("de")(X))
    assert torch.equal(some.bind("fr")(X), program.bind("fr.2")(X))
    assert not adaptc.load(adaptc.save(program, tmp_path / "none.pt2", adapters={})).adapters
    for other in (copy.copy(program), copy.deepcopy(program), program.with_options(fuse=False)):
        assert tuple(other.adapters) == NAMES
    for plain in (adaptc.merge(program), adaptc.unload(program)):
        assert not plain.adapters
    assert tuple(adaptc.unmerge(adaptc.merge(program)).adapters) == NAMES


@pytest.mark.parametrize("training", [False, True])
def test_nothing_writes_to_them(files: Files, tmp_path: Path, training: bool) -> None:
    made = adaptc.compile(files.model, files.program.binding.config, example_inputs=(X,), training=training)
    program = adaptc.load(adaptc.save(made, tmp_path / "x.pt2", adapters=files.directories))
    program.swap("fr")
    before = program(X).detach().clone()
    module = program.module()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad or "lora_" in name:
                p.add_(1.0)
    assert not torch.equal(program(X), before)
    program.swap("fr")
    assert torch.equal(program(X), before)


def test_threads(files: Files, program: Any) -> None:
    wanted = {name: files.program.bind(d)(X) for name, d in files.directories.items()}
    faults: list[Any] = []

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(30):
            name = chosen.choice(NAMES)
            program.swap(name)
            found = program(X)
            if not any(torch.equal(found, out) for out in wanted.values()):
                faults.append("a mix of adapters")
            if not torch.equal(program.bind(name)(X), wanted[name]):
                faults.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_report_lists_them(program: Any) -> None:
    report = adaptc.report(program)
    assert list(report.to_dict()["stored"]) == list(NAMES)
    assert report.to_dict()["stored"]["de"] == {"peft_type": "LORA", "tensors": 2, "parameters": 50, "bytes": 200}
    assert "über alles" in str(report)


# -- damage ------------------------------------------------------------------------------------------------------------


def refused(path: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as info:
        adaptc.load(path)
    assert str(path) in str(info.value)
    assert "/tmp/adaptc-" not in str(info.value)


def test_entries_that_are_missing(files: Files, tmp_path: Path) -> None:
    records, bad = read_records(files.file), tmp_path / "bad.pt2"
    for record in [n for n in records if n.startswith(ADDED_FOLDER + "adapters/")]:
        name = record.split("/")[3]
        less = {n: data for n, data in records.items() if n != record}
        refused(write_records(bad, less), f"the adapter '{name}' cannot be read: .*has no .*{record.split('/')[4]}")
        refused(write_records(bad, less, keep_seal=True), f"the adapter '{name}' cannot be read")
        for data in (b"", records[record][:-9], records[record][:9]):
            refused(write_records(bad, records | {record: data}), f"the adapter '{name}' cannot be read")
    refused(
        write_records(bad, {n: d for n, d in records.items() if n != INDEX}), "no adapters.json, which lists .*'fr'"
    )
    more = records | {ADDED_FOLDER + "adapters/fr/more.bin": b"x"}
    refused(write_records(bad, more), "the adapter 'fr' has 'adapters/fr/more.bin'")


@pytest.mark.parametrize("part", ["../x", "", "a\\b", ".hidden", "/etc/x"])
def test_names_that_lead_out(files: Files, tmp_path: Path, part: str) -> None:
    records = read_records(files.file)
    index = json.loads(records[INDEX])
    index["fr"]["files"] = [part]
    forged = records | {INDEX: json.dumps(index).encode()}
    refused(write_records(tmp_path / "bad.pt2", forged), "is no plain name")
    index["fr"] |= {"files": ["adapter_config.json", "adapter_model.safetensors"], "directory": part or ".."}
    forged = records | {INDEX: json.dumps(index).encode()}
    refused(write_records(tmp_path / "bad.pt2", forged), "is no plain name")


@pytest.mark.filterwarnings("ignore:adapter config. dropping unknown")
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_any_damage(tmp_path: Path, block: int) -> None:
    """Bytes of the file, and values of its index and configs: refused, or read right; nothing else is raised."""
    program = save_small(tmp_path / "small.pt2")
    adaptc.save_adapter(program, tmp_path / "fr")
    file = adaptc.save(program, tmp_path / "good.pt2", adapters={"fr": tmp_path / "fr"})
    good = adaptc.load(file)
    good.swap("fr")
    data, records, wanted = file.read_bytes(), read_records(file), outputs(good)
    texts = [n for n in records if n.startswith(ADDED_FOLDER) and n.endswith(".json")]
    for case in range(block * BLOCK, block * BLOCK + BLOCK):
        rng = random.Random(case)
        (tmp_path / "bad.pt2").write_bytes(mutate_bytes(data, rng))
        _refused_or_right(tmp_path / "bad.pt2", wanted, case)
        name = rng.choice(texts)
        forged = mutate_json(json.loads(records[name]), rng)[0]
        write_records(tmp_path / "bad.pt2", records | {name: json.dumps(forged).encode()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdaptcWarning)
            _refused_or_right(tmp_path / "bad.pt2", None, case)


def _refused_or_right(path: Path, wanted: Any, case: int) -> None:
    try:
        loaded = adaptc.load(path)
        for name in loaded.adapters:
            adaptc.swap(loaded, name)
        found = outputs(loaded)
    except adaptc.AdaptcError:
        return
    assert wanted is None or torch.equal(found[0], wanted[0]), case
