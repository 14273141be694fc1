"""Run an OpenVINO model whose adapter is a set of inputs, with adapters that are chosen in each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import BackendError, CheckpointError, ConfigError
from adaptc.exporters.adapter_feeds import METADATA_KEY
from adaptc.exporters.file_seal import check_seal
from adaptc.exporters.runtime_session import MakeRows, ReadAdapter, RuntimeSession, other_model_error, runtime_error
from adaptc.exporters.to_openvino.adapter_tensors import fingerprint_of, read_tensors
from adaptc.exporters.to_openvino.base_model import remove_adapter

#: where a model's runtime information has the description
RT_INFO_PATH = (METADATA_KEY, "description")
#: the number of waiting requests from which on another adapter takes one of them in place of a new one
MAX_IDLE = 4
#: OpenVINO's name of an element type -> the name of the dtype
_DTYPES: dict[str, str] = {
    **{f"f{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"i{n}": f"int{n}" for n in (8, 16, 32, 64)},
    "bf16": "bfloat16",
    "u8": "uint8",
    "boolean": "bool",
}


def import_openvino() -> Any:
    """Return the module ``openvino``. Raises BackendError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f"this needs openvino: pip install 'adaptc[openvino]' ({error})") from error
    return openvino


def weights_path(path: Path) -> Path:
    """Return the file with the weights of the model ``path``."""
    return path.with_suffix(".bin")


def base_path(path: Path) -> Path:
    """Return the file with the values of the inputs of the model ``path`` that compute its base."""
    return path.with_suffix(".base.safetensors")


