"""Models whose tensors were made in inference mode, as by a script within ``torch.inference_mode()``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.support.data_nets import IDS, data_net
from tests.support.method_checks import save_random_adapter
from tests.support.method_table import ENTRIES
from tests.support.subject import assert_close, subject

CASES = [pytest.param(e.name, layer, id=f"{e.name}-{layer}") for e in ENTRIES for layer in e.layers()]


@pytest.mark.few(10)
@pytest.mark.parametrize(("method", "layer"), CASES)
def test_they_are_adapted_swapped_and_merged(method: str, layer: str, tmp_path: Path) -> None:
    s = subject(method, layer)
    other = save_random_adapter(s, s.config(), tmp_path, seed=9)
    expected = adaptc.compile(s.base, s.directory, example_inputs=s.args(3))
    with torch.inference_mode():
        model, args = copy.deepcopy(s.base), s.args(3)
        outputs = [expected(*args), expected.bind(other)(*args), s.base(*args)]
    assert all(t.is_inference() for t in model.parameters())
    program = adaptc.compile(model, s.directory, example_inputs=args)
    assert_close(program(*args), outputs[0], 1e-12)
    adaptc.swap(program, other)
    assert_close(program(*args), outputs[1], 1e-12)
    if s.entry.has_weight_form:
        assert_close(adaptc.merge(program)(*args), outputs[1], 1e-9)
    assert_close(adaptc.unload(program)(*args), outputs[2], 1e-12)
    with pytest.raises(adaptc.CaptureError, match=r"its tensors were made in torch\.inference_mode"):
        adaptc.compile(model, s.directory, example_inputs=s.args(3), training=True)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.25}], ids=["lora", "dora", "dropout"])
def test_layers_that_read_each_other_are_adapted(options: Any) -> None:
    """The graph between them has values of inference mode, too."""
    config = adaptc.LoraConfig(r=2, target_modules=["left", "right", "down"], init_lora_weights=False, **options)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = adaptc.compile(data_net(), config, example_inputs={"ids": IDS}, generator=draws[0])
    with torch.inference_mode():
        model = data_net()
    program = adaptc.compile(model, config, example_inputs={"ids": IDS}, generator=draws[1])
    with torch.inference_mode():
        assert_close(program(ids=IDS), expected(ids=IDS), 1e-6)
