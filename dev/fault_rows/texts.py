"""Rows of people's texts: files of all kinds, corpora and tokenizers made of them, small texts trained on."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from dev.fault_box import TINY, Box, Skip, expect_error, expect_ok, row

SMALL = [flag for flag in TINY if not flag.startswith("--corpus")]


def dataset(box: Box, *named: object, name: str = "n", **how: object) -> subprocess.CompletedProcess[str]:
    """Make a corpus of files."""
    flags = ["--corpus=local", f"--name={name}", "--files", *named]
    return box.run("dataset", *flags, **how)  # type: ignore[arg-type]


def lines(count: int = 200) -> str:
    """Documents as lines of JSON, no two alike."""
    return "".join(
        json.dumps({"text": f"document {i} tells of {i * i} things."}) + "\n" for i in range(count)
    )


def write(box: Box, name: str, data: str | bytes) -> Path:
    path = box.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def documents(box: Box, name: str = "n") -> int:
    """Documents of all shards of a corpus."""
    manifest = json.loads((box.base / "data" / name / "manifest.json").read_text("utf-8"))
    return sum(shard["documents"] for shard in manifest["shards"])


def parquet(box: Box, code: str, path: str = "x.parquet") -> Path:
    """A parquet file of the table that the code gives; pa and STRINGS are there."""
    head = "import sys, pyarrow as pa, pyarrow.parquet as pq\nSTRINGS = ['a b', 'c d', 'e f'] * 50\n"
    expect_ok(box.python(f"{head}pq.write_table({code}, sys.argv[1])", box.folder / path))
    return box.folder / path


def follow(box: Box, error: str) -> Path:
    """Run the command that a message ends with; the file that it makes."""
    command = error.split("new file: ")[1].replace("python -c", f"{sys.executable} -c")
    box.execute(["bash", "-c", command])
    return box.folder / re.findall(r"new\.\w+", command)[0]


@row("A1", "a line of JSON with a number of 5,000 digits", wanted="one line that names the line")
def a1(box: Box) -> None:
    path = write(box, "x.jsonl", lines() + '{"text":"c","n":' + "9" * 5000 + "}\n")
    expect_error(dataset(box, path), "x.jsonl", "line 201", "sed 201d")
    assert not (box.base / "data" / "n").exists()


@row("A2", "lines of JSON with a byte order mark", wanted="read")
def a2(box: Box) -> None:
    expect_ok(dataset(box, write(box, "x.jsonl", codecs.BOM_UTF8 + lines().encode())))
    assert documents(box) == 200


@row("A3", "two files with byte order marks, put together by cat", wanted="read")
def a3(box: Box) -> None:
    one = codecs.BOM_UTF8 + lines().encode()
    expect_ok(dataset(box, write(box, "x.jsonl", one + one.replace(b"document", b"chapter"))))
    assert documents(box) == 400


@row("A4", "JSON with CRLF, no last newline, keys twice, NaN, 1e999, an escaped NUL", wanted="read")
def a4(box: Box) -> None:
    odd = ['{"text":"a","text":"b"}', '{"text":"c","n":NaN}', '{"text":"d","n":1e999}', '{"text":"e\\u0000"}']
    expect_ok(dataset(box, write(box, "x.jsonl", (lines() + "\n".join(odd)).replace("\n", "\r\n"))))
    assert documents(box) == 204


@row("A5", "raw NUL, raw tab, a cut line, 200,000 nested brackets", wanted="one line that names the line")
def a5(box: Box) -> None:
    for number, bad in enumerate(('{"text":"a\0b"}', '{"text":"a\tb"}', '{"text":"a', "[" * 200_000)):
        path = write(box, f"{number}.jsonl", lines(3) + bad + "\n")
        expect_error(dataset(box, path, name=f"n{number}"), "line 4")


@row("A6", "half a surrogate pair in a line", wanted="the line, and a way on that works")
def a6(box: Box) -> None:
    error = expect_error(dataset(box, write(box, "x.jsonl", lines() + '{"text":"\\ud800"}\n')), "line 201")
    expect_ok(dataset(box, follow(box, error)))
    assert documents(box) == 200


@row("A7", "an array of JSON in .jsonl, on one line and on many", wanted="read")
def a7(box: Box) -> None:
    entries = [json.loads(line) for line in lines().splitlines()]
    for name, indent in (("one", None), ("many", 2)):
        path = write(box, f"{name}.jsonl", json.dumps(entries, indent=indent))
        expect_ok(dataset(box, path, name=name))
        assert documents(box, name) == 200


@row("A8", "null as the text, in JSON and in parquet", wanted="left out of both")
def a8(box: Box) -> None:
    expect_ok(dataset(box, write(box, "x.jsonl", lines() + '{"text":null}\n'), name="j"))
    path = parquet(box, "pa.table({'text': [f'{i} ' + s for i, s in enumerate(STRINGS)] + [None]})")
    expect_ok(dataset(box, path, name="p"))
    assert (documents(box, "j"), documents(box, "p")) == (200, 150)


@row("A9", "UTF-16, as Windows writes Unicode", wanted="named, with a command that converts it")
def a9(box: Box) -> None:
    for name, text in (("u.txt", "some text\n" * 500), ("u.jsonl", lines())):
        path = write(box, name, text.encode("utf-16"))
        error = expect_error(dataset(box, path, name=name), "UTF-16", "iconv -f UTF-16 -t UTF-8")
        assert follow(box, error).read_text("utf-8").removeprefix("\ufeff") == text
        expect_ok(dataset(box, follow(box, error), name=name))


@row("A11", ".jsonl.gz, .json, .JSONL by name", wanted="read")
def a11(box: Box) -> None:
    data = lines().encode()
    for number, (name, packed) in enumerate(
        (("a.jsonl.gz", gzip.compress(data)), ("a.json", data), ("A.JSONL", data))
    ):
        expect_ok(dataset(box, write(box, name, packed), name=f"n{number}"))
        assert documents(box, f"n{number}") == 200


@row("A12", "a folder of many suffixes", wanted="all texts read; what is left out is counted and named")
def a12(box: Box) -> None:
    for name in ("a.txt", "B.TXT", "c.json", "d.ndjson", "g.md"):
        write(box, f"f/{name}", lines(10).replace("document", f"part {name}"))
    write(box, "f/e.jsonl.gz", gzip.compress(lines(10).encode()))
    for name in ("x.csv", "y.csv", "z.pdf"):
        write(box, f"f/{name}", "1,2")
    made = dataset(box, box.folder / "f")
    expect_ok(made)
    assert documents(box) == 33, documents(box)
    assert "3 files were left out: .csv (2), .pdf (1)" in made.stdout, made.stdout


@row(
    "A15",
    '--files "", as of a variable that is not set',
    wanted="refused; nothing is made of the current folder",
)
def a15(box: Box) -> None:
    write(box, "here.txt", "text of the current folder\n" * 50)
    for empty in ("", " "):
        expect_error(dataset(box, empty), "--files", "empty")
    assert not (box.base / "data" / "n").exists()


@row("A16", "a file whose name is Latin-1 bytes", wanted="read")
def a16(box: Box) -> None:
    (box.folder / "n").mkdir()
    folder = os.fsencode(box.folder / "n")
    Path(os.fsdecode(folder + b"/caf\xe9.txt")).write_text("a text\n" * 900)
    Path(os.fsdecode(folder + b"/caf\xe9.jsonl")).write_text(lines())
    expect_ok(dataset(box, box.folder / "n"))
    expect_ok(dataset(box, os.fsdecode(folder + b"/caf\xe9.jsonl"), name="one"))
    expect_ok(box.run("dataset", "--list"))


@row("A18", "parquet: large_string", wanted="read")
def a18(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': pa.array(STRINGS, pa.large_string())})")))


@row("A19", "parquet: a dictionary, as pandas writes categories", wanted="read")
def a19(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': pa.array(STRINGS).dictionary_encode()})")))


@row("A20", "parquet: string_view, as polars writes it", wanted="read")
def a20(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': pa.array(STRINGS, pa.string_view())})")))
    assert documents(box) >= 100


@row("A21", "parquet: a binary column of UTF-8", wanted="read")
def a21(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': [s.encode() for s in STRINGS]})")))


@row(
    "A22", "parquet: a string column with a byte that is not UTF-8", wanted="the row, and a way on that works"
)
def a22(box: Box) -> None:
    for kind in ("pa.binary()", "pa.string()"):
        data = "pa.array([b'a b'] * 60 + [b'\\xff'] + [b'c d'] * 60, pa.binary())"
        column = (
            data if kind == "pa.binary()" else f"pa.Array.from_buffers(pa.string(), 121, {data}.buffers())"
        )
        path = parquet(box, f"pa.table({{'text': {column}}})")
        error = expect_error(dataset(box, path), "x.parquet", "row 60")
        expect_ok(dataset(box, follow(box, error), name=kind.strip("()")))


@row(
    "A23",
    "parquet: nulls, no rows, only nulls, lists, structs, another name, two of one name",
    wanted="one line",
)
def a23(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': STRINGS + [None]})")))
    for number, (code, word) in enumerate(
        (
            ("pa.table({'text': pa.array([], pa.string())})", "no text"),
            ("pa.table({'text': pa.array([None] * 9, pa.string())})", "no text"),
            ("pa.table({'text': [['a']]})", "column 'text' holds list"),
            ("pa.table({'text': [{'a': 1}]})", "column 'text' holds struct"),
            ("pa.table({'content': STRINGS})", "rename_columns"),
            ("pa.table([STRINGS, STRINGS], names=['text', 'text'])", "expected one column"),
        )
    ):
        path = parquet(box, code, f"{number}.parquet")
        error = expect_error(dataset(box, path, name=f"n{number}"), word)
        if word == "rename_columns":
            expect_ok(dataset(box, follow(box, error), name="renamed"))


@row("A24", "parquet: a nested struct beside the text", wanted="read")
def a24(box: Box) -> None:
    nested = "[{'a': [{'b': i}]} for i in range(150)]"
    expect_ok(dataset(box, parquet(box, f"pa.table({{'meta': {nested}, 'text': STRINGS}})")))


@row("A25", "parquet: thousands of row groups", wanted="read")
def a25(box: Box) -> None:
    code = "import sys, pyarrow as pa, pyarrow.parquet as pq\n"
    code += "t = pa.table({'text': [f'text {i}' for i in range(4000)]})\n"
    code += "pq.write_table(t, sys.argv[1], row_group_size=1)"
    expect_ok(box.python(code, box.folder / "x.parquet"))
    expect_ok(dataset(box, box.folder / "x.parquet"))
    assert documents(box) == 4000


@row("A26", "parquet: one row group of 100,000 rows", wanted="read")
def a26(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': [f'text {i}' for i in range(100_000)]})")))
    assert documents(box) == 100_000


@row("A27", "parquet: a string of 20 MB in one row", wanted="read, cut to documents")
def a27(box: Box) -> None:
    expect_ok(dataset(box, parquet(box, "pa.table({'text': ['some words ' * 2_000_000, 'end']})")))
    assert documents(box) >= 20


@row("A28", "one line of 50 MB of plain text", wanted="read")
def a28(box: Box) -> None:
    expect_ok(dataset(box, write(box, "x.txt", "".join(f"word{i} " for i in range(5_000_000)))))
    assert documents(box) > 10_000


@row("A29", "documents that spell special tokens", wanted="text like any other")
def a29(box: Box) -> None:
    text = "".join(json.dumps({"text": f"<|bos|> <|user_start|> {i} <|bos|>"}) + "\n" for i in range(300))
    expect_ok(dataset(box, write(box, "x.jsonl", text)))
    expect_ok(box.run("tok_train", "--corpus=n", "--vocab-size=280"))
    expect_ok(box.run("base_train", "--corpus=n", "--num-iterations=2", *SMALL))


@row("A30", "a file edited in its middle, its size kept, the same command again", wanted="refused by name")
def a30(box: Box) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(15_000))
    path = write(box, "x.txt", text)
    expect_ok(dataset(box, path))
    expect_ok(dataset(box, path))
    stat = path.stat()
    write(box, "x.txt", text[:100_000] + text[100_000:200_000].upper() + text[200_000:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    expect_error(dataset(box, path), "have changed since", "--name")


@row("A31", "a validation file that is a copy of a training file", wanted="said")
def a31(box: Box) -> None:
    train, val = write(box, "a.txt", "one text\n" * 900), write(box, "b.txt", "one text\n" * 900)
    made = dataset(box, train, val, "--val-file", val)
    expect_ok(made)
    assert "validation will look too good" in made.stdout, made.stdout


@row("A32", "dataset --list with a damaged manifest", wanted="the others are listed, the damaged one named")
def a32(box: Box) -> None:
    for name in ("a", "b", "c"):
        expect_ok(dataset(box, write(box, f"{name}.jsonl", lines()), name=name))
    (box.base / "data" / "a" / "manifest.json").write_text("{")
    listed = box.run("dataset", "--list")
    expect_error(listed, "a/manifest.json")
    for name in ("b: ", "c: "):
        assert name in listed.stdout, listed.stdout


@row("A33", "a process substitution, - and a pipe as --files", wanted="a true message")
def a33(box: Box) -> None:
    write(box, "x.jsonl", lines())
    make = "$PY -m scripts.dataset --corpus local --name n --files"
    for named in ("<(cat x.jsonl)", "-", "/dev/stdin"):
        expect_error(box.shell(f"cat x.jsonl | {make} {named}"), "a pipe or a device", "Write it to a file")


@row("A34", "data/NAME is a link to another disk", wanted="the link stays, the data are behind it")
def a34(box: Box) -> None:
    (box.folder / "big" / "sl").mkdir(parents=True)
    (box.base / "data").mkdir()
    link = box.base / "data" / "sl"
    link.symlink_to(box.folder / "big" / "sl")
    expect_ok(dataset(box, write(box, "x.jsonl", lines()), name="sl"))
    assert link.is_symlink(), "the link is gone"
    assert (box.folder / "big" / "sl" / "manifest.json").is_file()
    left = [p.name for p in (*link.parent.iterdir(), *(box.folder / "big").iterdir())]
    assert left == ["sl", "sl"], left


@row("A35", "odd names of corpora", wanted="made, or one line")
def a35(box: Box) -> None:
    path = write(box, "x.jsonl", lines())
    for name in ("a\nb", "\U0001f600", "[x]", "a" * 250, "a/b", "..", ""):
        result = dataset(box, path, name=name)
        if result.returncode:
            expect_error(result)
        else:
            expect_ok(result)


@row("A36", "two processes make one corpus at once", wanted="one corpus, whole")
def a36(box: Box) -> None:
    path = write(box, "x.jsonl", lines(5000))
    flags = ["--corpus=local", "--name=n", "--files", path]
    both = [box.start("dataset", *flags) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0], box.output(0) + box.output(1)
    expect_ok(box.run("dataset", "--corpus=n", "--verify"))


@row("C1", "odd sizes of a vocabulary", wanted="made, or one line")
def c1(box: Box) -> None:
    expect_ok(dataset(box, write(box, "x.jsonl", lines())))
    for size in (0, -1, 255, 264):
        expect_error(box.run("tok_train", "--corpus=n", f"--vocab-size={size}"), str(size))
    for size in (265, 300, 5000):
        made = box.run("tok_train", "--corpus=n", f"--vocab-size={size}", "--overwrite")
        expect_ok(made)
        assert (size < 5000) != ("no more pairs" in made.stdout)


@row("C3", "a text that is empty or white space", wanted="one line")
def c3(box: Box) -> None:
    for number, text in enumerate(("", "\n\n", "  \t ")):
        expect_error(dataset(box, write(box, f"{number}.txt", text)), "no text")


@row("C4", "--max-chars and --doc-cap of 0 and below", wanted="the flag is named")
def c4(box: Box) -> None:
    box.tiny()
    for flag in ("--max-chars=0", "--max-chars=-5", "--doc-cap=0"):
        expect_error(box.run("tok_train", "--corpus=tiny", "--overwrite", flag), flag)


@row("C5", "--doc-cap=-1", wanted="the flag is named")
def c5(box: Box) -> None:
    box.tiny()
    expect_error(box.run("tok_train", "--corpus=tiny", "--overwrite", "--doc-cap=-1"), "--doc-cap=-1")


THREE = '{"text":"hello world."}\n{"text":"two."}\n{"text":"three."}\n'


@row("D8", "three short documents, default flags", wanted="trains and validates")
def d8(box: Box) -> None:
    expect_ok(dataset(box, write(box, "t.jsonl", THREE)))
    expect_ok(box.run("tok_train", "--corpus=n", "--vocab-size=300"))
    trained = box.run("base_train", "--corpus=n", "--run=a", "--num-iterations=3", *SMALL)
    expect_ok(trained)
    assert "remainders of long documents are kept" in trained.stdout, trained.stdout
    refused = box.run("base_train", "--corpus=n", "--run=b", "--num-iterations=3", "--no-keep-tails", *SMALL)
    expect_error(refused, "--no-keep-tails", "--max-seq-len")
    assert not (box.base / "runs" / "b" / "config.json").exists(), "the run had begun"


@row("D9", "three short documents with --keep-tails, and at a context of 2048", wanted="trains and validates")
def d9(box: Box) -> None:
    expect_ok(dataset(box, write(box, "t.jsonl", THREE)))
    expect_ok(box.run("tok_train", "--corpus=n", "--vocab-size=300"))
    for run, context in (("a", 32), ("b", 2048)):
        flags = [
            flag
            for flag in SMALL
            if not flag.startswith(("--max-seq-len", "--total-batch", "--device-batch"))
        ]
        flags += [
            f"--run={run}",
            f"--max-seq-len={context}",
            f"--total-batch-size={2 * context}",
            "--keep-tails",
        ]
        expect_ok(box.run("base_train", "--corpus=n", "--num-iterations=2", *flags))


@row("T88", "a full disk while a corpus and a tokenizer are written", wanted="one line, all as before")
def t88(box: Box) -> None:
    if os.geteuid() or box.execute(["mount", "-t", "tmpfs", "-o", "size=2m", "t", str(box.base)]).returncode:
        raise Skip("needs leave to mount a small disk")
    try:
        expect_ok(dataset(box, write(box, "x.jsonl", lines()), name="small"))
        expect_ok(box.run("tok_train", "--corpus=small", "--vocab-size=300"))
        before = sorted(str(p) for p in box.base.rglob("*"))
        noise = os.urandom(3 << 20).hex()
        large = "".join(json.dumps({"text": noise[i : i + 3000]}) + "\n" for i in range(0, len(noise), 3000))
        error = expect_error(dataset(box, write(box, "large.jsonl", large), name="large"))
        assert re.search("space", error), error
        assert sorted(str(p) for p in box.base.rglob("*") if "locks" not in str(p)) == [
            name for name in before if "locks" not in name
        ]
        with (box.base / "full").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"\0" * 4096)
            except OSError:
                pass
        expect_error(box.run("tok_train", "--corpus=small", "--vocab-size=290", "--overwrite"), "space")
        (box.base / "full").unlink()
        expect_ok(box.run("tok_train", "--corpus=small", "--vocab-size=300"))
    finally:
        box.execute(["umount", str(box.base)])
