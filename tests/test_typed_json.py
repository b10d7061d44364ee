"""JSON with distrust: what no file of ours may hold, and shapes that are named where they are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypedDict

import pytest

from nanochat.common import files, typed_json
from nanochat.common.errors import UserError


class Inner(TypedDict, total=False):
    """A part that a file may lack."""

    name: str


class Outer(TypedDict):
    """A file."""

    steps: int
    loss: float | None
    inner: Inner


GOOD: dict[str, Any] = {"steps": 3, "loss": 1, "inner": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9" * 5000, "5,000 digits"),
        ('{"a": -' + "9" * 301 + "}", "301 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "two entries named 'a'"),
        ('{"in": [{"\\n": 1, "\\n": 2}]}', "two entries"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("[1e999]", "1e999"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('"\\ud800"', "surrogates"),
        ('{"\\uDFFF": 1}', "surrogates"),
        ("{'a': 1}", "double quotes"),
        ("", "Expecting value"),
        ("\0\0\0\0", "Expecting value"),
    ],
)
def test_what_no_file_may_hold_is_a_value_error_that_says_so(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        typed_json.parse(text)


def test_what_a_file_may_hold_is_what_python_reads() -> None:
    for value in (
        2**200,
        0.1,
        1e308,
        -0.0,
        "\U0001f600 \0 \\ud800",
        [],
        {},
        [None, True, {"a": [{"a": 1}]}],
    ):
        text = json.dumps(value)
        assert typed_json.parse(text) == typed_json.parse(text.encode()) == json.loads(text) == value
    assert repr(typed_json.parse("[NaN, Infinity, 1e999]", allow_nan=True)) == "[nan, inf, inf]"


@pytest.mark.parametrize(
    ("value", "shape", "said"),
    [
        (GOOD, Outer, ""),
        (GOOD | {"newer": "field", "loss": None}, Outer, ""),
        ({"steps": 3, "loss": 1}, Outer, "inner is missing"),
        (GOOD | {"steps": "3"}, Outer, "steps is '3', expected a whole number"),
        (GOOD | {"steps": True}, Outer, "steps is True, expected a whole number"),
        (GOOD | {"loss": "x"}, Outer, "loss is 'x', expected a number or null"),
        (GOOD | {"inner": {"name": 5}}, Outer, "inner.name is 5, expected a text"),
        (GOOD | {"inner": []}, Outer, "inner is a list, expected an object"),
        ([], Outer, "it is a list, expected an object"),
        (None, dict, "it is null, expected an object"),
        ([GOOD, GOOD | {"steps": 0.5}], list[Outer], "[1].steps is 0.5, expected a whole number"),
        ({"a": [1, 2], "b": ["x"]}, dict[str, list[int]], "b[0] is 'x', expected a whole number"),
        ({"a": {"b": "x"}}, dict[str, dict[str, float] | None], "a.b is 'x', expected a number"),
        (("a", "b"), tuple[str, ...], ""),
        (("a", 1), tuple[str, ...], "[1] is 1, expected a text"),
        ("\ud800\n", int, "it is '\\ud800\\n', expected a whole number"),
        ("x" * 500, bool, "it is '" + "x" * 59 + "..., expected true or false"),
    ],
)
def test_the_first_wrong_place_is_named(value: Any, shape: Any, said: str) -> None:
    assert typed_json.mismatch(value, shape) == said


@pytest.mark.parametrize(
    "contents",
    [b"", b"{", b"\xff", b"9" * 5000, b"[" * 99_999, b'{"a":1,"a":2}', b'{"steps": NaN}', b"[]", b"null"],
)
def test_a_damaged_file_is_one_line_with_its_name_and_advice(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"config\.json: .*\. Take the other\.$") as refused:
        files.read_json(path, Outer, advice="Take the other.")
    assert "\n" not in str(refused.value)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "loop"):
        with pytest.raises(UserError, match=name):
            files.read_json(tmp_path / name)


def test_an_error_of_reading_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    path.write_text("{}")

    def bad_sector(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", bad_sector)
    with pytest.raises(UserError, match=r"state\.json: cannot be read \(Input/output error\)"):
        files.read_json(path, dict)
