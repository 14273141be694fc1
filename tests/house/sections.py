"""Check that the docstrings of public functions and classes have the sections they need. ``make lint`` runs it.

The sections are those of Google's style. A function has ``Args:`` with each parameter, ``Returns:`` if it returns
something, ``Raises:`` if it raises something itself, and ``Example:``. So has a method that users call, but for the
example, which its class has. The functions of a class that share their arguments have them in a section of the class
(``SHARED_ARGS``), and say what they return in their first sentence. A dataclass has ``Attributes:``. A config has an
example; the reference shows its fields.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping

from tests.house.docstring_parts import SHARED_ARGS, entries, sections
from tests.house.public import MEMBERS, PACKAGES, Function, PublicName, Source, parameters, source

#: classes whose objects functions make: the parameters of their constructors are not for users
MADE_BY_FUNCTIONS = ("AdaptedProgram", "Runner", "Bank", "Generator", "ServingModel", "Binding", "PackagedProgram")


def faults(code: Source | None = None) -> Iterator[str]:
    """Yield a line for each public name whose docstring lacks a section, or part of one."""
    code = code or source()
    for package in PACKAGES:
        for public in code.names(package):
            where = f"{code.file(public.module).relative_to(code.root)}:{public.node.lineno} {public.path}"
            if isinstance(public.node, ast.ClassDef):
                yield from _class_faults(code, public, where)
            else:
                yield from function_faults(public.node, where, example=True)


def function_faults(
    node: Function, where: str, *, example: bool, shared: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield a line for each section that a function's docstring lacks.

    ``example``: whether it needs one. ``shared``: the arguments that its class describes.
    """
    docstring = (ast.get_docstring(node) or "").strip()
    if not docstring:
        yield f"{where}: no docstring"
        return
    found = sections(docstring)
    described = entries(found.get("Args", ""))
    names = parameters(node)
    known = {**(shared or {}), **described}
    yield from (f"{where}: Args: does not describe {name}" for name in names if not known.get(name, "").strip())
    yield from (f"{where}: Args: describes {name}, which is no parameter" for name in described if name not in names)
    gives = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
    says_so = is_property or (shared and docstring.startswith("Return ")) or {"Returns", "Yields"} & {*found}
    if gives and not says_so:
        yield f"{where}: no section Returns:"
    if _raises(node) and "Raises" not in found:
        yield f"{where}: it raises, and has no section Raises:"
    if example and ">>>" not in found.get("Example", ""):
        yield f"{where}: no section Example: with a line >>>"


def _raises(node: Function) -> bool:
    """Return whether the body of a function has a ``raise``, functions inside of it aside.

    An AssertionError is for those who write a class, not for those who call.
    """
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.Raise) and not ast.unparse(one).startswith("raise AssertionError"):
            return True
        if not isinstance(one, (Function, ast.Lambda, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(one))
    return False


def _class_faults(code: Source, public: PublicName, where: str) -> Iterator[str]:
    assert isinstance(public.node, ast.ClassDef)
    docstring = (ast.get_docstring(public.node) or "").strip()
    if not docstring:
        yield f"{where}: no docstring"
        return
    found = sections(docstring)
    if public.module != "adaptc.errors" and ">>>" not in found.get("Example", ""):
        yield f"{where}: no section Example: with a line >>>"
    is_dataclass = any("dataclass" in ast.unparse(d) for d in public.node.decorator_list)
    if is_dataclass and not public.name.endswith("Config"):
        fields = [f.name for f in code.fields(public) if not f.name.startswith("_")]
        described = entries(found.get("Attributes", ""))
        yield from (f"{where}: Attributes: does not describe {name}" for name in fields if name not in described)
    made = [n for n in public.node.body if isinstance(n, Function) and n.name == "__init__"]
    own = {a for n in made for a in parameters(n)} if public.name not in MADE_BY_FUNCTIONS else set()
    known = entries(found.get("Args", ""))
    shared = entries(found.get(SHARED_ARGS, ""))
    yield from (f"{where}: Args: does not describe {name}" for name in sorted(own) if name not in known)
    members = list(code.members(public))
    for name in {*MEMBERS.get(public.name, ())} - {member.name for _, member in members}:
        yield f"{where}: MEMBERS of tests/house/public.py names {name}, which the class does not have"
    for owner, member in members:
        file = f"{where}.{member.name}" + ("" if owner == public.name else f" (of {owner})")
        yield from function_faults(member, file, example=False, shared=shared)


def main() -> int:
    """Print what is missing; return the exit status."""
    found = list(faults())
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