class OpenVinoModel(RuntimeSession):
    """An OpenVINO model with adapters by name, of which each call takes one or none.

    Calls may come from any thread. A call keeps the adapter that had its name when it began. Requests keep the adapter
    of their last call, so that up to four adapters take turns without being fed anew.

    Args:
        path: the ``.xml`` file.
        read_adapter: what gives the tensors of adapters that are neither files of :func:`save_openvino_adapter` nor
            arrays; None refuses them.
        device: the device of OpenVINO, such as "CPU".
        config: the properties that the model is compiled with; None for ``INFERENCE_PRECISION_HINT`` of "f32".
        make_rows: what stacks the adapters of rows, for files in which each row has its own; None refuses such files.
        separate_base: whether calls without an adapter have a compiled model of their own.

    Attributes:
        compiled_model: the ``openvino.CompiledModel``.

    Example:
        >>> model = adaptc.exporters.openvino_model(adaptc.exporters.export_openvino(prog, "model.xml"))
        >>> model.load_adapter("current", prog)
        >>> y = model.run({"input": x.numpy()}, adapter="current")["output"]
        >>> torch.allclose(torch.from_numpy(y), prog(x), atol=1e-6)
        True
    """

    runtime: ClassVar[str] = "OpenVINO"
    adapter_suffix: ClassVar[str] = ".safetensors"

    def __init__(
        self,
        path: Path,
        read_adapter: ReadAdapter | None = None,
        device: str = "CPU",
        config: Mapping[str, Any] | None = None,
        make_rows: MakeRows | None = None,
        separate_base: bool = False,
    ) -> None:
        self._ov = import_openvino()
        base = base_path(path)
        check_seal(path, [weights_path(path)], [base], writer="adaptc.exporters.export_openvino")
        options = {"INFERENCE_PRECISION_HINT": "f32"} if config is None else dict(config)
        try:
            core = self._ov.Core()
            model = core.read_model(str(path))
            text = str(model.get_rt_info(list(RT_INFO_PATH)).astype(str))
            self.compiled_model: Any = core.compile_model(model, device, options)
        except Exception as error:  # the classes of its errors are not public
            raise BackendError(f"OpenVINO cannot open {path}: {runtime_error(error)}") from error
        super().__init__(path, text, read_adapter, make_rows)
        self._base = {n: self._as_value(v) for n, v in (read_tensors(base) if base.is_file() else {}).items()}
        #: name of an input -> its number, by which a request finds it ten times as fast
        self._numbers = {n: i for i, port in enumerate(self.compiled_model.inputs) for n in port.get_names()}
        if missing := self._inputs.by_name.keys() - (self._numbers.keys() & self._base.keys()):
            raise CheckpointError(f"{path} is described to have the input {min(missing)!r}, and has none")
        #: requests that no call uses, each with the adapter that it was fed last, the one used last at the end
        self._idle: list[tuple[Any, Mapping[str, Any]]] = []
        #: what computes calls without an adapter where they have a model of their own, and its waiting requests
        self._base_model: Any = self._compile_base(core, device, options) if separate_base else None
        self._idle_base: list[Any] = []

    @property
    def input_names(self) -> list[str]:
        """Return the names of the model's own inputs."""
        names = (port.get_any_name() for port in self.compiled_model.inputs)
        others = () if self.rows is None else (self.rows.coefficients,)
        return [n for n in names if n not in self._inputs.by_name and n not in others]

    @property
    def output_names(self) -> list[str]:
        """Return the names of the outputs."""
        return list(dict.fromkeys(n for port in self.compiled_model.outputs for n in sorted(port.get_names())))

    def feeds(self, adapter: str | None = None, *, adapters: Any = None) -> dict[str, Any]:
        """Return the tensors of an adapter by the names of the inputs, for an ``InferRequest`` of the caller.

        Inputs that the adapter lacks have their values of the base.

        Args:
            adapter: the name of the adapter; None for the base.
            adapters: an entry for each row, as :meth:`run` takes them. A file with adapters for each row needs it.

        Returns:
            name of an input -> ``openvino.Tensor``, for all inputs but the model's own.

        Raises:
            ConfigError: there is no such adapter, or the file takes the other of the two arguments.
        """
        return {**self._base, **self._all_values(adapter, adapters)}

    def _compile_base(self, core: Any, device: str, options: Mapping[str, Any]) -> Any:
        """Return the compiled model of the base. Raises ConfigError where the base needs inputs of the adapter."""
        if self.rows is not None or self.is_merged:
            raise ConfigError(
                f"separate_base=True is for files that take one adapter for all rows of a call, and {self.path} is "
                "another file: open it without separate_base"
            )
        try:
            model = core.read_model(str(self.path))
            needed = remove_adapter(self._ov, model, {n: tuple(v.shape) for n, v in self._base.items()})
            compiled = None if needed else core.compile_model(model, device, options)
        except Exception as error:  # the classes of its errors are not public
            reason = runtime_error(error)
            raise BackendError(f"OpenVINO cannot take the adapter out of {self.path}: {reason}") from error
        if needed:
            raise ConfigError(
                f"separate_base=True needs a base without inputs of the adapter, and {self.path} computes its base "
                f"with {needed[0]!r}: open it without separate_base"
            )
        return compiled

    def _call_base(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        try:
            request = self._idle_base.pop()
        except IndexError:
            request = self._base_model.create_infer_request()
        found = self._infer(request, inputs, outputs)
        if len(self._idle_base) < MAX_IDLE:
            self._idle_base.append(request)
        return found

    def _infer(self, request: Any, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        given = {n: v if self._is_value(v) else np.asarray(v) for n, v in inputs.items()}
        request.infer(given, share_inputs=True, share_outputs=True)  # or it copies all outputs, which is done below
        return {n: _to_array(request.get_tensor(n)) for n in outputs}

    def _call(self, values: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        if self._base_model is not None and not values:
            return self._call_base(inputs, outputs)
        request, fed = self._take_request(values)
        if fed is not values:
            for name, value in {**self._base, **values}.items():
                request.set_input_tensor(self._numbers[name], value)
        found = self._infer(request, inputs, outputs)
        # Not after an error, which leaves a request in any state, nor with an adapter that was deleted meanwhile.
        if self.rows is not None or not values or any(v is values for v in self._adapters.values()):
            self._idle.append((request, values))
        return found

    def delete_adapter(self, name: str) -> None:
        values = self._values(name)
        super().delete_adapter(name)
        for idle in list(self._idle):  # they would keep its tensors
            if idle[1] is values:
                with suppress(ValueError):
                    self._idle.remove(idle)

    def _take_request(self, values: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any] | None]:
        """Return a request that no other call has, and the values that it was fed last: ``values`` where one was."""
        # Each removal is one call of Python, so that no two threads get one request.
        for idle in list(self._idle):
            if idle[1] is values:
                with suppress(ValueError):
                    self._idle.remove(idle)
                    return idle
        if self.rows is not None or len(self._idle) >= MAX_IDLE:  # rows are stacked anew for many calls
            with suppress(IndexError):
                return self._idle.pop(0)
        return self.compiled_model.create_infer_request(), None

    def _is_adapter_file(self, path: Path) -> bool:
        # PEFT's files end in .safetensors, too.
        return super()._is_adapter_file(path) and fingerprint_of(path) is not None

    def _read_file(self, path: Path) -> Mapping[str, Any]:
        if fingerprint_of(path) != self._inputs.fingerprint:
            raise other_model_error(path, self.path)
        return {n: self._as_value(v) for n, v in read_tensors(path).items()}

    def _as_value(self, value: Any) -> Any:
        """Return a tensor of OpenVINO in memory of its own."""
        if self._is_value(value):
            return value
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:  # which numpy lacks
            bits = value.detach().cpu().contiguous().view(torch.uint16).numpy()
            made = self._ov.Tensor(self._ov.Type.bf16, self._ov.Shape(list(bits.shape)))
            made.data.view(np.uint16)[...] = bits
            return made
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return self._ov.Tensor(np.ascontiguousarray(array), shared_memory=False)

    def _as_array(self, value: Any) -> Any:
        return np.array(value.data)

    def _is_value(self, value: Any) -> bool:
        return isinstance(value, self._ov.Tensor)

    def _facts(self, value: Any) -> tuple[str, tuple[int, ...]]:
        name: str = value.get_element_type().get_type_name()
        return _DTYPES.get(name, name), tuple(value.get_shape())


def _to_array(tensor: Any) -> Any:
    """Return a tensor of OpenVINO as an array in memory of its own; bfloat16 as float32, since numpy lacks it."""
    data = np.array(tensor.data)
    if tensor.get_element_type().get_type_name() != "bf16":
        return data
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
