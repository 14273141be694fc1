"""What write_adapter leaves on disk: any tensors, PEFT's conventions, and nothing at all when it fails or is killed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from adaptc.adapter_files import safe_load as _safefile
from adaptc.adapter_files.directory import read_adapter, read_config, write_adapter
from adaptc.errors import AdaptcWarning, CheckpointError
from tests.support.adapter_files import BIN, CONFIG, LORA, SAFE, some_tensors, tensors_are_equal, tree
from tests.support.cover import examples

# --- round trips ------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]
key_part = st.text("abz_09", min_size=1, max_size=4)
layouts = st.sampled_from(["plain", "transposed", "sliced", "expanded", "offset"])


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key in draw(st.lists(st.lists(key_part, min_size=1, max_size=3), min_size=1, max_size=5, unique_by=tuple)):
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7]), max_size=4))
        t = (torch.rand(shape, dtype=torch.float64) * 200 - 100).to(draw(st.sampled_from(DTYPES)))
        match draw(layouts):
            case "transposed":
                t = t.transpose(0, -1) if t.dim() else t
            case "sliced":
                t = torch.stack([t, t + 1], dim=-1)[..., 1]
            case "expanded":
                t = t.unsqueeze(0).expand(3, *shape)
            case "offset":
                t = torch.cat([t.reshape(-1), t.reshape(-1)])[t.numel() :].reshape(t.shape)
        out[".".join(key)] = t
    if draw(st.booleans()):
        first = next(iter(out))
        out[first + ".tied"] = out[first]
    return out


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_dicts(), safe=st.booleans(), kind=st.sampled_from(["LORA", "VERA", "OFT"]))
def test_any_tensors_round_trip(tensors: dict[str, Tensor], safe: bool, kind: str, tmp_path: Path) -> None:
    before = {k: t.clone() for k, t in tensors.items()}
    write_adapter(tmp_path, {"peft_type": kind}, tensors, safe_serialization=safe)
    got = read_adapter(tmp_path)
    assert tensors_are_equal(got.tensors, tensors)
    assert all(got.tensors[k].shape == t.shape for k, t in tensors.items())
    # The last example may have left the other format.
    assert [(tmp_path / n).is_file() for n in (SAFE, BIN)] == [safe, not safe]
    assert got.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert tensors_are_equal(tensors, before)


def test_a_view_is_written_alone(tmp_path: Path) -> None:
    bank = torch.randn(1000, 50)
    write_adapter(tmp_path, LORA, {"l1.lora_A.weight": bank[3:5]}, safe_serialization=False)
    assert (tmp_path / BIN).stat().st_size < 4000


# --- what is written --------------------------------------------------------------------------------------------------


def test_config_conventions(tmp_path: Path) -> None:
    config = {
        "r": 3,
        "peft_type": peft.PeftType.LORA,
        "target_modules": {"z", "a", "m"},
        "inference_mode": False,
        "runtime_config": {"x": 1},
        "nested": {"ids": frozenset({5, 2})},
        "peft_version": None,
    }
    kept = dict(config)
    write_adapter(tmp_path, config, some_tensors(), base_model="org/base")
    assert config == kept
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "nested": {"ids": [2, 5]},
        "peft_type": "LORA",
        "peft_version": peft.__version__,
        "r": 3,
        "target_modules": ["a", "m", "z"],
    }
    from safetensors import safe_open

    with safe_open(tmp_path / SAFE, framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    write_adapter(tmp_path, config | {"peft_version": "0.9.9"}, some_tensors())
    assert read_config(tmp_path)["peft_version"] == "0.9.9"


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_adapter(tmp_path / "a", LORA, some_tensors())
    finally:
        os.umask(old)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "a").iterdir()} == dict.fromkeys(
        (CONFIG, SAFE, "README.md"), "0o640"
    )


def test_model_card(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load

    config = LORA | {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}
    write_adapter(tmp_path, config, some_tensors())
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "lora"],
    }
    hand = "---\nlicense: mit\nbase_model: other/name\ntags:\n- mine\n---\n\n# My adapter\nWords: é, ---, {{x}}.\n"
    (tmp_path / "README.md").write_text(hand, encoding="utf-8")
    for _ in range(2):
        write_adapter(tmp_path, config, some_tensors(), adapter_name="fr")
        write_adapter(tmp_path, config, some_tensors())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.endswith("---\n\n# My adapter\nWords: é, ---, {{x}}.\n")
    meta = metadata_load(tmp_path / "README.md")
    assert meta is not None
    assert (meta["license"], meta["base_model"], meta["library_name"]) == ("mit", "other/name", "peft")
    assert set(meta["tags"]) == {"mine", "lora", "base_model:adapter:org/base"}
    assert not (tmp_path / "fr" / "README.md").exists()
    broken = "---\n: [ } x\n---\nbody\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(AdaptcWarning, match=r"README\.md left as it is"):
        write_adapter(tmp_path, config, some_tensors(3))
    assert (tmp_path / "README.md").read_text() == broken
    assert tensors_are_equal(read_adapter(tmp_path).tensors, some_tensors(3))


# --- a failed or killed write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("exists", [True, False], ids=["over", "new"])
def test_full_disk_changes_nothing(safe: bool, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if exists:
        write_adapter(tmp_path / "deep" / "er", LORA, some_tensors(1))
        (tmp_path / "deep" / "er" / "mine.txt").write_text("keep")
    before = tree(tmp_path)

    def full(tensors: object, place: Any, *args: object, **kw: object) -> None:
        if isinstance(place, Path):
            place.write_bytes(b"half a file")
        else:
            place.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_safefile, "save_file", full)
    monkeypatch.setattr(_safefile.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"adapter_model.*No space left.*unchanged"):
        write_adapter(tmp_path / "deep" / "er", LORA | {"r": 9}, some_tensors(2), safe_serialization=safe)
    assert tree(tmp_path) == before
    assert exists or list(tmp_path.iterdir()) == []


def overwrites() -> list[tuple[str, bool, bool]]:
    """(id, new config differs, new format is safetensors) over an existing safetensors adapter."""
    return [("weights", False, True), ("config", True, True), ("format", False, False), ("both", True, False)]


@pytest.mark.parametrize("fail_at", range(1, 6))
@pytest.mark.parametrize("case", overwrites(), ids=lambda c: c[0])
def test_failing_rename_changes_nothing(
    case: tuple[str, bool, bool], fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    before, real, calls = tree(tmp_path), os.replace, []

    def flaky(src: object, dst: object) -> None:
        calls.append(dst)
        if len(calls) == fail_at:
            raise OSError(errno.EIO, "disk gone")
        real(src, dst)  # pyright: ignore

    monkeypatch.setattr(os, "replace", flaky)
    config = LORA | {"r": 9 if case[1] else 3}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdaptcWarning)  # a model card that could not be moved is no failure
            write_adapter(tmp_path, config, some_tensors(2), safe_serialization=case[2])
    except CheckpointError:
        assert tree(tmp_path) == before
    else:
        got = read_adapter(tmp_path)
        assert tensors_are_equal(got.tensors, some_tensors(2))
        assert got.config["r"] == config["r"]
        assert len([c for c in calls if "README" not in str(c)]) < fail_at or "README" in str(calls[fail_at - 1])
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


KILLED = """
import os, sys, torch
sys.path.insert(0, {root!r})
from adaptc.adapter_files.directory import write_adapter
real = os.replace
for at in range(5):
    if os.fork() == 0:
        left = [at]
        def replace(src, dst):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            real(src, dst)
        os.replace = replace
        torch.manual_seed(2)
        tensors = {{"l1.lora_A.weight": torch.randn(3, 8), "l1.lora_B.weight": torch.randn(12, 3)}}
        write_adapter({path!r} + str(at), {{"peft_type": "LORA", "r": 9, "target_modules": ["l1"]}}, tensors)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) != 9:
        sys.exit(1)
