"""Row streams: endless sequences of packed rows, each with a position that a checkpoint keeps.

A stream reads its row groups one after another, epoch after epoch, and has the next one loaded while rows of
the current one are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait

import numpy as np
from numpy.typing import NDArray

from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested

POLL_S = 0.5  # between two looks whether to stop, while rows are waited for

Rows = NDArray[np.int32]


class RowStream:
    """One sequence of rows: a cursor, the row group under it, and the next row group being loaded.

    Attributes:
        cursor: epoch, position among the stream's row groups, row: where the next row is.
        row_groups: of this stream in each epoch.
    """

    def __init__(self, load: Callable[[int, int], Future[Rows]], row_groups: int) -> None:
        """Begin at the first row.

        Args:
            load: starts to load the rows at an epoch and position.
            row_groups: of this stream in each epoch.
        """
        self.cursor = (0, 0, 0)
        self.row_groups = row_groups
        self._load = load
        self._current: Future[Rows] | None = None
        self._next: Future[Rows] | None = None

    def move(self, cursor: tuple[int, int, int]) -> None:
        """Set the cursor; what was loaded is forgotten."""
        self.cursor = cursor
        self._current = self._next = None

    def start(self) -> Future[Rows]:
        """Begin to load the rows under the cursor."""
        if self._current is None:
            self._current = self._load(*self.cursor[:2])
        return self._current

    def take(self, count: int, stop_requested: Callable[[], bool] = requested) -> Rows:
        """The next `count` rows, (count, T + 1).

        Raises:
            Stopped: we are asked to stop while rows are waited for.
        """
        parts: list[Rows] = []
        empty_groups = 0
        while True:
            epoch, position, row = self.cursor
            following = (epoch, position + 1) if position + 1 < self.row_groups else (epoch + 1, 0)
            rows = _result(self.start(), stop_requested)
            if self._next is None:  # the first time that rows are drawn from this row group
                self._next = self._load(*following)
            part = rows[row : row + count]
            parts.append(part)
            count -= len(part)
            self.cursor = (epoch, position, row + len(part))
            empty_groups = 0 if len(part) else empty_groups + 1
            if empty_groups > self.row_groups:
                raise UserError(
                    "the corpus has too little text to fill a row. "
                    "Use --keep-tails, a shorter --max-seq-len, or more text."
                )
            if not count:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            self.cursor = (*following, 0)
            self._current, self._next = self._next, None

    def progress(self) -> float:
        """Epochs read, a number that grows with every row."""
        epoch, position, row = self.cursor
        fraction = 0.0
        if row and self._current is not None and self._current.done():
            fraction = row / len(self._current.result())
        return epoch + (position + fraction) / self.row_groups


def _result(rows: Future[Rows], stop_requested: Callable[[], bool]) -> Rows:
    """Rows, once they are loaded: a shard may be minutes away, a scheduler that stops us gives seconds."""
    while not wait([rows], POLL_S).done:
        if stop_requested():
            raise Stopped
    return rows.result()


def fit_streams(wanted: int, rows_per_batch: int, row_groups: int) -> int:
    """The most streams that divide the rows of a batch, at most `wanted` and one for each row group.

    >>> [fit_streams(8, *sizes) for sizes in [(32, 100), (32, 3), (9, 100)]]
    [8, 2, 3]
    """
    return max(n for n in range(1, min(wanted, row_groups) + 1) if rows_per_batch % n == 0)
