"""Interface of a cache of earlier positions: what the model asks of it; engine.py has its implementation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class DecodeCache(Protocol):
    """Interface of a cache of earlier positions; engine.py has its only implementation.

    A forward pass over T new positions reads `length`, calls `shift` once, `shift_ids` once where the model
    has a table of pairs, `append` once a layer in order, and `advance(T)` at its end. All rows have the same
    length.

    Attributes:
        length: positions stored by the passes that have ended.
    """

    length: int

    def shift(self, x: Tensor) -> Tensor:
        """What precedes each position of x: (B, T, C), zeros before the very first one; keeps x[:, -1].

        Args:
            x: (B, T, C) normed embeddings of the new positions.
        """
        ...

    def shift_ids(self, ids: Tensor) -> Tensor:
        """Likewise of token ids: (B, T) int64, -1 before the very first one."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) keys and values; return all so far, (B, length + T, Hkv, D)."""
        ...

    def advance(self, count: int) -> None:
        """Count the new positions as stored."""
        ...
