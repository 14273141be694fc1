"""Merge an adapter into the files of a transformers model, without the model in memory (``adaptc.merge_directory``).

The model is compiled on its mapped files, so every method and every choice of layers means what it means elsewhere.
Then each file is written anew, tensor by tensor. A tensor that the adapter changes is made when its turn comes, and
freed after it was written. The code that merges programs makes it. All others are copied.

The new files have the names, the keys and the order of the old ones. Of a quantised model they hold plain weights, all
of them, or weights of the same scheme.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.adapter_files import atomic_write
from adaptc.adapter_files.format import MODEL_CONFIG_NAME as CONFIG
from adaptc.adapters.directories.mapped_model import SINGLE_FILE, MappedModel, open_mapped_model
from adaptc.adapters.directories.write_tensors import TensorEntry, write_tensors
from adaptc.adapters.model_tensors import SAFE_WEIGHTS_INDEX_NAME
from adaptc.capture.model_files import QUANTIZATION_CONFIG
from adaptc.errors import CheckpointError, ConfigError, FilePlaceError, MergeError, listing, short_repr
from adaptc.passes.adapt.merging.merge_pass import Merge, MergedWeight
from adaptc.passes.adapt.merging.site_merge import SiteMerge
from adaptc.passes.graph.lifted import LiftedProgram
from adaptc.passes.quantized.quantized_merge import requantize as store_by_scheme
from adaptc.passes.quantized.quantized_tensor import QuantizedTensor
from adaptc.program.adapted_program import AdaptedProgram
from adaptc.program.compile_program import compile_model
from adaptc.progress import stage
from adaptc.runtime.options import RunOptions
from adaptc.state.model_directory import check_target_dir, commit_model_files, copy_companions
from adaptc.tables import format_bytes
from adaptc.torch_typing import is_dict

_GENERATION_CONFIG = "generation_config.json"


def merge_into_directory(
    source: Path,
    adapter: Any,
    target: Path,
    *,
    dequantize: bool = False,
    requantize: bool = False,
    safe: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    component: str | None = None,
    progress: bool = False,
) -> tuple[list[SiteMerge], str]:
    """Write the model in ``source`` with ``adapter`` merged to the directory ``target``.

    Returns the rows of the report, and where the adapter came from. ``adaptc.merge_directory`` says what the arguments
    mean, and what is raised. ``target`` is as it was then.
    """
    if dequantize and requantize:
        raise ConfigError("dequantize=True and requantize=True exclude each other: give one of them")
    check_target_dir(target)
    if target.exists() and source.resolve() == target.resolve():
        raise CheckpointError(f"the merged model cannot replace the one it is made of, {source}: choose another path")
    with open_mapped_model(source) as mapped:
        options = {"key_mapping": key_mapping, "component": component}
        program = compile_model(AdaptedProgram, mapped.model, adapter, RunOptions(), **options)
        merging = _DirectoryMerge(mapped, program, dequantize, requantize, safe)
        _write(mapped, merging, target, progress)
        return merging.rows, program.binding.source


class _DirectoryMerge:
    """The new content of each key of the files.

    ``entries`` maps the name of a file to its new tensors by key, and ``rows`` is the report, which grows with them.
    """

    def __init__(
        self, mapped: MappedModel, program: AdaptedProgram, dequantize: bool, requantize: bool, safe: bool
    ) -> None:
        self.mapped, self.dequantize = mapped, dequantize
        self.rows: list[SiteMerge] = []
        self._made: tuple[str, MergedWeight] | None = None
        binding = program.binding
        present = [a for a in program.adaptation.attachments if a.id in binding.methods]
        dropped = tuple(a.id for a in program.adaptation.attachments if a.id not in binding.methods)
        merge = Merge(present, dict(binding.values), safe, dropped_ids=dropped)
        self._lifted = LiftedProgram(program, edit=False)
        self._weights = (replace(merge, store=store_by_scheme) if requantize else merge).lazy_weights(program)
        self._check_quantized(requantize)
        #: key in the files, or name of a quantised weight -> what makes its new value
        self._changed: dict[str, Callable[[], Tensor]] = {}
        for fqn in self._weights:
            self._note_change(fqn, partial(self._new_weight, fqn))
            if any(a.method.has_bias() for a in present if a.fqn == fqn):
                for bias in self._merged(fqn).biases:
                    self._note_change(bias, lambda f=fqn, b=bias: self._merged(f).biases[b])
        self._by_part = {key: w for w in mapped.stored.values() for key in w.keys}
        self.entries = {name: self._entries_of(tensors) for name, tensors in mapped.files.items()}

    def _check_quantized(self, requantize: bool) -> None:
        stored = {self.mapped.keys.get(f): f for f in self._weights}
        found = [w for name, w in self.mapped.stored.items() if name in stored]
        if (self.dequantize or requantize) and not self.mapped.stored:
            raise ConfigError(
                f"{'dequantize' if self.dequantize else 'requantize'}=True is for quantised models, and "
                f"{self.mapped.path} has plain weights: leave it out"
            )
        if found and not (self.dequantize or requantize):
            raise MergeError(
                f"{found[0].name!r} and {len(found) - 1} more weights that the adapter changes are quantised: say what "
                "becomes of them, with dequantize=True or requantize=True"
            )
        if requantize and (unwritten := [w for w in found if w.write is None]):
            method = self.mapped.config[QUANTIZATION_CONFIG]["quant_method"]
            raise MergeError(
                f"requantize=True is for bitsandbytes, and {unwritten[0].name!r} is stored as {method} does, whose "
                "scales are fitted to data: give dequantize=True, and quantise the merged model with its library"
            )

    def _note_change(self, fqn: str, make: Callable[[], Tensor]) -> None:
        """Let ``make`` give the new value of every key that holds the tensor called ``fqn``."""
        names = self._lifted.fqns_of(self._lifted.placeholders[fqn])
        keys = {self.mapped.keys[n] for n in names if n in self.mapped.keys}
        if not keys:
            raise FilePlaceError(
                f"the adapter changes {fqn!r}, which transformers makes of other tensors or in another dtype than "
                f"{self.mapped.path} has: merge a program of the model (adaptc.merge), and write that with "
                "save_pretrained"
            )
        self._changed |= dict.fromkeys(keys, make)

    def _merged(self, fqn: str) -> MergedWeight:
        """Return the weight as merged; the last one is kept, since several keys may hold it."""
        if self._made is None or self._made[0] != fqn:
            self._made = None  # freed before the next one is made
            made = self._weights[fqn]()
            made.row.measure_errors()  # now: the report must not keep weights
            self._made = fqn, made
            self.rows = [*(r for r in self.rows if r.fqn != fqn), made.row]
        return self._made[1]

    def _new_weight(self, fqn: str) -> Tensor:
        return self._merged(fqn).value

    def _entries_of(self, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for key, t in tensors.items():
            weight = self._by_part.get(key)
            if weight is None:
                make = self._changed.get(key, partial(_unchanged, t))
                entries[key] = TensorEntry(tuple(t.shape), t.dtype, make)
            elif self.dequantize:
                if key == weight.keys[0]:
                    make = self._changed.get(weight.name, partial(_dequantized, weight.read))
                    entries[weight.name] = TensorEntry(weight.shape, weight.read().dtype, make)
            elif weight.name not in self._changed or weight.write is None:
                entries[key] = TensorEntry(tuple(t.shape), t.dtype, partial(_unchanged, t))
            else:
                shape = tuple(weight.write(weight.read())[key].shape)
                entries[key] = TensorEntry(shape, t.dtype, partial(self._part, weight.name, weight.write, key))
        return entries

    def _part(self, name: str, write: Callable[[QuantizedTensor], dict[str, Tensor]], key: str) -> Tensor:
        value = self._changed[name]()
        assert isinstance(value, QuantizedTensor)
        return write(value)[key]


def _unchanged(t: Tensor) -> Tensor:
    return t


def _dequantized(read: Callable[[], QuantizedTensor]) -> Tensor:
    return read().dequantize()


def _write(mapped: MappedModel, merging: _DirectoryMerge, target: Path, progress: bool) -> None:
    name = type(mapped.model).__name__
    count = len(mapped.files)
    total = sum(entry.nbytes for entries in merging.entries.values() for entry in entries.values())
    text = f"merging into {name}, {count} file{'' if count == 1 else 's'} of {format_bytes(total)}"
    try:
        with atomic_write.open_stage(target) as aside:
            with stage(text, always=progress) as writing:
                written = writing.count_bytes(total)
                for file, entries in merging.entries.items():
                    write_tensors(aside / file, entries, mapped.metadata[file], written)
            _write_config(mapped, aside, merging.dequantize)
            if list(merging.entries) != [SINGLE_FILE]:
                _write_index(mapped, aside, merging.entries)
            copy_companions(mapped.path, aside)
            if (mapped.path / _GENERATION_CONFIG).is_file():
                (aside / _GENERATION_CONFIG).write_bytes((mapped.path / _GENERATION_CONFIG).read_bytes())
            commit_model_files(aside, target)
        atomic_write.remove_abandoned(target, with_old_files=True)
    except OSError as error:
        raise CheckpointError(
            f"could not write a {name} to {target} ({short_repr(str(error))}). What was there before is unchanged."
        ) from error


def _write_config(mapped: MappedModel, aside: Path, dequantize: bool) -> None:
    config = dict(mapped.config)
    if dequantize:
        del config[QUANTIZATION_CONFIG]
        config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", str(mapped.dtype).partition(".")[2])
    (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_index(mapped: MappedModel, aside: Path, files: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    try:
        old = json.loads((mapped.path / SAFE_WEIGHTS_INDEX_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{mapped.path} has the files {listing(map(repr, files), 3)} and no index that can be read: save the model "
            "with save_pretrained"
        ) from error
    metadata = old.get("metadata") if is_dict(old) else None
    size = sum(entry.nbytes for entries in files.values() for entry in entries.values())
    index = {
        "metadata": {**(metadata if is_dict(metadata) else {}), "total_size": size},
        "weight_map": {key: file for file, entries in files.items() for key in entries},
    }
    (aside / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
