"""The modules that an adapter file of another format means, among those of a model.

Before: names as a file spells them: in full, or with underscores for dots, of this release of a library or another, of
diffusers or of the original code. After: the one module of the model that has such a name; or None, or a
CheckpointError where several have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from adaptc.errors import CheckpointError, nearest
from adaptc.peft_files.formats.ldm import original_names
from adaptc.peft_files.formats.parts import Part

#: what transformers has in front of the layers of a text encoder, or has not
_OUTER = "text_model."


class ModuleNames:
    """Of a model with these weights: every module that has one called ``weight``."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {
            fqn.removesuffix(".weight"): tuple(t.shape)
            for fqn, t in weights.items()
            if fqn.endswith(".weight") and isinstance(t, Tensor)
        }
        self._original = original_names(self.shapes)
        # What a name of the model's own means rules; other spellings come after it.
        others = dict(self._original)
        for name in self.shapes:
            others.setdefault(name.removeprefix(_OUTER) if name.startswith(_OUTER) else _OUTER + name, name)
        self._flat = [_by_flat({n: n for n in self.shapes}), _by_flat(others)]
        self._dotted = [{n: [n] for n in self.shapes}, {spelled: [name] for spelled, name in others.items()}]

    def find(self, part: Part, component: str, source: str) -> str | None:
        """The module that ``part`` is of, whose names begin with ``component`` where that is not ''.

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

    def near(self, part: Part) -> Sequence[str]:
        """Names in the model that are close to what ``part`` says, spelled as it spells them."""
        names = list(self._flat[0]) if part.flat else list(self.shapes)
        return nearest(part.modules[0], names, 2)


def _by_flat(names: Mapping[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for spelled, name in names.items():
        found = out.setdefault(spelled.replace(".", "_"), [])
        if name not in found:
            found.append(name)
    return out
