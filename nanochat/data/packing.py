"""Best-fit packing: the documents of one row group become rows of T + 1 slots, all of them full.

Pure: the same documents give the same rows, on any machine. Every row starts with BOS, and every document in
it does. Documents are placed best-fit: the largest that fits the space left in the row. Where none fits, one
is cropped to fill the row; its remainder is discarded, or with `keep_tails` goes back as a document.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packed(NamedTuple):
    """The rows of one row group.

    Attributes:
        rows: (n, T + 1) int32 token ids.
        filled: slots at the end of the last row that repeat the beginning, because the documents ran out
            (only with `keep_tails`).
    """

    rows: NDArray[np.int32]
    filled: int


class Segment(NamedTuple):
    """A part of a row: BOS, then some tokens of a document.

    Attributes:
        document: its index.
        start: first token taken of it.
        tokens: how many are taken; 0 is a lone BOS in the last slot of a row.
    """

    document: int
    start: int
    tokens: int


def plan_rows(lengths: NDArray[np.int64], row_slots: int, *, keep_tails: bool) -> tuple[list[Segment], int]:
    """Place documents best-fit; O(n log n) comparisons for n documents, whatever their number of tokens.

    Args:
        lengths: (n,) tokens of each document, without BOS.
        row_slots: T + 1.
        keep_tails: put the remainder of a cropped document back. Then the longest is cropped, as it has to be
            split anyway; without, the shortest, as it loses least.

    Returns:
        The segments of the rows, one row after another, and how many slots of the last row are missing.
    """
    order = np.argsort(lengths, kind="stable")
    sizes: list[int] = (lengths[order] + 1).tolist()  # in slots, with BOS; ascending throughout
    unplaced: list[tuple[int, int]] = [(document, 0) for document in order.tolist()]
    plan: list[Segment] = []
    while sizes:
        space = row_slots
        row_start = len(plan)
        while space and sizes:
            at = bisect_right(sizes, space) - 1
            if at < 0 and space == 1:
                plan.append(Segment(0, 0, 0))  # a lone BOS consumes no document
                break
            if at < 0:
                at = len(sizes) - 1 if keep_tails else 0
            size = sizes.pop(at)
            document, start = unplaced.pop(at)
            taken = min(size, space)
            plan.append(Segment(document, start, taken - 1))
            space -= taken
            if size > taken and keep_tails:
                remainder = size - taken + 1  # its tokens, and a BOS of its own
                at = bisect_right(sizes, remainder)
                sizes.insert(at, remainder)
                unplaced.insert(at, (document, start + taken - 1))
        else:
            if space and keep_tails:
                return plan, space
            if space:  # the last row cannot be filled
                del plan[row_start:]
    return plan, 0


def pack(
    ids: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    *,
    bos_id: int,
    row_slots: int,
    keep_tails: bool,
) -> Packed:
    """Pack the documents of a row group.

    Args:
        ids: (N,) tokens of all documents, one after another, without BOS.
        offsets: (n + 1,) document i is ids[offsets[i] : offsets[i + 1]].
        bos_id: the id that starts rows and documents.
        row_slots: T + 1.
        keep_tails: discard no token.
    """
    plan, filled = plan_rows(np.diff(offsets), row_slots, keep_tails=keep_tails)
    if not plan:
        return Packed(np.empty((0, row_slots), np.int32), filled=0)
    documents, starts, tokens = np.array(plan, np.int64).T
    slots = tokens + 1
    ends = np.cumsum(slots)
    begins = ends - slots
    # Slot s of a segment that begins at b holds token first + (s - b - 1); the slot of its BOS, s = b, is
    # overwritten below, so what it reads (clipped to the array) does not matter.
    shift = offsets[documents] + starts - 1 - begins
    source = np.arange(ends[-1], dtype=np.int64) + np.repeat(shift, slots)
    stream = ids.astype(np.int32).take(source, mode="clip") if len(ids) else np.empty(ends[-1], np.int32)
    stream[begins] = bos_id
    n_rows = -(-len(stream) // row_slots)
    rows = np.resize(stream, (n_rows, row_slots))  # repeats the beginning where the last row is short
    return Packed(rows, filled)


def shuffled(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 .. n-1 that depends on the key alone.

    The raw stream of PCG64 is fixed by NumPy's compatibility policy (NEP 19); `Generator.permutation` is not.
    """
    return np.random.PCG64(list(key)).random_raw(n).argsort(kind="stable")
