"""The package that most tests here share: compiling one takes half a minute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaptc
from tests.support.packaged_nets import NET_CONFIG, Net, Packaged, net_inputs


def snapshot(program: Any) -> Any:
    return str(program), {k: v.clone() for k, v in program.state_dict.items()}


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Packaged with first values: every B is zero, which a compiler would love to compute with. Every test that needs a
    known adapter swaps one in first; none relies on what another test left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args, kwargs = net_inputs(2, 5)
        auto = torch.export.Dim.AUTO
        shapes = {"x": {0: auto, 1: auto}, "ids": {0: auto, 1: auto}, "gain": None}
        model = Net()
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        program = adaptc.compile(exported, NET_CONFIG)
    (text, state), binding = snapshot(program), program.binding
    path = tmp_path_factory.mktemp("net") / "net.pt2"
    assert adaptc.package(program, path, max_rank=6) == path
    assert program.binding is binding
    assert snapshot(program)[0] == text
    assert {k: v.tolist() for k, v in program.state_dict.items()} == {k: v.tolist() for k, v in state.items()}
    assert [p.name for p in path.parent.iterdir()] == ["net.pt2"]
    packaged = Packaged(program, adaptc.load_package(path), path, model)
    packaged.check_same_outputs()
    return packaged
