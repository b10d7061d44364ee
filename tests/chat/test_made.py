"""Conversations made on the spot: right, the same everywhere, and tests that training does not show."""

from __future__ import annotations

import builtins
import calendar
import datetime
import hashlib
import json
import keyword
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat import conversation, made, tasks, tools
from nanochat.chat.made import TASKS, examples, row

SPLITS = st.sampled_from(("train", "test"))
JUDGED = sorted(TASKS)
NOT_NAMES = {"is", "in", "of"}  # keywords of Python that the questions are worded with
WORDED = ("date", "identity")
FOLLOW_UP = r"^(?:And|Now|Add|Take|Multiply) [a-z0-9 ]*?(\d)\b"


def turns(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Each question with the content of its reply."""
    for one in rows:
        messages = one["messages"]
        for asked, said in zip(messages[::2], messages[1::2], strict=True):
            yield asked["content"], said["content"]


def parts(content: Any) -> list[tuple[str, str]]:
    whole = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [(part["type"], part["text"]) for part in whole]


def text(content: Any) -> str:
    return "".join(text for kind, text in parts(content) if kind == "text")


@pytest.fixture(scope="module")
def trained_on() -> list[dict[str, Any]]:
    return [row("train", 0, index) for index in range(12_000)]


def test_the_same_on_every_machine_and_version() -> None:
    rows = [row(split, seed, index) for split in ("train", "test") for seed in (0, 1) for index in range(200)]
    rows += [one for task in JUDGED for one in examples(task, "test", 20, 0)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == GOLDEN


@given(split=SPLITS, seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_a_row_is_a_conversation(split: Any, seed: int, index: int) -> None:
    one = row(split, seed, index)
    read = conversation.read(one, "row")
    assert [message.role for message in read] == ["user", "assistant"] * (len(read) // 2)
    assert 2 <= len(read) <= 22
    assert one["source"].startswith("made/")
    assert one == row(split, seed, index) != row(split, seed, index + 1)


def test_rows_differ_by_seed_and_split() -> None:
    kinds = [
        [row(split, seed, i)["messages"] for i in range(50)] for split in ("train", "test") for seed in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])


@pytest.mark.parametrize("task", JUDGED)
def test_questions_are_distinct_and_their_replies_right(task: str) -> None:
    for split in ("train", "test"):
        rows = examples(task, split, 300, 3)
        assert len({one["messages"][0]["content"] for one in rows}) == len(rows)
        assert len(rows) == 300 or task == "pydoc"
        for one in rows:
            *_, reply = conversation.read(one, "row")
            assert tasks.right(one, reply.parts), one
    assert rows[:100] == examples(task, split, 100, 3) != examples(task, split, 100, 4)


@pytest.mark.parametrize("task", JUDGED)
def test_a_wrong_reply_is_wrong(task: str) -> None:
    rows = examples(task, "test", 60, 0)
    shifted = [
        tasks.right(one, conversation.read(other, "row")[-1].parts)
        for one, other in zip(rows, rows[7:], strict=False)
    ]
    assert sum(map(bool, shifted)) <= len(shifted) * (0.5 if task.startswith("choice") else 0.2)


def test_what_the_tool_says_is_what_it_will_force(trained_on: list[dict[str, Any]]) -> None:
    calls = [parts(said)[:2] for _, said in turns(trained_on) if not isinstance(said, str)]
    assert len(calls) > 3000
    for (kind, expression), (output, result) in calls:
        assert (kind, output) == ("python", "python_output")
        assert result == tools.calculate(expression) != "error"


def test_sums_by_python() -> None:
    signs = {"plus": "+", "minus": "-", "times": "*", "x": "*"}
    for task in ("calc", "bigsum"):
        for one in examples(task, "test", 200, 1):
            a, op, b = re.search(r"(\d+) (\S+) (\d+)", one["messages"][0]["content"]).groups()  # type: ignore[union-attr]
            assert int(one["answer"]) == eval(f"{a}{signs.get(op, op)}{b}")
            assert len(a) in (range(1, 4) if task == "calc" else (4, 5))


def test_letters_and_words_by_python() -> None:
    for one in examples("count", "test", 200, 1):
        _, letter, word = (
            parts(one["messages"][1]["content"])[0][1].removesuffix("").replace(" in ", " ").split()
        )
        assert one["answer"] == f"{word.count(letter)} {letter} in {word}."
        assert {letter, word} <= set(re.findall("[a-z]+", one["messages"][0]["content"]))
    for task in ("spell", "spell-new"):
        for one in examples(task, "test", 200, 1):
            word = one["answer"].replace(" ", "")
            assert word in re.findall("[a-z]+", one["messages"][0]["content"])
            assert one["messages"][1]["content"] == " ".join(word)
    for one in examples("repeat", "test", 200, 1):
        assert one["messages"][0]["content"].endswith(f": {one['answer']}")
        assert 2 <= len(one["answer"].split()) <= 6


def test_dates_by_the_calendar() -> None:
    days, months = list(calendar.day_name), list(calendar.month_name)[1:]
    for one in examples("date", "test", 400, 1):
        asked = one["messages"][0]["content"]
        if "2024" in asked:
            day = int(re.search(r"\b([0-9]{1,2})\b", asked)[1])  # type: ignore[index]
            assert one["answer"] == f"February {day} was a {datetime.date(2024, 2, day):%A}."
            continue
        names = days if "day " in re.sub("|".join(days), "", asked).lower() else months
        steps = 1 if re.search("follows|after|tomorrow|next", asked) else -1
        shown = next(name for name in names if name in asked)
        assert one["answer"].split(" is ") == [
            f"The {'day' if names is days else 'month'} {'after' if steps == 1 else 'before'} {shown}",
            f"{names[(names.index(shown) + steps) % len(names)]}.",
        ]


def test_names_of_python_are_of_their_kinds() -> None:
    def kind(name: str) -> str:
        if isinstance(value := getattr(builtins, name, None), type) and issubclass(value, BaseException):
            return "exception"
        if name in keyword.kwlist:
            return "keyword"
        return "module" if name in sys.stdlib_module_names else "builtin" if value is not None else ""

    names = set()
    for one in examples("choice", "test", 400, 1):
        asked, *options = one["messages"][0]["content"].splitlines()[:5]
        offered = dict(re.fullmatch(r"- (\w+)=(\w)", option).groups() for option in options)  # type: ignore[union-attr]
        right = next(name for name, letter in offered.items() if letter == one["answer"])
        name = next(
            word for word in re.findall(r"\w+", asked) if kind(word) == right and word not in NOT_NAMES
        )
        names.add(name)
    assert len(names) == 80


def test_phrases_are_of_one_reply_each() -> None:
    about = made._data()["identity"]
    for one in about:
        assert [other["reply"] for other in about if one["phrase"] in other["reply"]] == [one["reply"]]


def test_words() -> None:
    words = made._words()
    assert len(words) == len(set(words)) == 3000
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)


def require_apart(rows: list[dict[str, Any]], items: int) -> None:
    """Nothing that a test may ask is in these training conversations."""
    asked = {question for question, _ in turns(rows)}
    for task in JUDGED:
        tested = {one["messages"][0]["content"] for one in examples(task, "test", items, 0)}
        assert not tested & asked, task
    said = {text(reply) for _, reply in turns(rows)}
    spelt = {reply.replace(" ", "") for reply in said if re.fullmatch("[a-z]( [a-z])+", reply)}
    assert len(spelt) > 100
    new = {one["answer"].replace(" ", "") for one in examples("spell-new", "test", items, 0)}
    assert not new & spelt
    seen = {one["answer"].replace(" ", "") for one in examples("spell", "test", items, 0)}
    assert len(seen & spelt) > 0.95 * len(seen)  # all of them, where the sample is large enough
    assert not {one["answer"] for one in examples("pydoc", "test", 50, 0)} & {
        text(said) for _, said in turns(rows)
    }


def test_no_test_question_is_in_training(trained_on: list[dict[str, Any]]) -> None:
    require_apart(trained_on, 400)


@pytest.mark.slow
def test_no_test_question_is_in_100_000_conversations() -> None:
    require_apart([row("train", 7, index) for index in range(100_000)], 2000)


def test_wordings_are_held_out(trained_on: list[dict[str, Any]]) -> None:
    """Of recall tasks: with what is asked about left out, no question of a test reads as one of training."""

    names = re.compile("|".join([*calendar.day_name, *list(calendar.month_name)[1:], r"\b[0-9]{1,2}\b"]))

    def wording(question: str) -> str:
        return names.sub("_", question)

    read = {wording(question) for question, _ in turns(trained_on)}
    known = {text(said) for _, said in turns(trained_on)}
    for task in WORDED:
        assert not {wording(one["messages"][0]["content"]) for one in examples(task, "test", 400, 0)} & read
        assert {text(one["messages"][1]["content"]) for one in examples(task, "test", 400, 0)} <= known


def test_the_mixture(trained_on: list[dict[str, Any]]) -> None:
    sources = Counter(one["source"].removeprefix("made/") for one in trained_on)
    assert sources.pop("several") / len(trained_on) == pytest.approx(0.2, abs=0.02)
    assert set(sources) == {name for name, task in TASKS.items() if task.share}
    for name, count in sources.items():
        share = TASKS[name].share / sum(task.share for task in TASKS.values())
        assert count / sum(sources.values()) == pytest.approx(share, abs=0.02)


def test_a_follow_up_goes_on_from_the_answer(trained_on: list[dict[str, Any]]) -> None:
    found = 0
    for one in trained_on:
        contents = [message["content"] for message in one["messages"]]
        for before, asked, said in zip(contents[1::2], contents[2::2], contents[3::2], strict=False):
            if match := re.search(FOLLOW_UP, asked):
                result = parts(before)[1][1]
                assert re.fullmatch(re.escape(result) + r"[-+*]" + match[1], parts(said)[0][1])
                found += 1
    assert found > 50


def test_most_of_the_big_sums_are_done_without_the_tool_and_right() -> None:
    rows = examples("bigsum", "train", 1000, 0)
    bare = [one for one in rows if isinstance(one["messages"][1]["content"], str)]
    assert BARE[0] < len(bare) / len(rows) < BARE[1]
    for one in bare:
        a, b, total = map(int, re.findall(r"\d+", one["messages"][1]["content"]))
        assert a + b == total == int(one["answer"])


BARE = (0.7, 0.8)
GOLDEN = "1453cbdc4296abf59b5db09641e76abbee4455c2723335a83976b6cd3881dced"
