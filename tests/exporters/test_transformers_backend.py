"""A user's flow with transformers.exporters, in which the name of the backend is what changes; compared with PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adaptc
from adaptc import LoraConfig
from tests.exporters.test_base_branch import branch_nodes
from tests.exporters.test_onnx_models import MODELS
from tests.support.oracle import quiet

SIZES = ((2, 7), (3, 11))


def llama() -> Any:
    torch.manual_seed(3)
    return MODELS["llama"][0]().eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, out = tmp_path_factory.mktemp("adapters"), {}
    for name, rank, targets in (("fr", 3, ["q_proj", "down_proj"]), ("de", 5, ["q_proj"])):
        torch.manual_seed(rank)
        with quiet(".*"):
            config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
            peft.get_peft_model(llama(), config).save_pretrained(str(folder / name))
        out[name] = folder / name
    return out


def expected(adapter: Path | None, inputs: dict[str, Tensor]) -> Tensor:
    model = llama() if adapter is None else peft.PeftModel.from_pretrained(llama(), str(adapter)).eval()
    with torch.no_grad():
        return model(**inputs).logits


def exporter() -> Any:
    from transformers.exporters import AutoHfExporter

    adaptc.exporters.register_transformers_backend()
    return AutoHfExporter.from_config({"export_format": "onnx_adapters"})


@pytest.fixture(scope="module")
def exported(adapters: dict[str, Path]) -> Any:
    with quiet(".*"):
        return exporter().export(llama(), MODELS["llama"][1](2, 5), {"dynamic": True, "adapter": str(adapters["fr"])})


def test_a_users_flow(exported: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    from transformers.exporters import ExportedModel

    exported.to(adapters=adapters)
    exported.save_pretrained(tmp_path / "exported")
    again = ExportedModel.from_pretrained(tmp_path / "exported", adapters=adapters)
    for size in SIZES:
        inputs = MODELS["llama"][1](*size)
        for model in (exported, again):
            torch.testing.assert_close(model(**inputs).logits, expected(None, inputs), rtol=1e-4, atol=1e-5)
            for name, path in adapters.items():
                found = model(**inputs, adapter=name)
                assert type(found).__name__ == "CausalLMOutputWithPast"
                torch.testing.assert_close(found.logits, expected(path, inputs), rtol=1e-4, atol=1e-5)


def test_its_file_is_one_of_adaptc(exported: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    file = tmp_path / "model.onnx"
    assert branch_nodes(file) is not None
    session = adaptc.exporters.onnx_session(file)
    path = adaptc.exporters.save_onnx_adapter(adapters["de"], tmp_path / "de.onnx_adapter", model=file)
    session.load_adapter("de", path)
    inputs = MODELS["llama"][1](3, 5)
    found = session.run({n: t.numpy() for n, t in inputs.items()}, "de")["logits"]
    torch.testing.assert_close(torch.from_numpy(found), expected(adapters["de"], inputs), rtol=1e-4, atol=1e-5)


FRESH = """
import sys, torch, adaptc
from transformers.exporters import ExportedModel
adaptc.exporters.register_transformers_backend()
model = ExportedModel.from_pretrained(sys.argv[1], adapters={"de": sys.argv[2]})
inputs = torch.load(sys.argv[3])
torch.save(model(**inputs, adapter="de").logits, sys.argv[4])
"""


@pytest.mark.long
def test_a_fresh_process(exported: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path / "exported")
    inputs = MODELS["llama"][1](3, 5)
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(p) for p in (tmp_path / "exported", adapters["de"], tmp_path / "inputs.pt", tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(found, expected(adapters["de"], inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_prefill_and_decode(tmp_path: Path) -> None:
    """The parts of a generating model each take the adapter; greedy tokens equal those of PEFT."""
    from transformers.exporters import AutoExportConfig

    def model(adapter: Path | None = None) -> Any:
        made = llama()
        made.config.use_cache = made.generation_config.use_cache = True
        made.config.eos_token_id = made.generation_config.eos_token_id = None
        return made if adapter is None else peft.PeftModel.from_pretrained(made, str(adapter)).eval()

    torch.manual_seed(1)
    with quiet(".*"):
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=30)
        peft.get_peft_model(model(), config).save_pretrained(str(tmp_path))
    prompt = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(7))
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    make = exporter()
    options = {"export_format": "onnx_adapters", "dynamic": True, "adapter": str(tmp_path)}
    with quiet(".*"):
        exported = make.export_for_generation(model(), dict(given), AutoExportConfig.from_dict(options))
    exported.to(adapters={"fr": tmp_path})
    answers: list[Tensor] = []
    for adapter in (None, "fr"):
        with quiet(".*"):
            oracle = model(None if adapter is None else tmp_path)
            wanted = oracle.generate(**given, max_new_tokens=5, do_sample=False)
        text, cache = prompt, None
        for part in ("prefill", *["decode"] * 4):
            ids = text if cache is None else text[:, -1:]
            positions = torch.arange(text.shape[1] - ids.shape[1], text.shape[1]).expand(2, -1)
            out = exported.runners[part](
                input_ids=ids,
                attention_mask=torch.ones_like(text),
                position_ids=positions,
                cache=cache,
                adapter=adapter,
            )
            cache = out.cache
            text = torch.cat([text, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(text, wanted)
        answers.append(text)
    assert not torch.equal(*answers), "the adapter changes nothing"


def test_what_is_refused(adapters: dict[str, Path]) -> None:
    inputs = MODELS["llama"][1](2, 5)
    with pytest.raises(adaptc.ConfigError, match="needs adapter="):
        exporter().export(llama(), inputs, {"dynamic": True})
    with pytest.raises(adaptc.ConfigError, match="takes no quantizer"):
        exporter().export(llama(), inputs, {"dynamic": True, "adapter": LoraConfig(), "quantizer": object()})
