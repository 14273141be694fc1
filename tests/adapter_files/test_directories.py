"""PEFT adapter directories as files: what PEFT saves is read, what is written PEFT loads, bit for bit."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptc.adapter_files.directory import bare_key, file_key, read_adapter, read_config, write_adapter
from adaptc.adapter_files.load import load
from adaptc.errors import AdaptcWarning, CheckpointError, ConfigError
from tests.support.adapter_files import BIN, CONFIG, LORA, SAFE, some_tensors, tensors_are_equal, tree
from tests.support.cover import examples


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.l1 = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y = torch.relu(self.l1(self.emb(ids)))
        return self.head(self.conv(y.transpose(1, 2)).transpose(1, 2))


def make_net() -> Net:
    torch.manual_seed(7)
    return Net().eval()


def randomise(model: nn.Module) -> None:
    torch.manual_seed(13)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))


CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["emb", "l1", "conv"], modules_to_save=["head"]),
    "dora": peft.LoraConfig(r=3, target_modules=["l1", "conv"], use_dora=True),
    "vera": peft.VeraConfig(r=5, target_modules=["l1", "head"], projection_prng_key=3),
    "vblora": peft.VBLoRAConfig(r=3, target_modules=["l1"], num_vectors=7, vector_length=4),
    "tinylora": peft.TinyLoraConfig(target_modules=["l1", "head"]),
    "randlora": peft.RandLoraConfig(r=2, target_modules=["l1", "head"], projection_prng_key=3),
    "loha": peft.LoHaConfig(r=3, target_modules=["l1", "conv"]),
    "ia3": peft.IA3Config(target_modules=["l1", "head"], feedforward_modules=["head"]),
}


def peft_model(name: str) -> peft.PeftModel:
    config = peft.PeftConfig.from_peft_type(**CONFIGS[name].to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own advice on its defaults
        model = peft.get_peft_model(make_net(), config)
    randomise(model)
    return model.eval()


def state(model: peft.PeftModel, name: str = "default") -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model_state_dict(model, adapter_name=name)


def peft_save(model: peft.PeftModel, path: Path, **kw: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(path), **kw)


# --- PEFT in both directions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_peft_saves(name: str, safe: bool, tmp_path: Path) -> None:
    model = peft_model(name)
    peft_save(model, tmp_path, safe_serialization=safe)
    got = read_adapter(tmp_path)
    kind = got.config["peft_type"]
    assert tensors_are_equal({file_key(k, kind): t for k, t in got.tensors.items()}, state(model))
    assert not any(k.startswith("base_model.") for k in got.tensors)
    assert got.config == json.loads((tmp_path / CONFIG).read_text())
    assert got.path == tmp_path
    assert (tmp_path / (SAFE if safe else BIN)).is_file()
    assert got.nbytes == sum(t.nbytes for t in state(model).values())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_is_written(name: str, safe: bool, tmp_path: Path) -> None:
    model = peft_model(name)
    config = model.peft_config["default"].to_dict() | {"runtime_config": {"ephemeral_gpu_offload": True}}
    kind = config["peft_type"].value
    bare = {bare_key(k, kind): t for k, t in state(model).items()}
    assert write_adapter(tmp_path / "out", config, bare, safe_serialization=safe) == tmp_path / "out"
    peft_save(model, tmp_path / "ref", safe_serialization=safe)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(make_net(), str(tmp_path / "out"))
    complaints = [str(w.message) for w in said if re.search("missing|unexpected|ignored", str(w.message), re.I)]
    assert complaints == []
    assert tensors_are_equal(state(loaded), state(model))
    ids = torch.randint(0, 11, (2, 7))
    model.requires_grad_(False)  # torch picks another convolution kernel for weights that want a gradient
    assert torch.equal(loaded(ids), model(ids))
    assert not torch.equal(loaded(ids), make_net()(ids))
    ours, theirs = (json.loads((tmp_path / d / CONFIG).read_text()) for d in ("out", "ref"))
    assert theirs.pop("auto_mapping") is not None  # PEFT asks the model's class for it; there is no model here
    ours.pop("auto_mapping")
    sets_as_lists = {k: sorted(v) if k == "target_modules" else v for k, v in theirs.items()}
    assert {k: sorted(v) if k == "target_modules" else v for k, v in ours.items()} == sets_as_lists
    assert list(ours) == sorted(ours)


def test_several_adapters_have_pefts_layout(tmp_path: Path) -> None:
    model = peft_model("lora")
    model.add_adapter("fr", peft.LoraConfig(r=2, target_modules=["l1"]))
    peft_save(model, tmp_path / "ref")
    default, fr = read_adapter(tmp_path / "ref"), read_adapter(tmp_path / "ref", adapter_name="fr")
    assert tensors_are_equal({file_key(k, "LORA"): t for k, t in fr.tensors.items()}, state(model, "fr"))
    assert fr.path == tmp_path / "ref" / "fr"
    assert read_config(tmp_path / "ref", adapter_name="fr")["r"] == 2
    assert tensors_are_equal(read_adapter(tmp_path / "ref" / "fr", adapter_name="fr").tensors, fr.tensors)
    assert tensors_are_equal(read_adapter(tmp_path, subfolder="ref/fr").tensors, fr.tensors)
    write_adapter(tmp_path / "out", default.config, default.tensors)
    assert write_adapter(tmp_path / "out", fr.config, fr.tensors, adapter_name="fr") == tmp_path / "out" / "fr"
    assert sorted(tree(tmp_path / "out")) == sorted(tree(tmp_path / "ref"))
    back = peft.PeftModel.from_pretrained(make_net(), str(tmp_path / "out"))
    back.load_adapter(str(tmp_path / "out" / "fr"), adapter_name="fr")
    assert tensors_are_equal(state(back, "fr"), state(model, "fr"))


def test_which_adapter_is_meant(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, some_tensors(1), adapter_name="de")
    assert tensors_are_equal(read_adapter(tmp_path).tensors, some_tensors(1))  # the only one there is
    write_adapter(tmp_path, LORA, some_tensors(2), adapter_name="fr")
    with pytest.raises(CheckpointError, match=r"\['de', 'fr'\].*adapter_name"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"\['de', 'fr'\]"):
        read_adapter(tmp_path, adapter_name="default")
    with pytest.raises(CheckpointError, match=r"no adapter 'es'.*'de', 'fr'"):
        read_adapter(tmp_path, adapter_name="es")
    assert tensors_are_equal(read_adapter(tmp_path, adapter_name="fr").tensors, some_tensors(2))
    for name in ("../de", "a/b", "", ".", "..", ".hid", "x\\y", "x\0"):
        with pytest.raises(CheckpointError, match="plain name"):
            read_adapter(tmp_path, adapter_name=name)
        with pytest.raises(CheckpointError, match="plain name"):
            write_adapter(tmp_path, LORA, some_tensors(), adapter_name=name)
    with pytest.raises(CheckpointError, match="plain name"):
        read_adapter(tmp_path / "de", subfolder="../fr")


# --- keys -------------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(200), deadline=None)
@given(
    st.sampled_from(["LORA", "VERA", "FROD", "PROMPT_TUNING"]),
    st.lists(
        st.sampled_from(["base_model", "model", "vera_A", "frod_V", "q", "0", "prompt_embeddings", "weight"]),
        min_size=1,
        max_size=5,
    ),
)
def test_prefix_comes_back_exactly(kind: str, parts: list[str]) -> None:
    key = ".".join(parts)
    stored = file_key(key, kind)
    assert bare_key(stored, kind) == key
    assert stored.startswith("base_model.") or (kind == "PROMPT_TUNING" and parts[0] == "prompt_embeddings")


def test_model_level_keys_are_pefts() -> None:
    found = {}
    for name in CONFIGS:
        model = peft_model(name)
        kind = model.peft_config["default"].peft_type.value
        top = {k.split(".")[1] for k in state(model) if not k.startswith("base_model.model.")}
        if top:
            found[kind] = top
    from adaptc.adapter_files.format import MODEL_LEVEL_KEYS

    assert found == {k: set(MODEL_LEVEL_KEYS[k]) for k in ("VERA", "VBLORA", "TINYLORA", "RANDLORA")}


def test_prompt_adapters_have_no_prefix(tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}
    tensors = {"prompt_embeddings": torch.randn(5, 7), "score.weight": torch.randn(3, 7)}
    write_adapter(tmp_path, config, tensors)
    assert sorted(load_file(tmp_path / SAFE)) == ["base_model.score.weight", "prompt_embeddings"]
    assert tensors_are_equal(read_adapter(tmp_path).tensors, tensors)


def test_unprefixed_files(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, some_tensors())
    save_file(some_tensors(5), tmp_path / SAFE)
    assert tensors_are_equal(read_adapter(tmp_path).tensors, some_tensors(5))
    save_file(some_tensors(5) | {"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / SAFE)
    with pytest.raises(CheckpointError, match=r"2 of 3 keys.*l1\.lora_A\.weight"):
        read_adapter(tmp_path)
    save_file({"base_model.vera_A": torch.ones(2, 3)}, tmp_path / SAFE)
    with pytest.raises(CheckpointError, match=r"LORA file.*nothing else"):
        read_adapter(tmp_path)


def test_key_mapping_is_pefts(tmp_path: Path) -> None:
    model = peft_model("vera")
    peft_save(model, tmp_path)
    mapping = {r"^l(\d)": r"layers.\1", "l1": "never", "vera_lambda": "lam", "vera_A$": "shared_A"}
    ref = peft.utils.save_and_load.load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping)
    got = load(tmp_path, key_mapping=mapping).tensors
    assert tensors_are_equal(got, {re.sub(r"^base_model\.(model\.)?", "", k): t for k, t in ref.items()})
    assert {"layers.1.vera_lambda_b", "head.lam_b", "shared_A", "vera_B"} <= set(got)


def test_key_mapping_errors(tmp_path: Path) -> None:
    write_adapter(tmp_path, LORA, some_tensors())
    with pytest.raises(CheckpointError, match=r"lora_A\.weight' and '.*lora_B\.weight' both become 'l1\.w'"):
        load(tmp_path, key_mapping={r"lora_[AB]\.weight": "w"})
    with pytest.raises(ConfigError, match="key_mapping"):
        load(tmp_path, key_mapping={"(": "x"})
    with pytest.raises(ConfigError, match="key_mapping"):
        load(tmp_path, key_mapping={"l1": r"\3"})
    with pytest.raises(ConfigError, match="device"):
        read_adapter(tmp_path, device="nowhere")


# --- config fields and values -----------------------------------------------------------------------------------------


def test_runtime_config_is_dropped(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(LORA | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(AdaptcWarning, match="runtime_config"):
        assert read_config(tmp_path) == LORA
