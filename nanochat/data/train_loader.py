"""Documents -> packed rows -> batches, in an order that does not know the number of ranks.

A *block* is one row group of one training shard. The blocks of an epoch are put in a seeded order and dealt
to L *lanes*: lane l reads blocks l, l + L, ... of the order, epoch after epoch, each packed into rows on its
own (`packing.py`). A global batch of R rows takes R / L rows from each lane: row i is the next row of lane
i mod L. Rank r of W takes the rows with i mod W == r, in that order, and cuts them into micro-batches. So the
sequence of global batches depends on the corpus, the tokenizer, the context, the seed and L alone.

Shards that come from the hub one after another are read so in the first epoch, the blocks of each in a seeded
order: training begins while later shards are on their way. All other epochs mix the blocks of all shards.

Where W divides L, i mod L decides i mod W: a rank reads the lanes l with l mod W == r and no other. Where it
does not (fewer blocks than ranks), ranks share lanes: each reads them whole and keeps its rows.

Shards of tokens need no packing: their blocks are cut into rows as they stand (`token_shards.py`).

The state is one cursor a lane: epoch, position among the lane's blocks, row in the block. Threads tokenize
and pack ahead, but a cursor moves only when a row is drawn: the state is that of the batch not yet drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat.common.errors import UserError
from nanochat.common.stop_signals import requested
from nanochat.data.corpus import Corpus
from nanochat.data.packing import Packed, pack, shuffled
from nanochat.data.parquet_shards import Shard
from nanochat.data.row_stream import Lane, LoaderCounters, fit_lanes
from nanochat.distributed.world import World

Batch = tuple[Tensor, Tensor]

FORMAT = 1
SAMPLE_DOCUMENTS = 100  # tokenized to estimate the length of an epoch


class Encoder(Protocol):
    """What the loader needs of a tokenizer."""

    @property
    def bos_id(self) -> int:
        """The id that starts a document."""

    @property
    def fingerprint(self) -> str:
        """Digest of the tokenizer."""

    def encode_batch(
        self, texts: list[str], num_threads: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts, one after another, and the n + 1 offsets; without BOS."""


