"""Find the modules of a model that the keys of another format's adapter file mean.

A file may spell a name in full or with underscores for dots. It may use the names of another release of a library, of
diffusers, or of the original code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from adaptc.adapter_files.formats.ldm import original_names
from adaptc.adapter_files.formats.parts import KeyPart
from adaptc.errors import CheckpointError, nearest

#: the prefix that the layers of a text encoder have in some releases of transformers
_OUTER = "text_model."


class ModuleNames:
    """The names of a model's modules that have a weight called ``weight``, in the spellings that files use."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {
            fqn.removesuffix(".weight"): tuple(t.shape)
            for fqn, t in weights.items()
            if fqn.endswith(".weight") and isinstance(t, Tensor)
        }
        self._original = original_names(self.shapes)
        # The model's own names come before other spellings.
        others = dict(self._original)
        for name in self.shapes:
            others.setdefault(name.removeprefix(_OUTER) if name.startswith(_OUTER) else _OUTER + name, name)
        self._flat = [_by_flat({n: n for n in self.shapes}), _by_flat(others)]
        self._dotted = [{n: [n] for n in self.shapes}, {spelled: [name] for spelled, name in others.items()}]

    def find(self, part: KeyPart, component: str, source: str) -> str | None:
        """Return the module of ``part``, or None where the model has none. A non-empty ``component`` prefixes the
        part's names.

        Raises CheckpointError where several modules have the name.
        """
        for names in self._flat if part.flat else self._dotted:
            for spelled in part.modules:
                known = spelled if part.flat or not component else spelled.removeprefix(f"{component}.")
                found = names.get(known, ())
                if len(found) > 1:
                    raise CheckpointError(
                        f"{source}: {part.key!r} may be of any of {', '.join(map(repr, found))}, whose names differ "
                        f"in dots "
                        "and underscores alone, which the format does not tell apart. Rename one with key_mapping in "
                        "a file "
                        "with dots, or use PEFT's format."
                    )
                if found:
                    return found[0]
        return None

    def near(self, part: KeyPart) -> Sequence[str]:
        """Return names of modules that are close to the name of ``part``, in the spelling that ``part`` uses."""
        names = list(self._flat[0]) if part.flat else list(self.shapes)
        return nearest(part.modules[0], names, 2)


def _by_flat(names: Mapping[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for spelled, name in names.items():
        found = out.setdefault(spelled.replace(".", "_"), [])
        if name not in found:
            found.append(name)
    return out
