"""Checksums of the pieces of a file: taken while the file is hashed, compared whenever bytes are read.

A file that is read for days is hashed once; afterwards its disk may flip a bit, or its name may come to mean
another file. So a read returns what the checksums have seen, or fails: the very bytes that are decoded are
the ones that were compared. The checksum is CRC-32. It misses no change of one or two bits, nor of 32 bits in
a row, and one in 4 billion of all others: enough against accidents, while the digest of the whole, which
tells forgeries too, is SHA-256. It comes from zlib-ng, which is 20 times as fast as the zlib of Python: a
loader of token ids waits for it (dev/LOG.md, 2026-11-30).
"""

from __future__ import annotations

import hashlib
import io
from array import array
from pathlib import Path

from zlib_ng import zlib_ng

from nanochat.common.errors import UserError

PIECE_BYTES = 1 << 16  # small beside a row group, so that little is read which nobody asked for
READ_BYTES = 16 * PIECE_BYTES


class BrokenFileError(UserError):
    """A file is absent, damaged or has changed; whoever knows where it is from adds what repairs it."""


class ChecksummedFile:
    """A file as it was when it was hashed, of which any part can be read as long as it has not changed.

    Attributes:
        path: where it lies; opened anew at every read, so that thousands of them hold no descriptor.
        bytes: its size.
        sha256: hex digest of the whole.
    """

    def __init__(self, path: Path) -> None:
        """Hash the file, and keep 4 bytes for each of its pieces.

        Raises:
            OSError: it cannot be read.
        """
        self.path, self.bytes = path, 0
        self._checksums = array("I")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                self._checksums.extend(_checksums(memoryview(data)))
                self.bytes += len(data)
        self.sha256 = digest.hexdigest()

    def read(self, start: int, end: int) -> memoryview:
        """The bytes from `start` to `end`, or to the end of the file where that comes first.

        Raises:
            BrokenFileError: they are not those that were hashed, or cannot be read.
        """
        end = min(end, self.bytes)
        if start >= end:
            return memoryview(b"")
        first, last = start // PIECE_BYTES, (end - 1) // PIECE_BYTES
        whole_end = min((last + 1) * PIECE_BYTES, self.bytes)
        try:
            with self.path.open("rb") as file:
                file.seek(first * PIECE_BYTES)
                data = memoryview(file.read(whole_end - first * PIECE_BYTES))
        except OSError as error:
            raise BrokenFileError(f"{self.path}: cannot be read any more ({error.strerror}).") from None
        wanted = self._checksums[first : last + 1]
        for piece, (checksum, expected) in enumerate(zip(_checksums(data), wanted, strict=False), first):
            if checksum != expected:
                self._refuse(piece)
        if len(data) < whole_end - first * PIECE_BYTES:
            self._refuse(first + len(data) // PIECE_BYTES)
        return data[start - first * PIECE_BYTES : end - first * PIECE_BYTES]

    def _refuse(self, piece: int) -> None:
        start = piece * PIECE_BYTES
        end = min(start + PIECE_BYTES, self.bytes)
        raise BrokenFileError(
            f"{self.path}: bytes {start} to {end - 1} have changed since the file was hashed "
            f"(sha256 {self.sha256}): it was replaced, or the disk or the memory is failing."
        )

    def open(self) -> io.RawIOBase:
        """A file object for libraries that read one; every byte that it gives has been compared."""
        return _Reader(self)


def _checksums(data: memoryview) -> list[int]:
    return [zlib_ng.crc32(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]


class _Reader(io.RawIOBase):
    """A position in a `ChecksummedFile`. Not a buffered reader: one read of its user is one of the file."""

    def __init__(self, source: ChecksummedFile) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.bytes}[whence]
        return self._at

    def read(self, size: int | None = -1) -> memoryview:
        end = self._source.bytes if size is None or size < 0 else self._at + size
        data = self._source.read(self._at, end)
        self._at += len(data)
        return data
