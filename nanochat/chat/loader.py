"""Batches of conversations: packed rows with weights, in an order that does not depend on the ranks.

An epoch has every conversation of every source as often as the mixture says. Where it comes several times,
each time is in another part of the epoch: the k-th of n in the k-th n-th, at a random place there. This order
is packed into rows (`packing.py`), and row i of a global batch goes to rank i mod W. A batch that begins near
the end of an epoch ends with rows of the next one. Every epoch has another order.

All lengths are known at once from the token caches, so the rows of an epoch are too: how many steps it has,
and how many supervised targets M each global batch has over all ranks. The weight of each of these is W / M,
as the trainer averages over the ranks; so the loss is their mean, whatever the ranks and micro-batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat.chat import packing, token_cache
from nanochat.chat.corpus import Mixture, Source
from nanochat.common import typed_json
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped, requested
from nanochat.data.packing import shuffled
from nanochat.data.train_loader import Batch, moved
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer

FORMAT = 1
NOTICE = (
    "{name}: a row has {length} tokens. Of {conversations} conversations, {cut_conversations} are cut "
    "({cut_tokens} of {tokens} tokens); {dropped_conversations}, with no reply within a row, are dropped "
    "({dropped_tokens} tokens)."
)
POLL_S = 0.5  # between two looks whether to stop, while rows are waited for

Rows = NDArray[np.int32]


class Epoch(NamedTuple):
    """The rows of an epoch.

    Attributes:
        packed: which conversations each has.
        supervised: (n,) targets of each that count.
        filled: (n,) slots of each that hold tokens.
    """

    packed: packing.Packed
    supervised: NDArray[np.int64]
    filled: NDArray[np.int64]


class Conversations:
    """The conversations of a mixture, cut to the length of a row; their tokens stay on the disk.

    Attributes:
        counts: of each source: conversations and tokens that there are, those that were cut and the tokens
            cut off, and those that were dropped because no supervised token is left, with their tokens.
    """

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, row_slots: int) -> None:
        """Open the token caches, which are made where they are not there, and measure all conversations.

        Args:
            mixture: the sources.
            tokenizer: of the model.
            row_slots: T + 1.
        """
        self._row_slots, self._end_id = row_slots, tokenizer.special_id("<|assistant_end|>")
        self._epochs = [source.epochs for source in mixture]
        self._files = [token_cache.open_split(s.corpus, s.split, tokenizer) for s in mixture]
        self.counts: dict[str, dict[str, int]] = {}
        columns: list[NDArray[np.int64]] = []  # (4, n) of each source: file, start, length, supervised
        self._members: list[NDArray[np.int64]] = []  # of each source, which of all conversations are used
        for index, (source, file) in enumerate(zip(mixture, self._files, strict=True)):
            parts = [packing.fit(*part, row_slots, self._end_id) for part in file.scan()]
            fitted = np.hstack([np.empty((2, 0), np.int64), *parts])
            whole, first = np.diff(file.offsets), sum(column.shape[1] for column in columns)
            columns.append(np.vstack([np.full_like(whole, index), file.offsets[:-1], fitted]))
            chosen = np.sort(shuffled(len(whole), 0)[: source.limit])
            self.counts[source.corpus.name] = _counts(whole[chosen], *fitted[:, chosen])
            self._members.append(first + chosen[fitted[1, chosen] > 0])
        self._file, self._start, self._length, self._supervised = np.hstack(columns)

    def epoch(self, seed: int, number: int) -> Epoch:
        """The rows of an epoch, in their order."""
        members, keys = [], []
        for index, (chosen, epochs) in enumerate(zip(self._members, self._epochs, strict=True)):
            for repetition in range(epochs):
                raw = np.random.PCG64([seed, number, index, repetition]).random_raw(len(chosen))
                members.append(chosen)
                keys.append((repetition + raw / 2.0**64) / epochs)
        order = np.concatenate(members)[np.argsort(np.concatenate(keys), kind="stable")]
        if not len(order):
            raise UserError(
                f"no conversation has a reply within {self._row_slots - 1} tokens: {', '.join(self.counts)}. "
                "Begin with a model of a longer context, or name a corpus of shorter conversations."
            )
        packed = packing.pack(self._length, order, self._row_slots, seed, number)
        amounts = (self._supervised, self._length)
        return Epoch(packed, *(np.add.reduceat(a[packed.conversations], packed.rows[:-1]) for a in amounts))

    def read(self, epoch: Epoch, rows: NDArray[np.int64]) -> Rows:
        """The tokens of some rows of an epoch, (n, T + 1) int32, ~id where not supervised.

        Empty slots hold the token that ends a reply: bos would begin a document in each of them.

        Raises:
            UserError: a token cache has changed since it was opened.
        """
        tokens = np.full((len(rows), self._row_slots), ~self._end_id, np.int32)
        for row, index in zip(tokens, rows, strict=True):
            at = 0
            first, last = epoch.packed.rows[index : index + 2]
            for one in epoch.packed.conversations[first:last]:
                start, length = int(self._start[one]), int(self._length[one])
                row[at : at + length] = self._files[self._file[one]].read(start, start + length)
                at += length
        return tokens


def _counts(
    whole: NDArray[np.int64], kept: NDArray[np.int64], supervised: NDArray[np.int64]
) -> dict[str, int]:
    """What there is in a source, and what of it is cut or dropped."""
    dropped = supervised == 0
    cut = (kept < whole) & ~dropped
    return {
        "conversations": len(whole),
        "tokens": int(whole.sum()),
        "cut_conversations": int(cut.sum()),
        "cut_tokens": int((whole - kept)[cut].sum()),
        "dropped_conversations": int(dropped.sum()),
        "dropped_tokens": int(whole[dropped].sum()),
    }


class Drawn(NamedTuple):
    """This rank's rows of a global batch, and what is known of all of it.

    Attributes:
        rows: (n, T + 1) int32, ~id where not supervised.
        metrics: of the global batch.
        following: where the next one begins: epoch and row.
    """

    rows: Rows
    metrics: dict[str, float]
    following: tuple[int, int]


class ChatLoader:
    """An endless sequence of global batches, of which each rank draws its rows.

    Attributes:
        rows_per_epoch: rows of the first epoch; later ones have about as many.
        counts: what was cut and dropped: see `Conversations`.
        fingerprint: hash of all that decides the rows and their order.
        metrics: of the global batch that was handed out last.
        device_batch_size: rows of a micro-batch; may be changed between two batches.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        sequence_len: int,
        rows_per_batch: int,
        seed: int,
        world: World,
        device_batch_size: int,
    ) -> None:
        """Render what has not been rendered before, and pack the first epoch.

        Args:
            mixture: what to learn.
            tokenizer: of the model.
            sequence_len: T.
            rows_per_batch: R, rows of a global batch over all ranks and micro-batches.
            seed: of the order.
            world: the ranks.
            device_batch_size: rows of a micro-batch.

        Raises:
            UserError: a corpus is damaged, or has a conversation that cannot be used; or none fits.
        """
        parts = [[s.corpus.fingerprint, s.split, s.epochs, s.limit] for s in mixture]
        identity = [FORMAT, token_cache.FORMAT, tokenizer.fingerprint, sequence_len, seed, parts]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._conversations = Conversations(mixture, tokenizer, sequence_len + 1)
        self._slots, self._seed, self._world = rows_per_batch * (sequence_len + 1), seed, world
        self._rows_per_batch, self.device_batch_size = rows_per_batch, device_batch_size
        self.counts = self._conversations.counts
        for name, count in self.counts.items():
            if count["cut_tokens"] or count["dropped_tokens"]:
                world.print0(NOTICE.format(name=name, length=sequence_len, **count))
        self._epoch = (0, self._conversations.epoch(seed, 0))
        self.rows_per_epoch = len(self._epoch[1].supervised)
        self._cursor = self._before = (0, 0)
        self._fetched: list[Drawn] = []
        self.metrics: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chat-loader")
        self._ahead: tuple[tuple[int, int], Future[Drawn]] | None = None

    def fetch(self, batches: int, stop_requested: Callable[[], bool] = requested) -> None:
        """Draw the next global batches, for `next_batch` to hand out.

        Raises:
            Stopped: we are asked to stop while data is waited for; nothing is drawn then.
        """
        self._before = self._cursor
        try:
            self._fetched = [self._draw(stop_requested) for _ in range(batches)]
        except BaseException:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Take back what `fetch` has drawn: the state is that of before."""
        self._fetched, self._cursor = [], self._before

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch.

        Inputs are (B, T) int64, targets too, -1 where not supervised; weights are (B, T) fp32.
        """
        if not self._fetched:
            self.fetch(1)
        drawn = self._fetched.pop(0)
        self.metrics = drawn.metrics
        inputs, targets = shifted(moved(drawn.rows, self._world.device))
        weights = (targets >= 0).float() * (self._world.size / drawn.metrics["supervised_tokens"])
        return Batch(inputs, targets, weights).split(self.device_batch_size)

    def _draw(self, stop_requested: Callable[[], bool]) -> Drawn:
        """The batch at the cursor, from the thread, which then begins with the next one."""
        if self._ahead is None or self._ahead[0] != self._cursor:
            self._ahead = (self._cursor, self._pool.submit(self._load, self._cursor))
        _, loading = self._ahead
        while not wait([loading], POLL_S).done:
            if stop_requested():
                raise Stopped
        drawn = loading.result()
        self._cursor = drawn.following
        self._ahead = (self._cursor, self._pool.submit(self._load, self._cursor))
        return drawn

    def _load(self, cursor: tuple[int, int]) -> Drawn:
        """Read the batch at a cursor. Runs in the thread, of which there is one."""
        epoch, row = cursor
        parts, sums, taken = [], np.zeros(3, np.int64), 0
        while taken < self._rows_per_batch:
            if self._epoch[0] != epoch:
                self._epoch = (epoch, self._conversations.epoch(self._seed, epoch))
            plan = self._epoch[1]
            rows = np.arange(row, min(row + self._rows_per_batch - taken, len(plan.supervised)))
            sums += [a[rows].sum() for a in (plan.supervised, plan.filled, np.diff(plan.packed.rows))]
            mine = rows[(self._world.rank - taken) % self._world.size :: self._world.size]
            parts.append(self._conversations.read(plan, mine))
            taken, row = taken + len(rows), row + len(rows)
            progress = epoch + row / len(plan.supervised)
            if row >= len(plan.supervised):
                epoch, row = epoch + 1, 0
        metrics = {"epoch": progress, "supervised_tokens": int(sums[0])}
        metrics |= {"fill": int(sums[1]) / self._slots, "documents": int(sums[2])}
        return Drawn(np.concatenate(parts), metrics, (epoch, row))

    def close(self) -> None:
        """Stop the thread; what it has begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, the same on all ranks."""
        assert not self._fetched, "what was drawn is not used yet"
        return {"format": FORMAT, "conversations": self.fingerprint, "cursor": list(self._cursor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at this or another world size.

        Raises:
            UserError: it is not what `state_dict` gives, or of other rows.
        """
        cursor: Any = state.get("cursor")
        good = state.get("format") == FORMAT and not typed_json.mismatch(cursor, list[int])
        if not good or len(cursor) != 2 or not all(0 <= number < 1 << 32 for number in cursor):
            raise UserError(
                f"the loader's state has no cursor in format {FORMAT}; the checkpoint is damaged."
            )
        if state.get("conversations") != self.fingerprint:
            raise UserError("the loader's state is of other conversations, or of another order of them.")
        self._cursor = (cursor[0], cursor[1])


def shifted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of rows of T + 1 tokens, ~id where not supervised: (B, T) int64 each.

    Targets are -1 where they do not count.
    """
    inputs = torch.where(tokens < 0, ~tokens, tokens)[:, :-1]
    return inputs.contiguous(), tokens[:, 1:].clamp(min=-1)


def validation(
    mixture: Mixture, tokenizer: Tokenizer, *, sequence_len: int, rows: int, world: World, max_tokens: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """This rank's batches of the validation split of each corpus that has one, by its name.

    Args:
        mixture: whose corpora.
        tokenizer: of the model.
        sequence_len: T.
        rows: of a batch; the last may have fewer.
        world: each rank gets every W-th row.
        max_tokens: how many tokens of each corpus at least, over all ranks, where there are so many.

    Returns:
        (inputs, targets) as `shifted` gives them.
    """
    batches = {}
    for corpus in {source.corpus.name: source.corpus for source in mixture}.values():
        if corpus.val_shards:
            held = Conversations((Source(corpus, "val"),), tokenizer, sequence_len + 1)
            epoch = held.epoch(0, 0)
            count = min(len(epoch.filled), -(-max_tokens // sequence_len))
            tokens = moved(held.read(epoch, np.arange(world.rank, count, world.size)), world.device)
            batches[corpus.name] = (
                [shifted(part) for part in torch.split(tokens, rows)] if len(tokens) else []
            )
    return batches
