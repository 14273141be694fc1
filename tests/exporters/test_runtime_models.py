"""Models of transformers in OpenVINO and ExecuTorch, in a fresh process without adaptc, fed PEFT's own tensors.

Two adapters of different rank and sites, the base and a merged file give what PEFT gives, at sizes that were not
captured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.export import Dim

import adaptc
from tests.exporters.runtimes import RUNTIMES, run
from tests.exporters.test_onnx_models import MODELS
from tests.support.oracle import quiet

SIZES = ((2, 7), (1, 3), (5, 17))

BLOCKED = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np
from safetensors.numpy import load_file

def adapter(name, inputs):
    '''PEFT's tensors by the names of the inputs, and the scale for each of their layers.'''
    if name == "base":
        return {}
    config = json.load(open(f"{name}/adapter_config.json"))
    tensors = load_file(f"{name}/adapter_model.safetensors")
    found = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    layers = {k.partition(".lora_")[0] for k in found}
    scale = np.array([config["lora_alpha"] / config["r"]], dtype=np.float32)
    return {**found, **{n: scale for n in inputs if n.endswith(".scaling.lora") and n[:-13] in layers}}

def calls():
    for name in ("base", "fr", "de", "merged"):
        for size in ("2_7", "1_3", "5_17"):
            given = dict(np.load(f"{size}.npz"))
            yield name, given, lambda logits, n=f"found_{name}_{size}.npy": np.save(n, logits)
"""

OPENVINO = (
    """
BLOCKED = ("adaptc", "torch")
"""
    + BLOCKED
    + """
import openvino
def opened(name):
    return openvino.compile_model(f"{name}.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
model, merged, base = opened("model"), opened("merged"), load_file("model.base.safetensors")
for name, given, save in calls():
    found = merged(given) if name == "merged" else model({**given, **base, **adapter(name, base)})
    save(found["logits"])
assert not any(m.partition(".")[0] in BLOCKED for m in sys.modules)
"""
)

EXECUTORCH = (
    """
BLOCKED = ("adaptc",)
"""
    + BLOCKED
    + """
import torch
from executorch.runtime import Runtime
model, merged = (Runtime.get().load_program(f"{n}.pte") for n in ("model", "merged"))
about = json.loads(model.load_method("adaptc").execute([])[0])
names = [i["name"] for i in about["description"]["inputs"]]
base = dict(zip(names, model.load_method("adaptc_base").execute([]), strict=True))
own = [i["name"] for i in about["inputs"]]
for name, given, save in calls():
    args = [torch.from_numpy(given[n]) for n in own]
    if name != "merged":
        args += {**base, **{n: torch.from_numpy(t) for n, t in adapter(name, base).items()}}.values()
    found = (merged if name == "merged" else model).load_method("forward").execute(args)
    save(found[about["outputs"].index("logits")].numpy())
assert not any(m.partition(".")[0] in BLOCKED for m in sys.modules)
"""
)

SCRIPTS = {"openvino": OPENVINO, "executorch": EXECUTORCH}
#: sites whose weights would be inputs of a convolution, which OpenVINO does not compute
NO_CONVOLUTIONS = {"vit": ["q_proj", "v_proj"]}
#: ExecuTorch's conversion of T5 takes minutes
CASES = [(n, r) for r in RUNTIMES for n in MODELS if (n, r) != ("t5", "executorch")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "runtime_name"), CASES)
def test_models(name: str, runtime_name: str, tmp_path: Path) -> None:
    make, inputs, targets = MODELS[name]
    runtime = RUNTIMES[runtime_name]
    targets = NO_CONVOLUTIONS.get(name, targets) if runtime_name == "openvino" else targets

    def model() -> Any:
        torch.manual_seed(3)
        return make().eval()

    for adapter, rank, names in (("fr", 3, targets), ("de", 5, targets[:1])):
        torch.manual_seed(rank)
        config = peft.LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
        with quiet(".*"):
            peft.get_peft_model(model(), config).save_pretrained(str(tmp_path / adapter))
    program = adaptc.compile(model(), tmp_path / "fr")
    opened = runtime.open_model(runtime.exported(program, tmp_path))
    runtime.exported(program, tmp_path, "merged", adapters="merged")
    expected: dict[str, Any] = {}
    for size in SIZES:
        given = inputs(*size)
        np.savez(tmp_path / f"{size[0]}_{size[1]}.npz", **{n: t.numpy() for n, t in given.items()})
        for adapter in ("base", "fr", "de"):
            oracle = model()
            if adapter != "base":
                oracle = peft.PeftModel.from_pretrained(oracle, str(tmp_path / adapter)).eval()
                if adapter not in opened.adapters:
                    opened.load_adapter(adapter, tmp_path / adapter)
            with torch.no_grad():
                expected[f"{adapter}_{size[0]}_{size[1]}"] = wanted = oracle(**given).logits
            found = run(opened, given, None if adapter == "base" else adapter, "logits")
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        expected[f"merged_{size[0]}_{size[1]}"] = expected[f"fr_{size[0]}_{size[1]}"]
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", SCRIPTS[runtime_name]], cwd=tmp_path, check=True)
    for key, wanted in expected.items():
        found = torch.from_numpy(np.load(tmp_path / f"found_{key}.npy"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_more_sites_than_the_largest_rank(tmp_path: Path) -> None:
    """ExecuTorch plans memory for ranks up to 5, each of 14 sites having a rank of its own."""
    torch.manual_seed(3)
    free = {0: Dim("batch", max=4), 1: Dim("length", max=9)}
    config = adaptc.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    shapes = {"input_ids": free, "attention_mask": free}
    program = adaptc.compile(MODELS["llama"][0]().eval(), config, dynamic_shapes=shapes)
    model = adaptc.exporters.executorch_model(
        adaptc.exporters.export_executorch(program, tmp_path / "model.pte", max_rank=5)
    )
    model.load_adapter("fr", program)
    given = MODELS["llama"][1](2, 7)
    for adapter, expected in ((None, program.base), ("fr", program)):
        found = model.run(given, adapter)["logits"]
        torch.testing.assert_close(found, expected(**given).logits, rtol=1e-4, atol=1e-5)
