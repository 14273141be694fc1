"""Programs packaged with AOTInductor: they compute what the program does, swap within their capacity, refuse the rest.

The package is the one of conftest.py.
"""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc import AdaptcError, BackendError, CheckpointError, ConfigError, SwapError
from adaptc.adapter_files.directory import write_adapter
from tests.support.archives import MANIFEST, read_records, with_right_hashes, write_records
from tests.support.packaged_nets import NET_CONFIG, Packaged, adapter, net_inputs

aten = torch.ops.aten


@pytest.mark.long
def test_capacity_of_every_site(net: Packaged) -> None:
    assert net.runner.ranks == {"emb.weight": 6, "conv.weight": 6, "lin.weight": 6, "experts": 6}


@pytest.mark.long
@pytest.mark.parametrize(("rank", "alpha"), [(6, 5.0), (3, 11.0)])
def test_swap_at_all_sites(net: Packaged, rank: int, alpha: float) -> None:
    config = NET_CONFIG.replace(r=rank, lora_alpha=alpha)
    report = net.swap(adapter(net.program, config, seed=rank), config)
    assert (report.sites, report.identity, report.ranks) == (6, (), (rank,))
    net.check_same_outputs()


@pytest.mark.long
def test_a_swap_renames_keys(net: Packaged, tmp_path: Path) -> None:
    config = NET_CONFIG.replace(r=3)
    tensors = adapter(net.program, config, seed=8)
    net.swap(tensors, config)
    args, kwargs = net_inputs(3, 7)
    want = net.runner(*args, **kwargs)["y"]
    inner = {f"net.{k}": t for k, t in tensors.items()}
    before = net.runner.binding
    with pytest.raises(SwapError, match=r"key_mapping=\{r.\^net"):
        net.runner.swap(inner, config=config)
    with pytest.raises(ConfigError, match="key_mapping is for files"):
        net.runner.swap(net.program.binding, key_mapping={r"^net\.": ""})
    assert net.runner.binding is before
    for given in (inner, write_adapter(tmp_path, config.to_dict(), inner)):
        net.swap(adapter(net.program, config, seed=9), config)
        assert net.runner.swap(given, config=config, key_mapping={r"^net\.": ""}).sites == 6
        torch.testing.assert_close(net.runner(*args, **kwargs)["y"], want, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_swap_of_some_sites_leaves_the_rest_at_the_base(net: Packaged, rank: int) -> None:
    everything = NET_CONFIG.replace(r=6)
    net.swap(adapter(net.program, everything, seed=99), everything)
    config = NET_CONFIG.replace(r=rank, lora_alpha=0.3 * rank + 1, use_rslora=rank % 2 == 0)
    chosen = {1: "lin.weight", 2: "experts", 4: "emb.weight", 5: "lin.weight"}[rank]
    report = net.swap(adapter(net.program, config, lambda fqn: fqn == chosen, rank), config)
    assert report.sites == 1
    assert len(report.identity) == 5
    net.check_same_outputs()


def test_each_site_takes_part(net: Packaged) -> None:
    """Leaving any one site out changes the output: no slot is unread or folded away."""
    config = NET_CONFIG.replace(r=3)
    args, kwargs = net_inputs(3, 7)
    net.swap(adapter(net.program, config), config)
    full = net.runner(*args, **kwargs)["y"]
    for left_out in [a.fqn for a in net.program.adaptation.attachments]:
        tensors = adapter(net.program, config, lambda fqn, left_out=left_out: fqn != left_out)
        if left_out.startswith("head"):
            tensors = {k: v for k, v in adapter(net.program, config).items() if not k.startswith("head")}
        net.swap(tensors, config)
        assert (net.runner(*args, **kwargs)["y"] - full).abs().max() > 1e-2, left_out
        net.check_same_outputs((3, 7))


def test_ranks_may_differ_between_sites(net: Packaged) -> None:
    config = NET_CONFIG.replace(rank_pattern={"conv": 6, "lin": 1, "experts": 5}, alpha_pattern={"lin": 7})
    report = net.swap(adapter(net.program, config), config)
    assert report.ranks == (1, 3, 5, 6)
    net.check_same_outputs()


def test_a_state_dict_without_config_takes_the_rank_of_its_tensors(net: Packaged) -> None:
    config = NET_CONFIG.replace(r=5, lora_alpha=NET_CONFIG.lora_alpha)
    tensors = adapter(net.program, config, lambda fqn: fqn in ("lin.weight", "experts"))
    adaptc.swap(net.program, tensors, config=config)
    net.runner.swap(adapter(net.program, NET_CONFIG), config=NET_CONFIG)
    assert net.runner.swap({f"base_model.model.{k}": v for k, v in tensors.items()}).ranks == (5,)
    net.check_same_outputs()


def test_directories_and_bindings(net: Packaged, tmp_path: Path) -> None:
    config = NET_CONFIG.replace(r=6, lora_alpha=2)
    adaptc.swap(net.program, adapter(net.program, config), config=config)
    adaptc.save_adapter(net.program, tmp_path / "a")
    net.runner.swap(adapter(net.program, NET_CONFIG), config=NET_CONFIG)
    assert net.runner.swap(tmp_path / "a").source == str(tmp_path / "a")
    net.check_same_outputs()
    net.runner.swap(adapter(net.program, NET_CONFIG), config=NET_CONFIG)
    net.runner.swap(net.program.binding)
    net.check_same_outputs()


def test_the_runner_copies_what_it_is_given(net: Packaged) -> None:
    config = NET_CONFIG.replace(r=6)
    tensors = adapter(net.program, config)
    net.swap(tensors, config)
    adaptc.swap(net.program, {k: v.clone() for k, v in tensors.items()}, config=config)
    for t in tensors.values():
        t.fill_(float("nan"))
    net.check_same_outputs()


def test_a_loaded_package_is_neither_copied_nor_pickled(net: Packaged) -> None:
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(AdaptcError, match=r"load .*\.pt2 once more, with adaptc\.load_package"):
            attempt(net.runner)


def test_inputs_in_another_memory_layout(net: Packaged) -> None:
    args, kwargs = net_inputs(3, 7)
    want = net.runner(*args, **kwargs)["y"]
    strange = args[0].transpose(0, 2).contiguous().transpose(0, 2)
    ids = kwargs["ids"].t().contiguous().t()
    assert not strange.is_contiguous()
    assert torch.equal(net.runner(strange, ids=ids, gain=kwargs["gain"])["y"], want)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.pop("lin.lora_B.weight"), CheckpointError, r"'lin\.lora_B\.weight' is missing"),
        (
            lambda t: t.update({"lin.lora_A.weight": torch.ones(3, 10)}),
            CheckpointError,
            r"\(3, 10\), expected \(3, 9\)",
        ),
        (
            lambda t: t.update({"lin.lora_B.weight": torch.ones(13, 4)}),
            CheckpointError,
            r"\(13, 4\), expected \(13, 3\)",
        ),
        (lambda t: t["lora_A.weight"].view(-1)[5:6].fill_(float("nan")), CheckpointError, "NaN or infinite"),
        (
            lambda t: t.update({"emb.lora_embedding_B": t["emb.lora_embedding_B"].double() * 1e60}),
            CheckpointError,
            r"lora_embedding_B.*too large for",
        ),
        (lambda t: t.update({"lim.lora_A.weight": torch.ones(3, 9)}), SwapError, r"nearest: lin\.lora_A\.weight"),
    ],
)
def test_a_refused_adapter_changes_nothing(net: Packaged, change: Any, error: type, match: str) -> None:
    good = NET_CONFIG.replace(r=6, lora_alpha=3)
    net.swap(adapter(net.program, good, seed=5), good)
    binding = net.runner.binding
    bad = adapter(net.program, NET_CONFIG, seed=6)
    change(bad)
    with pytest.raises(error, match=match):
        net.runner.swap(bad, config=NET_CONFIG)
    assert net.runner.binding is binding
    net.check_same_outputs()


