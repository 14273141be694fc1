"""Train and eval mode as graphs have it: every op that has a mode says which, and those that have none say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.passes.analysis.program_facts import is_training
from adaptc.passes.graph.train_eval import MODE_FLAGS, training_mode_of

aten = torch.ops.aten


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class InPlace(nn.Module):
    def __init__(self, function: Callable[[Tensor, float, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 2, 0.5, self.training)


ROWS, IMAGE = torch.randn(3, 5, 7), torch.randn(3, 4, 6)
RNN: dict[str, Any] = {"num_layers": 2, "dropout": 0.5, "batch_first": True}
#: a module whose mode matters, and its input
MODES: dict[str, tuple[nn.Module, Tensor]] = {
    "lstm": (First(nn.LSTM(7, 4, **RNN)), ROWS),
    "gru": (First(nn.GRU(7, 4, **RNN)), ROWS),
    "rnn_tanh": (First(nn.RNN(7, 4, **RNN)), ROWS),
    "rnn_relu": (First(nn.RNN(7, 4, nonlinearity="relu", **RNN)), ROWS),
    "dropout": (nn.Dropout(0.5), ROWS),
    "dropout1d": (nn.Dropout1d(0.5), IMAGE),
    "alpha_dropout": (nn.AlphaDropout(0.5), ROWS),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout(0.5), IMAGE),
    "dropout_": (InPlace(torch.dropout_), ROWS),
    "feature_dropout_": (InPlace(torch.feature_dropout_), IMAGE),
    "alpha_dropout_": (InPlace(torch.alpha_dropout_), ROWS),
    "feature_alpha_dropout_": (InPlace(torch.feature_alpha_dropout_), IMAGE),
    "batch_norm": (nn.BatchNorm1d(4), IMAGE),
    "instance_norm": (nn.InstanceNorm1d(4, track_running_stats=True), IMAGE),
    "rrelu": (nn.RReLU(), ROWS),
    "rrelu in place": (nn.Sequential(nn.Tanh(), nn.RReLU(inplace=True)), ROWS),
}
#: modules that compute the same in both modes, though their ops have a flag for one
NONE: dict[str, tuple[nn.Module, Tensor]] = {
    "one layer": (First(nn.LSTM(7, 4, batch_first=True)), ROWS),
    "no dropout": (First(nn.LSTM(7, 4, num_layers=2, batch_first=True)), ROWS),
    "dropout of 0": (nn.Dropout(0.0), ROWS),
    "norm of the batch": (nn.BatchNorm1d(4, track_running_stats=False), IMAGE),
    "norm of the sample": (nn.InstanceNorm1d(4), IMAGE),
    "layer_norm": (nn.LayerNorm(7), ROWS),
}


def exported(module: nn.Module, x: Tensor, mode: bool) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on dropout between the layers of one
        return torch.export.export(module.train(mode), (x.clone(),))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", list(MODES))
def test_the_mode_is_that_of_the_export(name: str, mode: bool) -> None:
    program = exported(*MODES[name], mode)
    assert is_training(program, default=not mode) == mode
    assert [m for n in program.graph.nodes if (m := training_mode_of(n)) is not None] == [mode]


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("name", list(NONE))
def test_where_both_modes_compute_the_same_there_is_none(name: str, default: bool) -> None:
    for mode in (True, False):
        assert is_training(exported(*NONE[name], mode), default) == default


def test_every_op_with_a_flag_has_one_in_its_schema() -> None:
    """The positions of the table are those of the schemas."""
    for op, flag in MODE_FLAGS.items():
        names = [a.name for a in op._schema.arguments]
        assert names[flag.position] in ("train", "training", "use_input_stats"), op
        if flag.probability is not None:
            assert names[flag.probability] in ("p", "dropout"), op
        if flag.statistics is not None:
            assert names[flag.statistics].startswith("running_"), op


def test_no_op_of_torch_with_such_a_flag_is_missing() -> None:
    """But for those of other devices and of decompositions, which no export to the training dialect holds."""
    other = ("cudnn", "miopen", "mkldnn", "mps", "quantized", "fused", "thnn", "backward", "_out", "_scaled", "_batch")
    known = {str(op) for op in MODE_FLAGS}
    missing = set()
    for name in dir(aten):
        packet = getattr(aten, name)
        if any(part in name for part in other) or not hasattr(packet, "overloads"):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            flags = [a.name for a in op._schema.arguments if str(a.type) in ("bool", "Optional[bool]")]
            if {"train", "training", "use_input_stats"} & set(flags) and "out" not in overload:
                missing.add(str(op))
    assert missing - known == set(), missing - known


def test_a_recurrent_layer_exported_in_train_mode_is_a_training_program() -> None:
    module, x = MODES["lstm"]
    program = adaptc.compile(
        exported(module, x, True), adaptc.LoraConfig(r=2, target_parameters=["layer.weight_ih_l1"])
    )
    assert program.adaptation.training
    trained = program.module()
    trained.train()
    assert not torch.equal(trained(x), trained(x))
    trained.eval()
    assert torch.equal(trained(x), trained(x))
    with torch.no_grad():
        torch.testing.assert_close(trained(x), module.eval()(x))
