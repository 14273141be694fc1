"""Read conditions on sizes as ``torch.export`` writes them, such as ``L['x'].size()[0] != 1`` and ``2*s7``.

The texts may come from a stranger's file, so nothing is evaluated as code. A text is parsed to Python's syntax tree,
and a function of known sizes is built from the few operators that sizes are made with. A text that is not understood
gives None. Then the graph itself fails where the sizes do not fit.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Sizes = Mapping[Any, int]
SizeFunction = Callable[[Sizes], Any]

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
}
_MAX_LENGTH, _MAX_DEPTH = 4_000, 40
_SIZE_PATTERN = re.compile(r"L((?:\[[^\[\]]+\])+)\.size\(\)\[(\d+)\]")


@dataclass(frozen=True)
class Condition:
    """A condition on the sizes of a call.

    ``text`` shows it with the inputs' names. ``size_positions`` has the (flat input, axis) of each size that ``test``
    takes.
    """

    text: str
    size_positions: Sequence[tuple[int, int]]
    test: SizeFunction

    def is_broken_by(self, shapes: Sequence[Any]) -> bool:
        """Return whether a call whose flat inputs have these shapes breaks the condition."""
        try:
            return not self.test({(i, axis): shapes[i][axis] for i, axis in self.size_positions})
        except ZeroDivisionError:  # the condition divides by a size of zero, and so says nothing about it
            return False


def parse_condition(text: str, names: Sequence[str]) -> Condition | None:
    """Return a guard of an exported program as a condition; ``names`` are those of its flat inputs.

    None for a guard that reads anything but sizes, and for one that is not understood.
    """
    variable_of: dict[tuple[int, int], str] = {}

    def name(match: re.Match[str]) -> str:
        at = _input_position(match[1], names)
        if at is None:
            return "_unknown"
        return variable_of.setdefault((at, int(match[2])), f"v{len(variable_of)}")

    function = parse_expression(_SIZE_PATTERN.sub(name, text))
    if (
        function is None
        or not variable_of
        or "L[" in (shown := _SIZE_PATTERN.sub(lambda m: f"{_readable_path(m[1])}.shape[{m[2]}]", text))
    ):
        return None
    variables = {v: where for where, v in variable_of.items()}
    try:
        function(dict.fromkeys(variables, 2))
    except ZeroDivisionError:
        pass
    except KeyError:
        return None
    return Condition(shown, list(variable_of), lambda sizes: function({v: sizes[w] for v, w in variables.items()}))


@lru_cache(1024)
def parse_expression(text: str) -> SizeFunction | None:
    """Return ``text`` as a function of the sizes it names; None where it is no expression over sizes."""
    if len(text) > _MAX_LENGTH:
        return None
    try:
        return _build_function(ast.parse(text, mode="eval").body, 0)
    except (_UnknownSyntaxError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def solve_for_symbol(text: str, sizes: Sizes, symbol: str, value: int) -> int | None:
    """Return the integer ``symbol`` at which ``text``, linear in it, equals ``value``; None where there is none.

    ``sizes`` has the other symbols of ``text``.
    """
    function = parse_expression(text)
    assert function is not None
    zero, one = (function({**sizes, symbol: n}) for n in (0, 1))
    if one == zero or (value - zero) % (one - zero):
        return None
    found = (value - zero) // (one - zero)
    return found if function({**sizes, symbol: found}) == value else None


def symbol_names(text: str) -> list[str]:
    """Return the names of sizes in an expression, sorted."""
    return sorted({n for n in re.findall(r"[A-Za-z_]\w*", text) if n not in _CALLS})


class _UnknownSyntaxError(Exception):
    pass


def _build_function(node: ast.expr, depth: int) -> SizeFunction:
    if depth > _MAX_DEPTH:
        raise _UnknownSyntaxError
    match node:
        case ast.Constant(value=int() as value):
            return lambda sizes: value
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            minus = _build_function(inner, depth + 1)
            return lambda sizes: -minus(sizes)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            negated = _build_function(inner, depth + 1)
            return lambda sizes: not negated(sizes)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in _BINARY:
            of, left, right = _BINARY[type(op)], _build_function(a, depth + 1), _build_function(b, depth + 1)
            return lambda sizes: of(left(sizes), right(sizes))
        case ast.BoolOp(op=op, values=values):
            every, parts = all if isinstance(op, ast.And) else any, [_build_function(v, depth + 1) for v in values]
            return lambda sizes: every(p(sizes) for p in parts)
        case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in _COMPARISONS:
            compare, low, high = _COMPARISONS[type(op)], _build_function(a, depth + 1), _build_function(b, depth + 1)
            return lambda sizes: compare(low(sizes), high(sizes))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS and len(args) == 2:
            call, parts = _CALLS[name], [_build_function(a, depth + 1) for a in args]
            return lambda sizes: call(*(p(sizes) for p in parts))
    raise _UnknownSyntaxError


def _readable_path(path: str) -> str:
    """Return a path such as ``['cache'][0]`` as ``cache[0]``."""
    first, rest = path[1:].split("]", 1)
    return first.strip("'\"") + rest


def _input_position(path: str, names: Sequence[str]) -> int | None:
    """Return the position of the flat input that a path such as ``['cache'][0]`` means; None where there is none.

    Names are formed by the rule that torch names placeholders by.
    """
    keys = [k.strip("'\"") for k in re.findall(r"\[([^\[\]]+)\]", path)]
    if keys[0] == "flat_args" and len(keys) == 2 and keys[1].isdecimal():
        return int(keys[1]) if int(keys[1]) < len(names) else None
    name = re.sub(r"[^a-zA-Z0-9]", "_", "_".join(keys)).lower()
    return names.index(name) if name in names else None
