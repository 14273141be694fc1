"""Padded positions that attend to nothing: no runtime makes NaN of them, which would reach the other positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import adaptc
from adaptc.passes.lower.masked_rows import KeepMaskedRowsFinite
from tests.exporters.runtimes import RUNTIMES, run


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        return F.scaled_dot_product_attention(first, k, v, mask) + F.scaled_dot_product_attention(q, k, v)


def tensors(rows: int, length: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(rows, 2, length, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(rows, 1, length, length, generator=draw) < 0.3
    mask[0, 0, length - 2 :] = False
    return q, k, v, mask


def test_the_pass_changes_no_value() -> None:
    rows, length = Dim("rows"), Dim("length")
    shapes = [{0: rows, 2: length}] * 3 + [{0: rows, 2: length, 3: length}]
    program = torch.export.export(Attention(), tensors(3, 7), dynamic_shapes=tuple(shapes))
    result = KeepMaskedRowsFinite()(program)
    assert result.count == 2
    ops = [str(n.target) for n in result.program.graph.nodes]
    assert ops.count("aten.any.dim") == 1
    assert ops.count("aten.where.ScalarOther") == 2
    for size in ((3, 7), (2, 11)):
        given = tensors(*size)
        torch.testing.assert_close(result.program.module()(*given), program.module()(*given))


def test_programs_without_a_boolean_mask_stay() -> None:
    q, k, v, _ = tensors(3, 7)
    for mask in (None, torch.randn(7, 7, dtype=torch.float64)):
        module: Any = nn.Module()
        module.forward = lambda q, mask=mask: F.scaled_dot_product_attention(q, k, v, mask)
        program = torch.export.export(module, (q,))
        assert KeepMaskedRowsFinite()(program).program is program


@pytest.mark.long
@pytest.mark.parametrize("name", ["onnx", *RUNTIMES])
def test_a_window_behind_the_padding(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 97, "num_key_value_heads": 1, "sliding_window": 4}
    config = transformers.MistralConfig(use_cache=False, **sizes)
    torch.manual_seed(0)
    program = adaptc.compile(
        transformers.MistralForCausalLM(config).eval(),
        adaptc.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False),
    )
    ids, mask = torch.randint(1, 97, (2, 17)), torch.ones(2, 17, dtype=torch.int64)
    mask[0, 10:] = 0  # the last positions see nothing but padding
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "onnx":
        model: Any = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(program, tmp_path / "model.onnx"))
    else:
        model = RUNTIMES[name].open_model(RUNTIMES[name].exported(program, tmp_path))
    found = run(model, given, output="logits")
    wanted = adaptc.unload(program)(**given).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
