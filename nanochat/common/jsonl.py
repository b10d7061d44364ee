"""Files of JSON lines: metrics, of which a kill may tear one, and answers, of which none may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from nanochat.common import files, typed_json
from nanochat.common.errors import UserError, warn


class Entry(TypedDict):
    """What every line of metrics.jsonl has."""

    kind: str
    step: int


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl from `step` on, and what a kill or a crash left of others."""
    if not path.exists():
        return
    lines = ((line, _object(line)) for line in path.read_bytes().split(b"\n"))
    kept = [line + b"\n" for line, entry in lines if _is_entry(entry) and entry["step"] < step]
    files.atomic_write(path, b"".join(kept))


def keep_aside(path: Path, step: int) -> Path | None:
    """Copy metrics.jsonl to metrics.<n>.jsonl beside it, if it tells of steps from `step` on.

    For a run that will not go over these steps as it did: they stay as the only trace of work that was done.
    """
    if not path.exists():
        return None
    entries, _ = read_objects(path)
    if not any(_is_entry(entry) and entry["kind"] == "step" and entry["step"] >= step for entry in entries):
        return None
    number = 1
    while (copy := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    files.atomic_write(copy, path.read_bytes())
    return copy


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; those that a crash has damaged are counted on stderr.

    Raises:
        UserError: the file is absent, or no line of it can be read.
    """
    found, damaged = read_objects(path)
    entries = [entry for entry in found if _is_entry(entry)]
    damaged += len(found) - len(entries)
    if damaged and not entries:
        raise UserError(f"{path}: no line of it can be read. Move it away; a run goes on without it.")
    if damaged:
        warn(f"{path}: {damaged} of {damaged + len(entries)} lines are damaged and left out")
    return entries


def read_objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, in order, and how many lines hold none.

    Raises:
        UserError: the file is absent or cannot be read.
    """
    found = [_object(line) for line in _bytes_of(path).split(b"\n") if line.strip()]
    entries = [entry for entry in found if entry is not None]
    return entries, len(found) - len(entries)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines of which none may be missing, in order.

    Raises:
        UserError: the file is absent, or a line is not an object.
    """
    entries = []
    for number, line in enumerate(_bytes_of(path).splitlines(), start=1):
        if (entry := _object(line)) is None:
            raise UserError(f"{path}, line {number}: not a JSON object. The file is damaged; make it again.")
        entries.append(entry)
    return entries


def _object(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None for a line that is not whole."""
    try:
        entry = typed_json.parse(line, allow_nan=True)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _is_entry(entry: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    return not typed_json.mismatch(entry, Entry)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Has this run been started?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
