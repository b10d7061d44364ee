"""Every form of text that people have is read, or refused with a remedy that works when it is followed."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common.errors import UserError
from nanochat.data import sources, text_files
from nanochat.data.sources import find_files, local_documents

PAIR = ["one text", "another: caf\u00e9 \u65e5\u672c"]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def read(path: Path) -> list[str]:
    return list(local_documents(find_files([str(path)], "")[0]))


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


FORMS: dict[str, bytes] = {
    "a.txt": PAIR[0].encode(),
    "A.TXT": PAIR[0].encode(),
    "a.md": PAIR[0].encode(),
    "a.txt.gz": gzip.compress(PAIR[0].encode()),
    "a.Md.Zst": zstd(PAIR[0].encode()),
    "a.jsonl": jsonl(PAIR),
    "a.JSONL": jsonl(PAIR),
    "a.ndjson": jsonl(PAIR),
    "a.jsonl.gz": gzip.compress(jsonl(PAIR)),
    "two.jsonl.gz": gzip.compress(jsonl(PAIR[:1])) + gzip.compress(jsonl(PAIR[1:])),
    "a.jsonl.zst": zstd(jsonl(PAIR)),
    "two.ndjson.zst": zstd(jsonl(PAIR[:1])) + zstd(jsonl(PAIR[1:])),
    "lines.json": jsonl(PAIR),
    "array.json": json.dumps([{"text": text} for text in PAIR]).encode(),
    "array.json.gz": gzip.compress(json.dumps([{"text": text} for text in PAIR]).encode()),
    "pretty.json": json.dumps([{"text": text, "id": 1} for text in PAIR], indent=2).encode(),
    "strings.json": json.dumps(PAIR, indent=1).encode(),
    "pretty.jsonl": json.dumps([{"text": text} for text in PAIR], indent=2).encode(),
    "array.jsonl": json.dumps(PAIR).encode(),
    "object.json": json.dumps({"text": PAIR[0], "title": "x"}, indent=2).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(PAIR),
    "joined.jsonl": b"\xef\xbb\xbf" + jsonl(PAIR[:1]) + b"\xef\xbb\xbf" + jsonl(PAIR[1:]),
    "joined-without-newline.jsonl": jsonl(PAIR[:1]).strip() + b"\xef\xbb\xbf" + jsonl(PAIR[1:]),
    "null.jsonl": b'{"text": null}\n' + jsonl(PAIR) + b'null\n{"text": ""}\n',
    "crlf.jsonl": jsonl(PAIR).replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_text_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    is_one = FORMS[name] in (PAIR[0].encode(), FORMS["object.json"]) or name.lower().startswith(
        ("a.txt", "a.md")
    )
    assert read(tmp_path / name) == (PAIR[:1] if is_one else PAIR)


def test_byte_order_marks_amid_a_text_go_where_files_were_joined(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "x.txt").write_bytes(bom + b"one\n" + bom + b"two\n" + bom + bom + b"three")
    assert read(tmp_path / "x.txt") == ["one\ntwo\nthree"]


@pytest.mark.parametrize("part", [1, 2, 3, 7, 1 << 20])
def test_a_text_is_the_same_in_whatever_parts_it_is_read(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PART_BYTES", part)
    (tmp_path / "x.txt").write_bytes("\ufeffcaf\u00e9 \U0001f600\r\n\r\nab\rcd\r\n\ufeffend\r".encode())
    assert read(tmp_path / "x.txt") == ["caf\u00e9 \U0001f600\n\nab\rcd\nend\r"]


def parquet_of(values: pa.Array, column: str = "text") -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"n": list(range(len(values))), column: values}), path)


STRINGS = [*PAIR, None, ""]
KINDS = {
    "string": pa.array(STRINGS, pa.string()),
    "large_string": pa.array(STRINGS, pa.large_string()),
    "string_view": pa.array(STRINGS, pa.string_view()),
    "dictionary": pa.array(STRINGS).dictionary_encode(),
    "binary": pa.array([s and s.encode() for s in STRINGS], pa.binary()),
    "large_binary": pa.array([s and s.encode() for s in STRINGS], pa.large_binary()),
    "dictionary of bytes": pa.array([s and s.encode() for s in STRINGS], pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_parquet_column_of_any_kind_of_strings_is_read(kind: str, tmp_path: Path) -> None:
    parquet_of(KINDS[kind])(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == PAIR


def follow(error: str, folder: Path) -> Path:
    """Do what a message says behind "new file:", in its folder; the file that it makes."""
    found = re.search(r"(?:new (?:one|file)|entry a line): (.*)", error)
    assert found, error
    command = found[1].replace("python -c", f"{shlex.quote(sys.executable)} -c")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert not done.stderr or done.stderr.startswith("iconv: "), done.stderr  # says what it leaves out
    name = re.search(r"new\.\w+", command)
    assert name, command
    return folder / name[0]


DAMAGED: dict[str, tuple[bytes, str, list[str]]] = {
    "utf16.txt": ("some text\n".encode("utf-16"), "is UTF-16", ["some text\n".strip()]),
    "be.txt": (b"\xfe\xff" + "some text".encode("utf-16-be"), "is UTF-16", ["some text"]),
    "bare.txt": ("some text".encode("utf-16-le"), "is UTF-16LE", ["some text"]),
    "bare-be.txt": ("some text".encode("utf-16-be"), "is UTF-16BE", ["some text"]),
    "wide.txt": ("some text".encode("utf-32"), "is UTF-32", ["some text"]),
    "utf16.jsonl": (jsonl(PAIR).decode().encode("utf-16"), "is UTF-16", PAIR),
    "utf16.txt.gz": (gzip.compress("some text".encode("utf-16")), "is UTF-16", ["some text"]),
    "latin.txt": (b"a caf\xe9", "byte 5 is not UTF-8", ["a caf\u00e9"]),
    "windows.txt": (b"a \x93quote\x94", "byte 2 is not UTF-8", ["a \u201cquote\u201d"]),
    "cut.txt": ("caf\u00e9 \u65e5".encode()[:-1], "byte 6 is not UTF-8", ["caf\u00e9 "]),
    "bad.jsonl": (jsonl(PAIR) + b"{broken\n" + jsonl(PAIR), "line 3 is not JSON", PAIR + PAIR),
    "first.jsonl": (b'{"text": "a\n' + jsonl(PAIR), "line 1 is not JSON", PAIR),
    "bad.jsonl.gz": (gzip.compress(jsonl(PAIR) + b"nope\n"), "line 3 is not JSON", PAIR),
    "digits.jsonl": (jsonl(PAIR) + b'{"text":"c","n":' + b"9" * 5000 + b"}", "line 3 is not JSON", PAIR),
    "deep.jsonl": (jsonl(PAIR) + b"[" * 200_000, "line 3 is not JSON", PAIR),
    "pair.jsonl": (
        jsonl(PAIR) + b'{"text": "\\ud800"}\n',
        "line 3: the text holds half a surrogate pair",
        PAIR,
    ),
    "number.jsonl": (jsonl(PAIR) + b'{"text": 3}\n', 'line 3: expected {"text": "..."}, found 3', PAIR),
    "it's.jsonl": (
        jsonl(PAIR) + b'{"no": 1}\n',
        'line 3: expected {"text": "..."}, found the keys "no"',
        PAIR,
    ),
}


@pytest.mark.skipif(not shutil.which("iconv"), reason="no iconv")
@pytest.mark.parametrize("name", DAMAGED)
def test_a_remedy_works_when_it_is_followed(name: str, tmp_path: Path) -> None:
    data, message, texts = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as refused:
        read(tmp_path / name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read(follow(str(refused.value), tmp_path)) == texts


def test_a_key_of_another_name_is_told_with_what_renames_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(PAIR).replace(b'"text"', b'"content"'))
    with pytest.raises(
        UserError, match='line 1: expected .*, found the keys "content"; .* rename that: sed'
    ) as refused:
        read(tmp_path / "x.jsonl")
    found = re.search(r"sed 's.*?/'", str(refused.value))
    assert found
    renamed = subprocess.run(["bash", "-c", f"{found[0]} x.jsonl > new.jsonl"], cwd=tmp_path)
    assert renamed.returncode == 0
    assert read(tmp_path / "new.jsonl") == PAIR


def test_a_bad_entry_of_an_array_is_counted(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a"}, {"text": 7}], indent=1))
    with pytest.raises(
        UserError, match=r"x\.json: entry 2: expected .*, found 7.*jq -c '\.\[\]' > new\.jsonl"
    ):
        read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('[\n {"text": "a"},\n {"text": "b"\n')
    with pytest.raises(UserError, match=r"y\.json: line 4 is not JSON"):
        read(tmp_path / "y.json")


def test_a_row_that_is_not_utf8_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    values = pa.array([b"one", b"\xff", b"two"], pa.binary())
    for kind in (pa.binary(), pa.string()):
        column = values if kind == pa.binary() else pa.Array.from_buffers(pa.string(), 3, values.buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
        with pytest.raises(
            UserError, match=r"x\.parquet: row 1 of the column 'text' is not UTF-8"
        ) as refused:
            read(tmp_path / "x.parquet")
        assert read(follow(str(refused.value), tmp_path)) == ["one", "two"]


def test_a_parquet_column_of_another_name_is_told_with_what_renames_it(tmp_path: Path) -> None:
    parquet_of(pa.array(PAIR), "content")(tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"expected one column named 'text', found \['n', 'content'\]"
    ) as refused:
        read(tmp_path / "x.parquet")
    assert read(follow(str(refused.value), tmp_path)) == PAIR


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.txt.zst", "x.jsonl.zst"])
def test_a_cut_archive_is_damaged(name: str, tmp_path: Path) -> None:
    data = jsonl([os.urandom(50).hex() for _ in range(500)])
    packed = gzip.compress(data) if name.endswith("gz") else zstd(data)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot be unpacked|is not JSON"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"not packed at all")
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.txt.zst"])
def test_a_bomb_is_refused_in_a_bounded_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "FREE_EXPANSION", 1 << 20)
    zeros = b"x" * (64 << 20)
    (tmp_path / name).write_bytes(gzip.compress(zeros, 1) if name.endswith("gz") else zstd(zeros))
    del zeros
    tracemalloc.start()
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        for _ in local_documents([tmp_path / name]):
            pass
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def test_a_long_line_of_text_is_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"word " * 4_000_000)
    tracemalloc.start()
    count = sum(len(document) for document in local_documents([tmp_path / "x.txt"]))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert count == 20_000_000


def test_a_line_of_json_beyond_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(jsonl(["a", "b" * 2000]))
    with pytest.raises(UserError, match="line 2 has more than 1000 bytes"):
        read(tmp_path / "x.jsonl")


def test_what_a_folder_holds_beside_texts_is_counted_and_named(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "B.TXT",
        "c.json",
        "d.ndjson",
        "e.jsonl.gz",
        "g.md",
        "h.csv",
        "i.CSV",
        "README",
        ".x",
    ):
        (tmp_path / name).write_text("[]")
    paths, _ = find_files([str(tmp_path)], "")
    assert sorted(p.name for p in paths) == ["B.TXT", "a.txt", "c.json", "d.ndjson", "e.jsonl.gz", "g.md"]
    told = sources.left_out([str(tmp_path)])
    assert told.startswith("3 files were left out: .csv (2), no suffix (1); ")
    assert "h.csv" in told
    assert ".jsonl, .ndjson, .json" in told
    assert sources.left_out([str(tmp_path / "a.txt")]) == ""


def test_paths_that_are_none_are_refused_for_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "x.csv").write_text("a")
    cases = {
        "": "--files: one of the paths is empty",
        " ": "--files: one of the paths is empty",
        "-": "--files -: a pipe or a device, .* Write it to a file",
        str(tmp_path / "pipe.txt"): r"pipe\.txt: a pipe or a device",
        str(tmp_path / "x.csv"): r"x\.csv: expected a file that ends in \.txt, \.md",
        str(tmp_path / "none.txt"): r"none\.txt: no such file or folder",
    }
    for item, message in cases.items():
        with pytest.raises(UserError, match=message):
            find_files([item], "")


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl", b"\xff\xfe.parquet"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(b'{"text": "a"}')
    good, bad = find_files([str(tmp_path)], "")[0][:2], Path(os.fsdecode(folder + b"/\xff\xfe.parquet"))
    assert list(local_documents(good)) == ["a", '{"text": "a"}']
    assert len(sources.content_digest(good, None)) == 16
    assert len(sources.listing_digest(good, None)) == 16
    with pytest.raises(UserError, match=r"\\xff\\xfe\.parquet: not a readable parquet file") as refused:
        list(local_documents([bad]))
    str(refused.value).encode("utf-8")
    pq.write_table(pa.table({"text": PAIR}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(bad)
    assert list(local_documents([bad])) == PAIR
