"""Tasks of the chat evaluation: which items are asked, and the verdicts, against answers written by hand."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chat import corpus, made, sandbox, tasks
from nanochat.chat.conversation import Part
from nanochat.common.errors import UserError
from nanochat.evaluation.chat_scores import CHATCORE6


def judged(judge: str, answer: str, text: str, **row: Any) -> bool | None:
    return tasks.right({"judge": judge, "answer": answer, **row}, [Part("text", text)])


@pytest.mark.parametrize(
    ("judge", "answer", "text", "verdict"),
    [
        ("number", "936", "347 + 589 = 936.", True),
        ("number", "936", "936 is 347 + 589", False),  # the last one counts
        ("number", "936", "It is 936.0", True),
        ("number", "1234567", "1,234,567 in all, I think", True),
        ("number", "-242", "347-589=-242.", True),
        ("number", "242", "347-589=-242.", False),
        ("number", "5", "from 3-5", True),  # a range is not a sign
        ("number", "0.5", "0.50", True),
        ("number", "936", "no idea", False),
        ("number", "936", "", False),
        ("exact", "b a t", "  b a t\n", True),
        ("exact", "b a t", "b a t.", False),
        ("exact", "Monday", "monday", False),
        ("phrase", "nanochat", "I am NanoChat, a small model.", True),
        ("phrase", "nanochat", "I am nano chat.", False),
        ("letter", "B", "B", True),
        ("letter", "B", "A", False),
        ("f1", "joins paths of files", "It joins the paths of two files.", True),  # F1 = 8 / 11
        ("f1", "joins paths of files", "removes a folder", False),
        ("f1", "a b", "b c", True),  # F1 is one half
        ("f1", "a b", "b c d", False),
        ("f1", "a", "", False),
        ("gsm8k", "1200", "so #### 1,200 apples", True),
        ("gsm8k", "1200", "#### 12\n#### 1200", False),  # the first one counts
        ("gsm8k", "1200", "1200", False),
        ("gsm8k", "1200", "#### 1200.0", False),  # strings are compared, as upstream does
        ("gsm8k", "1200", "#### $1200", False),
    ],
)
def test_a_judge_is_strict_where_it_should_be(judge: str, answer: str, text: str, verdict: bool) -> None:
    assert judged(judge, answer, text) is verdict


def test_the_text_of_a_reply_is_judged_and_not_what_the_tool_said() -> None:
    call = [Part("python", "347+589"), Part("python_output", "936")]
    row = {"judge": "number", "answer": "936"}
    assert tasks.right(row, [*call, Part("text", "It is 936.")])
    assert not tasks.right(row, call)
    assert not tasks.right(row, [*call, Part("text", "It is 12.")])


@given(st.decimals(-(10**12), 10**12, places=2), st.text(alphabet="abc ,.!?\n-", max_size=8))
def test_the_last_number_is_found_in_whatever_is_around_it(value: Decimal, around: str) -> None:
    for shown in (f"{value}", f"{value:,}"):
        assert judged("number", str(value), f"1 and 2 {around} {shown}")
        assert not judged("number", str(value + 1), f"1 and 2 {around} {shown}{around}")


@given(st.text(), st.sampled_from(sorted(tasks.JUDGES)))
def test_no_text_makes_a_judge_fail(text: str, judge: str) -> None:
    assert judged(judge, "7", text) in (True, False)


@pytest.mark.parametrize("task", sorted(made.TASKS))
def test_the_reference_reply_of_every_made_item_is_right(task: str) -> None:
    for row in tasks.questions(task, 30, 3)[task]:
        content = row["messages"][-1]["content"]
        given_parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        assert tasks.right(row, [Part(part["type"], part["text"]) for part in given_parts]) is True, row


HUMANEVAL = {
    "prompt": "import math\nfrom os import path\n\ndef area(r):\n    '''Area.'''\n",
    "test": "def check(f):\n    assert f(0) == 0\n",
    "entry_point": "area",
}
CODE = "def area(r):\n    return math.pi * r * r\n"


@pytest.mark.parametrize(
    "text",
    [CODE, f"Here:\n```python\n{CODE}```\nand ```1```", f"```\n{CODE}```"],
    ids=["plain", "fenced", "bare"],
)
def test_a_program_gets_the_imports_of_the_prompt_and_the_tests(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str, str]] = []

    def run(*texts: str) -> sandbox.Outcome:
        ran.append(texts)  # the sandbox has tests of its own
        return sandbox.Outcome(True, "")

    monkeypatch.setattr(tasks, "cannot_judge_code", lambda: None)
    monkeypatch.setattr(sandbox, "run", run)
    assert judged("code", "", text, **HUMANEVAL) is True
    program = "import math\nfrom os import path\n" + CODE
    assert ran == [(program, HUMANEVAL["test"], "area")]


def test_code_is_not_judged_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "cannot_judge_code", lambda: "bwrap is missing")
    monkeypatch.setattr(sandbox, "run", lambda *_: pytest.fail("ran"))
    assert judged("code", "", CODE, **HUMANEVAL) is None


def test_names_and_groups_are_read_once_each_in_their_order() -> None:
    assert tasks.parse("mmlu, calc,mmlu") == ("mmlu", "calc")
    assert tasks.parse("made") == tuple(made.TASKS)
    assert tasks.parse("chatcore") == CHATCORE6
    assert tasks.parse("made,chatcore") == (*made.TASKS, *CHATCORE6)


@pytest.mark.parametrize(
    ("text", "said"), [("calc,calx", "no task calx"), ("", "names no task"), (",", "names no")]
)
def test_a_task_that_does_not_exist_is_named(text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"--tasks={text}.*{said}.*made, chatcore, calc"):
        tasks.parse(text)


def test_made_items_follow_the_seed_and_the_number_that_is_asked_for() -> None:
    one = tasks.questions("calc,spellingbee", 7, 0)
    assert {task: len(rows) for task, rows in one.items()} == {"calc": 7, "spellingbee": 7}
    assert one == tasks.questions("calc,spellingbee", 7, 0)
    assert one["calc"] != tasks.questions("calc", 7, 1)["calc"]
    assert len(tasks.questions("calc", 0, 0)["calc"]) == tasks.MADE_ITEMS


def test_a_part_of_a_data_set_is_the_same_draw_whatever_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": str(number), "subject": number // 100} for number in range(1000)]
    monkeypatch.setattr(corpus, "rows", lambda name, split: iter(rows) if split == "test" else None)
    drawn = tasks.questions("mmlu", 200, 0)["mmlu"]
    assert drawn == tasks.questions("mmlu", 200, 5)["mmlu"]
    assert len({row["id"] for row in drawn}) == 200
    assert {row["subject"] for row in drawn} == set(range(10))
    assert tasks.questions("mmlu", 0, 0)["mmlu"] == tasks.questions("mmlu", 5000, 0)["mmlu"] == rows