class TrainLoader:
    """An endless sequence of global batches, of which each rank draws its share."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Encoder,
        *,
        sequence_len: int,
        rows_per_batch: int,
        lanes: int,
        seed: int,
        world: World,
        device_batch_size: int,
        keep_tails: bool = False,
        threads: int = 2,
    ) -> None:
        """Plan the order; nothing is read before the first batch.

        Args:
            corpus: what to read.
            tokenizer: how.
            sequence_len: T.
            rows_per_batch: R, rows of a global batch over all ranks and micro-batches.
            lanes: L; lowered, with a notice, where the corpus has fewer blocks. Each opens with
                a block, about a million tokens: a wait before the first batch, and memory after it.
            seed: of the order of blocks, and of rows within a block.
            world: the ranks.
            device_batch_size: rows of a micro-batch.
            keep_tails: put what is cropped back as documents of their own.
            threads: that tokenize and pack ahead.

        Raises:
            UserError: R does not divide into lanes, ranks or micro-batches.
        """
        self._blocks = [(shard, group) for shard in corpus.train_shards for group in range(shard.row_groups)]
        counts = [shard.row_groups for shard in corpus.train_shards]
        self._shard_of = np.repeat(np.arange(len(counts)), counts)
        if lanes < 1 or rows_per_batch % lanes:
            raise UserError(f"lanes={lanes}: expected a divisor of the {rows_per_batch} rows of a batch.")
        if seed < 0:
            raise UserError(f"--seed {seed}: expected 0 or more.")
        self.n_lanes = fit_lanes(lanes, rows_per_batch, len(self._blocks))
        if self.n_lanes < lanes:
            world.print0(f"{corpus.name} has {len(self._blocks)} blocks: {self.n_lanes} lanes, not {lanes}.")
        if rows_per_batch % world.size or rows_per_batch // world.size % device_batch_size:
            sizes = [n for n in range(1, rows_per_batch + 1) if rows_per_batch % (n * device_batch_size) == 0]
            raise UserError(
                f"{rows_per_batch} rows of a batch do not divide into {world.size} ranks with micro-batches "
                f"of {device_batch_size}: use {', '.join(map(str, sizes)) or 'no such'} ranks."
            )
        self._corpus, self._tokenizer, self._world = corpus, tokenizer, world
        self._row_slots, self._seed, self._keep_tails = sequence_len + 1, seed, keep_tails
        self._rows_per_lane = rows_per_batch // self.n_lanes
        self.device_batch_size = device_batch_size
        rows = range(world.rank, rows_per_batch, world.size)
        self._mine = [(row % self.n_lanes, row // self.n_lanes) for row in rows]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self.counters = LoaderCounters()
        self._fetched: list[list[Batch]] = []
        self._before: dict[int, tuple[int, int, int]] = {}
        self._lanes = {lane: self._make_lane(lane) for lane in sorted({lane for lane, _ in self._mine})}

    def _make_lane(self, lane: int) -> Lane:
        blocks = len(range(lane, len(self._blocks), self.n_lanes))

        def load(epoch: int, position: int) -> Future[Packed]:
            return self._pool.submit(self._load_block, epoch, lane + position * self.n_lanes)

        return Lane(load, blocks, self.counters)

    def _load_block(self, epoch: int, place: int) -> Packed:
        """Read, tokenize, pack and shuffle the block at a place of an epoch's order. Runs in a thread."""
        block = int(block_order(self._shard_of, self._seed, epoch, self._corpus.comes_in_order)[place])
        packed = _pack_block(
            self._corpus, self._tokenizer, *self._blocks[block], self._row_slots, self._keep_tails
        )
        # Best-fit makes rows of long documents first and of short ones last; training wants them mixed.
        order = shuffled(len(packed.rows), self._seed, epoch, block)
        return Packed(packed.rows[order], packed.offered, packed.cropped, packed.filled)

    def fetch(self, batches: int, stop_requested: Callable[[], bool] = requested) -> None:
        """Draw the next global batches, for `next_batch` to hand out.

        Raises:
            Stopped: we are asked to stop while data is waited for; nothing is drawn then.
        """
        self._before = {index: lane.cursor for index, lane in self._lanes.items()}
        try:
            self._fetched = [self._draw(stop_requested) for _ in range(batches)]
        except BaseException:  # a batch is drawn from all lanes or from none
            self.put_back()
            raise

    def put_back(self) -> None:
        """Take back what `fetch` has drawn: the state is that of before."""
        self._fetched = []
        for index, cursor in self._before.items():
            self._lanes[index].move(*cursor)

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch: [(inputs (B, T), targets (B, T))], int64."""
        if not self._fetched:
            self.fetch(1)
        return self._fetched.pop(0)

    def _draw(self, stop_requested: Callable[[], bool]) -> list[Batch]:
        started = time.perf_counter()
        for lane in self._lanes.values():
            lane.start()
        taken = {index: lane.take(self._rows_per_lane, stop_requested) for index, lane in self._lanes.items()}
        self.counters.waited_s += time.perf_counter() - started
        rows = np.stack([taken[lane][row] for lane, row in self._mine])
        tokens = torch.from_numpy(rows.astype(np.int64))
        if self._world.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(self._world.device, non_blocking=True)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        size = self.device_batch_size
        return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(tokens), size)]

    @property
    def epoch(self) -> float:
        """Times that this rank's lanes have gone through their blocks, on average."""
        return sum(lane.progress() for lane in self._lanes.values()) / len(self._lanes)

    def close(self) -> None:
        """Stop the threads; blocks on their way are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _identity(self) -> dict[str, Any]:
        """What decides the order of the rows."""
        return {
            "format": FORMAT,
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._tokenizer.fingerprint,
            "sequence_len": self._row_slots - 1,
            "seed": self._seed,
            "keep_tails": self._keep_tails,
            "lanes": self.n_lanes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, the same on all ranks. A collective: every rank has to call it."""
        assert not self._fetched, "what was drawn is not used yet"
        cursors = torch.zeros(self.n_lanes, 3, dtype=torch.int64)
        for index, lane in self._lanes.items():
            if index % self._world.size == self._world.rank:  # a lane that ranks share is told by one
                cursors[index] = torch.tensor(lane.cursor)
        return {
            **self._identity(),
            "cursors": self._world.all_reduce_sum(cursors.to(self._world.device)).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at this or another world size.

        Raises:
            UserError: the state belongs to another order of rows; says in what they differ.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise UserError(
                    f"the data of the checkpoint and of this run differ in {name}: "
                    f"{state.get(name)!r} and {ours!r}. Resume with the same, or start a new run."
                )
        cursors = state.get("cursors")
        if not isinstance(cursors, list) or len(cursors) != self.n_lanes or not all(map(_is_cursor, cursors)):
            raise UserError(
                f"the loader's state has no cursors for {self.n_lanes} lanes; the checkpoint is damaged."
            )
        for index, lane in self._lanes.items():
            epoch, position, row = cursors[index]
            if position >= lane.blocks:
                raise UserError(
                    f"the loader's state has the cursor {cursors[index]}; the checkpoint is damaged."
                )
            lane.move(epoch, position, row)


def _is_cursor(value: Any) -> bool:
    """(epoch, block, row), as the state holds them: not negative, and small enough for a tensor of them."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(n) is int and 0 <= n < 1 << 40 for n in value)
    )


def block_order(shard_of: NDArray[np.int64], seed: int, epoch: int, in_order: bool) -> NDArray[np.int64]:
    """The blocks of an epoch in the order in which they are dealt to the lanes.

    Args:
        shard_of: (n,) the shard of each block, ascending.
        seed: of the order.
        epoch: each has another.
        in_order: shard by shard in the first epoch, as they arrive.
    """
    order = shuffled(len(shard_of), seed, epoch)
    if in_order and epoch == 0:
        order = order[np.argsort(shard_of[order], kind="stable")]
    return order


def _pack_block(
    corpus: Corpus, tokenizer: Encoder, shard: Shard, row_group: int, row_slots: int, keep_tails: bool
) -> Packed:
    if shard.holds_tokens:  # their tokenizer put BOS, its last id, before every document
        rows = corpus.read_rows(shard, row_group, row_slots, tokenizer.bos_id + 1)
        return Packed(rows, offered=len(rows) * (row_slots - 1), cropped=0, filled=0)
    ids, offsets = tokenizer.encode_batch(corpus.read_block(shard, row_group), num_threads=1)
    return pack(ids, offsets, bos_id=tokenizer.bos_id, row_slots=row_slots, keep_tails=keep_tails)


def epochs_for(corpus: Corpus, tokenizer: Encoder, tokens: int) -> float:
    """How many times `tokens` training tokens go through the corpus, estimated from a sample of its text."""
    if corpus.holds_tokens:
        return tokens / sum(shard.tokens for shard in corpus.train_shards)
    texts = corpus.read_block(corpus.train_shards[0], 0)
    sample = texts[:: -(-len(texts) // SAMPLE_DOCUMENTS)] if texts else []
    ids, _ = tokenizer.encode_batch(sample, num_threads=1)
    tokens_per_document = 1 + len(ids) / max(1, len(sample))
    return tokens / (tokens_per_document * sum(shard.documents for shard in corpus.train_shards))


class ValBatches:
    """A fixed list of rows of one split, of which each rank has every W-th, to iterate over again and again.

    Of shards of tokens they are the stream from its beginning, as the races on such shards take it. Rows of
    text are packed like those of training, by default with the tails, so that every token of the split is in
    one row and is a target once (BOS aside); targets in what is left of a block's last row are -1. The rows
    are made in the first pass and kept (4 bytes a token).
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Encoder,
        sequence_len: int,
        rows: int,
        world: World,
        max_tokens: int | None = None,
        split: str = "val",
        keep_tails: bool = True,
    ) -> None:
        """Nothing is read yet.

        Args:
            corpus: what to read.
            tokenizer: how.
            sequence_len: T.
            rows: of a batch; the last may have fewer.
            world: each rank gets its share; one may get a row more than another, or none.
            max_tokens: how many targets at least, over all ranks; None for the whole split.
            split: "val", or "train" to compare with it.
            keep_tails: as the run has it: without, figures compare with those of loaders that crop.
        """
        self._corpus, self._tokenizer, self._world = corpus, tokenizer, world
        self._row_slots, self._batch_rows, self._split = sequence_len + 1, rows, split
        self._keep_tails = keep_tails
        self._max_rows = math.inf if max_tokens is None else max(1, -(-max_tokens // sequence_len))
        self._rows: NDArray[np.int32] | None = None  # (n, T + 1); -1 where the documents ran out

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches."""
        if self._rows is None:
            self._rows = self._pack()
        for start in range(0, len(self._rows), self._batch_rows):
            tokens = torch.from_numpy(self._rows[start : start + self._batch_rows].astype(np.int64))
            inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] < 0, self._tokenizer.bos_id)
            yield inputs.to(self._world.device), tokens[:, 1:].contiguous().to(self._world.device)

    def _pack(self) -> NDArray[np.int32]:
        shards = self._corpus.val_shards if self._split == "val" else self._corpus.train_shards
        parts = [np.empty((0, self._row_slots), np.int32)]
        seen = 0
        for index, (shard, group) in enumerate((s, g) for s in shards for g in range(s.row_groups)):
            if seen >= self._max_rows:
                break
            packed = _pack_block(
                self._corpus, self._tokenizer, shard, group, self._row_slots, keep_tails=self._keep_tails
            )
            rows = packed.rows
            rows[len(rows) - 1 :, self._row_slots - packed.filled :] = -1
            if not shard.holds_tokens:
                # Best-fit puts long documents first; what max_tokens leaves should be like the whole.
                rows = rows[shuffled(len(rows), 0, index)]
            rows = rows[: int(min(len(rows), self._max_rows - seen))]
            parts.append(rows[(self._world.rank - seen) % self._world.size :: self._world.size])
            seen += len(rows)
        return np.concatenate(parts)
