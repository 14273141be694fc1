"""A model of many equal layers is captured as a stamped copy of a shallow one, without memory for its weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import adaptc
from adaptc import LoraConfig
from adaptc.capture import dynamic_shapes


def llama_7b(layers: int) -> Any:
    """The shape of Llama 7B in bfloat16 on the meta device, with so many layers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def layers_of(program: ExportedProgram) -> dict[int, list[tuple[str, str, str]]]:
    """Number of a layer -> its nodes: what they call, the shape of what they give, and the module that calls them."""
    found: dict[int, list[tuple[str, str, str]]] = {}
    for node in program.graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        inside = [m for path in stack if (m := re.search(r"layers\.(\d+)(.*)", path))]
        if node.op == "call_function" and inside:
            shape = str(getattr(node.meta["val"], "shape", None))
            found.setdefault(int(inside[-1][1]), []).append((str(node.target), shape, inside[-1][2]))
    return found


@pytest.mark.long
def test_thirty_two_layers_are_copies_of_those_of_a_shallow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = dynamic_shapes.copy_equal_layers

    @contextlib.contextmanager
    def counting(model: Any) -> Iterator[Any]:
        with real(model) as once:
            yield once
        copied[-1] += once.copy_count

    monkeypatch.setattr(dynamic_shapes, "copy_equal_layers", counting)
    config = LoraConfig(r=3, target_modules="all-linear")
    found: list[dict[int, list[tuple[str, str, str]]]] = []
    for count in (4, 32):
        copied.append(0)
        program = adaptc.compile(llama_7b(count), config)
        assert len(program.adaptation.attachments) == 7 * count
        found.append(layers_of(program))
        assert sorted(found[-1]) == list(range(count))
    shallow, deep = found
    # The deep model costs as many traced layers as the shallow one.
    assert 4 - copied[0] == 32 - copied[1] < 4
    assert all(nodes == shallow[1] for nodes in deep.values())
    assert len(shallow[1]) > 40