@pytest.mark.parametrize(
    ("pattern", "site", "rank"), [({"lin": 7}, "lin", 7), ({"conv": 9}, "conv", 9), ({"experts": 8}, "experts", 8)]
)
def test_a_rank_above_the_capacity(net: Packaged, pattern: dict[str, int], site: str, rank: int) -> None:
    good = NET_CONFIG.replace(r=6)
    net.swap(adapter(net.program, good, seed=7), good)
    config = NET_CONFIG.replace(rank_pattern=pattern)
    message = rf"{site}.*rank {rank}, and the package has room for 6; package again with max_rank={rank}"
    with pytest.raises(SwapError, match=message):
        net.runner.swap(adapter(net.program, config), config=config)
    net.check_same_outputs()


def test_adapters_that_change_the_base_are_refused(net: Packaged) -> None:
    config = NET_CONFIG.replace(init_lora_weights="pissa")
    with pytest.raises(SwapError, match=r"changes the base weight 'emb\.weight' by its first values"):
        net.runner.swap(adapter(net.program, config), config=config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a, k: (a, {**k, "gain": k["gain"].double()}), "'gain'.*float32.*float64"),
        (lambda a, k: (a, {**k, "gain": k["gain"][:2]}), "'gain'.*axis 0 has size 2"),
        (lambda a, k: (a, {**k, "ids": k["ids"][:1]}), "'ids'.*must equal axis 0 of 'x'|outside"),
        (lambda a, k: ((), k), "missing input"),
        (lambda a, k: (a, {**k, "gain": torch.empty(3, device="meta")}), "'gain' is on meta"),
    ],
)
def test_inputs_are_checked(net: Packaged, change: Any, match: str) -> None:
    args, kwargs = change(*net_inputs(3, 7))
    with pytest.raises(adaptc.AdaptcError, match=match):
        net.runner(*args, **kwargs)


