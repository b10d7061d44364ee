"""Sources of documents on this machine: Python's standard library and its help, and the user's files.

They need no network, so that a first run does not: a corpus is made from what every installation has.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import random
import re
import sys
import sysconfig
import tokenize
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import BuiltinFunctionType, ModuleType

import numpy as np

from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.data import text_files

PIECE_CHARS = 4_000  # texts of files are cut to pieces of this size: about 1,000 tokens, as web text has
MAX_DOCUMENT_CHARS = 1_000_000  # documents of parquet and jsonl are taken as they are up to here
BREAKS = ("\n\n\n", "\n\n", "\n", " ")  # where a text is cut, best first: top level of code, paragraph, line

STDLIB_VAL_EVERY = 25  # one source file in 25 is held out
STDLIB_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Modules in C have no sources to read; the text of their docstrings is documentation all the same.
C_MODULES = ("_datetime", "_decimal", "array", "cmath", "math", "select", "unicodedata", "zlib")

# Unless the user names a file, validation is the end of the text: one document in 100, and of a text below
# 5 MB more, since a bits per byte of a few pages says little: VAL_CHARS, but at most a tenth.
VAL_EVERY = 100
VAL_CHARS, SHORT_VAL_EVERY = 50_000, 10
MAX_VAL_DOCUMENTS, MAX_VAL_CHARS = 10_000, 1 << 28  # they are held in memory
SAMPLED_BYTES = 1 << 16  # of each end of a file, to know it again
SHUFFLE_CHARS = 512 << 20  # text held to shuffle; a corpus below it is shuffled perfectly


def split_text(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, at the best break in their last three quarters.

    Joined, the pieces are the text again.
    """
    start = 0
    while len(text) - start > limit:
        end = _best_break(text, start + limit // 4, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _best_break(text: str, first: int, end: int) -> int:
    """Where to cut a text between two positions: after the last of the best breaks, or at the end."""
    breaks = ((text.rfind(mark, first, end), len(mark)) for mark in BREAKS)
    return next((at + length for at, length in breaks if at >= 0), end)


def _pieces(text: str) -> Iterator[str]:
    return (piece.strip("\n") for piece in split_text(text, PIECE_CHARS))


# -----------------------------------------------------------------------------
# stdlib


def stdlib_documents() -> tuple[list[str], list[str]]:
    """Training and validation documents from this Python installation; the same each time on one.

    Tests and the tables of character sets are left out: they are long, repetitive, and teach a small model
    little. Validation is whole files. Exact duplicates are dropped.

    Raises:
        UserError: the installation has no sources on the disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    units = [*_source_texts(root), *_help_topics(), *_c_documentation()]
    if not any(name.endswith(".py") for name, _ in units):
        raise UserError(
            f"{root}: no Python sources there. Use a Python that has its standard library on the disk."
        )
    seen: set[str] = set()
    train: list[str] = []
    val: list[str] = []
    for name, text in sorted(units):
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % STDLIB_VAL_EVERY == 0
        for piece in _pieces(text.replace("\r\n", "\n")):
            if piece and piece not in seen:
                seen.add(piece)
                (val if held_out else train).append(piece)
    random.Random(0).shuffle(train)  # noqa: S311 - an order, not a secret
    random.Random(1).shuffle(val)  # noqa: S311
    return train, val


def _source_texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.suffix not in STDLIB_SUFFIXES or any(part in STDLIB_SKIPPED for part in name.parts):
            continue
        # _sysconfigdata is how this machine built Python; the topics come below, as text.
        if name.name.startswith("_sysconfigdata") or name.parts[0] == "pydoc_data":
            continue
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(path.read_bytes()).readline)
            text = path.read_text(encoding)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 ships sources of other encodings on purpose
        if name.parts[0] == "encodings" and ("decoding_table" in text or "decoding_map" in text):
            continue
        yield name.as_posix(), text


def _help_topics() -> Iterator[tuple[str, str]]:
    """The language reference, as `help("topic")` prints it; some distributions leave it out."""
    with contextlib.suppress(ImportError):
        for name, text in importlib.import_module("pydoc_data.topics").topics.items():
            yield f"topics/{name}", text


def _c_documentation() -> Iterator[tuple[str, str]]:
    for name in sorted({*sys.builtin_module_names, *C_MODULES}):
        with contextlib.suppress(ImportError):
            yield f"help/{name}", "\n\n".join(_docstrings(importlib.import_module(name)))


def _docstrings(module: ModuleType) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, under their names."""
    yield f"{module.__name__}: {module.__doc__}"
    for name, thing in sorted(vars(module).items()):
        # Hooks are replaced by debuggers and test runners: the corpus must not depend on who makes it.
        is_public = isinstance(thing, (BuiltinFunctionType, type)) and not name.startswith("_")
        if not is_public or name.endswith("hook"):
            continue
        yield f"{module.__name__}.{name}{_signature(thing)}\n{thing.__doc__}"
        for inner, member in sorted(vars(thing).items()) if isinstance(thing, type) else ():
            documentation = getattr(member, "__doc__", None)
            if not inner.startswith("_") and isinstance(documentation, str):
                yield f"{name}.{inner}{_signature(member)}\n{documentation}"


def _signature(thing: object) -> str:
    """Arguments as C code declares them, without the `$self` or `$module` that only the parser needs."""
    text = ""
    with contextlib.suppress(ValueError):
        text = getattr(thing, "__text_signature__", None) or ""
    return re.sub(r"\$\w+(, /)?(, )?", "", text)


# -----------------------------------------------------------------------------
# local


def find_files(named: Iterable[str], val_file: str) -> tuple[list[Path], Path | None]:
    """The files a user names, folders opened, and the one for validation taken out.

    Args:
        named: files and folders.
        val_file: a path, or the name of one of the files found; "" for none.

    Raises:
        UserError: something is absent, of another kind, or there is nothing.
    """
    paths = list({path.resolve(): path for item in named for path in _files_of(item)}.values())
    if not val_file:
        return paths, None
    held_out = [path for path in paths if path.name == val_file or path.resolve() == Path(val_file).resolve()]
    if not held_out and Path(val_file).exists():
        held_out = _files_of(val_file, flag="--val-file")
    if len(held_out) != 1:
        raise UserError(
            f"--val-file {text_files.shown(val_file)}: found {len(held_out)} such files, expected one. "
            "Name the one by its path."
        )
    return [path for path in paths if path != held_out[0]], held_out[0]


def _files_of(item: str, flag: str = "--files") -> list[Path]:
    """The files that a path stands for.

    Raises:
        UserError: there is nothing to read.
    """
    path = Path(item)
    where = f"{flag} {text_files.shown(item)}"
    if not item.strip():
        raise UserError(f"{flag}: one of the paths is empty. Is a variable of the shell not set?")
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if text_files.kind_of(p)[0] and p.is_file())
        if not inside:
            raise UserError(f"{where}: no file in this folder ends in {text_files.ACCEPTED}.")
        return inside
    if item == "-" or (path.exists() and not path.is_file()):
        raise UserError(
            f"{where}: a pipe or a device, which can be read only once. Write it to a file, and name that: "
            "... > text.txt"
        )
    if not path.is_file():
        raise UserError(f"{where}: no such file or folder.")
    if not text_files.kind_of(path)[0]:
        raise UserError(f"{where}: expected a file that ends in {text_files.ACCEPTED}. Rename or convert it.")
    return [path]


