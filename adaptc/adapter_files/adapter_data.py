"""Hold an adapter as its source has it: config, tensors, the format of the keys, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

#: formats of keys: PEFT's bare keys with a config, the keys of one file, and the keys of a caller's state dict; only
#: a model tells what keys of the last two mean
PEFT_KEYS, FILE_KEYS, STATE_DICT_KEYS = "PEFT", "file", "state dict"


@dataclass(frozen=True)
class FileOrigin:
    """The format and component of the file that an adapter was made from.

    ``format`` says how the file names tensors. ``component`` is the one that was taken, '' where the file names none.
    ``other_components`` maps each component that was not taken to its number of tensors.
    """

    format: str = "PEFT"
    component: str = ""
    other_components: Mapping[str, int] = field(default_factory=dict[str, int])

    def __str__(self) -> str:
        of = f" ({self.component})" if self.component else ""
        return f"{self.format}{of}"

    @property
    def describe_others(self) -> str:
        """Return in words the components that were not taken, or '' where there are none."""
        return ", ".join(f"{name or 'the rest'} ({n} tensors)" for name, n in self.other_components.items())


PEFT_ORIGIN = FileOrigin()

ConfigT = TypeVar("ConfigT", covariant=True)
NewConfigT = TypeVar("NewConfigT")


@dataclass(frozen=True, eq=False)
class AdapterData(Generic[ConfigT]):
    """An adapter as it was in its source at one moment.

    ``config`` is the content of an ``adapter_config.json``, or None where the source has none. After
    :func:`adaptc.binding.sources.resolve.resolve` it is a config object, and ``tensors`` has PEFT's bare keys. Tensors
    have the dtypes of their source. Those of files have memory of their own, so later changes to the file do not reach
    them.
    """

    config: ConfigT
    tensors: Mapping[str, Tensor] = field(repr=False)
    #: what messages call the source: the path that the caller gave, or a name
    source: str
    #: the directory that holds the files (the sub-directory, for a named adapter), or the file; None for no file
    path: Path | None = None
    #: how the keys are spelled: ``PEFT_KEYS``, ``FILE_KEYS`` or ``STATE_DICT_KEYS``
    format: str = PEFT_KEYS
    #: the format that the file had before it was converted to PEFT's
    origin: FileOrigin = PEFT_ORIGIN
    #: the adapters beside this one between which it routes, by name
    experts: Mapping[str, AdapterData[Any]] = field(default_factory=dict[str, Any], repr=False)
    #: the component that the caller asks for; None where the keys are to tell
    component: str | None = None
    #: what the header of a file says on the components in it, None where it says nothing
    component_configs: Mapping[str, Any] | None = None
    #: all floating-point data of the file in as few tensors as possible, where that is known
    flat_tensors: Sequence[Tensor] = field(default=(), repr=False)
    #: whether the memory of the tensors is the caller's, who may write to it later
    is_shared: bool = False
    #: whether the adapter is new: without tensors, or made from files of other adapters
    is_new: bool = False
    #: whether ``config`` is that of another adapter, so that ranks are read off the tensors
    infer_ranks: bool = False
    #: the fingerprint of the base that the adapter was stored with in a program's file; None where none is known
    base_fingerprint: str | None = None

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of tensor data."""
        return sum(t.nbytes for t in self.tensors.values())

    def with_config(self, config: NewConfigT, **changes: Any) -> AdapterData[NewConfigT]:
        """Return the adapter with another config, and with other ``changes`` of its fields."""
        if "tensors" in changes:
            changes.setdefault("flat_tensors", ())
        new: Any = replace(self, config=config, **changes)
        return new


#: an adapter that was loaded; its config is a dict, or None where only the caller or a model knows it
LoadedAdapter = AdapterData[dict[str, Any] | None]