@pytest.mark.parametrize("sizes", [(0, 5), (1, 1), (1, 5), (3, 1)])
def test_any_sizes_and_strides(net: Packaged, sizes: tuple[int, int]) -> None:
    (x,), kwargs = net_inputs(*sizes)
    expected = net.program(x, **kwargs)
    for y in (x, x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        torch.testing.assert_close(net.runner(y, **kwargs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        net.runner(x[..., :1].expand(x.shape), **kwargs), net.program(x[..., :1].expand(x.shape), **kwargs)
    )


# -- files -----------------------------------------------------------------------------------------------------------


def _copied(
    source: Path, target: Path, keep: Callable[[str], bool], edit: Callable[[bytes], bytes] | None = None
) -> Path:
    """A forged copy: what is left out or edited has the right hashes."""
    records = {name: data for name, data in read_records(source).items() if keep(name)}
    if edit is not None:
        records[MANIFEST] = edit(records[MANIFEST])
    return write_records(target, with_right_hashes(records))


def test_files_that_are_no_packages(net: Packaged, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        adaptc.load_package(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("not a package")
    with pytest.raises(CheckpointError, match="not a packaged program, or is damaged"):
        adaptc.load_package(tmp_path / "text.pt2")
    (tmp_path / "half.pt2").write_bytes(net.path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="not a packaged program, or is damaged"):
        adaptc.load_package(tmp_path / "half.pt2")
    with pytest.raises(CheckpointError, match=r"open it with adaptc\.load"):
        adaptc.load_package(adaptc.save(net.program, tmp_path / "program.pt2"))
    plain = _copied(net.path, tmp_path / "plain.pt2", lambda name: "adaptc" not in name)
    with pytest.raises(BackendError, match=r"packaged without adaptc.*adaptc\.package"):
        adaptc.load_package(plain)
    with pytest.raises(CheckpointError, match=r"a package that adaptc\.package wrote.*adaptc\.load_package"):
        adaptc.load(net.path)
    with pytest.raises(CheckpointError, match=r"a package of AOTInductor, made without adaptc"):
        adaptc.load(plain)
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as other:
        other.writestr("a/b", "c")
    with pytest.raises(CheckpointError, match=r"not one that adaptc\.package wrote"):
        adaptc.load_package(tmp_path / "zip.pt2")


def test_a_manifest_that_does_not_fit(net: Packaged, tmp_path: Path) -> None:
    def newer(text: bytes) -> bytes:
        return json.dumps({**json.loads(text), "format": 99}).encode()

    def other(text: bytes) -> bytes:
        return text.replace(b"lin.lora_A.default.weight", b"lin.lora_C.default.weight")

    with pytest.raises(CheckpointError, match="format 99"):
        adaptc.load_package(_copied(net.path, tmp_path / "a.pt2", lambda name: True, newer))
    with pytest.raises(CheckpointError, match=r"'current\.lin\.lora_C\.default\.weight' is missing"):
        adaptc.load_package(_copied(net.path, tmp_path / "b.pt2", lambda name: True, other))
    with pytest.raises(BackendError, match="does not load here"):
        adaptc.load_package(_copied(net.path, tmp_path / "c.pt2", lambda name: not name.endswith(".so")))


def test_what_cannot_be_packaged(net: Packaged, tmp_path: Path) -> None:
    net.swap(adapter(net.program, NET_CONFIG), NET_CONFIG)
    with pytest.raises(ConfigError, match=r"'(emb|conv)\.weight' has rank 3 now, more than max_rank=2"):
        adaptc.package(net.program, tmp_path / "a.pt2", max_rank=2)
    with pytest.raises(ConfigError, match="positive integer"):
        adaptc.package(net.program, tmp_path / "a.pt2", max_rank=0)
    with pytest.raises(CheckpointError, match=r"must end in \.pt2"):
        adaptc.package(net.program, tmp_path / "a.so")
    with pytest.raises(CheckpointError, match="directory must exist"):
        adaptc.package(net.program, tmp_path / "nowhere" / "a.pt2")
    with pytest.raises(ConfigError, match=r"package takes what.*not a ExportedProgram"):
        adaptc.package(torch.export.export(nn.Linear(3, 2), (torch.ones(5, 3),)), tmp_path / "a.pt2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no site of the program has a rank"):
        adaptc.package(adaptc.unload(net.program), tmp_path / "a.pt2", max_rank=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_without_a_compiler(net: Packaged, tmp_path: Path) -> None:
    from torch._inductor import config

    old = tmp_path / "a.pt2"
    old.write_text("what was here before")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        adaptc.package(net.program, old)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was here before"]


# -- a transformers model --------------------------------------------------------------------------------------------
