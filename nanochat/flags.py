"""Domains of flags: what their values may be, as the metadata beside each flag says, checked before any work.

A number that no run can use (infinite, negative, far too large) is refused in one line by the flag's name,
instead of by whatever breaks first after an hour.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any

from nanochat import files, typed_json
from nanochat.errors import UserError

LARGEST = 2**63 - 1  # of a whole number: what tensors, files and generators of random numbers hold
QUOTES = "'\""
BOUNDS = ("above", "at_least", "at_most")


def type_of(hint: Any) -> Any:
    """The type of a flag's value, without the None of a flag that may be left out."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def is_number(hint: Any) -> bool:
    """Whether the values of a flag are numbers."""
    return type_of(hint) in (int, float)


def domain(item: dataclasses.Field[Any], hint: Any) -> str:
    """What the values of a number's flag may be, in words: "0 or more", "from 1 to 1,000"."""
    above, at_least, at_most = (item.metadata.get(name) for name in BOUNDS)
    what = "a whole number " if type_of(hint) is int else "a number "
    if above is None and at_least is None:
        return what.strip()
    if above is not None:
        return f"{what}above {above:,}" + ("" if at_most is None else f", at most {at_most:,}")
    return f"{at_least:,} or more" if at_most is None else f"{what}from {at_least:,} to {at_most:,}"


def require_domain(args: Any) -> None:
    """Refuse values that are outside of the domains of their flags.

    Raises:
        UserError: names the first of them, its value and what was expected.
    """
    hints = typing.get_type_hints(type(args))
    for item in dataclasses.fields(args):
        values = getattr(args, item.name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and (expected := _expected(item, hints[item.name], value)):
                name = item.name if item.metadata.get("positional") else f"--{item.name.replace('_', '-')}"
                raise UserError(f"{name}={typed_json.shown(value).strip(QUOTES)}: expected {expected}.")


def _expected(item: dataclasses.Field[Any], hint: Any, value: Any) -> str:
    """What was expected instead of a value, or "" where it is in the domain of its flag."""
    facts = item.metadata
    if choices := facts.get("choices"):
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    if is_number(hint):
        above_all = ", below 2^63" if value > LARGEST and type_of(hint) is int else ""
        return "" if _is_within(item, hint, value) else domain(item, hint) + above_all
    if not isinstance(value, str) or not value or facts.get("path"):
        return ""
    if "names" in facts:
        return "" if files.is_name(facts["names"], value) else files.NAME_RULE
    if not re.fullmatch(facts.get("pattern", ".*"), value, re.DOTALL):
        return str(facts["expected"])
    return "" if files.is_utf8(value) else "a text in UTF-8"


def _is_within(item: dataclasses.Field[Any], hint: Any, value: Any) -> bool:
    above, at_least, at_most = (item.metadata.get(name) for name in BOUNDS)
    if type_of(hint) is int and not -LARGEST <= value <= LARGEST:
        return False
    return (
        math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
