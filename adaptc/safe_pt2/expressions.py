"""Check expressions over sizes, which torch evaluates as Python: only numbers, symbols, operators and known functions
pass.

torch.export writes an expression as sympy's ``srepr`` (``Mul(Integer(2), Symbol('s7', integer=True))``), the name of a
range as sympy's ``str``, and guards as Python over the inputs (``L['x'].size()[0] >= 2``). This file reads all three as
Python's syntax tree and evaluates nothing.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptc.archives.names import check_plain, word_set
from adaptc.archives.refusal import UnsafeFile, short_repr

_MAX_LENGTH = 8_000
_PRINTABLE = re.compile(r"[\x20-\x7e]+")
_SYMBOL = re.compile(r"(s|u|zf|zuf|ps|z|i)\d{1,5}")
_FLOAT = re.compile(r"-?\d{1,60}(\.\d{0,60})?([eE][+-]?\d{1,3})?")
_ASSUMPTIONS = word_set(
    "integer positive negative nonnegative nonpositive nonzero zero real rational finite extended_real"
)
_CONSTANTS = frozenset(["oo", "int_oo", "true", "false", "nan", "zoo"])
# The functions of torch.utils._sympy.functions, and those of sympy that torch writes for sizes.
_FUNCTIONS = word_set(
    """
    FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv Max Min PowByNatural FloatPow
    FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat
    Identity Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not Xor
    Abs floor ceiling Piecewise ExprCondPair
    BitwiseFn_bitwise_and BitwiseFn_bitwise_or BitwiseFn_bitwise_xor
    """
) | {f"OpaqueUnaryFn_{n}" for n in word_set("sqrt cos cosh sin sinh tan tanh asin acos atan exp log asinh log2")}
_SHIFTS = frozenset(["LShift", "RShift"])
_MAX_POWER = 16
_MAX_TERMS = 512  # the most terms of a multiplied-out expression
_MAX_BITS = 8_192  # the most bits of a number in it
_MAX_DEPTH = 64


@dataclass(frozen=True)
class _Cost:
    """An upper bound on the cost of evaluating: the terms once multiplied out, and the bits of the largest number."""

    terms: int = 1
    bits: int = 64

    def check_limits(self) -> _Cost:
        if self.terms > _MAX_TERMS or self.bits > _MAX_BITS:
            raise UnsafeFile("expected an expression over sizes, found one that takes too long to evaluate")
        return self


@functools.lru_cache(4_096)  # a program repeats a few expressions thousands of times
def check_size_expression(text: str) -> str:
    """Return ``text``. Raises UnsafeFile where it is no expression over sizes, or could take very long to evaluate."""
    _expression_cost(_parse(text), 0)
    return text


def is_symbol(text: str) -> bool:
    return _SYMBOL.fullmatch(text) is not None


def _parse(text: str, description: str = "an expression over sizes") -> ast.expr:
    if len(text) > _MAX_LENGTH or not _PRINTABLE.fullmatch(text):
        raise UnsafeFile(f"expected {description}, found {short_repr(text)} of {len(text)} characters")
    depth = 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if depth > _MAX_DEPTH:
            raise UnsafeFile(f"expected {description}, found one nested too deeply")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnsafeFile(f"expected {description}, found {short_repr(text)}") from error


def _sum_cost(costs: Sequence[_Cost]) -> _Cost:
    return _Cost(sum(c.terms for c in costs) or 1, max((c.bits for c in costs), default=64) + len(costs)).check_limits()


def _product_cost(costs: Sequence[_Cost]) -> _Cost:
    out = _Cost(1, 0)
    for c in costs:
        out = _Cost(out.terms * c.terms, out.bits + c.bits).check_limits()
    return out


def _power_cost(base: _Cost, exponent: ast.expr) -> _Cost:
    value = _number_of(exponent)
    if value is None:
        raise UnsafeFile(f"expected a power that is a number, found {short_repr(ast.unparse(exponent))}")
    if abs(value) > _MAX_POWER:
        raise UnsafeFile(f"expected a power of at most {_MAX_POWER}, found {value}")
    return _product_cost([base] * max(1, abs(int(value))))


def _number_of(node: ast.expr) -> int | float | None:
    """Return the number that a node spells as ``-2``, ``Integer(-2)`` or ``Rational(1, 2)``; None for any other
    node."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = _number_of(inner)
            return None if value is None else -value
        case ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            return _number_of(inner)
        case ast.Call(func=ast.Name(id="Rational"), args=[up, down], keywords=[]):
            over, under = _number_of(up), _number_of(down)
            return over / under if over is not None and under else None
    return None


