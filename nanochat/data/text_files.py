"""Readers of the user's files: plain text, JSON of several kinds and parquet, compressed or not.

`ACCEPTED` lists what is read; whatever cannot be is refused with a command that helps. Memory is bounded,
except that a line of JSON is parsed at once; a file that unpacks to far more than text does is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data import parquet_shards

# By the end of a file's name, in small letters.
TEXT_SUFFIXES, JSON_SUFFIXES, PARQUET_SUFFIX = (".txt", ".md"), (".jsonl", ".ndjson", ".json"), ".parquet"
COMPRESSED_SUFFIXES = {".gz": "gunzip -c", ".zst": "zstd -dc"}  # of text and JSON; the command that unpacks
ACCEPTED = (
    f"{', '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES))}, the same with {' or '.join(COMPRESSED_SUFFIXES)} "
    f"after it, or {PARQUET_SUFFIX}"
)
PART_BYTES = 1 << 20  # of a long line of plain text, read at a time
MAX_LINE_BYTES = 1 << 29  # of JSON, parsed whole
MAX_EXPANSION, FREE_EXPANSION = 200, 64 << 20  # text shrinks to a tenth or so: more is a bomb
BOM = "\ufeff"
JSON_SPACE = f" \t\r\n{BOM}"
CP1252_BYTES = frozenset(range(0x80, 0xA0)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D}  # letters there, none in Latin-1
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
DECODER = json.JSONDecoder()


def kind_of(path: Path) -> tuple[str, str]:
    """The kind of a file, as the suffix of it, and the suffix of its compression; "" for what is not read.

    >>> kind_of(Path("A.JSONL.gz")), kind_of(Path("notes.md")), kind_of(Path("x.csv"))
    (('.jsonl', '.gz'), ('.md', ''), ('', ''))
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES else ""
    kind = suffixes[-1] if suffixes else ""
    if kind in (*TEXT_SUFFIXES, *JSON_SUFFIXES) or (kind == PARQUET_SUFFIX and not packed):
        return kind, packed
    return "", ""


