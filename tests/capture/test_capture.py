"""What capture takes, what it keeps free, what it says when it cannot, and that it leaves the model as it was."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

from adaptc.capture.capture import capture
from adaptc.errors import AdaptcWarning, CaptureError
from tests.support.families import FAMILIES


class Plain(nn.Module):
    """Takes inputs in every way a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 7)
        self.act = nn.Sequential(nn.Dropout(0.5), nn.ReLU())
        self.scale = nn.Parameter(torch.randn(7))

    def forward(self, x, *more, pair=None, **extra):
        y = self.act(self.up(x)) * self.scale
        for z in (*more, *(pair or ()), *extra.values()):
            y = y + z[:, None].expand(y.shape) if z.ndim == 1 else y + z
        return {"y": y}


def check(run, model, *args, **kwargs) -> None:
    model.eval()
    torch.testing.assert_close(run(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("how", ["tensor", "tuple", "dict", "all"])
def test_batch_is_free_however_inputs_are_given(how: str, rows: int) -> None:
    model = Plain()

    def inputs(n: int) -> tuple[tuple, dict]:
        x = torch.randn(n, 3)
        if how == "tensor":
            return (x,), {}
        if how == "tuple":
            return (x, torch.randn(n), torch.randn(n, 7)), {}
        if how == "dict":
            return (), {"x": x, "pair": [torch.randn(n), torch.randn(n, 7)]}
        return (), {"x": x, "late": torch.randn(n), "later": torch.randn(n, 7)}

    args, kwargs = inputs(rows)
    captured = capture(model, args[0] if how == "tensor" else (kwargs or args))
    assert model.training
    assert "forward" not in vars(model)
    assert captured.module_types["up"] == "torch.nn.modules.linear.Linear"
    assert captured.module_types[""].endswith("test_capture.Plain")
    assert (captured.model_type, captured.output_embedding, captured.fills) == (None, None, {})
    for n in (1, 2, 3, 11):
        args, kwargs = inputs(n)
        check(captured.program.module(), model, *args, **kwargs)


class Branch(nn.Module):
    """Does something else for one row: torch would trace that away."""

    def forward(self, x):
        return x * 2 if x.shape[0] == 1 else x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(5, 3) + torch.ones(5, 3)


@pytest.mark.parametrize(("model", "rows"), [(Branch(), 1), (FixedBatch(), 5)])
def test_fixed_dimension_is_told(model: nn.Module, rows: int) -> None:
    x = torch.randn(rows, 3)
    with pytest.warns(AdaptcWarning, match=rf"dimension 0 \(batch\) of input 'x' is fixed at {rows}"):
        captured = capture(model, x)
    check(captured.program.module(), model, x)
    with pytest.raises(AssertionError, match="Guard failed"):
        captured.program.module()(torch.randn(rows + 1, 3))


def test_bounds_that_torch_suggests_are_taken() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(13, 3))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    model = Bounded()
    captured = capture(model, torch.randn(4, 3))
    for n in (1, 2, 13):
        check(captured.program.module(), model, torch.randn(n, 3))


def test_dynamic_shapes_go_to_torch_as_they_are() -> None:
    model, x = Plain(), torch.randn(4, 3)
    fixed = capture(model, x, dynamic_shapes=None).program
    with pytest.raises(AssertionError, match="Guard failed"):
        fixed.module()(torch.randn(5, 3))
    bounded = capture(model, (x,), dynamic_shapes=({0: Dim("rows", min=2, max=9)}, None)[:1]).program
    assert [(r.lower, r.upper) for r in bounded.range_constraints.values()] == [(2, 9)]
    with pytest.raises(CaptureError, match="dynamic_shapes"):
        capture(FixedBatch(), torch.randn(5, 3), dynamic_shapes=({0: Dim("rows")},))


def test_failure_is_one_line_and_leaves_no_trace(capsys) -> None:
    class ValueBranch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.frozen = nn.Linear(3, 5), nn.BatchNorm1d(5).eval()

        def forward(self, x, **extra):
            y = self.frozen(self.lin(x))
            return y * 2 if y.sum() > 0 else y

    model = ValueBranch()
    before = {n: m.training for n, m in model.named_modules()}
    for training in (False, True):
        with pytest.raises(CaptureError, match=r"torch\.where") as caught:
            capture(model, {"x": torch.randn(2, 3), "odd": torch.randn(2)}, training=training)
        message = str(caught.value)
        assert "\n" not in message
        assert "if y.sum() > 0 else y" in message
        assert type(caught.value.__cause__).__name__ == "GuardOnDataDependentSymNode"
        assert {n: m.training for n, m in model.named_modules()} == before
        assert "forward" not in vars(model)
        assert all(p.requires_grad and type(p) is nn.Parameter for p in model.parameters())
    assert "torch.ops.aten" not in capsys.readouterr().err


def test_wrong_inputs_are_refused() -> None:
    model = Plain()
    with pytest.raises(CaptureError, match="not a transformers model"):
        capture(model)
    with pytest.raises(CaptureError, match=r"do not fit Plain.forward\(x, more, pair, extra\): missing.*'x'"):
        capture(model, {"pair": (torch.randn(2),)})
    with pytest.raises(CaptureError, match="is a list"):
        capture(model, [torch.randn(2, 3)])  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="cannot capture a str"):
        capture("model", torch.randn(2, 3))
    audio = FAMILIES["bert"].build()
    audio.main_input_name = "input_values"
    with pytest.raises(CaptureError, match=r"'input_values'.*example_inputs"):
        capture(audio)


