"""Promises of the packages of banks, whatever they are of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaptc
from tests.bank.kinds import WAYS, Kind, close, every_kind, kinds, package_of, third_adapter
from tests.generation.packaged import tokenizer

FRESH = """
import sys, torch, adaptc
path, third, given, out = sys.argv[1:]
bank = adaptc.load_package(path)
bank.add("third", third)
inputs, names = torch.load(given)
with torch.no_grad():
    torch.save((bank.generate if bank.generator else bank)(**inputs, adapters=names), out)
if bank.generator:
    assert bank.tokenizer("w7 w2")["input_ids"] == [7, 2]
strange = [n for n in sys.modules if n.endswith((".modeling_llama", ".modeling_t5"))]
assert not strange, strange
"""


@pytest.mark.long
@kinds(*WAYS, packaged=(True,))
def test_a_fresh_process_runs_it(kind: Kind, tmp_path: Path) -> None:
    """Without the model's own code, and with an adapter that is put in there."""
    names = ["third", None, {"third": 0.5, "first": 0.3}, "second"]

    def elsewhere(**given: object) -> object:
        torch.save((given, names), tmp_path / "given.pt")
        files = [package_of(kind), third_adapter(kind), tmp_path / "given.pt", tmp_path / "out.pt"]
        command = [sys.executable, "-W", "ignore", "-c", FRESH, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "out.pt")

    bank = kind.source.bank({**kind.adapters, "third": third_adapter(kind)})
    close(kind.run(elsewhere), kind.rows(bank, names))


@every_kind
def test_what_no_package_is_made_of(kind: Kind, tmp_path: Path) -> None:
    bank, path = kind.bank(), tmp_path / "one.pt2"
    if kind.is_packaged:
        with pytest.raises(adaptc.ConfigError, match="of a package already"):
            adaptc.package(bank, path)
        if bank.generator is not None:
            with pytest.raises(adaptc.AdaptcError, match=r"adapters of the bank"):
                bank.generator.bank()
    if bank.generator is None:
        with pytest.raises(adaptc.ConfigError, match="a tokenizer goes into"):
            adaptc.package(kind.source.bank(kind.adapters), path, tokenizer=tokenizer())
    with pytest.raises(adaptc.ConfigError, match="the bank is empty"):
        adaptc.package(kind.source.bank(), path)
    with pytest.raises(adaptc.ConfigError, match="capacity=1 is no number of adapters from 2"):
        adaptc.package(kind.source.bank(kind.adapters), path, capacity=1)
    assert not list(tmp_path.iterdir())
