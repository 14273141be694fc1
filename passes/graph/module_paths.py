"""Module paths, as ``torch.export`` writes them into nodes, turned into those of the model.

``torch.export`` marks a further call of a module: ``layers.0.proj@1``. The mark is dropped here, so that all calls of a
module have one path. A module may itself be named ``proj@1``. Only the names of the program's tensors tell the two
apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import fx
from torch.export import ExportedProgram

_CALLED_AGAIN = re.compile(r"@\d+$")
_ROOT = "L['self']"


def module_paths_of(fqns: Iterable[str]) -> frozenset[str]:
    """Return the paths of all modules that hold any of these tensors, at any depth."""
    found: set[str] = set()
    for fqn in fqns:
        path = fqn.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return frozenset(found)


def program_module_paths(program: ExportedProgram) -> frozenset[str]:
    """Return the paths of all modules that hold a parameter, buffer or constant of a program, at any depth."""
    return module_paths_of([*program.state_dict, *program.constants])


def clean_path(path: str, module_paths: Collection[str]) -> str:
    """Return a path without the root's name in strict captures, and without the marks of further calls.

    ``module_paths`` holds the paths of all modules, since a module may itself have such a name.
    """
    head, _, rest = path.partition(".")
    if head == _ROOT and head not in module_paths:
        path = rest
    if "@" not in path:
        return path
    cleaned = ""
    for part in path.split("."):
        candidate = f"{cleaned}.{part}" if cleaned else part
        cleaned = candidate if candidate in module_paths else _CALLED_AGAIN.sub("", candidate)
    return cleaned


def module_path(node: fx.Node, module_paths: Collection[str]) -> str:
    """Return the path of the innermost module in which a node was traced; '' for the root."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0], module_paths) if stack else ""
