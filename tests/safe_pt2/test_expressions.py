"""What torch writes for sizes is read, and nothing else; what is read is quick to evaluate."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._sympy import functions as F
from torch.utils._sympy.numbers import int_oo

from adaptc.archives.refusal import UnsafeFile
from adaptc.safe_pt2.expressions import check_guard, check_size_expression
from tests.support.cover import examples

S = sympy.Symbol("s7", integer=True, positive=True)
U = sympy.Symbol("u0", integer=True)
MADE = [
    S, int_oo, sympy.oo, F.Max(1, U), F.Min(S, 4), sympy.Eq(S, 3), sympy.Ne(S, 3), S < 5, S >= 5,
    sympy.And(S < 5, S > 1), sympy.Or(S < 2, U > 1), sympy.Not(sympy.Eq(S, 2)), sympy.true, sympy.Float(1.5), S / 2, -S,
    F.FloorDiv(S + 1, 2), F.Mod(S, 2), F.PythonMod(U, 3), S**2, F.OpaqueUnaryFn_sqrt(S), F.IntTrueDiv(S, 3),
    F.ToFloat(S), F.CeilToInt(F.IntTrueDiv(S, 3)), F.ModularIndexing(S, 2, 3), F.Where(S < 2, S, U),
    sympy.Piecewise((1, S < 3), (2, True)), F.BitwiseFn_bitwise_and(S, 3), sympy.S.Half, sympy.floor(S / 2),
    F.LShift(U, 3), F.PowByNatural(U, 2), F.TruncToInt(F.ToFloat(U)), (S + U) * (S - 2 * U) + 7,
]  # fmt: skip


@pytest.mark.parametrize("made", MADE, ids=str)
def test_what_torch_writes(made: sympy.Basic) -> None:
    written = sympy.printing.repr.srepr(made)
    assert check_size_expression(written) == written
    assert check_size_expression(str(made)) == str(made)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "s7.__class__", "(lambda: 1)()", "[s7 for s7 in (1,)]", "open", "exec('1')",
        "Symbol('__import__(1)')", "Symbol('os')", "Symbol('s7', key=1)", "Symbol('s7', integer=print(1))",
        "Symbol(s7)",
        "Float('1; 2')", "Float('1e99999')", "Function('f')(s7)", "sympify('1')", "S('1')", "parse_expr('1')",
        "lambdify(s7, 1)", "Integer('1')", "Integer(s7)", "f'{1}'", "'text'", "b'1'", "...", "s7[0]", "s7 if s7 else 1",
        "s7 and 1", "(s7 := 1)", "*s7", "s7; s7", "s7\n", "", "   ", "1 +", "s" * 9_000, "s9999999", "E1", "x", "pi",
        "Dummy('s7')", "Max(s7, key=1)", "Wild('s7')", "s7 in s7", "s7 is s7", "await s7", "s7 @ s7", "s7 << 2",
    ],
)  # fmt: skip
def test_what_it_does_not(text: str) -> None:
    with pytest.raises(UnsafeFile):
        check_size_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "2**10**9", "Pow(Integer(10), Integer(1000000000))", "9**9**9",
        "Pow(Pow(Pow(Integer(9), Integer(9)), Integer(16)), Integer(16))",
        "9" * 3_000, "LShift(Integer(1), Integer(1000000000))", "LShift(s7, s8)", "Pow(Integer(2), s7)",
        "(s1 + s2 + s3)**16 * (s1 + s4 + s5)**16", "Pow(s7, Pow(Integer(2), Integer(9)))", "(" * 150 + "s7" + ")" * 150,
        "-" * 3_000 + "s7", "+".join(["s7"] * 3_000), "Max(" * 90 + "1" + ")" * 90, "9**16**16",
    ],
)  # fmt: skip
def test_what_takes_for_ever(text: str) -> None:
    with pytest.raises(UnsafeFile):
        check_size_expression(text)


@given(st.text(alphabet="s7u0123()+-*/%<>=,.'\"_ abcdefMaxIntegerSymbol\n\\[]{}:;#@", max_size=60))
@example("(s7 + 1) * 3 - u0")
@example("Max(1, s7)")
@settings(max_examples=examples(300), deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (check_size_expression, check_guard):
        try:
            found = read(text)
        except UnsafeFile as error:
            assert "expected" in str(error)  # noqa: PT017
        else:
            assert found == text
            assert "__" not in text


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] >= 2", "L['x'].size()[0] == L['args'][1].size()[1]", "((L['x'].size()[0] % 2) == 0)",
        "math.isnan(L['f'])", "L['f'] == math.inf", "L['mode'] == 'plain'", "not (L['x'].size()[0] == 1)",
        "2*L['x'].size()[1] + 1 <= 100 and L['x'].size()[0] != 4", "L['x'].stride()[0] == 1",
        "torch.sym_max(L['x'].size()[0], 3) == 3", "L['d'].field.size()[0] == 3", "L['n'] is None",
        "max(L['n'], 2) < 9",
        "L['x'].size()[0] // 2 < 7", "L['x'].size()[0]**2 < 900",
    ],
)  # fmt: skip
def test_guards(text: str) -> None:
    assert check_guard(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "print(1)", "L['x'].tofile('a')", "L['x'].__class__", "math.factorial(9)", "torch.load('a')", "torch.os",
        "torch.sym_max.__globals__", "L['x'] == \"a\"", "L['a'] == 'b' # c", "L['x'], 1", "L['x'] == 'a\\'b'",
        "(L := 1)", "L if L else 1", "[x for x in L]", "lambda: 1", "9**9**9", "((9**16)**16)**16 == 1", "1 << 99",
        "L['x'](1)",
        "L['x'].size(print(1))", "L[print(1)]", "open('a').read()", "L in L", "eval('1')", "x == 1", "",
    ],
)  # fmt: skip
def test_no_guards(text: str) -> None:
    with pytest.raises(UnsafeFile):
        check_guard(text)
