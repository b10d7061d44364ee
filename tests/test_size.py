"""The ratchet on lines of code, and the counting of them."""

from __future__ import annotations

import json

from dev import size


def test_no_folder_has_grown_past_its_number() -> None:
    kept = json.loads(size.KEPT.read_text("utf-8"))
    now = size.sizes()
    grown = {name: (kept.get(name, 0), now[name]) for name in now if now[name] > kept.get(name, 0)}
    assert not grown, f"lines of code (kept, now): {grown}. If it is worth it: python -m dev.size --write"


def test_what_is_no_code_is_not_counted() -> None:
    source = '''"""What it is.

In some lines."""

import math  # a comment beside code


# a comment alone
class Thing:
    """What it is."""

    text = """a string
of two lines"""

    def area(self, r: float) -> float:
        """A docstring."""
        return (
            math.pi

            * r**2
        )
'''
    assert size.lines_of_code(source) == 9
    assert size.lines_of_code("") == size.lines_of_code("# nothing\n") == 0


def test_the_counts_kept_are_those_of_the_history() -> None:
    """In a clone without history both are the same numbers."""
    assert {commit: size.lines_at(commit) for commit in size.COUNTED} == size.COUNTED
