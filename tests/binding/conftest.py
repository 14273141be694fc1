"""What the tests of adapter files of other formats share: a small net, and a program with an adapter at every layer."""

from __future__ import annotations

import pytest
from torch import nn

import adaptc
from tests.support.component_nets import net, program_with_all_sites


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


@pytest.fixture(scope="module")
def wide() -> adaptc.AdaptedProgram:
    return program_with_all_sites()
