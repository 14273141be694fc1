"""Make torch's arithmetic of sizes faster while a model is traced.

A model that pads to whole windows, such as Swin, computes sizes from sizes when it takes any image size. torch writes
each as an expression in which the same parts occur thousands of times. Here the sympy functions that walk an expression
visit each part once. A large quotient that came out as a polynomial with integer coefficients is not simplified:
``sympy.simplify`` takes a second for each and changes nothing. The captured program is the same.

Private torch use, with the public route that was tried: ``sympy`` in ``torch.utils._sympy.functions``, whose
``simplify`` is replaced meanwhile. Public: replacing ``sympy.simplify`` for all code. ``Basic._xreplace`` tells which
classes replace parts in a way of their own. Public: none.
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

#: the number of parts from which on a polynomial is not simplified
LARGE_POLYNOMIAL = 60


@contextlib.contextmanager
def fast_size_arithmetic() -> Iterator[None]:
    """Run the block with faster arithmetic of sizes in exports, which gives the same results."""
    quick: Any = ModuleType("sympy")
    vars(quick).update(vars(sympy))
    quick.simplify = simplify
    walks = _MemoizedWalks()
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


def simplify(expression: Any) -> Any:
    """Return ``sympy.simplify(expression)``, or a large polynomial itself, for which that is slow and changes
    nothing."""
    large = next(islice(sympy.preorder_traversal(expression), LARGE_POLYNOMIAL, None), None) is not None
    return expression if large and _is_polynomial(expression) else sympy.simplify(expression)


def _is_polynomial(expression: Any) -> bool:
    """Return whether an expression has integer coefficients only and no negative powers."""
    whole = all(number.q == 1 for number in expression.atoms(sympy.Rational))
    return whole and not any(power.exp.is_negative for power in expression.atoms(sympy.Pow))


class _MemoizedWalks:
    """Replacements for sympy's walks through expressions, which visit each part once.

    Visited parts are known by their id, and are kept so that the id stays theirs.
    """

    def __init__(self) -> None:
        self._atoms: dict[tuple[int, tuple[type, ...]], tuple[Basic, frozenset[Basic]]] = {}
        self._symbols: dict[int, tuple[Basic, frozenset[Basic]]] = {}
        self._original_walks: Any = vars(Basic)["atoms"], vars(Basic)["free_symbols"].fget, vars(Basic)["xreplace"]

    def atoms(self, expression: Any, types: tuple[Any, ...]) -> set[Basic]:
        if not types:
            return self._original_walks[0](expression)
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
            known = self._symbols[id(expression)] = expression, frozenset(self._original_walks[1](expression))
        return set(known[1])

    def xreplace(self, expression: Any, rule: Mapping[Any, Any]) -> Any:
        return self._replace(expression, rule, {})

    def _replace(self, expression: Any, rule: Mapping[Any, Any], memo: dict[int, tuple[Any, Any]]) -> Any:
        if not isinstance(expression, Basic) or type(expression)._xreplace is not Basic._xreplace:  # noqa: SLF001
            return self._original_walks[2](expression, rule) if isinstance(expression, Basic) else expression
        if expression in rule:
            return rule[expression]
        if (done := memo.get(id(expression))) is not None:
            return done[1]
        parts = [self._replace(part, rule, memo) for part in expression.args]
        changed = any(new is not old for new, old in zip(parts, expression.args, strict=True))
        new = expression.func(*parts) if changed else expression
        memo[id(expression)] = expression, new
        return new