"""


@pytest.mark.long
def test_a_killed_write_never_mixes_two_adapters(tmp_path: Path) -> None:
    for at in range(5):
        write_adapter(tmp_path / f"at{at}", LORA, some_tensors(1))
        write_adapter(tmp_path / f"at{at}", LORA, some_tensors(3), adapter_name="other")  # never to be taken instead
    code = KILLED.format(root=os.getcwd(), path=str(tmp_path / "at"))
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    # before the first rename; config away; weights away; weights in; config in, so that only the model card is missing
    for at, seed in ((0, 1), (1, None), (2, None), (3, None), (4, 2)):
        where = tmp_path / f"at{at}"
        if seed is None:
            with pytest.raises(CheckpointError, match="A write was interrupted"):
                read_adapter(where)
            assert list(where.glob(".adaptc-write-*/old/" + CONFIG))
        else:
            got = read_adapter(where)
            assert (got.config["r"], tensors_are_equal(got.tensors, some_tensors(seed))) == ((3, 9)[seed - 1], True)
        write_adapter(where, LORA, some_tensors(4))
        assert tensors_are_equal(read_adapter(where).tensors, some_tensors(4))


@pytest.mark.long
def test_a_really_full_disk(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    before = tree(tmp_path)
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {os.getcwd()!r})
from adaptc.adapter_files.directory import write_adapter
from adaptc.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for safe in (True, False):
    try:
        tensors = {{"l1.lora_A.weight": torch.ones(3, 50_000)}}
        write_adapter({str(tmp_path)!r}, {LORA!r}, tensors, safe_serialization=safe)
    except CheckpointError:
        continue
    sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert tree(tmp_path) == before


def test_reading_survives_an_overwrite(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1))
    old = read_adapter(tmp_path)
    write_adapter(tmp_path, old.config, {k: t * 2 for k, t in old.tensors.items()})
    assert tensors_are_equal(old.tensors, some_tensors(1))
    write_adapter(tmp_path, old.config, old.tensors)  # a file onto itself
    assert tensors_are_equal(read_adapter(tmp_path).tensors, some_tensors(1))
    old.tensors["l1.lora_A.weight"].fill_(3.0)  # private memory: the file does not see it
    assert tensors_are_equal(read_adapter(tmp_path).tensors, some_tensors(1))


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        ({}, {"a.b": torch.ones(2)}, "peft_type"),
        (LORA | {"x": torch.float16}, {"a.b": torch.ones(2)}, "float16.*JSON"),
        (LORA, {}, "no tensors"),
        (LORA, {"a.b": torch.ones(2, device="meta")}, r"a\.b.*meta"),
        (LORA, {"a.b": torch.eye(3).to_sparse()}, r"a\.b.*sparse"),
        (LORA, {"a.b": [1.0]}, r"a\.b.*list"),
    ],
)
def test_refuses_to_write(config: dict, tensors: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        write_adapter(tmp_path / "a", config, tensors)
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_write_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="it is a file"):
        write_adapter(tmp_path / "f", LORA, some_tensors())
    with pytest.raises(CheckpointError, match="it is a file"):
        write_adapter(tmp_path, LORA, some_tensors(), adapter_name="f")
    assert tree(tmp_path) == {"f": b"x"}