def shown(path: Path | str) -> str:
    """A path as a message can hold it: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def documents(path: Path, split: Callable[[Iterable[str]], Iterator[str]]) -> Iterator[str]:
    """The documents of a file; plain text goes through `split`, in parts.

    Raises:
        UserError: the file is damaged, not UTF-8, or not of the kind that its name says; says where.
    """
    kind, _ = kind_of(path)
    if kind == PARQUET_SUFFIX:
        yield from _parquet(path)
        return
    with _opened(path) as stream:
        if kind in TEXT_SUFFIXES:
            yield from split(text for _, text in _lines(path, stream, PART_BYTES, whole=False))
        else:
            yield from _json_texts(path, stream)


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file of JSON, compressed or not.

    Raises:
        UserError: the file is damaged or not UTF-8, or a line is longer than any may be.
    """
    with _opened(path) as stream:
        yield from _lines(path, stream, MAX_LINE_BYTES, whole=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a file; what is wrong with it while they are read becomes a message."""
    try:
        with path.open("rb") as file, _unpacked(path, file) as stream:
            _refuse_utf16(path, stream)
            yield stream
    except (EOFError, zlib.error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{shown(path)}: cannot be unpacked ({error}). It is damaged: fetch it again."
        ) from None


# -----------------------------------------------------------------------------
# Bytes


class _Unpacking(io.RawIOBase):
    """A stream of unpacked bytes that are counted: a file of a megabyte can hold a petabyte of zeros."""

    def __init__(self, path: Path, source: Any, packed_bytes: int) -> None:
        self._path, self._source = path, source
        self._left = FREE_EXPANSION + MAX_EXPANSION * packed_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"{shown(self._path)}: unpacks to more than {MAX_EXPANSION} times its size: no text does. "
                "If it is all the same, unpack it and name the unpacked file."
            )
        buffer[: len(data)] = data
        return len(data)


def _unpacked(path: Path, file: BinaryIO) -> io.BufferedReader:
    _, packed = kind_of(path)
    if not packed:
        return cast(io.BufferedReader, file)
    source: Any = gzip.GzipFile(fileobj=file)
    if packed == ".zst":
        source = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(_Unpacking(path, source, os.fstat(file.fileno()).st_size), PART_BYTES)


def _read_command(path: Path) -> str:
    """A shell command that prints the unpacked file, to be followed by a pipe."""
    return f"{COMPRESSED_SUFFIXES.get(kind_of(path)[1], 'cat')} {shlex.quote(shown(path))}"


def _new_name(path: Path) -> str:
    return f"new{kind_of(path)[0]}"


def _refuse_utf16(path: Path, stream: io.BufferedReader) -> None:
    """Windows calls it "Unicode"; as UTF-8, every second character of it would be NUL."""
    head = stream.peek(4096)[:4096]
    name = ""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        name = "UTF-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "UTF-16"
    elif max(nul := (head[::2].count(0), head[1::2].count(0))) > max(1, len(head) // 4, 9 * min(nul)):
        name = "UTF-16LE" if nul[1] > nul[0] else "UTF-16BE"
    if name:
        raise UserError(
            f"{shown(path)}: is {name}, expected UTF-8. Convert it, and name the new file: "
            f"{_read_command(path)} | iconv -f {name} -t UTF-8 > {_new_name(path)}"
        )


def _lines(path: Path, stream: BinaryIO, limit: int, *, whole: bool) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded, with their line end as a newline.

    Args:
        path: for messages.
        stream: what to read.
        limit: bytes that are read at a time.
        whole: refuse a line of more bytes; otherwise it comes in parts.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, offset, is_start, is_ascii = 1, 0, True, True
    while line := stream.readline(limit):
        while line.endswith(b"\r") and (following := stream.read(1)):  # perhaps its newline
            line += following
        is_end = line.endswith(b"\n")
        if whole and not is_end and len(line) >= limit:
            raise _bad_line(path, number, f" has more than {limit} bytes")
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(line)
        except UnicodeDecodeError as error:
            at = offset - undecoded + error.start
            raise _not_utf8(path, at, error.object[error.start], is_ascii) from None
        offset += len(line)
        is_ascii = is_ascii and text.isascii()
        if is_start:  # a byte order mark stands also where files were put together
            text = text.lstrip(BOM)
        is_start = is_end or (is_start and not text)
        yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
        number += is_end
    if rest := decoder.getstate()[0]:
        raise _not_utf8(path, offset - len(rest), rest[0], is_ascii)


def _not_utf8(path: Path, offset: int, byte: int, is_ascii: bool) -> UserError:
    """What helps depends on what comes before: UTF-8 that is damaged here, or an encoding of old."""
    if is_ascii:
        old = "CP1252" if byte in CP1252_BYTES else "LATIN1"
        advice = f"Convert the file, and name the new one: {_read_command(path)} | iconv -f {old} -t UTF-8"
    else:
        advice = (
            "There is UTF-8 before it, so the file is damaged. Leave such bytes out, and name the new file: "
            f"{_read_command(path)} | iconv -c -f UTF-8 -t UTF-8"
        )
    return UserError(f"{shown(path)}: byte {offset} is not UTF-8. {advice} > {_new_name(path)}")


# -----------------------------------------------------------------------------
# JSON


def _json_texts(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Texts of a file of JSON: one value a line, or all of the file one value."""
    lines = _lines(path, stream, MAX_LINE_BYTES, whole=True)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        try:
            values = list(_values(line))
        except (ValueError, RecursionError) as error:
            if is_first and isinstance(error, json.JSONDecodeError):
                yield from _json_whole(path, number, line, lines)
                return
            raise _bad_line(path, number, f" is not JSON ({error})") from None
        is_first = False
        for value in values:
            try:
                yield from _texts(value)
            except ValueError as error:
                raise _bad_line(path, number, f": {error}") from None


def _json_whole(path: Path, first: int, line: str, rest: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Texts of a file that is one value over several lines, such as an array."""
    held, chars = [line], len(line)
    for _, line in rest:
        held.append(line)
        chars += len(line)
        if chars > MAX_LINE_BYTES:
            raise _bad_line(path, first, " is not JSON by itself, and the file is too large for one value")
    try:
        values = list(_values("".join(held)))
    except json.JSONDecodeError as error:
        number = first + error.lineno - 1
        raise _bad_line(path, number, f" is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)}: is not JSON ({error}). {_an_entry_a_line(path)}") from None
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    for number, entry in enumerate(entries, 1):
        try:
            yield from _texts(entry)
        except ValueError as error:
            raise UserError(f"{shown(path)}: entry {number}: {error}. {_an_entry_a_line(path)}") from None


def _values(text: str) -> Iterator[Any]:
    """The values of JSON in a text, one after another: files without a last newline may have been joined."""
    at = 0
    while True:
        while at < len(text) and text[at] in JSON_SPACE:
            at += 1
        if at == len(text):
            return
        value, at = DECODER.raw_decode(text, at)
        yield value


def _texts(value: Any) -> Iterator[str]:
    """The texts of a value: an object with a key `text`, a string, an array of these; null has none.

    Raises:
        ValueError: something else, to be said of a line.
    """
    if isinstance(value, dict) and parquet_shards.TEXT_COLUMN in value:
        value = value[parquet_shards.TEXT_COLUMN]
        if isinstance(value, list):
            raise ValueError('expected {"text": "..."}, found an array as the text')
    elif isinstance(value, dict):
        raise ValueError(f'expected {{"text": "..."}}, found the keys {_keys(value)}')
    if isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, str):
        if not files.is_utf8(value):
            raise ValueError("the text holds half a surrogate pair")
        yield value
    elif value is not None:
        raise ValueError(f'expected {{"text": "..."}}, found {str(value)[:60]}')


def _keys(value: dict[str, Any]) -> str:
    names = ", ".join(json.dumps(name) for name in list(value)[:8])
    strings = {name: len(text) for name, text in value.items() if isinstance(text, str)}
    if not strings:
        return names or "none"
    longest = max(strings, key=lambda name: strings[name])
    key = json.dumps(longest)
    return f"{names}; if the text is in {key}, rename that: sed 's/{key} *:/\"text\":/'"


def _bad_line(path: Path, number: int, what: str) -> UserError:
    """A line that cannot be taken, and the way on without it."""
    return UserError(
        f"{shown(path)}: line {number}{what}. Mend it; or leave it out, and name the new file: "
        f"{_read_command(path)} | sed {number}d > {_new_name(path)}"
    )


def _an_entry_a_line(path: Path) -> str:
    return (
        f"Mend it; where there are many, write an entry a line: {_read_command(path)} | "
        "jq -c '.[]' > new.jsonl"
    )


# -----------------------------------------------------------------------------
# parquet


def _parquet(path: Path) -> Iterator[str]:
    """Values of the column `text`, whatever kind of strings it holds; null is skipped."""
    row = 0
    try:
        # Through an open file: Arrow takes no name that is not UTF-8. pre_buffer would hold all of it.
        with path.open("rb") as file, pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False) as parquet:
            _require_text(path, parquet.schema_arrow)
            for batch in parquet.iter_batches(
                parquet_shards.BATCH_ROWS, columns=[parquet_shards.TEXT_COLUMN]
            ):
                for value in batch.column(0):
                    text = value.as_py()
                    yield text.decode("utf-8") if isinstance(text, bytes) else text or ""
                    row += 1
    except UnicodeDecodeError:
        raise UserError(
            f"{shown(path)}: row {row} of the column 'text' is not UTF-8 (the first is 0). Mend it; or leave "
            'it out, and name the new file: python -c "import pyarrow.parquet as pq; '
            f"t = pq.read_table({shown(path)!r}, columns=['text']); "
            f"pq.write_table(t.take([i for i in range(len(t)) if i != {row}]), 'new.parquet')\""
        ) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = parquet_shards.first_line(error)
        raise UserError(
            f"{shown(path)}: not a readable parquet file ({reason}). Fetch or write it again."
        ) from None


def _require_text(path: Path, schema: pa.Schema) -> None:
    kinds = [schema.field(at).type for at in schema.get_all_field_indices(parquet_shards.TEXT_COLUMN)]
    if len(kinds) == 1 and _is_text(kinds[0]):
        return
    if len(kinds) == 1:
        problem = f"column 'text' holds {kinds[0]}, expected strings"
    else:
        problem = f"expected one column named 'text', found {schema.names}"
    others = [field.name for field in schema if _is_text(field.type) and schema.names.count(field.name) == 1]
    if not others:
        raise UserError(f"{shown(path)}: {problem}, and there is no other column of text. Write it with one.")
    raise UserError(
        f"{shown(path)}: {problem}. If the text is in {others[0]!r}, write it as 'text', and name the new "
        f'file: python -c "import pyarrow.parquet as pq; pq.write_table(pq.read_table({shown(path)!r}, '
        f"columns=[{others[0]!r}]).rename_columns(['text']), 'new.parquet')\""
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in TEXT_TYPES
