"""Run an ONNX file whose adapter is a set of inputs, in ONNX Runtime.

ONNX Runtime's own ``RunOptions.add_active_adapter`` feeds such inputs, too. But ``run_with_iobinding`` ignores it, and
of two adapters that give one input the first counts, without an error. So a session here feeds the tensors itself.

Nothing here imports torch: :class:`OnnxSession` takes ``.onnx_adapter`` files and arrays by itself, and gets a function
that reads other adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from adaptc.errors import CheckpointError
from adaptc.exporters.adapter_feeds import METADATA_KEY
from adaptc.exporters.runtime_session import MakeRows, ReadAdapter, RuntimeSession, other_model_error, runtime_error

#: the end of the names of ONNX Runtime's adapter files
ADAPTER_SUFFIX = ".onnx_adapter"
#: ONNX Runtime's name of an element type -> the name of the dtype, where the two differ
_DTYPES = {"float": "float32", "double": "float64"}


class OnnxSession(RuntimeSession):
    """An ONNX file with adapters by name, of which each call takes one or none.

    Calls may come from any thread. A call keeps the adapter that had its name when it began.

    Args:
        path: the ``.onnx`` file.
        read_adapter: what gives the tensors of adapters that are neither files of ONNX Runtime nor arrays; None refuses
            them.
        providers: the execution providers of ONNX Runtime; None for the CPU.
        session_options: an ``onnxruntime.SessionOptions``.
        make_rows: what stacks the adapters of rows, for files in which each row has its own; None refuses such files.
        session: an ``onnxruntime.InferenceSession`` of the file, in place of a new one.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.

    Example:
        >>> session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(prog, "model.onnx"))
        >>> session.load_adapter("current", prog)
        >>> y = session.run({"input": x.numpy()}, adapter="current")["output"]
        >>> torch.allclose(torch.from_numpy(y), prog(x), atol=1e-6)
        True
    """

    runtime: ClassVar[str] = "ONNX Runtime"
    adapter_suffix: ClassVar[str] = ADAPTER_SUFFIX

    def __init__(
        self,
        path: Path,
        read_adapter: ReadAdapter | None = None,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        make_rows: MakeRows | None = None,
        session: Any = None,
    ) -> None:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

        self._ort: Any = onnxruntime
        if session is None:
            options: Any = quiet_options() if session_options is None else session_options
            try:
                session = self._ort.InferenceSession(
                    str(path), options, providers=list(providers or ["CPUExecutionProvider"])
                )
            except Exception as error:  # the classes of its errors are not public
                raise CheckpointError(f"ONNX Runtime cannot open {path}: {runtime_error(error)}") from error
        self.session: Any = session
        try:
            text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
            optional = {i.name for i in self.session.get_overridable_initializers()}
            assert [i.name for i in (*self.session.get_inputs(), *self.session.get_outputs())]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: it has a name that is no text ({error})") from error
        if text is None:
            raise CheckpointError(
                f"{path} has no inputs for adapters: write it with adaptc.exporters.export_onnx, or run it "
                "with onnxruntime"
            )
        super().__init__(path, text, read_adapter, make_rows)
        if missing := self._inputs.by_name.keys() - optional:
            raise CheckpointError(f"{path} is described to have the input {min(missing)!r}, and has none")

    @property
    def input_names(self) -> list[str]:
        """Return the names of the model's own inputs."""
        names = [i.name for i in self.session.get_inputs()]
        return names if self.rows is None else [n for n in names if n != self.rows.coefficients]

    @property
    def output_names(self) -> list[str]:
        """Return the names of the outputs."""
        return [o.name for o in self.session.get_outputs()]

    def io_binding(self, adapter: str | None = None, *, adapters: Any = None) -> Any:
        """Return an ``onnxruntime.IOBinding`` to which the inputs of an adapter are bound.

        The caller binds the model's own inputs and the outputs, and calls ``session.session.run_with_iobinding``.

        Args:
            adapter: the name of the adapter; None for the base.
            adapters: an entry for each row, as :meth:`run` takes them. A file with adapters for each row needs it.

        Raises:
            ConfigError: there is no such adapter, or the file takes the other of the two arguments.
        """
        values, binding = self._all_values(adapter, adapters), self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _call(self, values: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        feeds = {**values, **{n: self._as_value(v) for n, v in inputs.items()}}
        found = self.session.run_with_ort_values(list(outputs), feeds)
        return {n: v.numpy() for n, v in zip(outputs, found, strict=True)}

    def _read_file(self, path: Path) -> Mapping[str, Any]:
        try:
            made = self._ort.AdapterFormat.read_adapter(str(path))
            values, version = made.get_parameters(), made.get_model_version()
        except Exception as error:
            raise CheckpointError(f"{path} is no adapter file, or is damaged: {runtime_error(error)}") from error
        if version not in (0, model_version(self._inputs.fingerprint)):
            raise other_model_error(path, self.path)
        return values

    def _as_value(self, value: Any) -> Any:
        return value if self._is_value(value) else self._ort.OrtValue.ortvalue_from_numpy(np.asarray(value))

    def _is_value(self, value: Any) -> bool:
        return isinstance(value, self._ort.OrtValue)

    def _facts(self, value: Any) -> tuple[str, tuple[int, ...]]:
        name: str = value.data_type().removeprefix("tensor(").removesuffix(")")
        return _DTYPES.get(name, name), tuple(value.shape())


def quiet_options() -> Any:
    """Return an ``onnxruntime.SessionOptions`` with which optional inputs give no warnings."""
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    untyped: Any = onnxruntime
    options = untyped.SessionOptions()
    options.log_severity_level = 3  # or each optional input gets a warning, for being one
    return options


def model_version(fingerprint: str) -> int:
    """Return the number by which an adapter file names the model that it was written for."""
    return int(fingerprint[:7], 16) | 1  # never 0, which says nothing of a model
