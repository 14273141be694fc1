"""Look public names up when they are first used, so that importing a package loads nothing heavy (PEP 562).

Old names keep working, with a warning that names the new ones.

A package has a table of its public names and the modules that define them. Its objects say that they live in the
package: their ``__module__`` is the package's name.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: the version of adaptc
VERSION = "0.1.0"

#: packages whose frames may lie between the use of an old name and its warning
_NO_USERS = {"adaptc", "torch", "importlib"}


def warn_renamed(old: str, new: str) -> None:
    """Warn, with DeprecationWarning, that ``old`` is called ``new`` now.

    The warning names the line that uses ``old``: the innermost one outside of adaptc. Python shows it once for each
    such line.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NO_USERS and frame.f_back:
        frame = frame.f_back
    assert frame is not None
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module, text = frame.f_globals.get("__name__", "<unknown>"), f"{old} is called {new} now"
    warnings.warn_explicit(text, DeprecationWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


def lazy_names(
    package: str, homes: Mapping[str, str], moved: Mapping[str, str] | None = None, packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: the package's ``__name__``.
        homes: public name -> the module that defines it.
        moved: old name -> the dotted name that it has now. Using the old name gives a DeprecationWarning that says so.
        packages: packages and modules inside of this one that are attributes, too, without an import.

    Returns:
        two functions, for the package to assign to ``__getattr__`` and ``__dir__``.

    The ``__getattr__`` raises AttributeError for names that are in neither table.
    """
    moved = moved or {}
    for name, value in vars(sys.modules[package]).items():
        if name in homes:  # imported by the package itself
            value.__module__ = package

    def look_up(name: str) -> Any:
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name in moved:
            warn_renamed(f"{package}.{name}", moved[name])
            module, _, new_name = moved[name].rpartition(".")
            # Kept, so that the warning comes once: ``from package import name`` looks twice.
            return vars(sys.modules[package]).setdefault(name, getattr(importlib.import_module(module), new_name))
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        importlib.import_module(homes[name])
        # What came along with it is named as well: a program is made by a function, and its class never asked for.
        names = vars(sys.modules[package])
        for public, home in homes.items():
            module_names = sys.modules.get(home)
            value = None if module_names is None else vars(module_names).get(public)
            if value is not None and value is not names.get(public):
                value.__module__ = package
                names[public] = value
        return names[name]

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *packages})

    return look_up, list_names