@pytest.mark.long
def test_failing_transformers_model_gets_its_config_back() -> None:
    model = FAMILIES["llama"].build()
    assert model.config.use_cache
    with pytest.raises(CaptureError, match="use_cache"):
        capture(model, {**FAMILIES["llama"].inputs(2, 5), "use_cache": True}, training=True)
    assert model.config.use_cache
    assert not any(m.training for m in model.modules())


def test_exported_program_is_taken_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
            self.table = nn.ParameterDict({"w": nn.Parameter(torch.randn(3))})

        def forward(self, x):
            return self.inner(self.inner(x)) * self.table["w"]

    for training in (True, False):
        program = torch.export.export(Twice().train(training), (torch.randn(2, 3),))
        captured = capture(program, training=not training)
        assert captured.program is program
        assert captured.training is training
        assert captured.module_types == {
            "": captured.module_types[""],
            "inner": "torch.nn.modules.container.Sequential",
            "inner.0": "torch.nn.modules.linear.Linear",
            "inner.1": "torch.nn.modules.dropout.Dropout",
            "table": "torch.nn.modules.module.Module",
        }
        with pytest.raises(CaptureError, match="already has its inputs"):
            capture(program, torch.randn(2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_program_without_a_mode_is_in_the_mode_asked_for(training: bool) -> None:
    program = torch.export.export(nn.Linear(3, 5), (torch.randn(2, 3),))
    assert capture(program, training=training).training is training


@pytest.mark.long
def test_what_transformers_exports_is_taken() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports every model it has a patch for
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    family = FAMILIES["llama"]
    model = family.build()
    exporter, inputs = DynamoExporter(), {**family.inputs(2, 5), "use_cache": False}
    exported = exporter.export(model, dict(inputs), config=DynamoConfig())
    captured = capture(exported)
    program = getattr(exported, "program", exported)
    assert captured.program is program
    assert captured.fills == {"attention_mask": ("ones_like", "input_ids")}
    whole = capture(model).module_types
    called = {n: t for n, t in captured.module_types.items() if t != "torch.nn.modules.module.Module"}
    assert called.items() <= whole.items()
    assert set(captured.module_types) - set(called) == {"model.layers"}  # a list is never called
    assert {n for n, t in whole.items() if t.endswith("Linear")} <= set(called)

    with pytest.raises(CaptureError, match=r"'prefill', 'decode'.*one of them"):
        capture({"prefill": program, "decode": program})
    with pytest.raises(CaptureError, match="holds a str"):
        capture({"model": "model.onnx"})


@pytest.mark.long
def test_extra_keywords_of_a_transformers_model() -> None:
    family = FAMILIES["gpt2"]
    model = family.build()
    captured = capture(model, {**family.inputs(1, 5), "output_hidden_states": True})
    for batch, seq in [(1, 4), (3, 9)]:
        inputs = {**family.inputs(batch, seq), "output_hidden_states": True}
        with torch.no_grad():
            found, expected = captured.program.module()(**inputs), model(**inputs)
        assert type(found) is type(expected)
        assert len(found.hidden_states) == len(expected.hidden_states) == 3
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_labels_of_unknown_shape_are_told_and_checkpointing_too() -> None:
    from transformers import BertForPreTraining

    model = BertForPreTraining(FAMILIES["bert"].build().config)
    with pytest.warns(AdaptcWarning, match="BertForPreTraining takes labels of a shape"):
        captured = capture(model, training=True)
    assert captured.training
    assert "labels" not in captured.fills
    model.bert.encoder.gradient_checkpointing = True
    with pytest.warns(AdaptcWarning, match="gradient checkpointing"):
        capture(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)}, training=True)


def test_gradients_stop_where_the_model_stops_them_whatever_the_caller_s_mode() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(y)

    model = Stopped()
    with torch.no_grad():
        captured = capture(model, torch.randn(2, 3))
    captured.program.module()(torch.randn(4, 3)).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None


def test_compiled_module_keeps_its_own_names() -> None:
    model = Plain()
    captured = capture(torch.compile(model, backend="eager"), torch.randn(2, 3))
    assert set(captured.program.state_dict) == {"up.weight", "up.bias", "scale"}
    assert captured.program.state_dict["scale"] is model.scale


@pytest.mark.long
def test_transformers_is_not_imported_for_other_models() -> None:
    code = (
        "import sys, torch; from adaptc.capture.capture import capture;"
        "capture(torch.nn.Linear(3, 5), torch.randn(2, 3));"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
