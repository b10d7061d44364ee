"""JSON from files: parsed by one set of rules, and compared with the shape that its reader needs.

A file may be torn, from another version, edited by hand or made by somebody else. What Python's reader lets
through and no program can use (NaN, a number of 5,000 digits, one key twice, half of a surrogate pair) is a
`ValueError` here, and so is a value of another shape than the reader is written for.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

MAX_DIGITS = 300  # of a whole number: it still fits a float
MAX_DEPTH = 100  # of objects and lists in each other; a file of ours has fewer than ten
SHOWN = 60  # characters of a wrong value, in a message
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


def parse(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        allow_nan: take NaN and infinity, which Python writes into metrics though they are not JSON.

    Raises:
        ValueError: it is not JSON, or no value that a file of ours can hold; the message says what.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    real = float if allow_nan else _finite
    try:
        value = json.loads(
            text, object_pairs_hook=_without_twins, parse_int=_whole, parse_float=real, parse_constant=real
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses half of a surrogate pair
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    """Refuse what would take a reader beyond the depth to which Python calls functions."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [one for parts in inner for one in parts if isinstance(one, dict | list)]
    if level:
        raise ValueError("nested too deeply")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries named {shown(next(n for n in names if names.count(n) > 1))}")
    return entries


def _whole(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > MAX_DIGITS:
        raise ValueError(f"a number of {count:,} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:SHOWN]} is no finite number")
    return value


def mismatch(value: Any, shape: Any, name: str = "") -> str:
    """The first place where a value is not of a shape, in words, or "" where all of it is.

    Args:
        value: as `parse` gives it; a tuple counts as a list.
        shape: a type hint of `bool`, `int`, `float`, `str`, `None`, `Any`, `dict` and `list`, plain or with
            what they hold, a `TypedDict`, or a union of them. Keys that a TypedDict does not name are let
            through: a file may be newer than its reader.
        name: what the value is called.

    >>> mismatch({"steps": [3, "x"]}, dict[str, list[int]])
    "steps[1] is 'x', expected a whole number"
    """
    if shape is Any or shape is object:
        return ""
    if typing.is_typeddict(shape):
        return _mismatch_fields(value, shape, name)
    kind, inner = typing.get_origin(shape) or shape, typing.get_args(shape)
    if kind in (types.UnionType, typing.Union):
        reasons = [mismatch(value, one, name) for one in inner]
        # Of a union such as dict | None, the reason is that of the branch which came further.
        further = [text for text in reasons if not text.startswith(f"{name or 'it'} is ")]
        return "" if "" in reasons else (further or [_wrong(value, shape, name)])[0]
    if not _is_kind(value, kind):
        return _wrong(value, shape, name)
    if not inner:
        return ""
    if kind is dict:
        return _first((item, inner[1], _inside(name, key)) for key, item in value.items())
    return _first((item, inner[0], f"{name}[{number}]") for number, item in enumerate(value))


def _mismatch_fields(value: Any, shape: Any, name: str) -> str:
    if not isinstance(value, dict):
        return _wrong(value, shape, name)
    hints = _hints(shape)
    if missing := [key for key in hints if key in shape.__required_keys__ - value.keys()]:
        return f"{_inside(name, missing[0])} is missing"
    return _first((value[key], hint, _inside(name, key)) for key, hint in hints.items() if key in value)


def _first(parts: Iterable[tuple[Any, Any, str]]) -> str:
    return next(filter(None, (mismatch(*part) for part in parts)), "")


def _inside(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


_hints = functools.cache(typing.get_type_hints)


def _is_kind(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    return type(value) is (types.NoneType if kind is None else kind)  # a bool is not an int here


def _wrong(value: Any, shape: Any, name: str) -> str:
    return f"{name or 'it'} is {shown(value)}, expected {describe(shape)}"


def shown(value: Any) -> str:
    """A wrong value for a message: plain text in ASCII, short, whatever is in it."""
    if isinstance(value, dict | list | tuple | None):
        return WORDS[list if isinstance(value, tuple) else type(value)]
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def describe(shape: Any) -> str:
    """A shape in the words of a message."""
    kind = typing.get_origin(shape) or shape
    if kind in (types.UnionType, typing.Union):
        return " or ".join(describe(inner) for inner in typing.get_args(shape))
    if typing.is_typeddict(shape):
        return WORDS[dict]
    return WORDS[list if kind is tuple else types.NoneType if kind is None else kind]
