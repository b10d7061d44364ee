"""Slots: a KV cache whose rows have lengths of their own, and the two passes that fill it.

A prompt is read in chunks, a slot at a time, through a kv_cache.KVCache of its memory; a step adds one token
to each of the first slots at once. A slot keeps what it stores until something else is put there, so that
whoever continues the same text reads only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.model.decode_step import decode_step
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache

# Keys that a step looks at, of every row, are a multiple of this: few shapes, and short rows stay cheap.
KEY_STEP = 64


class SlotCache:
    """Keys, values and ids of rows of different lengths.

    Attributes:
        ids: of each slot, those of the positions that it stores.
        capacity: positions of a slot.
    """

    def __init__(self, model: GPT, slots: int, capacity: int) -> None:
        """Room for `capacity` positions in each of `slots` slots, all free."""
        self.capacity = capacity
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self._model, self._device = model, model.head.weight.device
        # One position more than anybody fills: there a step writes what nobody waits for.
        self._rows = KVCache(model, slots, capacity + 1)
        # A masked key still enters a product, which must not be that of a number that is none.
        self._rows.k.zero_()
        self._rows.v.zero_()
        self._alone = [self._rows.row(slot) for slot in range(slots)]

    def read(self, slot: int, ids: Sequence[int]) -> None:
        """Store more positions in a slot, behind what it has."""
        cache = self._alone[slot]
        cache.length = len(self.ids[slot])
        self._model(torch.tensor([ids], device=self._device), cache)
        self.ids[slot].extend(ids)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Store one token more in each of the first slots; None adds nothing to a slot.

        Returns:
            (len(tokens), V) fp32 logits of what comes next; of no meaning where the token is None.
        """
        running = [slot for slot, token in enumerate(tokens) if token is not None]
        lengths = [len(self.ids[slot]) for slot in running]
        if compiled := decode_step(self._model):
            new = [token for token in tokens if token is not None]
            logits = compiled.logits(new, running, lengths, self._rows)
            if len(new) < len(tokens):
                logits = logits.new_zeros(len(tokens), logits.size(1)).index_copy(
                    0, torch.tensor(running), logits
                )
        else:
            ids = torch.tensor([[token or 0] for token in tokens], device=self._device)
            known = dict(zip(running, lengths, strict=True))
            cache = _Step(self._rows, [known.get(slot) for slot in range(len(tokens))], self.capacity)
            logits = self._model.logits(ids, cache, last_only=True)[:, 0]
        for slot in running:
            self.ids[slot].append(tokens[slot])  # type: ignore[arg-type]
        return logits

    def match(self, slot: int, prompt: Sequence[int]) -> int:
        """How many ids a prompt and a slot begin with in common."""
        stored = self.ids[slot]
        most = min(len(stored), len(prompt))
        return next((i for i in range(most) if stored[i] != prompt[i]), most)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` store the first `length` positions of `source`, and nothing else; both may be one."""
        for rows in self._stored(length) if source != target else ():
            rows[target] = rows[source]
        self.ids[target] = self.ids[source][:length]

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots store."""
        stored = self._stored(max(len(self.ids[a]), len(self.ids[b])))
        # All memory is taken before anything changes: a swap that finds none has done nothing.
        exchanged = [rows[[b, a]] for rows in stored]
        for rows, both in zip(stored, exchanged, strict=True):
            rows[[a, b]] = both
        self.ids[a], self.ids[b] = self.ids[b], self.ids[a]

    def _stored(self, length: int) -> tuple[Tensor, ...]:
        """Everything that the first `length` positions hold, each (slots, ...)."""
        rows = self._rows
        k, v = (kept[:, :, :length].transpose(0, 1) for kept in (rows.k, rows.v))
        return k, v, rows.ids[:, : length + 1]


class _Step:
    """One position more in each of the first rows of a cache (decode_cache.DecodeCache).

    Attributes:
        length: of the longest row.
        lengths: (B,) int64, of each.
    """

    def __init__(self, rows: KVCache, lengths: Sequence[int | None], capacity: int) -> None:
        """Take rows that store so many positions; None writes at `capacity`, which is read by nobody."""
        known = [length for length in lengths if length is not None]
        self.length = max(known)
        self._kept = rows
        self._keys = min(capacity, -(-(self.length + 1) // KEY_STEP) * KEY_STEP)
        # A row that nobody waits for looks at as many keys as another, all of them numbers.
        places = [
            [known[0] if length is None else length for length in lengths],
            [capacity if length is None else length for length in lengths],
            list(range(len(lengths))),
        ]
        self.lengths: Tensor | None
        self.lengths, self._at, self._row = torch.tensor(places, device=rows.k.device)

    def shift_ids(self, ids: Tensor) -> Tensor:
        """Return the id before the new one (B, 1) of each row, -1 before the first, and keep it."""
        before = self._kept.ids[self._row, self._at][:, None]
        self._kept.ids[self._row, self._at + 1] = ids[:, 0]
        return before

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, 1, Hkv, D) keys and values; return those of all rows up to the longest, rounded up."""
        rows, keys = k.size(0), self._keys
        all_k, all_v = self._kept.k[layer], self._kept.v[layer]
        all_k[self._row, self._at], all_v[self._row, self._at] = (new[:, 0].to(all_k.dtype) for new in (k, v))
        return all_k[:rows, :keys], all_v[:rows, :keys]

    def advance(self, count: int) -> None:
        """Nothing: SlotCache counts by the ids."""
