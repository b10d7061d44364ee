"""Flags: a field of a dataclass with its help and its domain beside it, read from a command line or a file.

A number that no run can use (infinite, negative, far too large) is refused in one line by the flag's name,
instead of by whatever breaks first after an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat.common import files, typed_json
from nanochat.common.errors import UserError

Args = TypeVar("Args")

LARGEST = 2**63 - 1  # of a whole number: what tensors, files and generators of random numbers hold
QUOTES = "'\""
BOUNDS = ("above", "at_least", "at_most")
MESSAGE_LETTERS = 300  # of what the parser says: a wrong value may be long


def flag(default: Any, help: str, *domain: float, **metadata: Any) -> Any:
    """A field with a default, a line of help, and what else is known of it in `metadata`.

    A number has a lower bound, `above` or `at_least`, and may have an upper one, `at_most`; `domain` is the
    last two in order. `choices` are all that is taken, and `reads` makes one of them of an older name.
    `pattern` matches what is taken, which `expected` says in words. `names` says in which part of the base
    directory a text names something, `path` that it is a path and may have any bytes. `short` is a one-letter
    form, `positional` a value without a flag.

    A resumed run has to be given the value that the run began with, unless the flag is `planned` or `free`.
    """
    bounds = dict(zip(("at_least", "at_most"), domain, strict=False))
    return field(default=default, metadata={"help": help, **bounds, **metadata})


def planned(default: Any, help: str, *domain: float, **metadata: Any) -> Any:
    """A flag that acts through the plan alone: a resume compares what the plan made of it."""
    return flag(default, help, *domain, resume="planned", **metadata)


def free(default: Any, help: str, *domain: float, **metadata: Any) -> Any:
    """A flag that a resumed run may change: it decides neither the weights nor the data."""
    return flag(default, help, *domain, resume="free", **metadata)


def type_of(hint: Any) -> Any:
    """The type of a flag's value, without the None of a flag that may be left out."""
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


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
        given = getattr(args, item.name)
        for value in given if isinstance(given, tuple) else (given,):
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
    facts, largest = item.metadata, LARGEST if type_of(hint) is int else sys.float_info.max
    is_above = value > facts.get("above", -math.inf)
    is_within = facts.get("at_least", -math.inf) <= value <= facts.get("at_most", math.inf)
    return abs(value) <= largest and bool(is_above and is_within)  # NaN is neither


def parse(cls: type[Args], argv: list[str] | None = None) -> Args:
    """Read a command line into an instance of a dataclass of this module.

    Args:
        cls: one of the dataclasses above.
        argv: the arguments; by default those of the process.

    Raises:
        SystemExit: with code 2 for an unknown flag or a value that does not parse, code 0 after --help.
        UserError: a value outside of the domain of its flag.
    """
    parser = _Parser(
        description=cls.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    hints = typing.get_type_hints(cls)
    # A command's own flags come before those that it shares with others.
    for item in sorted(dataclasses.fields(cls), key=lambda item: item.name not in cls.__annotations__):  # type: ignore[arg-type]
        _add_flag(parser, item, hints[item.name])
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--"]:  # what separates torchrun's options from ours
        given = given[1:]
    args = _filled(cls, parser.parse_mixed(given))
    require_domain(args)
    return args


def _filled(cls: type[Args], values: dict[str, Any]) -> Args:
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class _Parser(argparse.ArgumentParser):
    """A parser whose refusal is one line, like every other one."""

    def parse_mixed(self, given: list[str]) -> dict[str, Any]:
        """Values by name; prompts stand between flags, and behind -- whatever they begin with."""
        cut = given.index("--") if "--" in given else len(given)
        values, after = vars(self.parse_intermixed_args(given[:cut])), given[cut + 1 :]
        if after:
            taking = [action.dest for action in self._get_positional_actions() if action.nargs == "*"]
            if not taking:
                self.error(f"unrecognized arguments: {' '.join(after)}")
            values[taking[0]] = [*values[taking[0]], *after]
        return values

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave with code 2."""
        plain = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in message[:MESSAGE_LETTERS])
        advice = "Add --help to see the flags."
        if "prompt" in {action.dest for action in self._get_positional_actions()}:
            advice += " A prompt that begins with - comes last, after --."
        self.exit(2, f"error: {plain}. {advice}\n")


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
    """Turn one field into one flag: bool gives --x and --no-x, tuple takes many, X | None takes an X."""
    options: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
    if is_number(hint) and "choices" not in item.metadata:
        options["help"] += f"; {domain(item, hint)}"
    hint = type_of(hint)
    options["choices"] = item.metadata.get("choices")
    if typing.get_origin(hint) is tuple:
        options.update(nargs="*", type=str)
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = item.metadata.get("reads", hint)
    if item.metadata.get("positional"):
        parser.add_argument(item.name, **options)
        return
    short = [item.metadata["short"]] if "short" in item.metadata else []
    parser.add_argument(*short, f"--{item.name.replace('_', '-')}", dest=item.name, **options)


def from_dict(cls: type[Args], values: dict[str, Any], path: Path) -> Args:
    """An instance from what a file of a run holds. Domains are not looked at: an older version took more.

    Args:
        cls: one of the dataclasses of arguments.py.
        values: its fields; those that are not there have their defaults.
        path: the file, for the message.

    Raises:
        UserError: a field that this version does not know, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(
            f"{path}: {typed_json.shown(unknown[0])} is no argument of this version. Use that which made it."
        )
    for name, value in values.items():
        if wrong := typed_json.mismatch(value, hints[name], name):
            raise UserError(f"{path}: {wrong}. It is damaged: use another checkpoint.")
    reads = {item.name: item.metadata.get("reads", _as_it_is) for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return _filled(cls, {name: reads[name](value) for name, value in values.items()})


def _as_it_is(value: Any) -> Any:
    return value
