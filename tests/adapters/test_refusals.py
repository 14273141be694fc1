"""Options and adapters that do not go together: an error that names them, and nothing else happened."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import AdaptcError, Adapter, CheckpointError, ConfigError, LoraConfig

A, B = torch.randn(3, 7), torch.randn(5, 3)
KEYS = ("up.lora_A.weight", "up.lora_B.weight")


def lora(a: Tensor = A, b: Tensor = B, source: str = "one", **options: Any) -> Adapter:
    values = {"r": 3, "target_modules": ["up"], **options}
    return Adapter(LoraConfig(**values), dict(zip(KEYS, (a, b), strict=True)), source)


def combine(*others: Adapter, **options: Any) -> Adapter:
    return adaptc.combine([(lora(), 0.5), *((o, 0.5) for o in others)], **options)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "tie"}, r"method='tie' is not one of svd, cat, .*nearest (are|is)"),
    ({"method": 3}, "method must be a string"),
    ({"method": "ties"}, "method='ties' needs density"),
    ({"method": "dare_linear_svd"}, "needs density"),
    ({"method": "ties", "density": 0.0}, "density=0.0 must be above 0"),
    ({"method": "ties", "density": 1.5}, "density=1.5 must be"),
    ({"method": "ties", "density": -1}, "density=-1 must be"),
    ({"method": "ties", "density": float("nan")}, "density must be"),
    ({"method": "cat", "density": 0.5}, "method is 'cat', which keeps all"),
    ({"density": 0.5}, "method is 'svd', which keeps all"),
    ({"method": "cat", "svd_rank": 3}, "svd_rank is for the methods that decompose"),
    ({"method": "linear", "svd_clamp": 0.9}, "svd_clamp is for"),
    ({"method": "linear", "svd_full_matrices": True}, "svd_full_matrices is for"),
    ({"svd_rank": 0}, "svd_rank=0 leaves nothing"),
    ({"svd_clamp": 1.1}, "svd_clamp=1.1 is a quantile"),
    ({"svd_clamp": 0.1}, "svd_clamp=0.1: entries would be cut down to"),
    ({"svd_driver": "magic"}, "svd_driver='magic' is not one of"),
    ({"svd_driver": "gesvd"}, "chooses an algorithm of a GPU"),
    ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method='most'"),
    ({"majority_sign_method": "frequency"}, "majority_sign_method is for ties"),
    ({"generator": torch.Generator()}, "a generator is for the dare methods"),
    ({"example_inputs": A}, "example_inputs go with model="),
]


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS, ids=lambda v: None if isinstance(v, str) else "-".join(v))
def test_options_that_cannot_be_honoured(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        combine(lora(source="two"), **options)


def ia3(rows: int = 5) -> Adapter:
    config = adaptc.IA3Config(target_modules=["up"], feedforward_modules=[])
    return Adapter(config, {"up.ia3_l": torch.randn(rows, 1)}, "three")


def c3a(block: int = 1) -> Adapter:
    config = adaptc.C3AConfig(block_size=block, target_modules=["up"])
    return Adapter(config, {"up.c3a_kernel": torch.randn(5, 7, block)}, "four")


def test_adapters_that_do_not_go_together():
    with pytest.raises(
        CheckpointError,
        match=r"'up': one is for a weight of 5 x 7, and two for one of 5 x 8.*expected .*\(3, 7\).*found .*\(3, 8\)",
    ):
        combine(lora(torch.randn(3, 8), source="two"))
    with pytest.raises(ConfigError, match=r"one is a LORA adapter and three one of IA3.*give model="):
        combine(ia3())
    with pytest.raises(
        CheckpointError, match=r"'up.ia3_l' of three: expected shape \(5, 1\) as in three, found shape \(4, 1\)"
    ):
        adaptc.combine([(ia3(), 1.0), (ia3(4), 1.0)])
    with pytest.raises(ConfigError, match=r"'up': four has C3A\(block=1.*C3A\(block=2"):
        adaptc.combine([(c3a(), 1.0), (c3a(2), 1.0)])
    with pytest.raises(ConfigError, match="method='ties' is for LoRA"):
        adaptc.combine([(ia3(), 1.0), (ia3(), 1.0)], method="ties", density=0.5)
    with pytest.raises(
        CheckpointError, match=r"two: 'up': 'lora_A.weight' has shape \(4, 7\); by the config its rank is 3"
    ):
        combine(lora(torch.randn(4, 7), source="two"))
    with pytest.raises(
        CheckpointError, match=r"'lora_A.weight' \(3, 7\) and 'lora_B.weight' \(5, 2\) are not of one rank"
    ):
        combine(lora(b=torch.randn(5, 2), source="two"))
    with pytest.raises(CheckpointError, match=r"two: 'up': there is no 'lora_B.weight'"):
        combine(Adapter(LoraConfig(r=3, target_modules=["up"]), {KEYS[0]: A}, "two"))
    with pytest.raises(ConfigError, match="ensure_weight_tying=True"):
        combine(lora(source="two", ensure_weight_tying=True))
    with pytest.raises(CheckpointError, match="complex adapters are not combined"):
        combine(lora(A + 1j * A, B + 1j * B, source="two"))
    table = Adapter(
        LoraConfig(r=2, target_modules=["t"]),
        {"t.lora_embedding_A": torch.randn(2, 9), "t.lora_embedding_B": torch.randn(4, 2)},
    )
    biased = Adapter(
        LoraConfig(r=3, target_modules=["up"], lora_bias=True), {**lora().tensors, "up.lora_B.bias": B[:, 0]}
    )
    with pytest.raises(ConfigError, match="there is a bias in what the adapters do together"):
        biased + table


def test_names_of_different_models_are_told():
    with pytest.warns(adaptc.AdaptcWarning, match="name different models, 'a', 'b'"):
        combine(lora(source="two", base_model_name_or_path="a"), lora(source="two", base_model_name_or_path="b"))


def test_values_that_are_not_finite():
    with pytest.raises(CheckpointError, match=r"two: 'up.lora_A.weight'.* NaN or infinite"):
        lora(A / 0, source="two")
    big = lora(A * 1e30, B * 1e30)
    with pytest.raises(AdaptcError, match=r"not found|NaN or infinite"):
        adaptc.combine([(big, 1e9), (big, 1.0)], method="svd")
    for weight in (float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match="must be finite"):
            adaptc.combine([(lora(), weight)])
    for weight in ("1", True, None):
        with pytest.raises(ConfigError, match="the weight of one must be a number"):
            adaptc.combine([(lora(), weight)])  # pyright: ignore[reportArgumentType]


def test_a_result_that_would_do_nothing():
    for pairs in ([(lora(), 0.0)], [(lora(), 1.0), (lora(), -1.0)]):
        with pytest.raises(ConfigError, match="the result is zero everywhere"):
            adaptc.combine(pairs, method="linear")
    with pytest.raises(ConfigError, match="density keeps none"):
        combine(lora(), method="magnitude_prune", density=0.01)


@pytest.mark.parametrize("given", [{}, [], 3, None, [lora()], ["a"], [(lora(), 1, 2)]], ids=str)
def test_what_is_no_list_of_adapters(given: Any):
    with pytest.raises(ConfigError, match=r'expected {"directory": 0.5'):
        adaptc.combine(given)


def test_files_that_are_no_adapters(tmp_path: Path):
    with pytest.raises(CheckpointError):
        adaptc.combine({tmp_path / "none": 1.0})
    with pytest.raises(AdaptcError, match="an adapter is a directory"):
        adaptc.combine([(3, 1.0)])
    with pytest.raises(ConfigError, match="a state dict does not say its alpha"):
        adaptc.combine([({KEYS[0]: A, KEYS[1]: B}, 1.0)])
    with pytest.raises(CheckpointError, match="has no tensors"):
        Adapter(LoraConfig(), {})
    with pytest.raises(ConfigError, match="expected a config"):
        Adapter(3, {KEYS[0]: A})  # pyright: ignore[reportArgumentType]
    kohya = tmp_path / "k.safetensors"
    from safetensors.torch import save_file

    save_file({"lora_unet_up.lora_down.weight": A, "lora_unet_up.lora_up.weight": B}, kohya)
    with pytest.raises(CheckpointError, match=r"is not in PEFT's format.*prog.bind"):
        adaptc.load_adapter(kohya)


def test_tokens_are_combined_where_they_are_the_same():
    def tokens(rows: list[int]) -> Adapter:
        key = "table.token_adapter.trainable_tokens_delta"
        config = LoraConfig(r=3, target_modules=["up"], trainable_token_indices={"table": rows})
        return Adapter(config, {**lora().tensors, key: torch.randn(2, 4)}, str(rows))

    adaptc.combine([(tokens([1, 2]), 0.5), (tokens([1, 2]), 0.5)])
    with pytest.raises(ConfigError, match=r"trains the rows .*\[1, 2\].*only adapters with the same"):
        adaptc.combine([(tokens([1, 2]), 0.5), (tokens([1, 3]), 0.5)])
    with pytest.raises(ConfigError, match=r"trains the rows .*, and \[1, 3\] {'table': \[1, 3\]}; only"):
        adaptc.combine([(tokens([1, 2]), 0.5), (tokens([1, 3]), 0.25), (tokens([1, 2]), 0.25)])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_an_adapter_is_copied_and_pickled(how: Any):
    made = adaptc.convert_to_lora(
        lora(), torch.nn.Sequential(OrderedDict(up=torch.nn.Linear(7, 5))), rank=2, example_inputs=torch.randn(2, 7)
    )
    for one in (lora(), made):
        other = how(one)
        assert other.config.to_dict() == one.config.to_dict()
        assert (other.source, repr(other)) == (one.source, repr(one))
        assert all(map(torch.equal, other.tensors.values(), one.tensors.values()))
        for name, tensor in one.tensors.items():
            assert (other.tensors[name].data_ptr() == tensor.data_ptr()) is (how is copy.copy)
    assert str(how(made).report) == str(made.report)


@pytest.mark.parametrize("weight", [np.float16(0.5), np.float32(0.5), np.int64(2), Fraction(1, 2)])
def test_numbers_of_any_kind_are_weights(weight: Any):
    for found, want in (
        (adaptc.combine([(lora(), weight)], method="cat"), adaptc.combine([(lora(), float(weight))], method="cat")),
        (lora() * weight, lora() * float(weight)),
    ):
        assert all(map(torch.equal, found.tensors.values(), want.tensors.values()))


def test_an_adapter_takes_peft_configs_and_says_what_it_is(tmp_path: Path):
    found = Adapter(
        peft.LoraConfig(r=3, target_modules=["up"]),
        {f"base_model.model.{k}": t for k, t in zip(KEYS, (A, B), strict=True)},
    )  # pyright: ignore[reportArgumentType]
    assert list(found.tensors) == list(KEYS)
    assert repr(found) == "<Adapter: LORA, 2 tensors, 36 parameters: an adapter>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.save_adapter(found, tmp_path / "a", base_model="base")
    assert adaptc.load_adapter(tmp_path / "a").config.base_model_name_or_path == "base"
    for options in ({"format": "kohya"}, {"save_embedding_layers": True}, {"component": "unet"}):
        with pytest.raises(ConfigError, match="needs the model"):
            adaptc.save_adapter(found, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
    assert found.to("cpu").tensors.keys() == found.tensors.keys()
