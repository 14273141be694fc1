"""QLoRA gives the losses and adapters of PEFT on bitsandbytes, step by step, for twenty steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import Tensor

import adaptc
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor

STEPS = 20
FLOAT, HALF = torch.float32, torch.bfloat16
#: losses and adapters as PEFT has them, by the dtype that is computed in. In float32 the two differ by the order of
#: sums alone: some 2**-22 in a loss, which twenty steps of AdamW make a few times larger. AdamW divides a gradient by
#: its size. So an element whose gradient is close to zero may move differently by a whole step, which the norm shows.
#: In bfloat16 each value between two layers is rounded by 2**-9. A loss is a mean over forty tokens, and the adapters
#: of twenty steps carry the roundings of all steps before.
TOLERANCES = {FLOAT: (2e-6, 1e-3), HALF: (2**-6, 0.2)}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Keep bitsandbytes from compiling what it computes odd sizes by, once for each size."""
    with torch.compiler.set_stance("force_eager"):
        yield


SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> Any:
    more: dict[str, Any] = {"intermediate_size": 192, "num_key_value_heads": 1, "head_dim": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more, initializer_range=0.1))


def opt() -> Any:
    more: dict[str, Any] = {"ffn_dim": 192, "word_embed_proj_dim": 64, "max_position_embeddings": 40, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **more, init_std=0.1))


FAMILIES: dict[str, Callable[[], Any]] = {"llama": llama, "opt": opt}


def bits_config(kind: str, dtype: torch.dtype) -> Any:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant="double" in kind,
    )


def load(path: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return the model as transformers quantises it with bitsandbytes on loading."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=bits_config(kind, dtype), device_map="cpu", dtype=dtype
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel computes in bfloat16
    return peft.prepare_model_for_kbit_training(model, False) if "prepared" in kind else model


def batch(step: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (5, 9), generator=torch.Generator().manual_seed(step % 5))
    labels = ids.clone()
    labels[:2, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


Run = tuple[Tensor, dict[str, Tensor]]


def run(model: Any) -> Run:
    """Return the losses of the steps, and the change of each adapter tensor by its layer and slot."""
    model.train()
    trained = {n.split("layers.")[1].replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return torch.tensor(losses), {n: p.detach() - start[n] for n, p in trained.items()}


def with_peft(model: Any, path: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, str(path), is_trainable=True)


def new_adapter(model: Any, path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(path)


def distances(found: Run, expected: Run) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and the relative difference of the adapters' changes."""
    assert found[1].keys() == expected[1].keys()
    ours, theirs = (torch.cat([c[n].flatten() for n in sorted(c)]) for c in (found[1], expected[1]))
    losses = ((found[0] - expected[0]).abs() / expected[0]).max()
    return float(losses), float((ours - theirs).norm() / theirs.norm())


def check_close(found: Run, expected: Run, dtype: torch.dtype) -> None:
    measured = distances(found, expected)
    assert all(m <= t for m, t in zip(measured, TOLERANCES[dtype], strict=True)), (measured, TOLERANCES[dtype])


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "nf4, double, prepared", "int8"])
def test_twenty_steps_are_pefts_on_bitsandbytes(kind: str, family: str, tmp_path: Path) -> None:
    """In bfloat16, where roundings add up, they are also as close to those of float32 as PEFT's."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    new_adapter(load(tmp_path / "model", kind, FLOAT), tmp_path / "adapter")
    runs: dict[torch.dtype, tuple[Run, Run]] = {}
    for dtype in (FLOAT, HALF):
        build = partial(load, tmp_path / "model", kind, dtype)
        program = adaptc.compile(build(), tmp_path / "adapter", training=True)
        count = sum(isinstance(t, QuantizedTensor) for t in program.state_dict.values())
        assert count == 2 * (7 if family == "llama" else 6)
        runs[dtype] = run(program.module()), run(with_peft(build(), tmp_path / "adapter"))
        check_close(*runs[dtype], dtype)
    exact = runs[FLOAT][1]
    ours, theirs = (distances(found, exact) for found in runs[HALF])
    assert all(o <= 2 * t + 2**-9 for o, t in zip(ours, theirs, strict=True)), (ours, theirs)


def plain_twin(model: Any) -> Any:
    """Return a copy of a model whose quantised weights are plain tensors of the same values."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, t in list(module._parameters.items()):
            if isinstance(t, QuantizedTensor):
                setattr(module, name, torch.nn.Parameter(t.dequantize(), requires_grad=False))
    return twin


@pytest.mark.long
@pytest.mark.few(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("scheme", "dtype"), [("nf4", FLOAT), ("nf4", HALF), ("int4", FLOAT), ("int8", FLOAT)])
def test_twenty_steps_on_weights_of_our_own_are_pefts_on_their_values(
    scheme: str, dtype: torch.dtype, family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = adaptc.quantize(FAMILIES[family]().to(dtype), scheme)
    new_adapter(plain_twin(model), tmp_path)
    found = run(adaptc.compile(model, tmp_path, training=True).module())
    check_close(found, run(with_peft(plain_twin(model), tmp_path)), dtype)
