"""Find the modules of a model that the keys of another format's adapter file mean.

A file may spell a name in full or with underscores for dots. It may use the names of another release of a library, of
diffusers, or of the original code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from adaptc.adapter_files.formats.file_layer import TargetModule
from adaptc.adapter_files.formats.ldm import original_names
from adaptc.adapter_files.formats.mmdit import original_transformer_layers
from adaptc.adapter_files.formats.original_layers import OriginalLayer
from adaptc.adapter_files.formats.parts import ParsedKey
from adaptc.errors import CheckpointError, nearest
from adaptc.passes.graph.ops import Op

#: the prefix that the layers of a text encoder have in some releases of transformers
_TEXT_MODEL_PREFIX = "text_model."

#: a search for the ops that read the weights of modules, by the module's path
FindOps = Callable[[], Mapping[str, Op]]


def no_ops() -> Mapping[str, Op]:
    """Return no op: for callers without a program."""
    return {}


class ModuleNames:
    """The names of a model's modules that have a weight called ``weight``, in the spellings that files use.

    ``find_ops`` is called where it takes the op of a module to tell what a file means.
    """

    def __init__(self, weights: Mapping[str, Any], find_ops: FindOps = no_ops) -> None:
        self.shapes = {
            fqn.removesuffix(".weight"): tuple(t.shape)
            for fqn, t in weights.items()
            if fqn.endswith(".weight") and isinstance(t, Tensor)
        }
        self._biased = {fqn.removesuffix(".bias") for fqn in weights if fqn.endswith(".bias")}
        self._find_ops = cache(find_ops)

    # Most files have the model's own names, so the other spellings are made where one of them is asked for.

    @cached_property
    def _originals(self) -> Mapping[str, OriginalLayer]:
        return original_transformer_layers(self.shapes)

    @cached_property
    def _other_names(self) -> Mapping[str, str]:
        """Map other spellings of names to those that the model has."""
        others = original_names(self.shapes)
        others |= {n: layer.only_module or n for n, layer in self._originals.items()}
        for name in self.shapes:
            others.setdefault(
                name.removeprefix(_TEXT_MODEL_PREFIX)
                if name.startswith(_TEXT_MODEL_PREFIX)
                else _TEXT_MODEL_PREFIX + name,
                name,
            )
        return others

    @cached_property
    def _flat_names(self) -> Mapping[str, list[str]]:
        return _index_flat_names({n: n for n in self.shapes})

    @cached_property
    def _other_flat_names(self) -> Mapping[str, list[str]]:
        return _index_flat_names(self._other_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the weight of a module, or of an original layer."""
        layer = self.original_layer(name)
        return self.shapes[name] if layer is None else layer.shape

    def target(self, module: str) -> TargetModule:
        """Return what is known of a module that a file adapts."""
        return TargetModule(module, self.shapes[module], module in self._biased, lambda: self._find_ops().get(module))

    def original_layer(self, name: str) -> OriginalLayer | None:
        """Return the layer of the original code called ``name``, or None for a module of the model."""
        layer = None if name in self.shapes else self._originals.get(name)
        return None if layer is None or layer.only_module is not None else layer

    def find(self, parsed_key: ParsedKey, component: str, source: str) -> str | None:
        """Return the module of ``parsed_key``, or the original layer, or None where the model has none. A non-empty
        ``component`` prefixes the part's names.

        Raises CheckpointError where several modules have the name.
        """
        for is_own in (True, False):  # the model's own names come before other spellings
            for spelled in parsed_key.module_names:
                known = spelled if parsed_key.is_flattened or not component else spelled.removeprefix(f"{component}.")
                found = self._modules_called(known, parsed_key.is_flattened, is_own)
                if len(found) > 1:
                    raise CheckpointError(
                        f"{source}: {parsed_key.key!r} may be of any of {', '.join(map(repr, found))}, whose names "
                        "differ in dots and underscores alone, which the format does not tell apart. Rename one with "
                        "key_mapping in a file with dots, or use PEFT's format."
                    )
                if found:
                    return found[0]
        return None

    def _modules_called(self, name: str, is_flattened: bool, is_own: bool) -> Sequence[str]:
        if is_flattened:
            return (self._flat_names if is_own else self._other_flat_names).get(name, ())
        if is_own:
            return (name,) if name in self.shapes else ()
        return (self._other_names[name],) if name in self._other_names else ()

    def nearest_names(self, parsed_key: ParsedKey) -> Sequence[str]:
        """Return names of modules that are close to the name of ``parsed_key``, in the spelling that ``parsed_key``
        uses."""
        names = list(self._flat_names) if parsed_key.is_flattened else list(self.shapes)
        return nearest(parsed_key.module_names[0], names, 2)


def _index_flat_names(names: Mapping[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for spelled, name in names.items():
        found = out.setdefault(spelled.replace(".", "_"), [])
        if name not in found:
            found.append(name)
    return out
