"""Zip files from elsewhere: the list of their members, and each member in chunks that are counted.

A zip says of itself how large it is, and may lie. So what is asked of it is bounded before it is read, by
what the file on the disk can hold, and nothing is ever unpacked as a whole.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from nanochat.common.errors import UserError

CHUNK_BYTES = 1 << 16
MAX_DIRECTORY_BYTES = 1 << 18  # that of the CORE tasks has 4 kB
# The text of the CORE tasks that repeats itself most is 27 times its size in the zip; zeros are 1,000 times.
MAX_RATIO = 100
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python unpacks no other a bounded piece at a time
ENCRYPTED = 0x1

# What zipfile raises over a damaged zip; ValueError and OSError are of seeks to where no file goes.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ArithmeticError, ValueError)


class _Bounded(io.FileIO):
    """A file that gives no large piece at once; zipfile reads the directory of members in one."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The bytes that are asked for, or an error where they are many."""
        limit = MAX_DIRECTORY_BYTES + 1
        data: bytes = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has more than {MAX_DIRECTORY_BYTES:,} bytes")
        return data


@contextmanager
def _opened(path: Path, member: str = "") -> Iterator[zipfile.ZipFile]:
    """The zip; whatever is wrong with it becomes a UserError that names it, and the member that is read."""
    where = f"{path}/{member}: damaged" if member else f"{path}: not a complete zip file"
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UserError:
        raise
    except (*DAMAGE, OSError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{where} ({reason}). Fetch it again.") from error


def members(path: Path) -> list[str]:
    """The names in a zip, in its order.

    Raises:
        UserError: it is no zip, or a name leads out of the folder that it would be unpacked to.
    """
    with _opened(path) as archive:
        names = archive.namelist()
    if unsafe := [name for name in names if not is_inside(name)]:
        raise UserError(f"{path}: its member {unsafe[0]!r} leads out of it. Do not use this file.")
    return names


def is_inside(member: str) -> bool:
    """Whether a path stays within the folder that it is relative to, on any system."""
    parts = PurePosixPath(member.replace("\\", "/")).parts
    return bool(parts) and ".." not in parts and parts[0] != "/" and ":" not in parts[0]


def chunks(path: Path, member: str, max_bytes: int) -> Iterator[bytes]:
    """The bytes of one member, a chunk at a time, so that a caller holds no more than it keeps.

    Args:
        path: of the zip.
        member: its name in the zip.
        max_bytes: the most that it may have.

    Raises:
        UserError: it is not there, there twice, a link, encrypted, packed in a way that cannot be read in
            pieces, larger than allowed or than its packed bytes can be, or damaged.
    """
    with _opened(path, member) as archive:
        entries = [info for info in archive.infolist() if info.filename == member]
        if not entries:
            raise UserError(f"{path}/{member}: the file is missing. Fetch the bundle again, or give another.")
        if problem := _refusal(entries, max_bytes, path.stat().st_size):
            raise UserError(f"{path}/{member}: {problem}. Do not use this file.")
        with archive.open(entries[0]) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk


def _refusal(entries: list[zipfile.ZipInfo], max_bytes: int, packed_bytes: int) -> str:
    """What is wrong with a member before its first byte is read; empty where nothing is."""
    info = entries[0]
    if len(entries) > 1:
        return "the name stands there twice"
    if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
        return "it is a link or a folder, expected a file"
    if info.flag_bits & ENCRYPTED:
        return "it is encrypted"
    if info.compress_type not in METHODS:
        return f"it is packed by method {info.compress_type}, expected deflate or none"
    # zipfile gives no more than file_size bytes, whatever is packed: the claim is the bound.
    if info.file_size > max_bytes:
        return f"it claims {info.file_size:,} bytes, at most {max_bytes:,} are expected"
    packed = min(info.compress_size, packed_bytes)
    if info.file_size > MAX_RATIO * packed + CHUNK_BYTES:
        return f"it claims {info.file_size:,} bytes in {packed:,} packed ones, which no text does"
    return ""
