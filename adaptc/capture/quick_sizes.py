"""Make torch's arithmetic of sizes faster while a model is traced.

Before: a model that pads to whole windows and divides by them, such as Swin, at any image size. torch writes each of
its sizes as an expression of those before it, in which the same parts come thousands of times. After: the same program.
Functions of sympy that walk through an expression meet each part once, and a quotient of many terms that is a
polynomial with whole coefficients is left as the division made it: ``sympy.simplify`` takes a second for each of these
and changes nothing.

Private torch use, with the public route that was tried: ``sympy`` in ``torch.utils._sympy.functions``, whose
``simplify`` is another one meanwhile (public: replacing ``sympy.simplify``, for everybody); and ``Basic._xreplace``,
which tells classes that replace parts in a way of their own (public: none).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any

import sympy
from sympy import Basic
from torch.utils._sympy import functions

#: parts of an expression, from which on it is not simplified
MANY = 60


@contextlib.contextmanager
def quick_sizes() -> Iterator[None]:
    """A block in which exports compute with sizes of many terms faster, and to the same."""
    quick: Any = ModuleType("sympy")
    vars(quick).update(vars(sympy))
    quick.simplify = simplified
    walks = _Walks()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (functions, "sympy", quick),
            (Basic, "atoms", lambda self, *types: walks.atoms(self, types)),
            (Basic, "free_symbols", property(walks.free_symbols)),
            (Basic, "xreplace", lambda self, rule: walks.xreplace(self, rule)),
        ):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield


def simplified(expression: Any) -> Any:
    """Return ``sympy.simplify(expression)``, or the expression itself where that takes long and changes nothing."""
    large = next(islice(sympy.preorder_traversal(expression), MANY, None), None) is not None
    return expression if large and _is_polynomial(expression) else sympy.simplify(expression)


def _is_polynomial(expression: Any) -> bool:
    """Whether nothing is divided in an expression, as in what a common divisor was taken out of."""
    whole = all(number.q == 1 for number in expression.atoms(sympy.Rational))
    return whole and not any(power.exp.is_negative for power in expression.atoms(sympy.Pow))


class _Walks:
    """sympy's walks through expressions, each part of which is met once. Parts are known by identity, and kept."""

    def __init__(self) -> None:
        self._atoms: dict[tuple[int, tuple[type, ...]], tuple[Basic, frozenset[Basic]]] = {}
        self._symbols: dict[int, tuple[Basic, frozenset[Basic]]] = {}
        self._plain: Any = vars(Basic)["atoms"], vars(Basic)["free_symbols"].fget, vars(Basic)["xreplace"]

    def atoms(self, expression: Any, types: tuple[Any, ...]) -> set[Basic]:
        if not types:
            return self._plain[0](expression)
        return set(self._atoms_of(expression, tuple(t if isinstance(t, type) else type(t) for t in types)))

    def _atoms_of(self, expression: Any, types: tuple[type, ...]) -> frozenset[Basic]:
        if not isinstance(expression, Basic):
            return frozenset()
        key = id(expression), types
        if (known := self._atoms.get(key)) is not None:
            return known[1]
        found = frozenset((expression,)) if isinstance(expression, types) else frozenset[Basic]()
        found = found.union(*(self._atoms_of(part, types) for part in expression.args))
        self._atoms[key] = expression, found
        return found

    def free_symbols(self, expression: Any) -> set[Basic]:
        known = self._symbols.get(id(expression))
        if known is None:
            known = self._symbols[id(expression)] = expression, frozenset(self._plain[1](expression))
        return set(known[1])

    def xreplace(self, expression: Any, rule: Mapping[Any, Any]) -> Any:
        return self._replaced(expression, rule, {})

    def _replaced(self, expression: Any, rule: Mapping[Any, Any], known: dict[int, tuple[Any, Any]]) -> Any:
        if not isinstance(expression, Basic) or type(expression)._xreplace is not Basic._xreplace:  # noqa: SLF001
            return self._plain[2](expression, rule) if isinstance(expression, Basic) else expression
        if expression in rule:
            return rule[expression]
        if (done := known.get(id(expression))) is not None:
            return done[1]
        parts = [self._replaced(part, rule, known) for part in expression.args]
        changed = any(new is not old for new, old in zip(parts, expression.args, strict=True))
        new = expression.func(*parts) if changed else expression
        known[id(expression)] = expression, new
        return new
