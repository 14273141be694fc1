"""Run an ONNX file whose adapter is a set of inputs, with adapters that are kept by name and chosen in each call.

ONNX Runtime's own ``RunOptions.add_active_adapter`` feeds such inputs, too. But ``run_with_iobinding`` ignores it, and
of two adapters that give one input the first counts, without an error. So a session here feeds the tensors itself.

Nothing here imports torch: :class:`OnnxSession` takes ``.onnx_adapter`` files and arrays by itself, and gets a function
that reads other adapters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from adaptc.errors import BackendError, CheckpointError, ConfigError, SwapError, did_you_mean, short_repr

#: the key of the description in a file's metadata
METADATA_KEY = "adaptc"
#: the end of the names of ONNX Runtime's adapter files
ADAPTER_SUFFIX = ".onnx_adapter"
#: what gives the tensors of any other adapter by the names of the inputs, from the file's description
ReadAdapter = Callable[[Any, str], Mapping[str, Any]]


class OnnxSession:
    """An ONNX file with adapters by name, of which each call takes one or none.

    Calls may come from any thread. A call keeps the adapter that had its name when it began.

    Args:
        path: the ``.onnx`` file.
        read_adapter: what gives the tensors of adapters that are neither files of ONNX Runtime nor arrays; None refuses
            them.
        providers: the execution providers of ONNX Runtime; None for the CPU.
        session_options: an ``onnxruntime.SessionOptions``.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.

    Example:
        >>> session = adaptc.exporters.onnx_session(adaptc.exporters.export_onnx(prog, "model.onnx"))
        >>> session.load_adapter("current", prog)
        >>> y = session.run({"input": x.numpy()}, adapter="current")["output"]
        >>> torch.allclose(torch.from_numpy(y), prog(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        path: Path,
        read_adapter: ReadAdapter | None = None,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
    ) -> None:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

        self._ort: Any = onnxruntime
        self.path = path
        options: Any = session_options
        if options is None:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3  # or each optional input gets a warning, for being one
        try:
            self.session: Any = self._ort.InferenceSession(
                str(path), options, providers=list(providers or ["CPUExecutionProvider"])
            )
        except Exception as error:  # the classes of its errors are not public
            raise CheckpointError(f"ONNX Runtime cannot open {path}: {str(error).splitlines()[0]}") from error
        self.text = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if self.text is None:
            raise CheckpointError(
                f"{path} has no inputs for adapters: write it with adaptc.exporters.export_onnx, or run it "
                "with onnxruntime"
            )
        try:
            data: Any = json.loads(self.text)
            self._identities = {i["name"]: tuple(i["identity"]["shape"]) for i in data["inputs"]}
            self._version = model_version(data["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the description of its adapter inputs is damaged: {error!r}") from error
        optional = {i.name: i for i in self.session.get_overridable_initializers()}
        if missing := self._identities.keys() - optional.keys():
            raise CheckpointError(f"{path} is described to have the input {min(missing)!r}, and has none")
        self._inputs = {n: optional[n] for n in self._identities}
        self._read_adapter = read_adapter
        self._adapters: dict[str, dict[str, Any]] = {}

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters that were loaded."""
        return list(self._adapters)

    @property
    def input_names(self) -> list[str]:
        """Return the names of the model's own inputs."""
        return [i.name for i in self.session.get_inputs()]

    @property
    def output_names(self) -> list[str]:
        """Return the names of the outputs."""
        return [o.name for o in self.session.get_outputs()]

    def load_adapter(self, name: str, adapter: Any) -> None:
        """Keep an adapter under a name.

        Args:
            name: a name that no adapter has yet; :meth:`delete_adapter` makes a name free.
            adapter: a file that :func:`save_onnx_adapter` wrote, or an adapter as :func:`swap` takes it: a PEFT
                directory or file, a program, what was bound to one. Or a mapping from names of inputs to arrays.

        Raises:
            ConfigError: the name is taken, or no name.
            CheckpointError: the file is damaged, or was written for another model.
            SwapError: the adapter has tensors that the model has no input for, or of other shapes.
        """
        given: Any = name  # callers may give anything
        if not isinstance(given, str) or not given:
            raise ConfigError(f"the name of an adapter is a text, not {short_repr(name)}")
        if name in self._adapters:
            raise ConfigError(f"there is an adapter called {name!r} already: session.delete_adapter({name!r}) first")
        is_path = isinstance(adapter, (str, os.PathLike))
        untyped: Any = adapter
        source = str(untyped) if is_path else f"the adapter {name!r}"
        values: Mapping[str, Any]
        if is_path and source.endswith(ADAPTER_SUFFIX):
            values = self._read_file(Path(source))
        elif (arrays := _arrays(adapter)) is not None:
            values = {key: self._to_ort(_own(value)) for key, value in arrays.items()}
        elif self._read_adapter is not None:
            values = {key: self._to_ort(v) for key, v in self._read_adapter(adapter, self.text or "").items()}
        else:
            raise ConfigError(
                f"{source} is neither a {ADAPTER_SUFFIX} file nor a mapping from names of inputs to arrays"
            )
        self._check(values, source)
        self._adapters = {**self._adapters, name: dict(values)}

    def delete_adapter(self, name: str) -> None:
        """Give up an adapter. Calls that have begun with it end with it.

        Args:
            name: its name.

        Raises:
            ConfigError: there is no such adapter.
        """
        self._values(name)
        self._adapters = {n: values for n, values in self._adapters.items() if n != name}

    def run(
        self, inputs: Mapping[str, Any], adapter: str | None = None, outputs: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the outputs of a call, by name, as arrays.

        Args:
            inputs: name -> array, or ``OrtValue``, of the model's own inputs.
            adapter: the name of the adapter; None for the base.
            outputs: the names of the outputs that are wanted; None for all.

        Raises:
            ConfigError: there is no such adapter, input or output, or an input is missing.
            BackendError: ONNX Runtime refuses the inputs.
        """
        values = self._values(adapter)
        expected, known = self.input_names, self.output_names
        if strange := [n for n in inputs if n not in expected]:
            raise ConfigError(f"the model has no input {strange[0]!r}; its inputs are {expected}")
        if missing := [n for n in expected if n not in inputs]:
            raise ConfigError(f"the input {missing[0]!r} is missing")
        if outputs is not None and (strange := [n for n in outputs if n not in known]):
            raise ConfigError(f"the model has no output {strange[0]!r}; its outputs are {known}")
        names = known if outputs is None else list(outputs)
        feeds = {**values, **{n: self._to_ort(v) for n, v in inputs.items()}}
        try:
            found = self.session.run_with_ort_values(names, feeds)
        except Exception as error:
            raise BackendError(f"ONNX Runtime refused the call: {str(error).splitlines()[0]}") from error
        return {n: v.numpy() for n, v in zip(names, found, strict=True)}

    def io_binding(self, adapter: str | None = None) -> Any:
        """Return an ``onnxruntime.IOBinding`` to which the inputs of an adapter are bound.

        The caller binds the model's own inputs and the outputs, and calls ``session.session.run_with_iobinding``.

        Args:
            adapter: the name of the adapter; None for the base.

        Raises:
            ConfigError: there is no such adapter.
        """
        values, binding = self._values(adapter), self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _values(self, adapter: str | None) -> Mapping[str, Any]:
        if adapter is None:
            return {}
        if adapter not in self._adapters:
            raise ConfigError(
                f"there is no adapter called {short_repr(adapter)}{did_you_mean(str(adapter), self.adapters)}"
            )
        return self._adapters[adapter]

    def _read_file(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        try:
            made = self._ort.AdapterFormat.read_adapter(str(path))
            values, version = made.get_parameters(), made.get_model_version()
        except Exception as error:
            raise CheckpointError(f"{path} is no adapter file, or is damaged: {str(error).splitlines()[0]}") from error
        if version not in (0, self._version):
            raise CheckpointError(f"{path} was written for another model than {self.path}: write it again for this one")
        return values

    def _to_ort(self, value: Any) -> Any:
        return (
            value
            if isinstance(value, self._ort.OrtValue)
            else self._ort.OrtValue.ortvalue_from_numpy(np.asarray(value))
        )

    def _check(self, values: Mapping[str, Any], source: str) -> None:
        """Raise SwapError for tensors that are no inputs, or whose shapes or dtypes do not fit."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in values.items():
            if name not in self._inputs:
                raise SwapError(
                    f"{source}: the model has no input {name!r} for an adapter{did_you_mean(name, self._inputs)}"
                )
            expected, shape = self._inputs[name], tuple(value.shape())
            if value.data_type() != expected.type:
                raise SwapError(f"{source}: {name!r} is a {value.data_type()}, expected a {expected.type}")
            fits = len(shape) == len(expected.shape)
            for size, found in zip(expected.shape, shape, strict=False):
                if not isinstance(size, str):
                    fits = fits and size == found
                elif sizes.setdefault(size, (found, name))[0] != found:
                    first, where = sizes[size]
                    raise SwapError(f"{source}: {size} is {found} in {name!r}, and {first} in {where!r}")
            if not fits:
                raise SwapError(f"{source}: {name!r} has shape {shape}, expected {tuple(expected.shape)}")
        for name, expected in self._inputs.items():
            if name in values:
                continue
            for size, own in zip(expected.shape, self._identities[name], strict=True):
                if size in sizes and sizes[size][0] != own:
                    raise SwapError(
                        f"{source}: it has {sizes[size][1]!r}, and lacks {name!r}, which has the same {size}"
                    )


def model_version(fingerprint: str) -> int:
    """Return the number by which an adapter file names the model that it was written for."""
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise ValueError(f"{fingerprint!r} is no fingerprint")
    return int(fingerprint[:7], 16) | 1  # never 0, which says nothing of a model


def _arrays(adapter: Any) -> Mapping[str, Any] | None:
    """Return a mapping from names to arrays or ``OrtValue``; None for any other adapter."""
    if not isinstance(adapter, Mapping):
        return None
    found = cast("Mapping[str, Any]", adapter)
    is_array = (isinstance(v, np.ndarray) or type(v).__name__ == "OrtValue" for v in found.values())
    return found if all(is_array) else None


def _own(value: Any) -> Any:
    """Return an array in memory of its own, since an ``OrtValue`` reads the memory of the array it is made of."""
    return value.copy() if hasattr(value, "copy") else value
