"""Shards of token ids, as llm.c writes them: a header of 256 int32, then uint16 ids; all little-endian.

The header begins with a magic number, the version and the count of tokens. Such a file has no row groups, so
a chunk of its tokens takes their place: rows begin every T tokens from the first of the shard, and
the last target of a row is the first input of the next. So every token but the first and a rest of less than
T is a target once, for any T, and the rows of a shard in their order are its stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanochat.common.checksums import BrokenFileError, ChecksummedFile
from nanochat.common.errors import UserError

SUFFIX = ".bin"
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
CHUNK_TOKENS = 1 << 20  # about as many as a row group of 1,000 documents has


def chunks(tokens: int) -> int:
    """Chunks of a shard of so many tokens."""
    return -(-tokens // CHUNK_TOKENS)


def count_tokens(header: bytes, size: int) -> int:
    """How many tokens a file has.

    Args:
        header: its first HEADER_BYTES, or all of it where it is shorter.
        size: its bytes.

    Raises:
        ValueError: it is not such a file, or has not the bytes that its header promises.
    """
    if len(header) < HEADER_BYTES or size < HEADER_BYTES:
        raise ValueError(f"{size} bytes, fewer than the {HEADER_BYTES} of the header")
    magic, version, count = (int(number) for number in np.frombuffer(header, "<i4", count=3))
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic}, expected {MAGIC}, so it holds no tokens of llm.c")
    if version != VERSION:
        raise ValueError(f"version {version} of the format, expected {VERSION} (uint16 ids of GPT-2)")
    body = size - HEADER_BYTES
    if body % TOKEN_BYTES:
        raise ValueError(f"{body} bytes after the header, an odd number, where every token has {TOKEN_BYTES}")
    if body != count * TOKEN_BYTES:
        raise ValueError(f"the header says {count} tokens, the file holds {body // TOKEN_BYTES}")
    return count


def count_file(source: ChecksummedFile) -> int:
    """How many tokens a file has.

    Raises:
        UserError: it is not a file of tokens, or damaged.
    """
    header = bytes(source.read(0, HEADER_BYTES))
    try:
        return count_tokens(header, source.bytes)
    except ValueError as error:
        raise UserError(f"{source.path}: not a shard of tokens: {error}. Fetch or write it again.") from None


def read_rows(source: ChecksummedFile, chunk: int, row_slots: int, vocab_size: int) -> NDArray[np.int32]:
    """The rows that begin in a chunk, in their order.

    Args:
        source: the shard; only the bytes of the chunk are read, and compared with its checksums.
        chunk: which, from 0.
        row_slots: T + 1.
        vocab_size: every id is below it.

    Returns:
        (n, T + 1); none where what is left of the shard fills no row.

    Raises:
        BrokenFileError: the file is absent or has changed.
        UserError: it holds an id that is not in the vocabulary.
    """
    path, step = source.path, row_slots - 1
    count = (source.bytes - HEADER_BYTES) // TOKEN_BYTES  # as the header says: see `count_file`
    if not 0 <= chunk < chunks(count):
        raise BrokenFileError(f"{path}: chunk {chunk} was asked for, it has {chunks(count)}.")
    first, end = (-(-at * CHUNK_TOKENS // step) for at in (chunk, chunk + 1))
    end = min(end, max(0, count - 1) // step)
    if first >= end:
        return np.empty((0, row_slots), np.int32)
    start, stop = (HEADER_BYTES + TOKEN_BYTES * at for at in (first * step, end * step + 1))
    tokens = np.frombuffer(source.read(start, stop), "<u2")
    if (largest := int(tokens.max())) >= vocab_size:
        at = first * step + int(tokens.argmax())
        raise UserError(
            f"{path}: token {at} is {largest}, but the vocabulary has ids below {vocab_size}. "
            "Use the tokenizer that made these tokens."
        )
    windows = np.lib.stride_tricks.sliding_window_view(tokens, row_slots)[::step]
    return windows.astype(np.int32)
