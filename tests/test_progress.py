"""What a terminal shows."""

from __future__ import annotations

import sys

import pytest

from nanochat.common.progress import printable

HOSTILE = "\x1b]0;owned\x07 a\tb\nc\x9b2J\r\x08 caf\u00e9 \U0001f600"


def test_a_text_cannot_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = printable(HOSTILE)
    assert shown == "\ufffd]0;owned\ufffd a\tb\nc\ufffd2J\ufffd\ufffd caf\u00e9 \U0001f600"


def test_a_file_or_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable(HOSTILE) == HOSTILE
    monkeypatch.setattr(sys, "stdout", None)
    assert printable(HOSTILE) == HOSTILE