def _expression_cost(node: ast.expr, depth: int) -> _Cost:
    if depth > _MAX_DEPTH:
        raise UnsafeFile("expected an expression over sizes, found one nested too deeply")

    def costs_of(nodes: Sequence[ast.expr]) -> list[_Cost]:
        return [_expression_cost(n, depth + 1) for n in nodes]

    match node:
        case ast.Constant(value=bool()):
            return _Cost()
        case ast.Constant(value=int() as value) if value.bit_length() <= 64:
            return _Cost(1, value.bit_length())
        case ast.Constant(value=float()):
            return _Cost()
        case ast.Name(id=name) if name in _CONSTANTS or is_symbol(name):
            return _Cost()
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Invert() | ast.Not(), operand=inner):
            return _expression_cost(inner, depth + 1)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.BitAnd() | ast.BitOr() | ast.BitXor(), left=a, right=b):
            return _sum_cost(costs_of([a, b]))
        case ast.BinOp(op=ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod(), left=a, right=b):
            return _product_cost(costs_of([a, b]))
        case ast.BinOp(op=ast.Pow(), left=a, right=b):
            return _power_cost(_expression_cost(a, depth + 1), b)
        case ast.Compare(left=a, ops=ops, comparators=rest) if all(
            isinstance(o, (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for o in ops
        ):
            return _sum_cost(costs_of([a, *rest]))
        case ast.Tuple(elts=elements):
            return _sum_cost(costs_of(elements))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call_cost(name, args, keywords, costs_of)
    raise UnsafeFile(f"expected an expression over sizes, found {short_repr(ast.unparse(node))}")


def _call_cost(
    name: str,
    args: list[ast.expr],
    keywords: list[ast.keyword],
    costs_of: Callable[[Sequence[ast.expr]], list[_Cost]],
) -> _Cost:
    match name, args:
        case "Symbol", [ast.Constant(value=str() as text)]:
            known = all(k.arg in _ASSUMPTIONS and _is_bool(k.value) for k in keywords)
            if known and is_symbol(text):
                return _Cost()
            raise UnsafeFile(f"expected a symbol such as s7, found {short_repr(text)}")
        case "Float", [ast.Constant(value=str() as text)] if _FLOAT.fullmatch(text):
            if all(k.arg == "precision" and _is_small_number(k.value) for k in keywords):
                return _Cost()
    if keywords:
        raise UnsafeFile(f"expected no named arguments, found some of {short_repr(name)}")
    if name in ("Integer", "Float", "Rational") and args and all(_number_of(a) is not None for a in args):
        return _product_cost(costs_of(args))
    if name == "Add":
        return _sum_cost(costs_of(args))
    if name == "Mul":
        return _product_cost(costs_of(args))
    if name in ("Pow", "PowByNatural", "FloatPow") and len(args) == 2:
        return _power_cost(costs_of(args[:1])[0], args[1])
    if name in _SHIFTS and len(args) == 2:
        return _shift_cost(costs_of(args[:1])[0], args[1])
    if name in _FUNCTIONS:
        inner = _sum_cost(costs_of(args))
        return _Cost(max(1, inner.terms), inner.bits)
    raise UnsafeFile(f"expected a function over sizes, found {short_repr(name)}")


def _shift_cost(base: _Cost, by: ast.expr) -> _Cost:
    value = _number_of(by)
    if not isinstance(value, int) or not 0 <= value <= 63:
        raise UnsafeFile(f"expected a shift by a number of 0 to 63, found {short_repr(ast.unparse(by))}")
    return _Cost(base.terms, base.bits + value).check_limits()


def _is_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _is_small_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and 1 <= node.value <= 1_000


# -- guards ----------------------------------------------------------------------------------------------------------

# torch pastes guards into the source of a function, so no sign may end a line, a string or a statement there.
_GUARD_TEXT = re.compile(r"[\w .,()\[\]'<>=!+\-*/%&|^~]+")
_GUARD_METHODS = frozenset(["size", "stride", "storage_offset", "dim", "numel"])
_GUARD_FUNCTIONS = frozenset(
    ["IsNonOverlappingAndDenseIndicator", "cast_symbool_to_symint_guardless", "max", "min", "abs", "int"]
)
_GUARD_MODULES = {
    "math": word_set("ceil floor trunc sqrt isnan isinf pow fmod log2"),
    "torch": word_set("sym_float sym_int sym_max sym_min sym_not sym_ite _sym_sqrt sym_sqrt _sym_log2"),
}


def check_guard(text: str) -> str:
    """Return ``text``. Raises UnsafeFile where it is no condition on the sizes and values of inputs."""
    if not _GUARD_TEXT.fullmatch(text):
        raise UnsafeFile(f"expected a condition on inputs, found {short_repr(text)}")
    _check_guard_node(_parse(text, "a condition on inputs"), 0)
    return text


def _check_guard_node(node: ast.expr, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise UnsafeFile("expected a condition on inputs, found one nested too deeply")
    operands: list[ast.expr]
    match node:
        case ast.Constant(value=str() as value):
            check_plain(value)
            return
        case ast.Constant(value=bool() | int() | float() | None) | ast.Name(id="L" | "inf"):
            return
        case ast.BoolOp(values=operands):
            pass
        case ast.UnaryOp(operand=a):
            operands = [a]
        case ast.Compare(left=a, ops=ops, comparators=rest) if not any(isinstance(o, (ast.In, ast.NotIn)) for o in ops):
            operands = [a, *rest]
        case ast.BinOp(op=ast.Pow(), left=a, right=b):
            power = _number_of(b)
            if power is None or abs(power) > _MAX_POWER or any(isinstance(n, ast.Pow) for n in ast.walk(a)):
                raise UnsafeFile(f"expected a power that is a small number, found {short_repr(ast.unparse(b))}")
            operands = [a]
        case ast.BinOp(op=ast.LShift() | ast.RShift() | ast.MatMult()):
            raise UnsafeFile(f"expected a condition on inputs, found {short_repr(ast.unparse(node))}")
        case ast.BinOp(left=a, right=b):
            operands = [a, b]
        case ast.Subscript(value=a, slice=ast.Constant(value=str() | int()) as key):
            operands = [a, key]
        case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return
        case ast.Attribute(value=a, attr=name) if not name.startswith("_"):
            operands = [a]
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name), args=operands, keywords=[]) if (
            name in _GUARD_MODULES.get(module, ())
        ):
            pass
        case ast.Call(func=ast.Attribute(value=a, attr=name), args=[], keywords=[]) if name in _GUARD_METHODS:
            operands = [a]
        case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]) if name in _GUARD_FUNCTIONS:
            pass
        case _:
            raise UnsafeFile(f"expected a condition on inputs, found {short_repr(ast.unparse(node))}")
    for part in operands:
        _check_guard_node(part, depth + 1)
