"""Rows of the user's files and of the hub's data sets: every schema, and every line that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.chat import conversation, sources
from nanochat.chat.sources import HUB_SETS
from nanochat.chat.tools import calculate
from nanochat.common.errors import UserError

Row = dict[str, Any]
GOOD: Row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def rows_of(*paths: Path, left_out: list[str] | None = None) -> list[Row]:
    return list(sources.checked(sources.of_files(paths), left_out))


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8"
    )
    return path


# -----------------------------------------------------------------------------
# The user's files


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    entries = [{**GOOD, "id": str(number), "note": "left out"} for number in range(5)]
    expected = [{**GOOD, "id": str(number)} for number in range(5)]
    lines = write_lines(tmp_path / "a.jsonl", *entries[:2], "", *entries[2:])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array = tmp_path / "c.json"
    array.write_text(json.dumps(entries, indent=2), "utf-8")
    table = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(entries), table)
    for path in (lines, packed, array, table):
        assert rows_of(path) == expected
    assert rows_of(lines, table) == expected * 2


def test_conversations_of_other_programs_become_rows_of_one_form(tmp_path: Path) -> None:
    calls = [{"id": "x", "function": {"name": "calculator", "arguments": '{"expression": "1+2"}'}}]
    openai = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "1+2?"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "x", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ]
    }
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    first, second = rows_of(write_lines(tmp_path / "a.jsonl", openai, sharegpt))
    parts = [("python", "1+2"), ("python_output", "3"), ("text", "It is 3.")]
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]},
    ]
    assert second == GOOD
    assert conversation.read(first, "") == conversation.read(openai, "")


JUDGED = {"task": "x", "judge": "exact", "answer": "Hello"}


def test_what_judges_a_reply_is_kept(tmp_path: Path) -> None:
    assert rows_of(write_lines(tmp_path / "a.jsonl", {**GOOD, **JUDGED, "source": None})) == [
        {**GOOD, **JUDGED}
    ]


BAD = {
    "{not JSON": "not JSON",
    '{"messages": NaN}': "not JSON",
    '{"messages": [], "messages": []}': "two entries named 'messages'",
    "3": "the line is 3",
    '{"text": "a document"}': "messages is missing",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "the last message is the user's",
    '{"messages": [{"role": "robot", "content": "Hi"}]}': r"messages\[0\].role is 'robot'",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_used_is_named(line: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(UserError, match=f"a.jsonl: line 2: .*{BAD[line]}.*--skip-bad") as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)


def test_lines_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    left_out: list[str] = []
    assert rows_of(write_lines(tmp_path / "a.jsonl", *BAD, GOOD), left_out=left_out) == [GOOD]
    assert len(left_out) == len(BAD)
    assert "line 1: not JSON" in left_out[0]


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("notes", "utf-8")
    with pytest.raises(UserError, match=r"notes.md: expected conversations as .jsonl, .json or .parquet"):
        rows_of(tmp_path / "notes.md")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text('[{"messages": ', "utf-8")
    with pytest.raises(UserError, match="a.json: not JSON"):
        rows_of(tmp_path / "a.json")


# -----------------------------------------------------------------------------
# The hub


def converted(name: str, *theirs: Row, tmp_path: Path) -> list[Row]:
    """Rows of a data set, through a parquet file in its schema."""
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.Table.from_pylist(list(theirs)), path)
    return list(sources.checked(HUB_SETS[name].rows("test", [path]), None))


def asked(row: Row) -> tuple[str, Any]:
    question, reply = row["messages"]
    assert (question["role"], reply["role"]) == ("user", "assistant")
    return question["content"], reply["content"]


def test_smoltalk(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *GOOD["messages"]]
    [row] = converted("smoltalk", {"messages": messages, "source": "everyday"}, tmp_path=tmp_path)
    assert row == {"messages": messages, "source": "smoltalk/everyday", "id": "test-0"}


def test_mmlu(tmp_path: Path) -> None:
    theirs = {"question": "Two and two?", "subject": "", "choices": ["3", "4", "5", "6"], "answer": 1}
    rows = converted("mmlu", theirs, {**theirs, "answer": 3}, tmp_path=tmp_path)
    assert asked(rows[0]) == (
        "Multiple Choice question: Two and two?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer.",
        "B",
    )
    judged = {"task": "mmlu", "source": "mmlu", "judge": "letter", "answer": "B", "letters": list("ABCD")}
    assert rows[0] == {"messages": rows[0]["messages"], "id": "test-0", **judged}
    assert (rows[1]["answer"], rows[1]["id"]) == ("D", "test-1")


@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge"])
def test_arc_with_letters_and_with_digits(name: str, tmp_path: Path) -> None:
    theirs = {"id": "Mercury_1", "question": "Which?", "answerKey": "2"}
    digits = {**theirs, "choices": {"text": ["sun", "rock", "tree"], "label": ["1", "2", "3"]}}
    letters = {**theirs, "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "C"}
    rows = converted(name, digits, letters, tmp_path=tmp_path)
    assert asked(rows[0])[0].splitlines()[1:4] == ["- sun=1", "- rock=2", "- tree=3"]
    assert (asked(rows[0])[1], rows[0]["letters"], rows[0]["task"]) == ("2", ["1", "2", "3"], name)
    assert (asked(rows[1])[1], rows[1]["answer"]) == ("C", "C")


def test_gsm8k_calls_the_calculator_where_it_agrees(tmp_path: Path) -> None:
    answer = (
        "She sold 48/2 = <<48/2=24>>24 clips.\nA tenth is <<24*.1=2.40>>2.4.\nIn all <<1,000+2=1,002>>1,002, "
        "not <<48+24=73>>73 and <<a lot=9>>9.\n#### 1,002"
    )
    [row] = converted("gsm8k", {"question": "How many?", "answer": answer}, tmp_path=tmp_path)
    question, reply = asked(row)
    assert (question, row["answer"], row["judge"], row["task"]) == ("How many?", "1002", "gsm8k", "gsm8k")
    assert [(part["type"], part["text"]) for part in reply] == [
        ("text", "She sold 48/2 = "),
        ("python", "48/2"),
        ("python_output", "24"),
        ("text", "24 clips.\nA tenth is "),
        ("python", "24*.1"),
        ("python_output", "2.4"),
        ("text", "2.4.\nIn all "),
        ("python", "1,000+2"),
        ("python_output", "1002"),
        ("text", "1,002, not 73 and 9.\n#### 1,002"),
    ]
    calls = [(a["text"], b["text"]) for a, b in zip(reply, reply[1:], strict=False) if a["type"] == "python"]
    assert all(calculate(expression) == output for expression, output in calls)


def test_humaneval(tmp_path: Path) -> None:
    theirs = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    [row] = converted("humaneval", theirs, tmp_path=tmp_path)
    assert asked(row) == ("def one():\n", "```python\ndef one():\n    return 1\n\n```")
    assert {key: row[key] for key in ("judge", "prompt", "test", "entry_point")} == {
        "judge": "code",
        **{key: theirs[key] for key in ("prompt", "test", "entry_point")},
    }
    program: dict[str, Any] = {}
    exec(
        "\n".join(
            [asked(row)[1].removeprefix("```python\n").removesuffix("\n```"), row["test"], "check(one)"]
        ),
        program,
    )


def test_other_columns_than_this_version_knows_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 0: the columns of openai/gsm8k .*'answer'.*there are question"):
        converted("gsm8k", {"question": "How many?"}, tmp_path=tmp_path)
    wrong = {"question": "?", "choices": ["a", "b", "c", "d"], "answer": 7}
    with pytest.raises(UserError, match="the columns of cais/mmlu"):
        converted("mmlu", wrong, tmp_path=tmp_path)
