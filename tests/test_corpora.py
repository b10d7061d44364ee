"""Documents from Python itself and from the user's files."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common.errors import UserError
from nanochat.data import sources
from nanochat.data.sources import find_files, hold_out_end, local_documents, shuffled, split_text


@given(st.text(alphabet="ab \n", max_size=300), st.integers(4, 50))
def test_pieces_are_short_enough_and_joined_are_the_text(text: str, limit: int) -> None:
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_a_text_is_cut_at_the_best_break() -> None:
    text = "aaaa bbbb\ncccc\n\ndddd eeee ffff"
    assert list(split_text(text, 25)) == ["aaaa bbbb\ncccc\n\n", "dddd eeee ffff"]


def test_stdlib_is_clean_shuffled_and_the_same_each_time() -> None:
    train, val = sources.stdlib_documents()
    assert (train, val) == sources.stdlib_documents()
    assert 2e6 < sum(map(len, train)) < 40e6
    assert 0.01 < len(val) / len(train) < 0.2
    assert len({*train, *val}) == len(train) + len(val)
    assert all(0 < len(piece) <= sources.PIECE_CHARS for piece in train + val)
    assert any("class JSONDecoder" in piece for piece in train + val)
    assert any("math.acos(x, /)" in piece for piece in train + val)
    assert not any("class TestCase(unittest" in piece for piece in train)


def test_local_reads_the_three_kinds_in_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": ["one", None, "", "two"]}), tmp_path / "a.parquet")
    lines = [json.dumps({"text": "thr\u00e9e", "other": 1}), "", json.dumps({"text": "fo\nur"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "c.txt").write_bytes("\ufefffi\r\nve\n".encode())
    paths, val = find_files([str(tmp_path)], "")
    assert val is None
    assert list(local_documents(paths)) == ["one", "two", "thr\u00e9e", "fo\nur", "fi\nve"]


def test_a_long_txt_file_becomes_pieces_that_lose_nothing(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(20_000)) + "\n" + "".join(f"line {i}\n" for i in range(9_000))
    (tmp_path / "long.txt").write_text(words, "utf-8")
    pieces = list(local_documents([tmp_path / "long.txt"]))
    assert " ".join(pieces).split() == words.split()
    assert max(map(len, pieces)) <= sources.PIECE_CHARS


def test_a_file_that_is_not_utf8_is_refused_at_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good line\n" * 1000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt: byte 10003 is not UTF-8"):
        list(local_documents([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ('{"txt": "a"}', "line 2: expected"),
        ('{"text": 3}', "line 2: expected"),
        ("[3]", "line 2: expected"),
        ('{"text": "\\ud800"}', "line 2: the text holds half a surrogate pair"),
    ],
)
def test_a_wrong_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(UserError, match=message):
        list(local_documents([path]))


@pytest.mark.parametrize(
    "table",
    [pa.table({"content": ["a"]}), pa.table({"text": [1]}), pa.table({"text": [["a"]]})],
)
def test_a_parquet_of_another_schema_is_refused(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: .*'text'"):
        list(local_documents([tmp_path / "x.parquet"]))


def test_something_else_called_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"x\.parquet: not a readable parquet file"):
        list(local_documents([tmp_path / "x.parquet"]))


def test_the_validation_file_is_taken_out_by_name_or_path(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert find_files([str(tmp_path)], "b.txt") == ([tmp_path / "a.txt"], tmp_path / "b.txt")
    assert find_files([str(tmp_path)], str(tmp_path / "a.txt")) == ([tmp_path / "b.txt"], tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"--val-file c\.txt: found 0"):
        find_files([str(tmp_path)], "c.txt")


def test_unusable_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nothing.txt", "no such file"),
        ("x.csv", "expected a file"),
        ("folder", "no file in this folder ends in .txt"),
    ]:
        with pytest.raises(UserError, match=message):
            find_files([str(tmp_path / name)], "")


@given(st.integers(0, 500))
def test_the_end_is_held_out(count: int) -> None:
    held: deque[str] = deque()
    passed = list(hold_out_end((str(i) for i in range(count)), held))
    assert passed + list(held) == [str(i) for i in range(count)]
    assert len(held) == min(1, count) or sum(map(len, list(held)[1:])) < sources.val_chars(
        sum(map(len, passed)) + sum(map(len, held))
    )


def test_of_a_long_text_a_hundredth_of_the_documents_is_held_out() -> None:
    held: deque[str] = deque()
    passed = list(hold_out_end((f"{i:05d} " + "x" * 3_000 for i in range(3_000)), held))
    assert [text[:5] for text in held] == [f"{i:05d}" for i in range(2970, 3000)]
    assert len(passed) == 2970


@pytest.mark.parametrize(("chars", "least", "most"), [(10_000, 900, 3_000), (1_000_000, 50_000, 54_000)])
def test_of_a_short_text_enough_is_held_out_to_measure_on(chars: int, least: int, most: int) -> None:
    text = "".join(f"line {i} of a short text\n" for i in range(chars // 20))[:chars]
    held: deque[str] = deque()
    passed = list(hold_out_end(split_text(text, sources.PIECE_CHARS), held))
    assert least <= sum(map(len, held)) <= most
    assert "".join([*passed, *held]) == text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_long_document_is_cut_where_it_is_nearly_all_there_is(count: int) -> None:
    texts = ["".join(f"Sentence {i} of {n}.\n\n" for i in range(50_000)) for n in range(count)]
    held: deque[str] = deque()
    passed = list(hold_out_end(iter(texts), held))
    assert "".join([*passed, *held]) == "".join(texts)
    assert len(held) == 1
    assert 50_000 <= len(held[0]) <= 100_000
    assert held[0].startswith("Sentence")


def test_a_document_without_a_break_is_cut_all_the_same() -> None:
    held: deque[str] = deque()
    assert list(hold_out_end(iter(["x" * 1_000]), held)) == ["x" * 900]
    assert list(held) == ["x" * 100]


def test_what_training_has_too_is_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"document number {i % 40} of the text" for i in range(100)]
    lines.insert(95, "a document that stands once")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    train, val = sources.local_splits([tmp_path / "x.jsonl"], None)
    known = set(train)
    assert set(val) == {"a document that stands once"}
    assert "a document that stands once" not in known
    assert "also in the text to train on, word for word: they were left out." in capsys.readouterr().out


def test_a_text_that_repeats_one_document_is_validated_on_it_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "the same"}\n' * 50)
    train, val = sources.local_splits([tmp_path / "x.jsonl"], None)
    assert len(list(train)) + len(list(val)) == 50
    assert "validation will look too good" in capsys.readouterr().out


def test_a_validation_file_that_copies_the_training_text_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one text\n\n" * 10)
    train, val = sources.local_splits([tmp_path / "a.txt"], tmp_path / "b.txt")
    assert list(train) == list(val)
    assert "1 of 1 validation documents are also in the text to train on" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [0, 50, 10**9])
def test_shuffling_loses_nothing_whatever_the_memory(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHUFFLE_CHARS", limit)
    documents = [f"document {i}" for i in range(200)]
    mixed = list(shuffled(documents, seed=1))
    assert sorted(mixed) == sorted(documents)
    assert (mixed == documents) == (limit == 0)
    assert mixed == list(shuffled(documents, seed=1))
