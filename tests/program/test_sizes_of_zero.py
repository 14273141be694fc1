"""Calls with a size of zero: computed, or refused with the input's name, and no process ends by them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc import LoraConfig


@pytest.mark.parametrize("training", [False, True])
def test_a_size_of_zero_that_is_divided_by(training: bool) -> None:
    """Whether by the model or by a condition on its sizes, the input is named."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.lin = nn.EmbeddingBag(11, 6), nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.lin(self.bags(ids))

    class Mean(Bags):
        def forward(self, ids: Tensor) -> Tensor:
            return self.lin(self.bags(ids)) * (ids.numel() // ids.shape[0])

    config = LoraConfig(r=2, target_modules=["lin"])
    for kind, empty in ((Bags, (3, 0)), (Mean, (0, 3))):
        program = adaptc.compile(kind().eval(), config, example_inputs=torch.arange(6).reshape(2, 3), training=training)
        with pytest.raises(adaptc.AdaptcError, match=r"'ids' has shape \(" + ", ".join(map(str, empty))):
            program.module()(torch.zeros(*empty, dtype=torch.int64))


class Heads(nn.Module):
    """Attention that writes -1 for the number of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lin = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        rows, tokens = ids.shape
        heads = self.lin(self.words(ids)).view(rows, tokens, -1, 3).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum((1, 2))


class TwoHeads(Heads):
    """The same with numbers, which computes with a size of zero, in code that is not compiled."""

    def forward(self, ids: Tensor) -> Tensor:
        heads = self.lin(self.words(ids)).view(*ids.shape, 2, 3).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum((1, 2))


IDS = torch.arange(6).reshape(2, 3)

#: in a process of its own, which such calls used to end
CALLS = """
import sys, torch, adaptc
from tests.program.test_sizes_of_zero import IDS, Heads, TwoHeads
config = adaptc.LoraConfig(r=2, target_modules=["lin"])
made = adaptc.compile(Heads().eval(), config, example_inputs=IDS, backend="inductor")
two = adaptc.compile(TwoHeads().eval(), config, example_inputs=IDS, backend="inductor")
assert two(IDS).shape == (2, 3)
assert two(torch.zeros((4, 0), dtype=torch.int64)).shape == (4, 3)
packaged = adaptc.load_package(adaptc.package(two.with_options(backend="eager"), sys.argv[1]))
assert packaged(IDS[:0]).shape == (0, 3)
for call in (made, packaged, packaged.base):
    assert call(IDS).shape == (2, 3)
    for shape in ((4, 0), (0, 0)):
        try:
            call(torch.zeros(shape, dtype=torch.int64))
        except adaptc.AdaptcError as error:
            assert str(shape) in str(error), error
        else:
            raise AssertionError(shape)
    assert call(IDS).shape == (2, 3)
try:
    torch.func.vmap(packaged)(IDS[None])
except adaptc.BackendError as error:
    assert "Call the program that it was packaged from" in str(error), error
else:
    raise AssertionError("vmap")
print("alive")
"""


@pytest.mark.long
def test_compiled_code_is_not_given_what_it_divides_by(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CALLS, str(tmp_path / "package.pt2")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.parametrize("training", [False, True])
def test_a_size_of_zero_that_a_model_does_not_compute_with(training: bool) -> None:
    """Torch's own error is one of ours, which names the input; what computes nothing but has a meaning is computed."""
    config = LoraConfig(r=2, target_modules=["lin"])
    program = adaptc.compile(Heads().eval(), config, example_inputs=IDS, training=training)
    for call in (program, program.bind(program.binding), program.base, program.module()):
        with pytest.raises(adaptc.AdaptcError, match=r"a size of zero: 'ids' has shape \(4, 0\)"):
            call(torch.zeros(4, 0, dtype=torch.int64))
    plain = adaptc.compile(
        nn.Linear(5, 3), LoraConfig(r=2, target_modules="all-linear"), example_inputs=torch.ones(2, 5)
    )
    plain.backend = "inductor"
    for rows in (0, 2):
        assert plain(torch.ones(rows, 5)).shape == (rows, 3)
