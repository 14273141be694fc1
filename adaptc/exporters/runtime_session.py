"""Run a file whose adapter is a set of inputs, with adapters that are kept by name and chosen in each call.

:class:`RuntimeSession` is what the sessions of all runtimes share. A runtime adds how it opens a file, how it has
tensors, and how it makes a call. Nothing here imports torch.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np

from adaptc.errors import BackendError, CheckpointError, ConfigError, did_you_mean, short_repr
from adaptc.exporters.adapter_feeds import AdapterInputs

#: what gives the tensors of any adapter by the names of the inputs, from the file's description
ReadAdapter = Callable[[Any, str], Mapping[str, Any]]


class Rows(Protocol):
    """A stacker of the adapters of rows; see :class:`~adaptc.exporters.row_stacks.RowStacks`."""

    coefficients: str
    batch: tuple[str, int]
    max_rank: int | None

    def check_complete(self, values: Mapping[str, Any], source: str) -> None: ...
    def feeds(
        self,
        entries: Any,
        adapter_of: Callable[[str], Mapping[str, Any]],
        as_value: Callable[[Any], Any],
        rows: int | None = None,
    ) -> Any: ...


#: what makes that of the field ``rows`` of a file's description, its inputs and its path
MakeRows = Callable[[Any, AdapterInputs, Path], Rows]
S = TypeVar("S")
#: the values of the base: one object, by which a request knows that it was fed them
_NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class RuntimeSession(ABC):
    """A file of a runtime with adapters by name, of which each call takes one or none.

    Calls may come from any thread. A call keeps the adapter that had its name when it began.

    Args:
        path: the file.
        text: the description in the file.
        read_adapter: what gives the tensors of adapters that are neither files of the runtime nor tensors by name; None
            refuses them.
        make_rows: what stacks the adapters of rows, for files in which each row has its own; None refuses such files.

    Attributes:
        path: the file.
        text: the description in the file.
        rows: what stacks the adapters of rows; None for a file that takes one adapter for all rows.
        is_merged: whether the file has no inputs for adapters, and takes none.
    """

    #: the name of the runtime, for messages
    runtime: ClassVar[str]
    #: the end of the names of the adapter files that are written for one model
    adapter_suffix: ClassVar[str]
    #: the least and the largest rank that the file takes; None for any
    ranks: tuple[int, int | None] = (0, None)

    def __init__(
        self, path: Path, text: str, read_adapter: ReadAdapter | None, make_rows: MakeRows | None = None
    ) -> None:
        self.path, self.text = path, text
        self._inputs = AdapterInputs.parse(text, path)
        self.is_merged = self._inputs.is_merged
        self.rows: Rows | None = None
        if self._inputs.rows is not None:
            if make_rows is None:
                raise ConfigError(f"{path} has adapters for each row, which {self.runtime} is not given here")
            self.rows = make_rows(self._inputs.rows, self._inputs, path)
            self.ranks = (0, self.rows.max_rank)
        self._read_adapter = read_adapter
        self._adapters: dict[str, dict[str, Any]] = {}

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters that were loaded."""
        return list(self._adapters)

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the base, by which adapter files name it."""
        return self._inputs.fingerprint

    @property
    @abstractmethod
    def input_names(self) -> list[str]:
        """Return the names of the model's own inputs."""

    @property
    @abstractmethod
    def output_names(self) -> list[str]:
        """Return the names of the outputs."""

    def load_adapter(self, name: str, adapter: Any) -> None:
        """Keep an adapter under a name.

        Args:
            name: a name that no adapter has yet; :meth:`delete_adapter` makes a name free.
            adapter: an adapter file that was written for this model, or an adapter as :func:`swap` takes it: a PEFT
                directory or file, a program, what was bound to one. Or a mapping from names of inputs to arrays.

        Raises:
            ConfigError: the name is taken, or no name, or the file has no inputs for adapters.
            CheckpointError: the file is damaged, or was written for another model.
            SwapError: the adapter has tensors that the model has no input for, or of other shapes.
        """
        given: Any = name  # callers may give anything
        if not isinstance(given, str) or not given:
            raise ConfigError(f"the name of an adapter is a text, not {short_repr(name)}")
        if self.is_merged:
            raise ConfigError(
                f"{self.path} has no inputs for adapters, for its adapter was merged when it was exported: export the "
                "program with adapters='inputs'"
            )
        if name in self._adapters:
            raise ConfigError(f"there is an adapter called {name!r} already: session.delete_adapter({name!r}) first")
        is_path = isinstance(adapter, (str, os.PathLike))
        untyped: Any = adapter
        source = str(untyped) if is_path else f"the adapter {name!r}"
        values: Mapping[str, Any]
        if is_path and self._is_adapter_file(Path(source)):
            values = self._read_file(Path(source))
        elif (tensors := self._tensors_by_name(adapter)) is not None:
            values = {key: self._as_value(_own(value)) for key, value in tensors.items()}
        elif self._read_adapter is not None:
            values = {key: self._as_value(value) for key, value in self._read_adapter(adapter, self.text).items()}
        else:
            raise ConfigError(
                f"{source} is neither a file ending in {self.adapter_suffix} nor a mapping from names of inputs to "
                "arrays"
            )
        self.check_tensors(values, source)
        if self.rows is not None:
            self.rows.check_complete(values, source)
            values = {key: self._as_array(value) for key, value in values.items()}
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
        self,
        inputs: Mapping[str, Any],
        adapter: str | None = None,
        outputs: Sequence[str] | None = None,
        *,
        adapters: Any = None,
    ) -> dict[str, Any]:
        """Return the outputs of a call, by name, as the runtime gives them: arrays, or tensors of ExecuTorch.

        Args:
            inputs: name -> array, or a tensor of the runtime, of the model's own inputs.
            adapter: the name of the adapter of all rows; None for the base.
            outputs: the names of the outputs that are wanted; None for all.
            adapters: an entry for each row: a name, None for the base, or a dict of names and weights. It is for files
                that were exported with ``adapters="rows"``.

        Raises:
            ConfigError: there is no such adapter, input or output, an input is missing, or there is not one entry for
                each row.
            AdaptcError: ``adapters`` is no list of such entries.
            BackendError: the runtime refuses the inputs.
        """
        expected, known = self.input_names, self.output_names
        if strange := [n for n in inputs if n not in expected]:
            raise ConfigError(f"the model has no input {strange[0]!r}; its inputs are {expected}")
        if missing := [n for n in expected if n not in inputs]:
            raise ConfigError(f"the input {missing[0]!r} is missing")
        if outputs is not None and (strange := [n for n in outputs if n not in known]):
            raise ConfigError(f"the model has no output {strange[0]!r}; its outputs are {known}")
        values, inputs = self._fed(adapter, adapters, inputs)
        try:
            return self._call(values, inputs, known if outputs is None else list(outputs))
        except Exception as error:  # the classes of a runtime's errors are not public
            raise BackendError(f"{self.runtime} refused the call: {runtime_error(error)}") from error

    def check_tensors(self, values: Mapping[str, Any], source: str) -> None:
        """Raise SwapError for tensors of the runtime that are no inputs or do not fit; ``source`` names the adapter."""
        self.check_facts({n: self._facts(v) for n, v in values.items()}, source)

    def check_facts(self, facts: Mapping[str, tuple[str, tuple[int, ...]]], source: str) -> None:
        """Raise SwapError for (dtype, shape) of tensors, by name, that are no inputs or do not fit."""
        self._inputs.check(facts, source, self.ranks)

    def _fed(
        self, adapter: str | None, adapters: Any, inputs: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the values of adapters for a call, and its other inputs."""
        if self.rows is None:
            if adapters is not None:
                raise ConfigError(
                    f"{self.path} takes one adapter for all rows of a call: export the program with adapters='rows', "
                    "or make a call for the rows of each adapter"
                )
            return self._values(adapter), inputs
        if adapter is not None and adapters is not None:
            raise ConfigError("adapter= is for all rows, and adapters= for each: give one of them")
        name, axis = self.rows.batch
        given = inputs.get(name, ())
        shape = self._facts(given)[1] if self._is_value(given) else np.shape(given)
        rows = shape[axis] if axis < len(shape) else 1
        fed = self.rows.feeds([adapter] * rows if adapters is None else adapters, self._values, self._as_value, rows)
        return fed.values or _NO_VALUES, {**inputs, self.rows.coefficients: fed.coefficients}

    def _all_values(self, adapter: str | None, adapters: Any) -> Mapping[str, Any]:
        """Return the values of adapters, with the coefficients of rows, for a call that the caller makes."""
        if self.rows is None:
            return self._fed(adapter, adapters, {})[0]
        if adapters is None:
            raise ConfigError(f"{self.path} has adapters for each row of a call: give adapters=[...]")
        fed = self.rows.feeds(adapters, self._values, self._as_value)
        return {**fed.values, self.rows.coefficients: self._as_value(fed.coefficients)}

    @abstractmethod
    def _as_value(self, value: Any) -> Any:
        """Return an array, or a value of the runtime, as the runtime takes it."""

    def _as_array(self, value: Any) -> Any:
        """Return a value of the runtime as an array in memory of its own."""
        return np.array(value.numpy())

    @abstractmethod
    def _facts(self, value: Any) -> tuple[str, tuple[int, ...]]:
        """Return the dtype, such as "float32", and the shape of a value of the runtime."""

    @abstractmethod
    def _read_file(self, path: Path) -> Mapping[str, Any]:
        """Return the values in an adapter file that was written for this model. Raises CheckpointError for others."""

    @abstractmethod
    def _call(self, values: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Return the outputs of a call with the ``values`` of an adapter; empty for the base."""

    def _is_adapter_file(self, path: Path) -> bool:
        """Return whether ``path`` is an adapter file of the runtime. Raises CheckpointError for one that is missing."""
        if path.suffix != self.adapter_suffix:
            return False
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return True

    def _values(self, adapter: str | None) -> Mapping[str, Any]:
        if adapter is None:
            return _NO_VALUES
        if adapter not in self._adapters:
            raise ConfigError(
                f"there is no adapter called {short_repr(adapter)}{did_you_mean(str(adapter), self.adapters)}"
            )
        return self._adapters[adapter]

    def _tensors_by_name(self, adapter: Any) -> Mapping[str, Any] | None:
        """Return a mapping from names to arrays or values of the runtime; None for any other adapter."""
        if not isinstance(adapter, Mapping):
            return None
        found = cast("Mapping[str, Any]", adapter)
        return found if all(isinstance(v, np.ndarray) or self._is_value(v) for v in found.values()) else None

    def _is_value(self, value: Any) -> bool:
        """Return whether ``value`` is a tensor of the runtime's own type, which is taken by the names of inputs."""
        return False


def as_session(model: Any, kind: type[S], open_file: Callable[[Any], S], what: str) -> S:
    """Return ``model`` where it is a session already, and else the session of the file ``what`` at that path.

    Raises ConfigError for anything else.
    """
    if isinstance(model, kind):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigError(f"model is the path of {what} or a {kind.__name__} of it, not a {type(model).__name__}")
    return open_file(model)


def runtime_error(error: Exception) -> str:
    """Return what an error of a runtime says, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    # Errors of OpenVINO begin with where its source checks what.
    plain = [n for n in lines if n and not n.startswith(("Exception from src/", "Check '"))]
    return plain[0] if plain else type(error).__name__


def other_model_error(path: Path, model: Path) -> CheckpointError:
    """Return the error for an adapter file ``path`` that was written for another model than ``model``."""
    return CheckpointError(f"{path} was written for another model than {model}: write it again for this one")


def _own(value: Any) -> Any:
    """Return an array in memory of its own, since a runtime reads the memory of the array it is given."""
    return value.copy() if hasattr(value, "copy") else value
