"""A lane: one endless stream of rows, read block by block, with the next block on its way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested
from nanochat.data.packing import Packed

POLL_S = 0.5  # between two looks whether to stop, while a block is waited for


@dataclass
class LoaderCounters:
    """What this rank's loader has done so far.

    Attributes:
        tokens: tokens of the documents of the blocks it has opened.
        cropped_tokens: those of them that are in no row.
        waited_s: seconds that the trainer waited for data.
    """

    tokens: int = 0
    cropped_tokens: int = 0
    waited_s: float = 0.0

    @property
    def cropped_frac(self) -> float:
        """Share of the tokens that no row holds."""
        return self.cropped_tokens / max(1, self.tokens)


class Lane:
    """One stream of rows: a cursor, the block under it, and the next block on its way."""

    def __init__(
        self, load: Callable[[int, int], Future[Packed]], blocks: int, counters: LoaderCounters
    ) -> None:
        self.epoch = self.position = self.row = 0
        self.blocks = blocks  # of this lane in each epoch
        self._counters = counters
        self._load = load
        self._current: Future[Packed] | None = None
        self._next: Future[Packed] | None = None

    @property
    def cursor(self) -> tuple[int, int, int]:
        """Epoch, position among the lane's blocks, row: where the next row is."""
        return self.epoch, self.position, self.row

    def move(self, epoch: int, position: int, row: int) -> None:
        """Set the cursor; what was loaded is forgotten."""
        self.epoch, self.position, self.row = epoch, position, row
        self._current = self._next = None

    def start(self) -> None:
        """Begin to load the block under the cursor."""
        if self._current is None:
            self._current = self._load(self.epoch, self.position)

    def take(self, count: int, stop_requested: Callable[[], bool] = requested) -> NDArray[np.int32]:
        """The next `count` rows, (count, T + 1).

        Raises:
            Stopped: we are asked to stop while a block is waited for.
        """
        parts: list[NDArray[np.int32]] = []
        empty_blocks = 0
        while count:
            self.start()
            assert self._current is not None
            block = _arrived(self._current, stop_requested)
            if self._next is None:  # the first time that rows are drawn from this block
                self._next = self._load(*self._following())
                self._counters.tokens += block.offered
                self._counters.cropped_tokens += block.cropped
            part = block.rows[self.row : self.row + count]
            if len(part):
                parts.append(part)
                self.row += len(part)
                count -= len(part)
                empty_blocks = 0
            else:
                empty_blocks += 1
            if empty_blocks > self.blocks:
                raise UserError(
                    "the corpus has too little text to fill a row. "
                    "Use --keep-tails, a shorter --max-seq-len, or more text."
                )
            if count:
                self._advance()
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def progress(self) -> float:
        """Epochs read, a number that grows with every row."""
        done = 0.0
        if self._current is not None and self._current.done() and self.row:
            done = self.row / max(1, len(self._current.result().rows))
        return self.epoch + (self.position + done) / self.blocks

    def _following(self) -> tuple[int, int]:
        last = self.position + 1 == self.blocks
        return (self.epoch + 1, 0) if last else (self.epoch, self.position + 1)

    def _advance(self) -> None:
        (self.epoch, self.position), self.row = self._following(), 0
        self._current, self._next = self._next, None


def _arrived(block: Future[Packed], stop_requested: Callable[[], bool]) -> Packed:
    """The block when it is there: a shard that is on its way may take minutes, a scheduler gives seconds."""
    while not wait([block], POLL_S).done:
        if stop_requested():
            raise Stopped
    return block.result()


def fit_lanes(wanted: int, rows_per_batch: int, blocks: int) -> int:
    """The most lanes that divide the rows of a batch, at most `wanted` and one for each block.

    >>> fit_lanes(8, 32, blocks=100), fit_lanes(8, 32, blocks=3), fit_lanes(8, 9, blocks=100)
    (8, 2, 3)
    """
    return max(n for n in range(1, min(wanted, blocks) + 1) if rows_per_batch % n == 0)
