"""Tools: the calculator, and which tokens a reply may draw or is given because of it. Pure.

A reply asks between <|python_start|> and <|python_end|>; what the calculator says comes between
<|output_start|> and <|output_end|>, token by token in place of draws. A text is never executed: an arithmetic
expression is read into a tree of which only the kinds below are computed.
"""

from __future__ import annotations

import ast
import decimal
import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

MAX_CHARACTERS = 128
MAX_EXPRESSION = 64  # tokens
MAX_CALLS = 8  # in a reply
DIGITS = 10  # significant ones of a result that is no integer
ERROR = "error"

# Only what arithmetic is written with: no name, no string and no exponent reaches the parser.
ARITHMETIC = re.compile(r"[0-9+\-*/%.() ]+")
COUNT = re.compile(r"count (?P<part>\S+) in (?P<word>\S+)")
COUNT_METHOD = re.compile(r"""(['"])(?P<word>[^'"\\]*)\1\.count\((['"])(?P<part>[^'"\\]+)\3\)""")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)
CONTEXT = decimal.Context(prec=28)


def calculate(expression: str) -> str:
    """Value of an expression: + - * / // % and parentheses, `count C in WORD` or `"WORD".count("C")`.

    Integers are written without a point, other values with at most 10 significant digits. Division is exact
    up to 28 digits, so that 20/2 is 10 and 0.1+0.2 is 0.3. Never raises; any text takes microseconds.

    Returns:
        The value, or "error": not such an expression, longer than 128 characters, a division by zero, or a
        value of 1e18 and more, or below 1e-9 but not zero.
    """
    text = expression.strip()
    if len(text) > MAX_CHARACTERS:
        return ERROR
    if counted := COUNT.fullmatch(text) or COUNT_METHOD.fullmatch(text):
        return str(counted["word"].count(counted["part"]))
    text = THOUSANDS.sub("", text)
    if not ARITHMETIC.fullmatch(text):
        return ERROR
    try:
        with decimal.localcontext(CONTEXT):
            return _written(_value(ast.parse(text, mode="eval").body))
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ERROR


def _modulo(a: Decimal, b: Decimal) -> Decimal:
    """Remainder with the sign of the divisor, as in Python; Decimal's own has that of the dividend."""
    rest = a % b
    return rest + b if rest and (rest < 0) != (b < 0) else rest


OPERATORS: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: (a - _modulo(a, b)) // b,
    ast.Mod: _modulo,
}


def _value(node: ast.expr) -> Decimal:
    """Value of a tree of numbers and operators.

    Raises:
        ValueError: another kind of node is in it.
        ArithmeticError: a division by zero, or more than 28 digits where a remainder is asked.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Decimal(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def _written(value: Decimal) -> str:
    """The value in digits, as `calculate` says."""
    size = abs(value)
    if size >= 10**18 or 0 < size < Decimal("1e-9"):
        return ERROR
    if value == value.to_integral_value():
        return str(int(value))
    # A value of many digits before the point keeps all of them, and cents.
    rounded = decimal.Context(prec=max(DIGITS, value.adjusted() + 3)).plus(value)
    return format(rounded, "f").rstrip("0").rstrip(".")


# What may be drawn besides text, by mode: in a reply, in one that may not call, in an expression.
TEXT, TEXT_WITHOUT_CALLS, EXPRESSION = range(3)
DRAWN_SPECIALS = (
    ("<|assistant_end|>", "<|python_start|>"),
    ("<|assistant_end|>",),
    ("<|python_end|>",),
)


class ToolCalls:
    """State of the tool calls of one reply (engine.RowRules).

    Attributes:
        mode: TEXT, TEXT_WITHOUT_CALLS or EXPRESSION: what may be drawn next.
        calls: (expression, result) of those that were made.
        is_text: whether the token taken last is text of the reply: no special, no expression, no output.
    """

    def __init__(self, tokenizer: Tokenizer, tools: bool) -> None:
        """Begin a reply, which may call the calculator if `tools`."""
        self._tokenizer = tokenizer
        self.mode = TEXT if tools else TEXT_WITHOUT_CALLS
        self.calls: list[tuple[str, str]] = []
        self.is_text = True
        self._expression: list[int] = []
        self._forced: deque[int] = deque()

    def take(self, drawn: int) -> tuple[int, bool, Literal["stop", "forbidden"] | None]:
        """Put one more token into the reply: the drawn one, or one that is forced in its place.

        An expression ends after 64 tokens, and after 8 calls none begins.

        Returns:
            The token; whether it is the drawn one; "stop" at <|assistant_end|>, "forbidden" at a special
            token that may not come here.
        """
        if self._forced:
            self.is_text = False
            token = self._forced.popleft()
            if token == self._tokenizer.special_id("<|python_end|>"):
                self._call()
            return token, False, None
        special = drawn - self._tokenizer.bos_id
        self.is_text = special < 0 and self.mode != EXPRESSION
        if special >= 0:
            return drawn, True, self._take_special(SPECIALS[special])
        if self.mode == EXPRESSION:
            self._expression.append(drawn)
            if len(self._expression) == MAX_EXPRESSION:
                self._forced.append(self._tokenizer.special_id("<|python_end|>"))
        return drawn, True, None

    def _take_special(self, name: str) -> Literal["stop", "forbidden"] | None:
        if name not in DRAWN_SPECIALS[self.mode]:
            return "forbidden"
        if name == "<|assistant_end|>":
            return "stop"
        if name == "<|python_start|>":
            self.mode = EXPRESSION
        else:
            self._call()
        return None

    def _call(self) -> None:
        """Compute the expression and put its result in place of the next draws."""
        tokenizer = self._tokenizer
        expression = tokenizer.decode(self._expression)
        result = calculate(expression)
        self.calls.append((expression, result))
        self.mode = TEXT if len(self.calls) < MAX_CALLS else TEXT_WITHOUT_CALLS
        self._expression.clear()
        self._forced.append(tokenizer.special_id("<|output_start|>"))
        self._forced.extend(tokenizer.encode(result))
        self._forced.append(tokenizer.special_id("<|output_end|>"))
