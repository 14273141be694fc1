"""Run an ExecuTorch program whose adapter is a set of inputs, with adapters that are chosen in each call."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import BackendError, CheckpointError
from adaptc.exporters.described_model import facts_of
from adaptc.exporters.file_seal import check_seal
from adaptc.exporters.runtime_session import ReadAdapter, RuntimeSession, other_model_error, runtime_error
from adaptc.exporters.to_executorch.flat_tensors import import_executorch, read_flat_tensors
from adaptc.locks import reset_after_fork

#: the method that returns what is known of the inputs and outputs, as JSON
TEXT_METHOD = "adaptc"
#: the method that returns the adapter inputs that compute the base, in their order
BASE_METHOD = "adaptc_base"


class ExecutorchModel(RuntimeSession):
    """An ExecuTorch program with adapters by name, of which each call takes one or none.

    Calls may come from any thread, and run one after the other. A call keeps the adapter that had its name when it
    began.

    Args:
        path: the ``.pte`` file.
        read_adapter: what gives the tensors of adapters that are neither files of :func:`save_executorch_adapter` nor
            arrays; None refuses them.

    Attributes:
        program: the ``executorch.runtime.Program``.

    Example:
        >>> prog = adaptc.compile(lm, LoraConfig(r=2, target_modules=["q_proj"]))
        >>> model = adaptc.exporters.executorch_model(adaptc.exporters.export_executorch(prog, "model.pte", max_size=8))
        >>> model.load_adapter("current", prog)
        >>> model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "current")["logits"].shape
        torch.Size([2, 7, 97])
    """

    runtime: ClassVar[str] = "ExecuTorch"
    adapter_suffix: ClassVar[str] = ".ptd"

    def __init__(self, path: Path, read_adapter: ReadAdapter | None = None) -> None:
        runtime = import_executorch("runtime").Runtime.get()
        check_seal(path, writer="adaptc.exporters.export_executorch")
        try:
            self.program: Any = runtime.load_program(path)
            about: Any = json.loads(self.program.load_method(TEXT_METHOD).execute([])[0])
            has_base = BASE_METHOD in self.program.method_names
            base: Sequence[Any] = self.program.load_method(BASE_METHOD).execute([]) if has_base else ()
            self._forward: Any = self.program.load_method("forward")
            text = json.dumps(about["description"])
            #: the model's inputs in their order; those without a name are constants
            self._arguments: list[dict[str, Any]] = about["inputs"]
            self._own_inputs = {i["name"]: (i["dtype"], i["sizes"]) for i in self._arguments if i["name"]}
            self._outputs, self.ranks = list(about["outputs"]), (1, int(about["max_rank"]))
        except Exception as error:  # the classes of its errors are not public
            raise BackendError(f"ExecuTorch cannot open {path}: {runtime_error(error)}") from error
        super().__init__(path, text, read_adapter)
        if len(base) != len(self._inputs.by_name):
            raise CheckpointError(f"{path} has {len(base)} values of the base for {len(self._inputs.by_name)} inputs")
        self._base = {n: t.clone() for n, t in zip(self._inputs.by_name, base, strict=True)}
        self._lock = reset_after_fork(threading.Lock())

    @property
    def input_names(self) -> list[str]:
        """Return the names of the model's own inputs."""
        return list(self._own_inputs)

    @property
    def output_names(self) -> list[str]:
        """Return the names of the outputs."""
        return list(self._outputs)

    @property
    def max_rank(self) -> int:
        """Return the largest rank that an adapter may have."""
        return self.ranks[1] or 0

    def feeds(self, adapter: str | None = None) -> list[Tensor]:
        """Return the tensors of an adapter in the order of the inputs, to be given behind the model's own.

        Inputs that the adapter lacks have their values of the base.

        Args:
            adapter: the name of the adapter; None for the base.

        Returns:
            the tensors.

        Raises:
            ConfigError: there is no such adapter.
        """
        return list({**self._base, **self._values(adapter)}.values())

    def _call(self, values: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        own = [self._own_input(i["name"], inputs[i["name"]]) if i["name"] else i["value"] for i in self._arguments]
        given = [*own, *({**self._base, **values}.values())]
        with self._lock:
            tensors = [o for o in self._forward.execute(given) if isinstance(o, Tensor)]
            found = dict(zip(self._outputs, tensors, strict=True))
            return {n: found[n].clone() for n in outputs}

    def _own_input(self, name: str, value: Any) -> Tensor:
        """Return an input as the program takes it. ExecuTorch itself sees whether its memory is enough, no more."""
        tensor = _to_tensor(value)
        dtype, sizes = self._own_inputs[name]
        found = str(tensor.dtype).removeprefix("torch.")
        if found != dtype:
            raise ValueError(f"{name!r} is {found}, expected {dtype}")
        fits = len(sizes) == tensor.ndim and all(a <= n <= b for n, (a, b) in zip(tensor.shape, sizes, strict=True))
        if not fits:
            expected = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in sizes)
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, expected ({expected})")
        return tensor.contiguous()

    def _read_file(self, path: Path) -> Mapping[str, Any]:
        tensors, fingerprint = read_flat_tensors(path)
        if fingerprint != self.fingerprint:
            raise other_model_error(path, self.path)
        return tensors

    def _as_value(self, value: Any) -> Any:
        """Return a tensor in memory of its own."""
        return _to_tensor(value).clone(memory_format=torch.contiguous_format)

    def _facts(self, value: Any) -> tuple[str, tuple[int, ...]]:
        return facts_of(value)


def _to_tensor(value: Any) -> Tensor:
    """Return an array or a tensor as a tensor on the CPU."""
    untyped: Any = torch
    return value.detach().cpu() if isinstance(value, Tensor) else untyped.from_numpy(np.array(value))
