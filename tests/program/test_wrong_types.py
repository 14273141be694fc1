"""What a function of programs says of something that is none: an AdaptcError that names it, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc import AdaptcError, LoraConfig

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "swap": lambda it: adaptc.swap(it, {}),
    "bind": lambda it: adaptc.bind(it, None),
    "merge": adaptc.merge,
    "unmerge": adaptc.unmerge,
    "unload": adaptc.unload,
    "lower": adaptc.debug.lower,
    "save": lambda it: adaptc.save(it, "never.pt2"),
    "save_adapter": lambda it: adaptc.save_adapter(it, "never"),
    "verify": adaptc.verify,
    "package": lambda it: adaptc.package(it, "never.pt2"),
    "report": adaptc.report,
}
#: what takes more than programs of adaptc's
TAKEN = {
    ("save", "plain program"),
    ("package", "plain program"),
    ("package", "bank"),
    ("report", "bank"),
    ("verify", "path"),
}


@cache
def strangers() -> dict[str, Any]:
    net, x = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)), torch.randn(2, 7)
    program = adaptc.compile(net, LoraConfig(r=2, target_modules=["0"]), example_inputs=x)
    return {
        "nothing": None,
        "path": "a.pt2",
        "module": net,
        "plain program": torch.export.export(net, (x,)),
        "bound": program.bind(None),
        "bank": program.bank({}),
        "module of a program": program.module(),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, it in strangers().items():
        if (name, what) in TAKEN or (name == "save_adapter" and what == "module of a program"):
            continue
        with pytest.raises(AdaptcError) as info:
            FUNCTIONS[name](it)
        assert type(it).__name__ in str(info.value), (what, str(info.value))
    assert not list(tmp_path.iterdir())
