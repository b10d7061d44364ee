"""The calculator, and the state machine of forced tokens, without a model."""

from __future__ import annotations

import random
import re
import string
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.chat.tools import DRAWN_SPECIALS, ToolCalls, calculate
from nanochat.tokenizer.tokenizer import SPECIALS, Tokenizer

ARITHMETIC = "0123456789.+-*/%() ,"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("20/2", "10"),
        ("347+589", "936"),
        ("1,234,567 + 1", "1234568"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.3333333333"),
        ("2/3*3", "2"),
        (".5*10", "5"),
        ("100*20*.01", "20"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("7 % -3", "-2"),
        ("-(2 - 5)", "3"),
        ("--3", "3"),
        ("-0", "0"),
        ("0*-1.5", "0"),
        ("123456789012.5/1", "123456789012.5"),
        ("999999999999999999", "999999999999999999"),
        ("999999999999999999+1", "error"),
        ("1/1000000000", "0.000000001"),
        ("1/10000000000", "error"),
        ("count r in strawberry", "3"),
        ("count z in strawberry", "0"),
        ("  count an in banana ", "2"),
        ('"strawberry".count("r")', "3"),
        ("'strawberry'.count('b')", "1"),
        ("1/0", "error"),
        ("1%0", "error"),
        ("1//0", "error"),
        ("2**3", "error"),
        ("1e3", "error"),
        ("0x10", "error"),
        ("1_000", "error"),
        ("1,5", "error"),
        ("1,2345", "error"),
        ("05+1", "error"),
        ("1 2", "error"),
        ("(1", "error"),
        ("()", "error"),
        ("", "error"),
        ("count r in two words", "error"),
        ("__import__('os')", "error"),
        ("'a'.count('')", "error"),
        ("'a'*9", "error"),
        ("\u0661+1", "error"),
        ("1+1\n", "2"),
        ("1\n+1", "error"),
        ("\ud800", "error"),
        ("1+" * 100 + "1", "error"),
    ],
)
def test_the_calculator_gives(expression, value):
    assert calculate(expression) == value


def slow_value(text: str) -> Fraction | None:
    """A twin by fractions and Python's own reading of the expression; None where it has no value."""
    text = re.sub(r"(\d+\.\d*|\.\d+|\d+)", r"F('\1')", text)
    try:
        return Fraction(eval(text, {"F": Fraction, "__builtins__": {}}))
    except (ZeroDivisionError, SyntaxError, TypeError, ValueError):
        return None


def numbers() -> st.SearchStrategy[str]:
    whole = st.integers(0, 10**6).map(str)
    return whole | st.tuples(whole, st.integers(0, 999)).map(lambda pair: f"{pair[0]}.{pair[1]}")


def expressions() -> st.SearchStrategy[str]:
    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pair = st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner)
        return pair.map(lambda three: f"({three[0]} {three[1]} {three[2]})") | inner.map(lambda x: f"-{x}")

    return st.recursive(numbers(), grown, max_leaves=6)


@settings(max_examples=400, deadline=None)
@given(expressions())
def test_the_calculator_agrees_with_fractions(expression):
    given, exact = calculate(expression), slow_value(expression)
    if exact is None:
        assert given == "error"
    elif given == "error":
        # Floor and remainder of what has no 28 digits, or of what was rounded to them, may have no value.
        out_of_range = abs(exact) >= 10**18 or 0 < abs(exact) < Fraction(1, 10**9)
        assert out_of_range or len(expression) > 128 or re.search("//|%", expression)
    elif not re.search("//|%", expression):  # a quotient that was rounded may fall on the other side of one
        half_a_digit = abs(exact) * Fraction(501, 10**12) if exact.denominator > 1 else 0
        assert abs(Fraction(given) - exact) <= half_a_digit
        if exact.denominator == 1:
            assert given == str(exact.numerator)


HOSTILE = (
    st.text(max_size=300)
    | st.text(ARITHMETIC, max_size=140)
    | st.text(string.printable, max_size=140)
    | st.sampled_from(
        ["(", "-", "9", "1/", "9*", "(-", "%", "''", "count ", '"', "\\", "\x00", "1%.1"]
    ).flatmap(lambda piece: st.integers(1, 130).map(lambda times: (piece * times)[:128]))
    | st.tuples(st.text(max_size=60), st.text(max_size=60)).map(lambda t: f"count {t[0]} in {t[1]}")
    | st.tuples(st.text(max_size=60), st.text(max_size=60)).map(lambda t: f"'{t[0]}'.count('{t[1]}')")
)


def check_calculator(text: str) -> None:
    spent = []
    for _ in range(3):  # the machine may be busy with something else
        begun = time.thread_time()
        result = calculate(text)
        spent.append(time.thread_time() - begun)
        if spent[-1] < 1e-3:
            break
    assert min(spent) < 1e-3
    assert result == "error" or re.fullmatch(r"-?\d+(\.\d+)?", result)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(HOSTILE)
