"""The adapter of a module as a directory, also where the module has other tensors than its program by now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adaptc
from adaptc import AdaptcError
from tests.support.training import batch, first_values, module

NAME = "model.layers.1.mlp.down_proj.lora_B.default.weight"


def replaced() -> Any:
    """A module with a new tensor in the place of one, as who wraps modules may do."""
    trained = module()
    owner, _, name = NAME.rpartition(".")
    old = trained.get_parameter(NAME)
    setattr(trained.get_submodule(owner), name, nn.Parameter(old.detach() * 2))
    return trained


def test_a_module_is_written_as_its_program_is(tmp_path: Path) -> None:
    trained = module()
    for what, name in ((trained, "module"), (trained.owner, "program")):
        assert adaptc.save_adapter(what, tmp_path / name, base_model="a/b") == tmp_path / name
    names = sorted(p.name for p in (tmp_path / "program").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "module").iterdir())
    for name in names:
        assert (tmp_path / "module" / name).read_bytes() == (tmp_path / "program" / name).read_bytes()


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "save_adapter": adaptc.save_adapter,
    "save": lambda program, path: adaptc.save(program, path.with_suffix(".pt2")),
    "merge": lambda program, _: adaptc.merge(program),
    "package": lambda program, path: adaptc.package(program, path.with_suffix(".pt2")),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_program_that_does_not_have_what_was_trained_says_so(way: str, tmp_path: Path) -> None:
    trained = replaced()
    with pytest.raises(
        AdaptcError, match=r"lora_B.* 0 more tensors.*others in their place.*save_adapter\(module, path\)"
    ):
        WAYS[way](trained.owner, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_and_gets_it_from_the_file(tmp_path: Path) -> None:
    trained = replaced()
    adaptc.save_adapter(trained, tmp_path / "a")
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    changed = {k for k, t in first_values().items() if not torch.equal(written[k], t)}
    assert changed == {"base_model.model." + NAME.replace(".default", "")}
    adaptc.swap(trained.owner, tmp_path / "a")
    adaptc.save_adapter(trained.owner, tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], t) for k, t in written.items())
    rows = {k: t for k, t in batch().items() if k != "labels"}
    torch.testing.assert_close(trained.owner(**rows).logits, trained.eval()(**rows).logits, rtol=1e-5, atol=1e-6)


def test_modules_of_before_do_not_matter(tmp_path: Path) -> None:
    """A program that was swapped has another adapter than they train; copies of a program have modules of their own."""
    trained = replaced()
    twin = copy.deepcopy(trained.program)
    adaptc.save_adapter(twin, tmp_path / "twin")
    adaptc.swap(trained.owner, {k: t.clone() for k, t in first_values().items()})
    adaptc.save_adapter(trained.owner, tmp_path / "swapped")


@pytest.mark.parametrize("what", [nn.Linear(3, 5), "a name"])
def test_what_is_no_program_is_named(what: Any, tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match=f"not a {type(what).__name__}; of what wraps a module"):
        adaptc.save_adapter(what, tmp_path / "a")
