"""Best-fit packing of conversations: whole ones in rows of T + 1 slots, each row with something to learn.

Pure: the same lengths in the same order give the same rows, on any machine. A conversation is never split
over two rows, as its later turns need the earlier ones. So one that is longer than a row is cut, at the end
of its last reply that fits; and one of which no supervised token is left is dropped. Both are counted by the
caller: nothing is lost in silence, and no row has a loss of 0 / 0.

A token is stored as its id where it is supervised and as ~id, which is negative, where it is not.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanochat.data.packing import shuffled

TOKENS_A_DOCUMENT = 16  # a row of T has at most T / 16 conversations: attention kernels have so many slots
BLOCK = 4096  # conversations among which rows are filled: the best fit among so many leaves 1 % empty or less


class Fitted(NamedTuple):
    """What rows can hold of conversations.

    Attributes:
        lengths: (n,) int64 tokens of each that are kept: at most T + 1.
        supervised: (n,) int64 supervised ones among them; 0 where the conversation has to be dropped.
    """

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]


class Packed(NamedTuple):
    """Rows of conversations.

    Attributes:
        conversations: (p,) int64 the conversations of all rows, one row after another.
        rows: (n + 1,) int64 row i has conversations[rows[i] : rows[i + 1]].
    """

    conversations: NDArray[np.int64]
    rows: NDArray[np.int64]


def fit(tokens: NDArray[np.int32], offsets: NDArray[np.int64], row_slots: int, end_id: int) -> Fitted:
    """Cut conversations to the length of a row.

    Args:
        tokens: (N,) those of all conversations, one after another; ~id where not supervised.
        offsets: (n + 1,) conversation i is tokens[offsets[i] : offsets[i + 1]].
        row_slots: T + 1. Longer ones end at their last whole reply that fits, or else in the middle of it.
        end_id: id of the token that ends a reply, which is supervised.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    ends = np.append(np.flatnonzero(tokens == end_id), -1)  # the last stands for none, also at index -1
    last = ends[np.searchsorted(ends[:-1], starts + row_slots) - 1]
    cut = np.where(last >= starts, last - starts + 1, row_slots)
    lengths = np.where(lengths > row_slots, cut, lengths)
    before = np.concatenate([[0], np.cumsum(tokens >= 0)])
    return Fitted(lengths, before[starts + lengths] - before[starts])


def pack(lengths: NDArray[np.int64], order: NDArray[np.int64], row_slots: int, *key: int) -> Packed:
    """Place conversations in rows, block by block; the rows of a block are shuffled.

    Args:
        lengths: (n,) tokens of each conversation, at most `row_slots`.
        order: (p,) which of them to place, in a random order. A conversation may come more than once.
        row_slots: T + 1.
        key: of the order of the rows.
    """
    rows: list[list[int]] = []
    for block in range(0, len(order), BLOCK):
        filled = best_fit(lengths[order[block : block + BLOCK]], row_slots)
        rows += [[block + at for at in filled[row]] for row in shuffled(len(filled), *key, block).tolist()]
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    places = np.fromiter((at for row in rows for at in row), np.int64, len(order))
    return Packed(order[places], np.concatenate([[0], np.cumsum(counts)]))


def best_fit(lengths: ArrayLike, row_slots: int) -> list[list[int]]:
    """Fill rows, each with the longest that still fits, again and again.

    Args:
        lengths: (n,) tokens of each, at most `row_slots`.
        row_slots: T + 1.

    Returns:
        Indices of those in each row. They keep their order, which is not that of the lengths.
    """
    unplaced = np.argsort(lengths, kind="stable")
    sizes: list[int] = np.asarray(lengths)[unplaced].tolist()  # ascending throughout
    left: list[int] = unplaced.tolist()
    most = max(1, (row_slots - 1) // TOKENS_A_DOCUMENT)
    rows = []
    while sizes:
        row: list[int] = []
        space = row_slots
        while len(row) < most and (at := bisect_right(sizes, space)):
            space -= sizes.pop(at - 1)
            row.append(left.pop(at - 1))
        rows.append(sorted(row))
    return rows