def test_no_text_makes_the_calculator_raise_or_wait(text):
    check_calculator(text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(HOSTILE)
def test_none_of_ten_thousand_texts_makes_the_calculator_raise_or_wait(text):
    check_calculator(text)


# -----------------------------------------------------------------------------
# Forced tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 347 + 589? 347+589 = 936. error count r in strawberry"] * 4, 300)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Ids of texts and of names of specials."""
    return [
        i
        for piece in pieces
        for i in ([tokenizer.special_id(piece)] if piece in SPECIALS else tokenizer.encode(piece))
    ]


def played(calls: ToolCalls, wanted: list[int]) -> tuple[list[int], list[bool], str | None]:
    """What comes of a model that says `wanted`, and 0 wherever it is not heard."""
    came, sampled, left = [], [], list(wanted)
    while left or calls._forced:
        forced = bool(calls._forced)
        token, drew, reason = calls.take(0 if forced else left.pop(0))
        assert drew is not forced
        if reason:
            return came + [token] * (reason == "forbidden"), sampled, reason
        came.append(token)
        sampled.append(drew)
    return came, sampled, None


def test_a_call_is_answered_by_the_calculator(tokenizer):
    call = ids_of(tokenizer, "It is ", "<|python_start|>", "347+589", "<|python_end|>")
    output = ids_of(tokenizer, "<|output_start|>", "936", "<|output_end|>")
    rest = ids_of(tokenizer, "936.")
    calls = ToolCalls(tokenizer, tools=True)
    came, sampled, reason = played(calls, call + rest + ids_of(tokenizer, "<|assistant_end|>", "x"))
    assert came == call + output + rest
    assert sampled == [True] * len(call) + [False] * len(output) + [True] * len(rest)
    assert reason == "stop"
    assert calls.calls == [("347+589", "936")]


def test_what_cannot_be_computed_is_an_error(tokenizer):
    for code in ("1/0", "import os", ""):
        calls = ToolCalls(tokenizer, tools=True)
        came, _, _ = played(calls, ids_of(tokenizer, "<|python_start|>", code, "<|python_end|>"))
        assert came[-len(tokenizer.encode("error")) - 1 : -1] == tokenizer.encode("error")
        assert calls.calls == [(code, "error")]


def test_an_expression_ends_after_64_tokens_and_no_call_comes_after_8(tokenizer):
    calls = ToolCalls(tokenizer, tools=True)
    start, end = ids_of(tokenizer, "<|python_start|>", "<|python_end|>")
    long = [start, *[tokenizer.encode("1")[0]] * 64]
    came, sampled, _ = played(calls, long)
    assert came[: len(long) + 1] == [*long, end]
    assert sampled[: len(long) + 1] == [True] * len(long) + [False]
    assert calls.calls == [("1" * 64, "error")]  # 1e63
    for _ in range(7):
        assert played(calls, [start, *tokenizer.encode("1"), end])[2] is None
    assert len(calls.calls) == 8
    assert "<|python_start|>" not in DRAWN_SPECIALS[calls.mode]
    assert played(calls, [*tokenizer.encode("x"), start])[2] == "forbidden"


@pytest.mark.parametrize("tools", [True, False])
def test_special_tokens_that_may_not_come_end_a_reply(tokenizer, tools):
    text = set(SPECIALS) - {"<|assistant_end|>"} - ({"<|python_start|>"} if tools else set())
    for name in SPECIALS:
        calls = ToolCalls(tokenizer, tools)
        came, _, reason = played(calls, ids_of(tokenizer, "a", name))
        assert (reason == "forbidden") == (name in text)
        assert came[-1] == tokenizer.special_id(name) or reason == "stop"
    for name in set(SPECIALS) - {"<|python_end|>"}:
        calls = ToolCalls(tokenizer, tools=True)
        assert played(calls, ids_of(tokenizer, "<|python_start|>", "1", name))[2] == "forbidden"


def test_any_sequence_of_draws_keeps_the_format(tokenizer):
    """Whatever a model draws, calls are closed and answered, and outputs stand nowhere else."""
    rng = random.Random(0)
    for tools in [True, False] * 150:
        calls, came, reason = ToolCalls(tokenizer, tools), [], None
        while reason is None and len(came) < 400:
            drawn = rng.randrange(tokenizer.bos_id)
            if rng.random() < 0.2:
                drawn = tokenizer.special_id(rng.choice(DRAWN_SPECIALS[calls.mode]))
            token, _, reason = calls.take(drawn)
            came += [token] * (reason != "stop")
        assert reason in (None, "stop")
        text = "".join(chr(i - tokenizer.bos_id + ord("A")) if i >= tokenizer.bos_id else "." for i in came)
        # F and G are the python markers, H and I those of the output.
        whole = re.compile(r"(\.*F\.{0,64}GH\.+I)*\.*(F\.{0,64}(GH?\.*)?)?")
        assert whole.fullmatch(text)
        assert text.count("F") <= (8 if tools else 0)
