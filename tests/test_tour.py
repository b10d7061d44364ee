"""docs/tour.md: ten questions, each answered in at most two files, and the names that are told are there."""

from __future__ import annotations

import ast
import re

from tests.conftest import REPO

ANSWER = re.compile(r"`(nanochat/[\w/]+\.py)`: `(\w+)`")


def rows() -> list[list[str]]:
    """The cells of each row of the table."""
    lines = (REPO / "docs" / "tour.md").read_text("utf-8").splitlines()
    return [
        line.strip("|").split("|") for line in lines if line.startswith("| ") and "question" not in line[:12]
    ]


def names_in(path: str) -> set[str]:
    """What a file defines: functions, classes, and names that are assigned, of classes too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((REPO / path).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_every_answer_is_where_the_tour_says() -> None:
    for question, answer in rows():
        told = ANSWER.findall(answer)
        assert told, question
        for path, name in told:
            assert name in names_in(path), f"{question.strip()} {path} has no {name}"


def test_ten_questions_need_two_files_at_most_and_few_need_two() -> None:
    files = [len({path for path, _ in ANSWER.findall(answer)}) for _, answer in rows()]
    assert len(files) == 10
    assert max(files) <= 2
    assert sum(files) / len(files) <= 1.3


def test_every_path_that_the_tour_names_is_there() -> None:
    text = (REPO / "docs" / "tour.md").read_text("utf-8")
    for path in re.findall(r"`((?:nanochat|scripts|tests)/[\w/]+\.py)`", text):
        assert (REPO / path).is_file(), path
