"""KV cache: what a model keeps of the positions it has read, for rows of one length."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nanochat.model.gpt import GPT


class KVCache:
    """Keys and values of every layer for rows of one length, and the ids, for what mixes two positions.

    Implements decode_cache.DecodeCache. What lies behind `length` is never read: a smaller length cuts the
    cache back, and a forward pass that was interrupted leaves nothing in it.

    Attributes:
        length: positions stored.
        lengths: None, since they are those of every row.
        k: (layers, rows, capacity, Hkv, D) keys.
        v: likewise values.
        ids: (rows, capacity + 1) int64, each a place later than its position; -1 before.
    """

    lengths: Tensor | None = None

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        """Room for `capacity` positions of `rows` rows, all free."""
        config, dtype, device = model.config, model.dtype, model.head.weight.device
        shape = (config.n_layer, rows, capacity, config.n_kv_head, config.head_dim)
        self.length = 0
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.ids = torch.full((rows, capacity + 1), -1, device=device)

    def shift_ids(self, ids: Tensor) -> Tensor:
        """Return the id before each of the new ones (B, T), -1 before the first, and keep them."""
        end = self.length + ids.size(1)
        self.ids[:, self.length + 1 : end + 1] = ids
        return self.ids[:, self.length : end]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, T, Hkv, D) keys and values behind earlier ones; return all, (B, length + T, Hkv, D)."""
        end = self.length + k.size(1)
        assert end <= self.k.size(2), "the cache is full"
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` new positions as stored, once every layer has appended them."""
        self.length += count

    def row(self, row: int) -> KVCache:
        """A cache of one row alone, on the same memory, with a length of its own that begins with 0."""
        alone = copy.copy(self)
        alone.length, one = 0, slice(row, row + 1)
        alone.k, alone.v, alone.ids = self.k[:, one], self.v[:, one], self.ids[one]
        return alone

    def take_rows(self, rows: Tensor) -> None:
        """Let row i be a copy of the former row rows[i]; rows is (B,) int64."""
        rows = rows.to(self.k.device)
        self.k, self.v, self.ids = (
            self._rows_of(kept, dim, rows) for kept, dim in ((self.k, 1), (self.v, 1), (self.ids, 0))
        )

    def _rows_of(self, kept: Tensor, dim: int, rows: Tensor) -> Tensor:
        """Those rows, (..., B, capacity, ...); only what is stored is copied."""
        shape = (*kept.shape[:dim], len(rows), *kept.shape[dim + 1 :])
        taken, stored = kept.new_empty(shape), min(self.length + 1, shape[dim + 1])
        taken.narrow(dim + 1, 0, stored).copy_(kept.narrow(dim + 1, 0, stored).index_select(dim, rows))
        return taken
