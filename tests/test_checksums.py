"""Checksums of pieces: what is read is what was hashed, or an error."""

from __future__ import annotations

import hashlib
import io
import os
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import checksums
from nanochat.common.checksums import PIECE_BYTES, BrokenFileError, ChecksummedFile
from tests.shard_files import flip

SIZE = 3 * PIECE_BYTES + 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of four pieces, the last of them short."""
    (tmp_path / "file").write_bytes(random.Random(0).randbytes(SIZE))
    return tmp_path / "file"


def test_it_is_hashed_as_a_whole(path: Path) -> None:
    source = ChecksummedFile(path)
    assert source.bytes == SIZE
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@given(size=st.integers(0, 50), start=st.integers(0, 60), end=st.integers(0, 60), piece=st.integers(1, 9))
def test_any_part_is_what_the_file_holds(
    size: int, start: int, end: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "part"
    path.write_bytes(bytes(range(size)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "PIECE_BYTES", piece)
        assert bytes(ChecksummedFile(path).read(start, end)) == bytes(range(size))[start:end]


@pytest.mark.parametrize("at", [0, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 77, SIZE - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flip_is_found_in_its_piece_and_only_there(path: Path, at: int, bit: int) -> None:
    source = ChecksummedFile(path)
    flip(path, 8 * at + bit)
    for piece in range(4):
        start, end = piece * PIECE_BYTES + 5, min((piece + 1) * PIECE_BYTES, SIZE) - 5
        if at // PIECE_BYTES == piece:
            with pytest.raises(BrokenFileError, match=rf"bytes {start - 5} to \d+ have changed since"):
                source.read(start, end)
        else:
            assert len(source.read(start, end)) == end - start
    flip(path, 8 * at + bit)
    assert bytes(source.read(0, SIZE)) == path.read_bytes()


def test_two_pieces_that_change_places_are_found(path: Path) -> None:
    source, data = ChecksummedFile(path), path.read_bytes()
    path.write_bytes(data[PIECE_BYTES : 2 * PIECE_BYTES] + data[:PIECE_BYTES] + data[2 * PIECE_BYTES :])
    for start in (0, PIECE_BYTES):
        with pytest.raises(BrokenFileError, match="have changed"):
            source.read(start, start + 1)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 2 * PIECE_BYTES - 1, SIZE - 1])
def test_a_file_that_became_shorter_is_found(path: Path, size: int) -> None:
    source = ChecksummedFile(path)
    os.truncate(path, size)
    with pytest.raises(BrokenFileError, match="have changed"):
        source.read(0, SIZE)


def test_another_file_under_the_name_is_found_and_none_too(path: Path) -> None:
    source = ChecksummedFile(path)
    other = path.with_name("other")
    other.write_bytes(random.Random(1).randbytes(SIZE))
    other.replace(path)
    with pytest.raises(BrokenFileError, match="it was replaced, or the disk"):
        source.read(0, 10)
    path.unlink()
    with pytest.raises(BrokenFileError, match="cannot be read any more .No such file"):
        source.read(0, 10)


def test_the_same_bytes_under_the_name_are_the_same_file(path: Path) -> None:
    source, data = ChecksummedFile(path), path.read_bytes()
    path.with_name("again").write_bytes(data)
    path.with_name("again").replace(path)
    assert bytes(source.read(0, SIZE)) == data


def test_an_error_inside_a_library_comes_out_as_it_is(path: Path) -> None:
    source = ChecksummedFile(path)
    flip(path, 80)
    with pa.PythonFile(source.open(), mode="r") as file:
        file.seek(2 * PIECE_BYTES)
        assert file.read(4) == path.read_bytes()[2 * PIECE_BYTES :][:4]
        file.seek(0)
        with pytest.raises(BrokenFileError, match="have changed"):
            file.read(4)


def test_it_reads_like_any_file(path: Path) -> None:
    reader, plain = ChecksummedFile(path).open(), io.BytesIO(path.read_bytes())
    for offset, whence, size in (
        (0, 0, 7),
        (5, 1, 100_000),
        (-9, 2, 4),
        (0, 1, -1),
        (SIZE + 3, 0, 5),
        (1, 0, 0),
    ):
        assert reader.seek(offset, whence) == plain.seek(offset, whence)
        assert bytes(reader.read(size)) == plain.read(size)
        assert reader.tell() == plain.tell()


def test_the_checksums_of_a_quarter_of_a_gigabyte_are_16_kb(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 28)
    source = ChecksummedFile(tmp_path / "sparse")
    held = source._checksums
    assert len(held) * held.itemsize == 4 * (1 << 28) // PIECE_BYTES == 16_384
