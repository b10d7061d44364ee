"""Interface of a cache of earlier positions: what the model asks of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DecodeCache(Protocol):
    """Interface of a cache of earlier positions; kv_cache has rows of one length, serve.slots others.

    A forward pass over T new positions reads `length` and `lengths`, calls `shift_ids` once, `append` once a
    layer in order, and `advance(T)` at its end.

    Attributes:
        length: positions stored by the passes that have ended; of the longest row, where they differ.
        lengths: (B,) int64, those of each row; None where all have the same.
    """

    length: int
    lengths: Tensor | None

    def shift_ids(self, ids: Tensor) -> Tensor:
        """The id before each of the new ones (B, T), int64, -1 before the very first; keeps ids[:, -1]."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) keys and values; return all so far, (B, length + T, Hkv, D).

        With `lengths` there may be more of them, and what lies behind a row's own is any finite number.
        """
        ...

    def advance(self, count: int) -> None:
        """Count the new positions as stored."""
        ...
