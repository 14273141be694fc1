"""Rows of one batch on adapters of their own, in models of every family: each row is what its adapter makes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.support.banks import check_rows, outputs_by_adapter, save_random_adapters
from tests.support.families import FAMILIES
from tests.support.oracle import run, shared_base_program, with_head

#: family -> layers to adapt; of modules with a weight per channel
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["input_layernorm"]),
    "gemma2": (["q_proj", "down_proj"], []),
    "gpt2": (["c_attn", "c_proj"], ["ln_1"]),
    "bert": (["query", "value"], ["LayerNorm"]),
    "t5": (["q", "v", "wo"], ["layer_norm"]),
    "vit": (["q_proj", "v_proj"], ["layernorm_before"]),
    "resnet": (["convolution"], ["normalization"]),
}

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (adaptc.LoraConfig, {"r": 3}),
    "lora_and_biases": (adaptc.LoraConfig, {"r": 2, "bias": "all"}),
    "dora": (adaptc.LoraConfig, {"r": 3, "use_dora": True}),
    "ia3": (adaptc.IA3Config, {"feedforward_modules": []}),
    "oft": (adaptc.OFTConfig, {"oft_block_size": 4}),
    "vera": (adaptc.VeraConfig, {"r": 5}),
    "norms": (adaptc.LNTuningConfig, {}),
}

CASES = [(f, m) for f, (_, norms) in TARGETS.items() for m in METHODS if norms or m != "norms"]


def compiled(family: str, method: str) -> adaptc.AdaptedProgram:
    layers, norms = TARGETS[family]
    cls, options = METHODS[method]
    return adaptc.compile(
        shared_base_program(family), cls(target_modules=norms if method == "norms" else layers, **options)
    )


@pytest.mark.long
@pytest.mark.few(3)
@pytest.mark.filterwarnings("ignore:.*oft_block_size=4 does not divide")  # widths of ResNet
@pytest.mark.parametrize(("family", "method"), CASES)
def test_each_row_is_what_its_adapter_makes_alone(family: str, method: str, tmp_path: Path) -> None:
    """Of other batches and lengths than the capture's, padded."""
    program = compiled(family, method)
    a, b = save_random_adapters(program, tmp_path)
    made = {"a": a, "b": b}
    bank = program.bank(made)
    for rows, length in ((["a", None, "b", "a"], 9), ([None, "b"], 4)):

        def call(f: Any, rows: Any = rows, length: int = length) -> Any:
            return run(f, FAMILIES[family], len(rows), length)

        check_rows(
            call(lambda rows=rows, **inputs: bank(**inputs, adapters=rows)),
            outputs_by_adapter(program, made, call),
            rows,
        )


@pytest.mark.long
def test_a_norm_whose_weight_is_computed_is_refused() -> None:
    """Gemma adds one to it, so that what reads the parameter has no rows."""
    program = adaptc.compile(shared_base_program("gemma2"), adaptc.LNTuningConfig(target_modules=["input_layernorm"]))
    with pytest.raises(adaptc.TargetError, match=r"input_layernorm\.weight.*has no axis for the .* rows"):
        program.bank()


@pytest.mark.long
def test_heads_trained_as_a_whole(tmp_path: Path) -> None:
    import transformers

    model = with_head(transformers.BertForSequenceClassification, "bert", num_labels=3)
    config = adaptc.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    program = adaptc.compile(model, config)
    a, b = save_random_adapters(program, tmp_path)
    bank, rows = program.bank({"a": a, "b": b}), [None, "b", "a"]

    def call(f: Any) -> Any:
        return run(f, FAMILIES["bert"], 3, 7)

    single = outputs_by_adapter(program, {"a": a, "b": b}, call)
    check_rows(call(lambda **inputs: bank(**inputs, adapters=rows)), single, rows)


@pytest.mark.long
def test_trainable_tokens(tmp_path: Path) -> None:
    config = adaptc.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 7, 11, 12, 13, 30])
    program = adaptc.compile(shared_base_program("llama"), config)
    a, b = save_random_adapters(program, tmp_path, size=2.0)
    bank, rows = program.bank({"a": a, "b": b}), ["a", "b", None, "b"]
    ids = torch.tensor([[5, 7, 9], [11, 5, 6], [30, 5, 7], [8, 12, 13]])

    def call(f: Any) -> Any:
        with torch.no_grad():
            return f(input_ids=ids)

    single = outputs_by_adapter(program, {"a": a, "b": b}, call)
    check_rows(call(lambda **inputs: bank(**inputs, adapters=rows)), single, rows)


@pytest.mark.long
def test_windows_of_images(tmp_path: Path) -> None:
    """Swin's attention has the windows of all images as its batch."""
    import transformers

    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
    settings = transformers.SwinConfig(window_size=4, num_labels=3, **sizes)
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(settings).eval()
    images = torch.randn(3, 3, 16, 16)
    targets = ["query", "value", "q_proj", "v_proj"]
    named = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    config = adaptc.LoraConfig(r=2, target_modules=[t for t in targets if t in named], init_lora_weights=False)
    free = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    program = adaptc.compile(model, config, example_inputs={"pixel_values": images[:2]}, dynamic_shapes=free)
    a, b = save_random_adapters(program, tmp_path)
    bank, rows = program.bank({"a": a, "b": b}), ["a", "b", None]

    def call(f: Any) -> Any:
        with torch.no_grad():
            return f(pixel_values=images)

    single = outputs_by_adapter(program, {"a": a, "b": b}, call)
    check_rows(call(lambda **inputs: bank(**inputs, adapters=rows)), single, rows)


@pytest.mark.long
def test_a_batch_norm_in_training_is_refused() -> None:
    config = adaptc.LoraConfig(r=2, target_modules=["convolution"])
    model = FAMILIES["resnet"].build().train()
    program = adaptc.compile(model, config, training=True)
    with pytest.raises(adaptc.TargetError, match="what one row of the batch is changes what others are there"):
        program.bank()
