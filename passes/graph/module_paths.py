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


def owners(fqns: Iterable[str]) -> frozenset[str]:
    """Return the paths of all modules that hold any of these tensors, at any depth."""
    found: set[str] = set()
    for fqn in fqns:
        path = fqn.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return frozenset(found)


def owners_of(program: ExportedProgram) -> frozenset[str]:
    """Return the paths of all modules that hold a parameter, buffer or constant of a program, at any depth."""
    return owners([*program.state_dict, *program.constants])


def clean_path(path: str, known: Collection[str]) -> str:
    """Return a path without the root's name in strict captures, and without the marks of further calls.

    ``known`` holds the paths of all modules, since a module may itself have such a name.
    """
    head, _, rest = path.partition(".")
    if head == _ROOT and head not in known:
        path = rest
    if "@" not in path:
        return path
    done = ""
    for part in path.split("."):
        whole = f"{done}.{part}" if done else part
        done = whole if whole in known else _CALLED_AGAIN.sub("", whole)
    return done


def module_path(node: fx.Node, known: Collection[str]) -> str:
    """Return the path of the innermost module in which a node was traced; '' for the root."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0], known) if stack else ""