def left_out(named: Iterable[str]) -> str:
    """What folders hold beside the files that are read, counted by suffix; "" for nothing."""
    inside = (path for folder in map(Path, named) if folder.is_dir() for path in sorted(folder.rglob("*")))
    others = [
        path
        for path in inside
        if path.is_file() and not path.name.startswith(".") and not text_files.kind_of(path)[0]
    ]
    if not others:
        return ""
    counts = Counter("".join(path.suffixes[-2:]).lower() or "no suffix" for path in others)
    kinds = ", ".join(f"{kind} ({count})" for kind, count in counts.most_common(8))
    names = ", ".join(text_files.shown(path.name) for path in others[:5])
    return (
        f"{len(others)} files were left out: {kinds}; {names}{', ...' if len(others) > 5 else ''}. "
        f"What is read: {text_files.ACCEPTED}."
    )


def content_digest(paths: Sequence[Path], val_path: Path | None) -> str:
    """Tells whether the same texts are named again: the names and the bytes of all files."""
    digest = hashlib.sha256()
    for path in filter(None, [*paths, val_path]):
        digest.update(b"%s %d %s\n" % (os.fsencode(path.name), path == val_path, files.sha256(path).encode()))
    return digest.hexdigest()[:16]


def listing_digest(paths: Sequence[Path], val_path: Path | None) -> str:
    """What corpora of earlier releases know their files by: names, sizes, first and last bytes."""
    digest = hashlib.sha256()
    for path in filter(None, [*paths, val_path]):
        size = path.stat().st_size
        digest.update(b"%s %d %s\n" % (os.fsencode(path.name), size, str(path == val_path).encode()))
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def local_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The documents of files of all kinds that `text_files` reads, in order; none is empty.

    Raises:
        UserError: a file is damaged, not UTF-8, or without text; says which and where.
    """
    for path in paths:
        for text in text_files.documents(path, _pieces_of):
            for document in split_text(text, MAX_DOCUMENT_CHARS):
                if document.strip():
                    yield document


def _pieces_of(parts: Iterable[str]) -> Iterator[str]:
    """Pieces of a plain text that comes in parts; a short text is one document. Holds a few at a time."""
    held: list[str] = []
    chars = 0
    for part in parts:
        held.append(part)
        chars += len(part)
        if chars > 8 * PIECE_CHARS:
            *ready, rest = split_text("".join(held), PIECE_CHARS)
            yield from (piece.strip("\n") for piece in ready)
            held, chars = [rest], len(rest)
    yield from _pieces("".join(held))


def local_splits(paths: Sequence[Path], val_path: Path | None) -> tuple[Iterator[str], Iterator[str]]:
    """Documents to train on, shuffled, and those for validation, which are there once the first are read.

    What is held out from a text leaves out documents that training has too, unless all are such. A file that
    a person named for validation is taken whole. What is in both is said.
    """
    held: deque[str] = deque()
    hashes = array("q")
    train = local_documents(paths)
    if val_path is None:
        train = hold_out_end(train, held)

    def val() -> Iterator[str]:
        documents = list(held) if val_path is None else list(local_documents([val_path]))
        repeated = np.isin([hash(document) for document in documents], np.frombuffer(hashes, np.int64))
        stays = val_path is not None or repeated.all()
        if count := repeated.sum():
            so = "validation will look too good" if stays else "they were left out"
            print(
                f"{count} of {len(documents)} validation documents are also in the text to train on, word for"
                f" word: {so}."
            )
        yield from (text for text, known in zip(documents, repeated, strict=True) if stays or not known)

    return shuffled(_noted(train, hashes), seed=0), val()


def hold_out_end(documents: Iterable[str], held: deque[str]) -> Iterator[str]:
    """Pass documents on, but leave the last of them in `held`: it is validation.

    What is at the end stays together, so pieces of one text are on both sides of one border at most. Where
    the document at the border is far longer than what is to be held out, it is cut.
    """
    chars_seen = held_chars = 0
    for seen, document in enumerate(documents, 1):
        held.append(document)
        chars_seen += len(document)
        held_chars += len(document)
        least = min(max(1, seen // VAL_EVERY), MAX_VAL_DOCUMENTS)
        while (len(held) > least and held_chars - len(held[0]) >= val_chars(chars_seen)) or (
            len(held) > 1 and held_chars > MAX_VAL_CHARS
        ):
            held_chars -= len(held[0])
            yield held.popleft()
    wanted = val_chars(chars_seen) - sum(map(len, list(held)[1:]))  # of the first of them
    if held and wanted > 0 and len(held[0]) - wanted > val_chars(chars_seen):
        first = held.popleft()
        end = len(first) - wanted  # or up to as much again before it, for the sake of a break
        at = _best_break(first, max(1, end - wanted), end)
        held.appendleft(first[at:])
        yield first[:at]


def val_chars(chars: int) -> int:
    """Characters to hold out at least, of a text of so many.

    >>> val_chars(10_000), val_chars(1_000_000), val_chars(10**9)
    (1000, 50000, 50000)
    """
    return max(1, min(VAL_CHARS, chars // SHORT_VAL_EVERY))


def _noted(documents: Iterable[str], hashes: array[int]) -> Iterator[str]:
    """Pass documents on and append a hash of each: 8 bytes, where a set of the texts would hold them all."""
    for document in documents:
        hashes.append(hash(document))
        yield document


def shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    """Shuffle within bounded memory: each document changes places with a random one of those held."""
    rng = random.Random(seed)  # noqa: S311
    held: list[str] = []
    chars = 0
    for document in documents:
        held.append(document)
        chars += len(document)
        if chars > SHUFFLE_CHARS:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            chars -= len(held[-1])
            yield held.pop()
    rng.shuffle(held)
    yield from held
