"""Train and eval mode of a program: every flag a module has, wherever it hides, there and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc import LoraConfig
from adaptc.passes.train.set_mode import SetMode
from tests.support.pass_checks import Snapshot, assert_valid, export, saved_and_loaded


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        p = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(x, x.flip(0), x * 2, dropout_p=p)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: str) -> None:
        super().__init__()
        self.rnn = kind(7, 5, num_layers=2, dropout=0.5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Hidden(nn.Module):
    """Dropout in an autocast block, in a no_grad block, and in one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 7)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.drop(self.lin(x))
        with torch.no_grad():
            z = self.drop(x) * 2
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = z + self.drop(self.lin(z)).float()
        return y.float() + z


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x + 1, 0.5, self.training, inplace=True)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.5)), (3, 7)),
    "two dropouts": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(7, 5), nn.Dropout(0.5)), (3, 7)),
    "dropout in place": (InPlace, (3, 7)),
    "channels": (lambda: nn.Dropout1d(0.5), (3, 7, 5)),
    "alpha": (lambda: nn.AlphaDropout(0.5), (3, 7)),
    "feature alpha": (lambda: nn.FeatureAlphaDropout(0.5), (3, 7, 5)),
    "rrelu": (lambda: nn.RReLU(0.1, 0.9), (3, 7)),
    "batch norm": (lambda: nn.BatchNorm1d(7), (5, 7)),
    "batch norm and dropout": (lambda: nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(0.5)), (5, 7)),
    "instance norm": (lambda: nn.InstanceNorm1d(7, track_running_stats=True), (3, 7, 5)),
    "attention": (Attends, (2, 3, 5, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 3, 7)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 3, 7)),
    "rnn": (lambda: Recurrent(nn.RNN), (2, 3, 7)),
    "rnn relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), (2, 3, 7)),
    "hidden": (Hidden, (3, 7)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 9, dropout=0.5, batch_first=True), (2, 3, 8)),
}
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", list(NETS))
def test_eval_and_back(name: str) -> None:
    """In eval mode the program computes what the model does; back in train mode it is what it was."""
    torch.manual_seed(2)
    build, shape = NETS[name]
    x = torch.randn(shape)
    model = build()
    with torch.no_grad():
        for k, v in model.named_buffers():
            if v.is_floating_point():
                v.uniform_(0.5, 2.0)
            assert "running" in k or "num_batches" in k
    program = export(model.train(), x)
    before = Snapshot.record(program)
    result = SetMode(training=False)(program)
    before.check(program)
    assert result.count > 0
    assert_valid(result.program)
    expected = model.eval()(x)
    for runs in (result.program, saved_and_loaded(result.program)):
        held = {k: v.detach().clone() for k, v in runs.state_dict.items()}
        module = runs.module()
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
        assert all(torch.equal(held[k], v) for k, v in runs.state_dict.items())
        again = SetMode(training=False)(runs)
        assert again.count == 0
        back = SetMode(training=True)(runs)
        assert back.count == result.count
        assert_valid(back.program)
        if runs is result.program:
            before.check(back.program)
        torch.manual_seed(3)
        trained = model.train()(x)
        model.load_state_dict(held)
        torch.manual_seed(3)
        torch.testing.assert_close(back.program.module()(x), trained)
        assert not torch.allclose(trained, expected, rtol=1e-3, atol=1e-3)
        model.load_state_dict(held)
        for k, v in runs.state_dict.items():
            v.data.copy_(held[k])


def test_a_program_without_modes() -> None:
    program = export(nn.Sequential(nn.Linear(7, 5), nn.Tanh()), torch.randn(3, 7))
    for training in (False, True):
        result = SetMode(training=training)(program)
        assert result.count == 0
        Snapshot.record(program).check(result.program)


def test_attention_captured_without_dropout_gets_none() -> None:
    """What was not there cannot come back: the rate is known only to a program captured in train mode."""
    x = torch.randn(2, 3, 5, 7)
    program = export(Attends().eval(), x)
    result = SetMode(training=True)(program)
    assert result.count == 0
    module = result.program.module()
    assert torch.equal(module(x), module(x))


@pytest.mark.long
def test_hidden_dropout_is_off_for_inference_and_on_for_training() -> None:
    torch.manual_seed(2)
    model, x = Hidden(), torch.randn(3, 7)
    config = LoraConfig(r=2, target_modules=["lin"])
    program = adaptc.compile(model, config, example_inputs=x, training=True)
    expected = model.eval()(x)
    torch.testing.assert_close(program(x), expected)
    module = program.module()
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), expected)
    module.train()
    assert not torch.equal(module(x), module(x))
    torch.testing.assert_close(program(x), expected)
    torch.testing.assert_close(adaptc.merge(program)(x), expected)
    torch.testing.assert_close(adaptc.unload(program)(x), expected)
