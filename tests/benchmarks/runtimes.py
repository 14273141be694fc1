"""Other runtimes: adapters as inputs next to the exported base, base requests of the same file, and swaps by feeding.

``python -m tests.benchmarks.runtimes [--layers N] [--rounds N] [onnx openvino executorch]``. The model is SmolLM2-135M
with random weights and LoRA of rank 16 on all linear layers; ``--layers`` takes fewer of its 30 layers. The aims are
1.08 of the base for ONNX Runtime and 1.10 for OpenVINO, 1.02 for base requests, and 1 ms for a swap.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

import adaptc
from adaptc import LoraConfig
from tests.benchmarks.harness import Row, interleave, machine, markdown
from tests.benchmarks.model import RANK, smollm2, tokens
from tests.exporters.runtimes import RUNTIMES, RuntimeUnderTest

WORKS = {"decode 1x1": (1, 1), "prefill 1x128": (1, 128)}
ONNX = RuntimeUnderTest(
    "onnx",
    adaptc.exporters.export_onnx,
    adaptc.exporters.onnx_session,
    adaptc.exporters.save_onnx_adapter,
    ".onnx",
    ".onnx_adapter",
    {},
)
ALL = {"onnx": ONNX, **RUNTIMES}


def program(layers: int) -> adaptc.AdaptedProgram:
    model: Any = smollm2()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    free = {0: Dim("batch", max=4), 1: Dim("length", max=160)}
    return adaptc.compile(model, config, dynamic_shapes={"input_ids": free, "attention_mask": free})


def _with_threads(options: Any) -> Any:
    """Return options of ONNX Runtime with as many threads as torch has, which wait without taking a core from others:
    the sessions of a table are all open at once."""
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_plain(runtime: str, path: Path) -> Callable[[dict[str, Any]], Any]:
    """Return a call of a file without adapters, by the runtime's own means and with the same options."""
    if runtime == "onnx":
        import onnxruntime

        options = _with_threads(onnxruntime.SessionOptions())
        session = onnxruntime.InferenceSession(str(path), options)
        return lambda given: session.run(["logits"], given)
    if runtime == "openvino":
        import openvino

        threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = openvino.Core().compile_model(str(path), "CPU", threads).create_infer_request()
        return lambda given: request.infer(given, share_inputs=True)["logits"]
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    assert method is not None
    return lambda given: method.execute([torch.from_numpy(v) for v in given.values()])


def open_adapted(runtime: str, path: Path) -> Any:
    if runtime == "onnx":
        from adaptc.exporters.to_onnx.session import quiet_options

        return adaptc.exporters.onnx_session(path, session_options=_with_threads(quiet_options()))
    if runtime == "openvino":
        threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return adaptc.exporters.openvino_model(path, config=threads, separate_base=True)
    return adaptc.exporters.executorch_model(path)


def run(adapted: adaptc.AdaptedProgram, runtime: str, folder: Path, rounds: int) -> list[Row]:
    under_test = ALL[runtime]
    options = {**under_test.options, **({"max_size": 160, "max_rank": RANK} if runtime == "executorch" else {})}
    path = under_test.export(adapted, folder / f"adapted{under_test.suffix}", **options)
    options.pop("max_rank", None)
    plain = under_test.export(adaptc.unload(adapted), folder / f"base{under_test.suffix}", adapters="merged", **options)
    base, session = open_plain(runtime, plain), open_adapted(runtime, path)
    session.load_adapter("fr", adapted)
    session.load_adapter("de", adapted)
    rows: list[Row] = []
    for work, size in WORKS.items():
        given = {n: t.numpy() for n, t in tokens(*size).items()}
        in_turn = itertools.cycle(("fr", "de"))

        def same(given: dict[str, Any] = given) -> Any:
            return session.run(given, "fr", ["logits"])

        def another(given: dict[str, Any] = given, names: Any = in_turn) -> Any:
            return session.run(given, next(names), ["logits"])

        candidates: dict[str, Callable[[], Any]] = {
            f"{runtime}: exported base": lambda given=given: base(given),
            f"{runtime}: adapters as inputs, one adapter": same,
            f"{runtime}: adapters as inputs, another adapter in each call": another,
        }
        rows += interleave(work, candidates, f"{runtime}: exported base", rounds)
        requests = {
            f"{runtime}: exported base": lambda given=given: base(given),
            f"{runtime}: base request": lambda given=given: session.run(given, None, ["logits"]),
        }
        rows += interleave(f"{work}, base requests", requests, f"{runtime}: exported base", rounds)
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")  # of other libraries, about versions and devices
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("runtimes", nargs="*", default=list(ALL))
    asked = parser.parse_args()
    print(f"Measured on {machine()}; {asked.layers} layers.\n")
    adapted = program(asked.layers)
    for runtime in asked.runtimes:
        with tempfile.TemporaryDirectory() as folder:
            print(markdown(run(adapted, runtime, Path(folder), asked.rounds)), "\n", flush=True)


if __name__ == "__main__":
    main()
